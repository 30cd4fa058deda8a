"""Configs include others: what they come to, and what cannot be included."""

import json
from pathlib import Path

import pytest
import yaml

from nslightning import configs
from nslightning.cli import main
from nslightning.commands.config_files import read_config
from nslightning.commands.going_on import Call

FOLDER = Path(configs.__file__).parent
#: What each config said when it was one file. A setting that is changed on purpose is changed there as well.
RECORDED = json.loads(Path(__file__).with_name("resolved_configs.json").read_text())
FRAGMENTS = sorted(file.stem for file in (FOLDER / "fragments").glob("*.yaml"))


@pytest.mark.parametrize("name", RECORDED)
def test_a_config_of_fragments_is_the_config_that_it_was(name):
    config = read_config(FOLDER / name)
    if "callbacks+" in config["trainer"]:  # Lightning's Trainer has none of its own to add them to
        config["trainer"]["callbacks"] = config["trainer"].pop("callbacks+")
    assert config == RECORDED[name]


def test_every_packaged_config_is_recorded():
    names = {file.relative_to(FOLDER).as_posix() for file in FOLDER.rglob("*.yaml")}
    assert {name for name in names if not name.startswith(("fragments/", "experiments/"))} == set(RECORDED)


def test_settings_of_one_kind_stand_once():
    """Of the eight configs of the mitigation study, 33 of 40 lines were the same."""
    lines = [set(read_lines(file)) for file in (FOLDER / "mitigation").glob("*.yaml")]
    assert len(lines) == 8
    assert len(set.intersection(*lines)) <= 4
    included = [name for file in FOLDER.rglob("*.yaml") for name in yaml.safe_load(file.read_text()).get("include", [])]
    assert {Path(name).stem for name in included} == set(FRAGMENTS)


def read_lines(file):
    return [line for line in file.read_text().splitlines() if not line.startswith("#")]


def printed(capfd, *words):
    """The config that a command line comes to."""
    assert main(["fit", *words, "--print_config"]) == 0
    return yaml.safe_load(capfd.readouterr().out)


def test_fragments_compose_on_the_command_line(capfd):
    base, fragments = "--config=configs/mnist_lenet.yaml", ("adamw_warmup", "gpus_bf16", "ema")
    words = [base, *(f"--config=configs/fragments/{name}.yaml" for name in fragments)]
    config, alone = printed(capfd, *words), printed(capfd, base)
    assert config["trainer"]["precision"] == "bf16-mixed"
    assert config["trainer"]["strategy"] == "ddp"
    assert config["model"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert config["model"]["optimizer"]["init_args"]["lr"] == 0.001
    added = config["trainer"]["callbacks"].pop()
    assert added["class_path"].endswith("EMAWeightAveraging")
    assert config["trainer"]["callbacks"] == alone["trainer"]["callbacks"]
    assert config["data"] == alone["data"]
    assert Call.read(["fit", *words]).name == "mnist_lenet"


def test_a_config_of_one_s_own_includes_packaged_and_own_files(tmp_path, monkeypatch, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/half.yaml").write_text("trainer: {precision: 16-true, callbacks+: [TieMonitor]}\n")
    (tmp_path / "mine/run.yaml").write_text(
        "include: [configs/quickstart.yaml, half.yaml]\nmodel: {optimizer: {class_path: Adam, init_args: {lr: 0.1}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    config, quick = printed(capfd, "--config=mine/run.yaml"), printed(capfd, "--config=configs/quickstart.yaml")
    assert config["trainer"]["precision"] == "16-true"
    assert "momentum" not in config["model"]["optimizer"]["init_args"]  # another class: the arguments were SGD's
    callbacks = config["trainer"].pop("callbacks")
    assert callbacks.pop()["class_path"].endswith("TieMonitor")
    assert callbacks == quick["trainer"]["callbacks"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("include: [x.yaml]", r"x\.yaml includes itself, by way of .*x\.yaml"),
        ("include: [other.yaml]", r"x\.yaml includes itself, by way of .*other\.yaml"),
        (
            "include: [fragments/wandbb.yaml]",
            r"x\.yaml includes fragments/wandbb\.yaml, and .*did you mean 'fragments/wandb'\?",
        ),
        ("include: all", r"x\.yaml: include: all names no YAML files; it is a list of them"),
        ("include: [empty.yaml]", r"empty\.yaml is empty"),
    ],
)
def test_what_cannot_be_included_is_named(content, said, tmp_path):
    (tmp_path / "x.yaml").write_text(content)
    (tmp_path / "other.yaml").write_text("include: [x.yaml]")
    (tmp_path / "empty.yaml").touch()
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        read_config(tmp_path / "x.yaml")
