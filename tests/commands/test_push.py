"""``nslightning push``: what is written is loaded again, and computes what the trained network computes."""

import json
import re
import shutil

import pytest
import torch

from nslightning.cli import main
from nslightning.models.hub import load_hub_folder
from nslightning.models.weights import network_of_checkpoint, read_checkpoint
from nslightning.runs import last_checkpoint
from nslightning.surgery import selections


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    words = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    words += [
        "--trainer.max_epochs=1",
        "--trainer.log_every_n_steps=1",
        "--model.jacobians.relu=1",
        f"--output={folder}",
        "--name=little",
    ]
    assert main(["fit", "--config", "configs/quickstart.yaml", *words]) == 0
    return folder / "little" / "001"


def test_a_pushed_network_is_the_trained_one(run, tmp_path, capsys):
    hub = tmp_path / "hub"
    assert main(["push", str(run), str(hub)]) == 0
    assert sorted(file.name for file in hub.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((hub / "config.json").read_text())
    assert (config["backbone"], config["jacobians"]["relu"]) == ("paper/lenet5", 1.0)
    card = (hub / "README.md").read_text()
    for part in ("library_name: nslightning", "val/acc1", "## Patched sites", '"relu": 1.0', "- torch: "):
        assert part in card
    assert str(run) not in card + (hub / "config.json").read_text()  # no folder of this machine
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("FOLDER", str(hub))
    exec(code, names := {})  # as the card says it
    network = names["network"]
    trained, shape, _ = network_of_checkpoint(read_checkpoint(last_checkpoint(run)), "it")
    x = torch.rand(3, *shape)
    assert torch.equal(network(x), trained.eval()(x))
    assert not network.training
    assert {s.jacobians.relu for s in selections(network).values()} == {1.0}


def test_mistaken_calls(run, tmp_path, capsys):
    for words, message in (
        (["nowhere", "hub"], "there is no folder nowhere"),
        ([str(tmp_path), "hub"], "has no checkpoint"),
        ([str(run), "hub", "--checkpoint=nowhere.ckpt"], "there is no file nowhere.ckpt"),
    ):
        assert main(["push", *words]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by nslightning push"):
        load_hub_folder(tmp_path)


def test_the_metrics_of_a_card_are_those_of_its_checkpoint(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    step = read_checkpoint(last_checkpoint(copy))["global_step"]
    (copy / "metrics.csv").write_text(f"step,val/acc1\n{step - 1},0.25\n{step},0.75\n")  # a later epoch's
    assert main(["push", str(copy), str(tmp_path / "hub")]) == 0
    assert "| val/acc1 | 0.25 |" in (tmp_path / "hub/README.md").read_text()


def test_files_of_another_program_are_not_overwritten(run, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    assert main(["push", str(run), str(tmp_path)]) == 2
    assert "has README.md, which nslightning push did not write" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    hub = tmp_path / "hub"
    assert main(["push", str(run), str(hub)]) == main(["push", str(run), str(hub)]) == 0  # its own are written again
