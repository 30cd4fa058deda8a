"""Twins: each trains as it would alone, to the bit; what tells them apart is measured right."""

import copy
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bits import bits
from ddp_helpers import finish, start
from fake_data import write_all
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision

from nslightning import Jacobians, configs, figures
from nslightning.callbacks import GradientDivergence, StepSeed, TieMonitor, TwinDivergence
from nslightning.commands import twins as command
from nslightning.data import Synthetic
from nslightning.models import ImageClassifier, Mixing, Twins
from nslightning.models.twins import CONTROL
from nslightning.surgery import PatchWarning

CHOICES = {
    "native": Jacobians(),
    "relu1": Jacobians(relu=1.0, max_pool="minimal"),
    "wild": Jacobians(relu=1e3, max_pool=1e4),
    "random": Jacobians(max_pool="random"),
}
OPTIONS = {
    "backbone": "paper/lenet5",
    "num_classes": 4,
    "image_shape": (1, 28, 28),
    "backbone_options": {"batch_norm": True},
    "seed": 5,
}


def data():
    return Synthetic((1, 28, 28), 4, 48, eval_images=8, constant=0.5, batch_size=8, seed=3)


def fp16(init_scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
    return [MixedPrecision("16-mixed", "cpu", scaler)]


PRECISIONS = {
    "fp32": lambda: {"precision": "32-true"},
    "bf16": lambda: {"precision": "bf16-mixed"},
    # From a scale at which gradients overflow: scales then differ between choices.
    "fp16": lambda: {"plugins": fp16(2.0**17)},
}


def trainer(folder, *callbacks, **options):
    options = {"max_epochs": 2, "logger": False, "log_every_n_steps": 1} | options
    return Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=[StepSeed(7), *callbacks], enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, deterministic=True,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **options,
    )  # fmt: skip


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(bits(a[n]), bits(b[n])) if a[n].is_floating_point() else torch.equal(a[n], b[n]) for n in a
    )


class Losses(Callback):
    """What each step's loss and each epoch's validation was, of a lone run or of one twin."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, *_):
        self.found.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("train/")})

    def on_validation_end(self, trainer, *_):
        self.found.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")})

    def of(self, twin):
        """As a lone run would have logged it."""
        return [{k.replace(f"/{twin}/", "/"): v for k, v in row.items() if f"/{twin}/" in k} for row in self.found]


def built(make):
    """A module from one random state; a fully connected one with dead units, which are ties at every image."""
    torch.manual_seed(2), random.seed(2), np.random.seed(2)  # noqa: NPY002 - the legacy stream is meant
    module = make()
    for layer in (m for name, m in module.named_modules() if name.endswith("fc1") and m.in_features == 784):
        with torch.no_grad():
            layer.weight[:5] = layer.bias[:5] = 0
    return module


ADAM = partial(torch.optim.AdamW, lr=0.01)
RULES = [{"match": "vectors", "weight_decay": 0}, {"match": "classifier.*", "lr_scale": 3}]
COSINE = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=3)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("model", "run"),
    [
        ({}, {}),
        ({"optimizer": ADAM, "lr_scheduler": COSINE}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
        ({"optimizer": ADAM, "parameter_rules": RULES, "mixing": Mixing(mixup=0.5)}, {"gradient_clip_val": 0.5}),
    ],
    ids=["sgd", "adamw, cosine, accumulate, clip", "rules, mixup"],
)
def test_each_twin_trains_as_it_would_alone(model, run, precision, tmp_path):
    dropout = {"backbone": "paper/fc", "backbone_options": {"hidden": [24, 16], "dropout": 0.3}}
    options = OPTIONS | (dropout if not model else {}) | model
    watch = Losses()
    twins = built(lambda: Twins(CHOICES, **options))
    together = trainer(tmp_path, watch, **PRECISIONS[precision](), **run)
    together.fit(twins, data())
    scales, weights = {}, {}
    for name, choice in (CHOICES | {CONTROL: CHOICES["native"]}).items():
        alone, seen = built(lambda choice=choice: ImageClassifier(jacobians=choice, **options)), Losses()
        lone = trainer(tmp_path, seen, **PRECISIONS[precision](), **run)
        lone.fit(alone, data())
        assert lone.global_step == together.global_step >= 6
        assert equal(alone.state_dict(), twins.twins[name].state_dict()), name
        assert len(seen.found) == 2 * 6 + 2
        assert str(seen.found) == str(watch.of(name))  # text: NaN is NaN
        weights[name] = torch.cat([p.flatten() for p in alone.parameters()])
        if precision == "fp16":
            scales[name] = lone.precision_plugin.scaler.get_scale()
    assert torch.equal(bits(weights["native"]), bits(weights[CONTROL]))
    assert not torch.equal(weights["native"], weights["relu1"])
    if precision == "fp16":
        assert len(set(scales.values())) > 1  # so a shared scaler would have failed here


def test_one_overflowing_twin_leaves_the_others_alone(tmp_path):
    """With one scaler for all, nobody would take a step."""
    twins = built(lambda: Twins({"native": Jacobians(), "bad": Jacobians(max_pool=1e30)}, **OPTIONS))
    before = copy.deepcopy(twins.state_dict())
    trainer(tmp_path, **PRECISIONS["fp16"](), max_epochs=3).fit(twins, data())
    moved = {
        name: any(not torch.equal(p, before[f"twins.{name}.{n}"]) for n, p in twin.named_parameters())
        for name, twin in twins.twins.items()
    }
    assert moved == {"native": True, "bad": False, CONTROL: True}


# ------------------------------------------------------------------------------------------------- what is measured
def read(folder):
    return pd.read_csv(Path(folder, "twins.csv"), keep_default_na=False, na_values={"value": ["nan"]})


def by_hand(a, b):
    """The five figures of two vectors, in float64."""
    a, b = a.detach().double(), b.detach().double()
    d = a - b
    cosine = (a @ b / (a.norm() * b.norm())).item() if d.any() else 1.0
    return [d.abs().sum().item(), d.norm().item(), d.abs().max().item(), (d.norm() / b.norm()).item(), cosine]


NORMS = ["l1", "l2", "linf", "relative", "cosine"]
TWO = {"native": Jacobians(), "relu1": Jacobians(relu=1.0, max_pool="minimal")}


@pytest.mark.parametrize("precision", ["fp64", "fp16"])
def test_distances_are_those_of_the_weights_and_of_the_gradients_stepped_along(precision, tmp_path):
    """Against plain SGD, whose step along an unclipped, unscaled gradient is seen in the weights."""
    weights, rate = [], 2.0**-4

    class Note(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx % 2 == 0:  # the first of a step
                weights.append(copy.deepcopy({n: dict(t.named_parameters()) for n, t in pl_module.twins.items()}))

        def on_train_end(self, trainer, pl_module):
            self.on_train_batch_start(trainer, pl_module, None, 0)

    options = OPTIONS | {"optimizer": partial(torch.optim.SGD, lr=rate), "backbone_options": {"batch_norm": False}}
    plugins = {"fp64": {"precision": "64-true"}, "fp16": {"plugins": fp16(2.0**4)}}[precision]
    twins = built(lambda: Twins(TWO, **options))
    run = trainer(tmp_path, TwinDivergence(2), Note(), accumulate_grad_batches=2, **plugins)
    run.fit(twins, data())
    rows = read(tmp_path)
    assert not rows.duplicated(["step", "twin", "parameter", "metric"]).any()
    for kind in ("weights", "gradients"):  # what loggers and other callbacks get
        for norm in NORMS:
            last = rows[(rows["metric"] == f"{kind}/{norm}") & (rows["twin"] == "relu1") & (rows["parameter"] == "")]
            assert run.callback_metrics[f"{kind}/relu1/{norm}"] == pytest.approx(
                last[last["step"] < 6]["value"].iloc[-1]
            )
    rows = rows.set_index(["step", "twin", "metric", "parameter"])["value"]
    assert sorted(set(rows.index.get_level_values("step"))) == [0, 2, 3, 4, 5, 6]  # 3 starts an epoch; 5: validation
    parameters = [n for n, _ in twins.twins["native"].named_parameters()]
    for step in (0, 2, 3, 4, 6):
        for twin in ("relu1", CONTROL):
            for parameter in ["", *parameters]:
                names = [parameter] if parameter else parameters

                def flat(at, twin, names=names):
                    return torch.cat([weights[at][twin][n].detach().double().flatten() for n in names])

                a, b = flat(step, twin), flat(step, "native")
                norms = [rows[step, twin, f"weights/{norm}", parameter] for norm in NORMS]
                assert norms == pytest.approx(by_hand(a, b), rel=1e-12)
                if step == 6:
                    continue
                a, b = ((flat(step, t) - flat(step + 1, t)) / rate for t in (twin, "native"))
                norms = [rows[step, twin, f"gradients/{norm}", parameter] for norm in NORMS]
                rounded = 1e-12 if precision == "fp64" else 2.0**-22  # of the weights, whose rounding the step shows
                size = {"l1": len(b) ** 0.5, "relative": 1 / b.norm().item(), "cosine": 1 / b.norm().item()}
                for norm, value, expected in zip(NORMS, norms, by_hand(a, b), strict=True):
                    near = rounded * len(b) ** 0.5 * size.get(norm, 1.0) / rate
                    assert value == pytest.approx(expected, rel=1e-6, abs=near), (norm, parameter)
                assert norms[0] == 0 or twin != CONTROL
    assert rows[0, "relu1", "weights/l1", ""] == 0
    assert rows[0, "relu1", "gradients/l1", ""] > 0
    assert rows[6, "relu1", "weights/l1", ""] > 0
    assert (6, "relu1", "gradients/l1", "") not in rows.index
    assert (tmp_path / "twins.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "twins.png").stat().st_size > 5000


def test_the_first_gradient_difference_is_the_divergence(tmp_path):
    """Twins at one point differ by their choice alone, which GradientDivergence measures in one network."""
    options = OPTIONS | {"backbone": "paper/fc", "backbone_options": {"hidden": [24, 16]}}
    trainer(tmp_path / "a", TwinDivergence(1), precision="64-true", max_steps=1).fit(
        built(lambda: Twins(TWO, **options)), data()
    )
    alone = built(lambda: ImageClassifier(jacobians=TWO["native"], **options))
    watch = GradientDivergence({"relu1": TWO["relu1"]}, 1)
    trainer(tmp_path / "b", watch, precision="64-true", max_steps=1).fit(alone, data())
    recorded = read(tmp_path / "a")
    recorded = recorded[(recorded["step"] == 0) & (recorded["twin"] == "relu1")].pivot(
        index="parameter", columns="metric", values="value"
    )
    expected = pd.read_csv(tmp_path / "b" / "divergence.csv", keep_default_na=False).set_index("parameter")
    assert expected.loc["", "relative"] > 1e-4
    for norm in NORMS:
        got = recorded[f"gradients/{norm}"][expected.index]
        assert got.tolist() == pytest.approx(expected[norm].tolist(), rel=1e-9, abs=1e-13)


def test_measuring_changes_nothing(tmp_path):
    weights = []
    for callbacks in ([], [TwinDivergence(1), TieMonitor(1)]):
        twins = built(lambda: Twins(TWO, **OPTIONS))
        trainer(tmp_path, *callbacks, **PRECISIONS["fp16"](), gradient_clip_val=0.5).fit(twins, data())
        weights.append(copy.deepcopy(twins.state_dict()))
    assert equal(*weights)


@pytest.mark.parametrize("step", [5, 6, 8])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # it goes on
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # in another folder
def test_resumed_is_as_left_alone(step, tmp_path):
    """From the middle and from the end of an epoch; the scales differ by then."""

    def run(folder, ckpt=None):
        twins = built(lambda: Twins(CHOICES, **OPTIONS, lr_scheduler=COSINE))
        saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        run = trainer(folder, TwinDivergence(2), saving, **PRECISIONS["fp16"]())
        run.fit(twins, data(), ckpt_path=ckpt, weights_only=True)
        return twins.state_dict(), run.optimizers[0].state_dict()["param_groups"]

    whole, groups = run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "twins.csv").write_text((tmp_path / "a" / "twins.csv").read_text())
    scales = torch.load(tmp_path / "a" / f"step={step}.ckpt", weights_only=True)["MixedPrecision"]
    assert len({state["scale"] for state in scales.values()}) > 1
    resumed, groups_then = run(tmp_path / "b", tmp_path / "a" / f"step={step}.ckpt")
    assert equal(whole, resumed)
    assert groups == groups_then
    assert (tmp_path / "a" / "twins.csv").read_text() == (tmp_path / "b" / "twins.csv").read_text()


def test_figure_of_odd_values(tmp_path):
    """No validation, a twin that is lost, one that never moved away, a single step."""
    at = {"epoch": 0, "parameter": ""}
    rows = [
        {"step": step, "twin": twin, "metric": "weights/l1", "value": value, **at}
        for step in range(3)
        for twin, value in (("a", 0.0), ("b", [0.0, 1e3, float("inf")][step]), (CONTROL, 0.0))
    ]
    for n in (3, len(rows)):
        table = pd.DataFrame(rows[:n], columns=["step", "epoch", "twin", "parameter", "metric", "value"])
        assert figures.twins_by_step(table, tmp_path / f"{n}" / "twins.pdf").read_bytes().startswith(b"%PDF")


# --------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("choices", "control", "message"),
    [
        ({"a/b": Jacobians()}, True, "letters, digits"),
        ({"a.b": Jacobians()}, True, "letters, digits"),
        ({"items": Jacobians()}, True, "'items'"),
        ({CONTROL: Jacobians()}, False, "given 'control'"),
        ({}, True, "at least two"),
        ({"a": Jacobians()}, False, "at least two"),
    ],
)
def test_names_and_numbers_are_checked(choices, control, message):
    with pytest.raises(ValueError, match=message):
        Twins(choices, control)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
        ({"lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "one twin's loss"),
    ],
)
def test_what_would_couple_twins_is_refused(option, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(Twins(TWO, **OPTIONS, **option), data())


def test_other_modules_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nslightning twins"):
        trainer(tmp_path, TwinDivergence()).fit(ImageClassifier(**OPTIONS), data())


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")  # other callbacks, on purpose
def test_another_choice_on_resume_is_said(tmp_path):
    saving = ModelCheckpoint(tmp_path, "a")
    trainer(tmp_path, saving, max_epochs=1).fit(Twins(TWO, **OPTIONS), data())
    changed = Twins(TWO | {"relu1": Jacobians(relu=0.5)}, **OPTIONS)
    with pytest.warns(PatchWarning, match=r"relu=1.0, max_pool='minimal', and this run has relu=0.5"):
        trainer(tmp_path, max_epochs=1).fit(changed, data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


# ---------------------------------------------------------------------------------------------------- the command
def config(**trainer_options):
    return {
        "seed_everything": 3,
        "name": "run",
        "model": {
            "backbone": "paper/fc",
            "backbone_options": {"hidden": [24, 16], "dropout": 0.3, "batch_norm": True},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
            "lr_scheduler": {"class_path": "StepLR", "init_args": {"step_size": 1}},
        },
        "data": {
            "class_path": "Synthetic",
            "init_args": {
                "image_shape": [1, 7, 7], "num_classes": 4, "images": 96, "eval_images": 8, "batch_size": 8,
                "constant": 0.5,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "precision": "16-mixed",
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "num_sanity_val_steps": 0,
            "max_epochs": 2,
            "callbacks": [
                {"class_path": "ddp_helpers.DeadUnits"},
                {"class_path": "ddp_helpers.Slow"},
                {"class_path": "ddp_helpers.Dump"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"every_n_train_steps": 5, "filename": "last"},
                },
            ],
            **trainer_options,
        },
    }  # fmt: skip


FLAGS = ["--model.choices.native={}", "--model.choices.relu1.relu=1", "--divergence.every_n_steps=2"]


def of_twin(state, name):
    return {n.removeprefix(f"twins.{name}."): v for n, v in state.items() if n.startswith(f"twins.{name}.")}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_killed_and_resumed_is_as_left_alone_and_each_twin_as_fit(devices):
    """Dropout, batch norm, fp16 scalers, a scheduler; killed between two checkpoints in the middle of an epoch."""
    options = config(devices=devices, strategy="auto" if devices == 1 else "ddp")
    whole = start("twins", options, "whole", *FLAGS)
    alone = start("fit", options, "alone", "--model.jacobians.relu=1", "--trainer.deterministic=warn")
    killed = start("twins", options, "killed", *FLAGS, SECONDS_PER_STEP="0.5")
    two, one = Path("killed/run/001"), Path("whole/run/001")
    beyond = {1: 7, 2: 3}[devices]  # two processes take half as many steps
    for _ in range(1200):
        done = (two / "checkpoints" / "last.ckpt").exists() or devices == 2
        if done and (two / "metrics.csv").exists() and pd.read_csv(two / "metrics.csv")["step"].max() >= beyond + 3:
            break
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (two / "weights-0.pt").exists()
    finish(whole, alone, start("twins", options, "killed", *FLAGS, "--ckpt_path=last"))
    for rank in range(devices):
        ours, expected = (torch.load(folder / f"weights-{rank}.pt") for folder in (two, one))
        assert equal(ours, expected)
        assert equal(of_twin(ours, "relu1"), torch.load(f"alone/run/001/weights-{rank}.pt"))
        assert equal(of_twin(ours, CONTROL), of_twin(ours, "native"))
        assert not equal(of_twin(ours, "relu1"), of_twin(ours, "native"))
    assert (two / "twins.csv").read_text() == (one / "twins.csv").read_text()
    assert not read(two).duplicated(["step", "twin", "parameter", "metric"]).any()
    seen = [pd.read_csv(folder / "metrics.csv", dtype=str) for folder in (two, one)]
    pd.testing.assert_frame_equal(*seen)
    assert (two / "twins.png").stat().st_size > 5000


@pytest.mark.parametrize("name", ["mnist_lenet", pytest.param("cifar10_vgg11", marks=pytest.mark.slow)])
def test_config_trains_two_batches(name, tmp_path, monkeypatch):
    write_all(tmp_path / "data")
    monkeypatch.setenv("NSLIGHTNING_DATA_DIR", str(tmp_path / "data"))
    small = [
        "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=2",
        "--trainer.enable_progress_bar=false", "--data.batch_size=4", "--data.eval_batch_size=4",
        "--data.verify=false", "--trainer.logger=false",
    ]  # fmt: skip
    assert command.main(["twins", "--config", str(configs.path(f"configs/twins_{name}.yaml")), *small]) == 0
    rows = read(Path("runs", f"twins_{name}", "001"))
    control = rows[(rows["twin"] == CONTROL) & (rows["metric"] == "weights/l1")]
    assert len(control)
    assert (control["value"] == 0).all()
    assert (rows.loc[rows["metric"] == "val/acc1", "twin"].nunique()) == 1 + rows.loc[
        rows["metric"] == "weights/l1", "twin"
    ].nunique()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task=text"], "--task=text: twins takes --task=images"),
        (["--data=Synthetic"], "--model.choices is needed"),
        (["--data=Synthetic", "--model.choices.a.relo=1"], "relo"),
        (["--data=Synthetic", "--model.choices.a={}", "--model.control=false"], "at least two"),
        (
            ["--data=Synthetic", "--model.choices.a={}", "--divergence.every=2"],
            "did you mean '--divergence.every_n_steps'",
        ),
    ],
)
def test_mistakes_are_told(flags, message, capsys):
    assert command.main(["twins", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "nslightning twins" in said
    assert not Path("runs").exists()
