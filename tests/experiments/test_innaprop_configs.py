"""The configs of the INNAprop and mitigation experiments: each runs two batches; any optimizer by its class path."""

import inspect
from importlib.util import find_spec
from pathlib import Path

import fake_data
import pytest
import timm.optim
import torch
import torch.optim
import yaml
from fake_data import write_food101
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser, OptimizerCallable

import nslightning.optim
from nslightning import configs
from nslightning.commands import train
from nslightning.commands.config_files import read_config
from nslightning.data import TokenFile
from nslightning.data.tokens import prepare
from nslightning.models import LanguageModel

FOLDER = Path(configs.__file__).parent
INNAPROP = sorted(f.stem for f in FOLDER.glob("innaprop/*.yaml"))
MITIGATION = sorted(f.stem for f in FOLDER.glob("mitigation/*.yaml"))
TEXT = [name for name in INNAPROP if name.startswith("openwebtext")]
HEAVY = {"imagenet_resnet50", "imagenet_vit_b_32", "food101_vgg11"}  # tens of millions of parameters

needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers, of the extra `language`, is not installed"
)
SMALL = "{n_layer: 1, n_embd: 16, n_head: 2}"


class Seen(Callback):
    """What a run was made of, when it took its last step."""

    last = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        Seen.last = trainer, pl_module, batch, outputs["loss"].detach()


def read(folder, name):
    return read_config(FOLDER / folder / f"{name}.yaml")


def flags(name, root):
    """What makes a config small enough for a test, without touching what it is about."""
    if name.startswith("openwebtext"):
        text = root / "a.txt"
        text.write_text("a text of some length, for both files\n" * 200)
        prepare([text], root / "tokens")
        return [
            f"--data.root={root / 'tokens'}", "--data.block_size=32", "--data.batch_size=2",
            f"--model.config={SMALL}", "--trainer.val_check_interval=1", "--trainer.accumulate_grad_batches=1",
        ]  # fmt: skip
    options = ["--data.verify=false", "--data.batch_size=4"]
    if name.startswith("imagenet"):
        fake_data.write_imagenet(root / "imagenet")
        options += ["--data.workers=0", "--trainer.strategy=auto", "--trainer.devices=1"]
    elif name.startswith("food101"):
        write_food101(root)
        options += ["--data.workers=0", "--data.download=false", "--model.pretrained=false"]
    else:
        fake_data.write_cifar(root)
    return [*options, "--data.eval_batch_size=4"]


def run(folder, name, root, monkeypatch, *more):
    monkeypatch.setenv("NSLIGHTNING_DATA_DIR", str(root))
    Seen.last = None
    status = train.main(
        ["fit", f"--config={FOLDER / folder / name}.yaml", *flags(name, root), "--trainer.fast_dev_run=2",
         "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
         "--trainer.callbacks+=test_innaprop_configs.Seen", *more]
    )  # fmt: skip
    return status, Seen.last


# ------------------------------------------------------------------------------------------- each config runs
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.slow] * (name in HEAVY) + [needs_transformers] * (name in TEXT),
        )
        for name in INNAPROP
    ],
)
@pytest.mark.filterwarnings("ignore:GPT2LMHeadModel has nothing to patch")  # its activation is GELU
def test_innaprop(name, tmp_path, monkeypatch):
    status, seen = run("innaprop", name, tmp_path, monkeypatch)
    assert status == 0
    trainer, _, _, loss = seen
    assert trainer.global_step == 2
    assert torch.isfinite(loss)
    published = read("innaprop", name)["model"]["optimizer"]["init_args"]
    group = trainer.optimizers[0].param_groups[0]
    assert type(trainer.optimizers[0]) is nslightning.optim.INNAprop
    assert {key: group["initial_lr" if key == "lr" else key] for key in published} == published


@pytest.mark.parametrize("name", MITIGATION)
def test_mitigation(name, tmp_path, monkeypatch):
    status, seen = run("mitigation", name, tmp_path, monkeypatch)
    assert status == 0
    trainer, model, _, loss = seen
    assert torch.isfinite(loss)
    path = read("mitigation", name)["model"]["optimizer"]["class_path"]
    assert type(trainer.optimizers[0]).__module__.startswith(path.rpartition(".")[0])
    assert type(trainer.optimizers[0]).__name__ == path.rpartition(".")[2]
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize(
    "precision",
    ["16-mixed", *(pytest.param(p, marks=pytest.mark.slow) for p in ("16-true", "64-true"))],
)
@pytest.mark.filterwarnings("ignore:fp16's loss scale left out 2 of 2 steps")  # too few to find a scale
def test_mitigation_flags_of_the_headers(precision, tmp_path, monkeypatch):
    status, seen = run(
        "mitigation", "innaprop", tmp_path, monkeypatch,
        "--model.jacobians.relu=1", "--model.jacobians.max_pool=1000",
        "--model.backbone_options.batch_norm=true", f"--trainer.precision={precision}",
    )  # fmt: skip
    assert status == 0
    _, model, _, loss = seen
    assert torch.isfinite(loss)
    assert (model.jacobians.relu, model.jacobians.max_pool) == (1.0, 1000.0)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    dtype = {"64-true": torch.float64, "16-true": torch.float16, "16-mixed": torch.float32}[precision]
    assert {p.dtype for p in model.parameters()} == {dtype}


def header_flags(folder, name, label):
    """The flags after a label in a config's header."""
    lines = (FOLDER / folder / f"{name}.yaml").read_text().splitlines()
    head = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    start = next(i for i, line in enumerate(head) if line.startswith(f"{label}:"))
    more = [line for line in head[start + 1 :] if line.startswith(" ")]
    return [word for line in [head[start], *more] for word in line.split() if word.startswith("--")]


def test_other_pairs_and_adamw_by_the_header_s_flags(tmp_path, monkeypatch):
    pair = header_flags("innaprop", "cifar10_vgg11", "Other pairs")
    status, (trainer, *_) = run("innaprop", "cifar10_vgg11", tmp_path, monkeypatch, *pair)
    assert status == 0
    group = trainer.optimizers[0].param_groups[0]
    assert (group["alpha"], group["beta"], group["weight_decay"]) == (0.1, 0.9, 0.01)
    adamw = header_flags("innaprop", "cifar10_vgg11", "AdamW")
    status, (trainer, *_) = run("innaprop", "cifar10_vgg11", tmp_path / "again", monkeypatch, *adamw)
    assert status == 0
    group = trainer.optimizers[0].param_groups[0]
    assert type(trainer.optimizers[0]) is torch.optim.AdamW
    assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (1e-3, 0.01, (0.9, 0.999))


@needs_transformers
@pytest.mark.parametrize("name", TEXT)
@pytest.mark.filterwarnings("ignore:GPT2LMHeadModel has nothing to patch")  # its activation is GELU
@pytest.mark.filterwarnings("ignore:You are trying to `self.log..`")  # of a step without a trainer
def test_text_configs_parse_and_build(name, tmp_path):
    """Without the command line's own parser: model and data by their classes."""
    config = read("innaprop", name)
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(LanguageModel, "model")
    parser.add_lightning_class_args(TokenFile, "data", subclass_mode=True)
    parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
    parser.link_arguments("data.block_size", "model.block_size", apply_on="instantiate")
    words = [word for word in flags(name, tmp_path) if not word.startswith("--trainer")]
    overrides = tmp_path / "given.yaml"
    overrides.write_text(yaml.safe_dump({"model": config["model"], "data": config["data"]}))
    parser.add_argument("--config", action="config")
    made = parser.instantiate_classes(parser.parse_args([f"--config={overrides}", *words]))
    optimizer = made.model.configure_optimizers()["optimizer"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["sigma"] for group in optimizer.param_groups} == {0.99}
    assert made.model.network.config.vocab_size == made.data.vocab_size == 50304
    made.data.setup("fit")
    loss = made.model.training_step(next(iter(made.data.train_dataloader())), 0)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)


# ------------------------------------------------------------------- settings that are said to be published
@pytest.mark.parametrize("network", ["vgg11", "resnet18", "densenet121"])
def test_cifar10_settings(network):
    config = read("innaprop", f"cifar10_{network}")
    optimizer = config["model"]["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["weight_decay"], optimizer["sigma"]) == (1e-3, 0.01, 0.999)
    assert config["data"]["init_args"]["batch_size"] == 256
    assert config["trainer"]["max_epochs"] == config["model"]["lr_scheduler"]["init_args"]["T_max"] == 200
    assert config["model"]["backbone_options"]["batch_norm"]


@pytest.mark.parametrize("name", TEXT)
def test_gpt2_steps_are_96_sequences(name):
    config = read("innaprop", name)
    trainer, schedule = config["trainer"], config["model"]["lr_scheduler"]["init_args"]
    assert config["data"]["init_args"]["batch_size"] * trainer["accumulate_grad_batches"] == 96
    assert (trainer["max_steps"], schedule["total"], schedule["warmup"]) == (100_000, 100_000, 2_000)
    assert schedule["final"] * config["model"]["optimizer"]["init_args"]["lr"] == pytest.approx(6e-5)
    assert trainer["val_check_interval"] == 1000 * trainer["accumulate_grad_batches"]


def test_every_run_has_a_name_of_its_own():
    """Run folders are named after it: configs of the same file name must not share one."""
    files = sorted(FOLDER.rglob("*.yaml"))
    names = [yaml.safe_load(f.read_text()).get("name", f.stem) for f in files]
    assert len(set(names)) == len(names) == len(files)


def test_the_mitigation_configs_differ_in_the_optimizer_only():
    """And in the run's name."""
    experiments = [read("mitigation", name) for name in MITIGATION]
    assert len({str(config["model"].pop("optimizer")) for config in experiments}) == len(experiments) == 8
    assert len({config.pop("name") for config in experiments}) == 8
    assert all(config == experiments[0] for config in experiments)


# -------------------------------------------------------------------------- any optimizer by its class path
def optimizers(module):
    return [
        f"{module.__name__}.{name}"
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, torch.optim.Optimizer)
        and cls is not torch.optim.Optimizer
        and cls.__module__.startswith(module.__name__)  # timm also hands on torch's
    ]


#: What each says when it is given the weights and biases of a linear layer with dense gradients.
NOT_FOR_THIS = {
    "torch.optim.Muon": (ValueError, "2D parameters"),  # wants matrices only
    "torch.optim.SparseAdam": (RuntimeError, "dense gradients"),
    "timm.optim.Adahessian": (RuntimeError, "does not require grad"),  # wants backward(create_graph=True)
    "timm.optim.Lookahead": (Exception, "not accepted"),  # wraps another optimizer
}
ALL = [path for module in (torch.optim, timm.optim, nslightning.optim) for path in optimizers(module)]


def steps(path):
    """Three steps of the optimizer that a YAML with this class path gives; whether every parameter moved."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=OptimizerCallable)
    config = yaml.safe_load(f"optimizer: {{class_path: {path}, init_args: {{lr: 0.01}}}}")
    made = parser.instantiate_classes(parser.parse_object(config)).optimizer
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = made(layer.parameters())

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert type(optimizer).__module__.startswith(path.rpartition(".")[0])
    assert type(optimizer).__name__ == path.rpartition(".")[2]
    return all(not torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")  # the libraries' own, of methods on their way out
@pytest.mark.parametrize("path", [path for path in ALL if path not in NOT_FOR_THIS])
def test_an_optimizer_by_its_class_path(path):
    assert steps(path)


@pytest.mark.parametrize("path", [path for path in NOT_FOR_THIS if path in ALL])
def test_optimizers_of_another_kind_say_so(path):
    """If one of these starts to work, it belongs to the others."""
    error, message = NOT_FOR_THIS[path]
    with pytest.raises(error, match=message):
        steps(path)


def test_an_optimizer_of_timm_trains_a_classifier_from_the_command_line(tmp_path, monkeypatch):
    flag = "--model.optimizer=timm.optim.Lion"
    status, (trainer, *_) = run("mitigation", "adam", tmp_path, monkeypatch, flag, "--model.optimizer.lr=1e-4")
    assert status == 0
    assert type(trainer.optimizers[0]) is timm.optim.Lion
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == 1e-4


# ----------------------------------------------------------------------------------------- docs/innaprop.md
def test_the_table_of_the_document_is_that_of_the_data(repo_root):
    import importlib.util

    import pandas as pd

    file = repo_root / "benchmarks/innaprop_mnist.py"
    spec = importlib.util.spec_from_file_location("innaprop_mnist", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.table(pd.read_csv(script.CSV)) in (repo_root / "docs/innaprop.md").read_text(encoding="utf-8")


def test_the_document_s_pairs_by_the_optimizer_itself():
    """A constant gradient: the step at once, and in the long run, in units of lr."""
    for alpha, beta, first, last in ((0.1, 0.9, 0.9, 10.0), (1, 1, 1.0, 1.0), (2, 2, 2.0, 0.5)):
        weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = nslightning.optim.INNAprop([weight], lr=0.1, alpha=alpha, beta=beta, weight_decay=0, eps=0)
        moves = []
        for _ in range(1000):
            weight.grad = torch.ones_like(weight)
            before = weight.item()
            optimizer.step()
            moves.append((before - weight.item()) / 0.1)
        assert moves[0] == pytest.approx(first, rel=1e-9)
        assert moves[-1] == pytest.approx(last, rel=1e-3)
