"""The callbacks: training stays bit for bit what it is, and what they write is right."""

import copy
import csv
import gc
import json
import os
import random
import re
import struct
import subprocess
import sys
import time
import warnings
import weakref
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from bits import bits
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint
from wandb.proto import wandb_internal_pb2

import nslightning.runs as runs
from nslightning import Jacobians, patch
from nslightning.callbacks import GradientDivergence, RunRecord, StepSeed, TieMonitor
from nslightning.callbacks import gradient_divergence as divergence_module
from nslightning.data import Synthetic
from nslightning.exact_csv import read_exactly
from nslightning.models import ImageClassifier, Twins
from nslightning.probes import Ties
from nslightning.runs.environment import _commit
from nslightning.surgery import selections

NORMS = ["l1", "l2", "linf", "relative", "cosine"]
NATIVE = Jacobians()
CHOICES = {
    "relu1": Jacobians(relu=1.0),
    "minimal": Jacobians(max_pool="minimal"),
    "both": Jacobians(relu=0.5, max_pool=10.0),
}


class Round(torch.autograd.Function):
    """Rounds to halves, so that ties abound, with the derivative of the identity; counts its evaluations."""

    forwards = backwards = 0
    graphs: list = []  # noqa: RUF012 - shared on purpose

    @staticmethod
    def forward(ctx, x):
        Round.forwards += 1
        ctx.token = np.empty(0)  # lives as long as the graph
        Round.graphs.append(weakref.ref(ctx.token))
        return torch.round(2 * x) / 2

    @staticmethod
    def backward(ctx, g):
        Round.backwards += 1
        return g


class Net(nn.Module):
    """Everything that an extra backward could disturb: dropout, batch norm, in-place ReLUs, a checkpointed block."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.block = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(True), nn.Dropout(0.2)
        )
        self.head = nn.Linear(4 * 5 * 5, 4)

    def forward(self, x):
        x = self.drop(self.norm(self.pool(self.relu(Round.apply(self.conv(x))))))
        return self.head(checkpoint(self.block, x, use_reentrant=False).flatten(1))


class Plain(nn.Module):
    """Without random numbers and batch statistics, so that it can be run again by hand."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(3, 2)
        self.conv2 = nn.Conv2d(3, 4, 3, bias=False)
        self.relu2 = nn.ReLU(inplace=True)
        self.head = nn.Linear(4 * 3 * 3, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = self.pool1(self.relu1(Round.apply(self.conv1(x))))
        return self.head(self.relu2(Round.apply(self.conv2(x))).flatten(1))


class Module(LightningModule):
    """Trains a patched net, and notes weights and batch of every step."""

    def __init__(self, net, jacobians=NATIVE, lr=0.05):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.lr, self.noted = net(), lr, []
        patch(self.net, jacobians, strict=False)  # Round has its own backward

    def training_step(self, batch, batch_idx):
        self.noted.append((copy.deepcopy(self.net.state_dict()), batch))
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        """Nothing: the data have validation images, and no training here looks at them."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def data(batch_size=8, images=48):
    return Synthetic((1, 13, 13), 4, images, eval_images=8, constant=0.5, batch_size=batch_size, seed=3)


def trainer(folder, *callbacks, **options):
    options = {"max_epochs": 1, "logger": False, "log_every_n_steps": 1} | options
    return Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **options,
    )  # fmt: skip


def read(folder):
    numbers = {norm: ["nan"] for norm in NORMS}
    return read_exactly(Path(folder, "divergence.csv"), keep_default_na=False, na_values=numbers)


def equal(a, b):
    """Bit for bit the same, in nested containers."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(*(bits(x) if x.is_floating_point() else x for x in (a, b)))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return a == b


def fp16(init_scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
    return [MixedPrecision("16-mixed", "cpu", scaler)]


PRECISIONS = {
    "fp32": lambda: {"precision": "32-true"},
    "bf16": lambda: {"precision": "bf16-mixed"},
    "fp16": lambda: {"plugins": fp16(2.0**12)},
}


def state_after(folder, *callbacks, precision="fp32", jacobians=NATIVE, **options):
    """Everything that training changes, and the losses on the way."""
    module, losses = Module(Net, jacobians), []

    class Losses(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            losses.append(outputs["loss"].clone())

    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002 - the legacy stream is to be left alone
    run = trainer(folder, *callbacks, Losses(), **PRECISIONS[precision](), **options)
    run.fit(module, data())
    assert run.global_step >= 3
    streams = [s._generators for s in selections(module).values()]
    scaler = getattr(run.precision_plugin, "scaler", None)
    return {
        "weights and buffers": module.state_dict(),
        "grad": {name: p.grad for name, p in module.named_parameters() if p.grad is not None},
        "optimizer": run.optimizers[0].state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "random": [torch.get_rng_state(), random.getstate(), np.random.get_state()],  # noqa: NPY002 # the legacy stream is meant
        "own streams": [{str(d): g.get_state() for d, g in stream.items()} for stream in streams],
        "losses": losses,
    }


OPTIONS = {
    "plain": {},
    "accumulate, clip": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
}


@pytest.mark.parametrize(("in_use", "options"), [("native", "plain"), ("random", "accumulate, clip")])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.filterwarnings("ignore:GradientDivergence subtracts")  # of a random choice
def test_training_is_bit_identical(precision, in_use, options, tmp_path):
    own = Jacobians(relu=0.5, max_pool=in_use)
    without = state_after(tmp_path, precision=precision, jacobians=own, **OPTIONS[options])
    watching = [GradientDivergence(CHOICES | {"random": Jacobians(max_pool="random")}, 1), TieMonitor(1)]
    with_ = state_after(tmp_path, *watching, precision=precision, jacobians=own, **OPTIONS[options])
    for absent in without:
        assert equal(without[absent], with_[absent]), absent
    rows = read(tmp_path)
    assert (rows[(rows["parameter"] == "") & (rows["choice"] != "random")]["l1"] > 0).any()
    assert bool(without["own streams"][0]) == (in_use == "random")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_is_bit_identical_while_differences_are_propagated(precision, tmp_path):
    own = Jacobians(relu=0.5, max_pool="minimal")
    without = state_after(tmp_path, precision=precision, jacobians=own, **OPTIONS["accumulate, clip"])
    watching = GradientDivergence(CHOICES, 1, method="propagate")
    with_ = state_after(tmp_path, watching, precision=precision, jacobians=own, **OPTIONS["accumulate, clip"])
    for absent in without:
        assert equal(without[absent], with_[absent]), absent
    rows = read(tmp_path)
    assert (rows[rows["parameter"] == ""]["l1"] > 0).any()


@pytest.mark.filterwarnings("ignore:GradientDivergence subtracts")  # of a random choice
def test_the_comparison_sees_a_disturbance(tmp_path, monkeypatch):
    """What the callback guards against happens when it does not."""
    monkeypatch.setattr(divergence_module, "undisturbed", lambda *_: nullcontext())
    own = Jacobians(max_pool="random")
    without = state_after(tmp_path, jacobians=own)
    with_ = state_after(tmp_path, GradientDivergence({"other": Jacobians(relu=1, max_pool="random")}, 1), jacobians=own)
    assert not equal(without["weights and buffers"], with_["weights and buffers"])
    assert not equal(without["own streams"], with_["own streams"])


@pytest.mark.filterwarnings("ignore:GradientDivergence subtracts")  # of a random choice
def test_random_choice_draws_independently(tmp_path):
    """Beside a training that draws, another draw is measured, not the same one again; and the same in every run."""
    choices = {"a": Jacobians(max_pool="random"), "b": Jacobians(max_pool="random")}
    measured = []
    for i in range(2):
        state_after(tmp_path / str(i), GradientDivergence(choices, 1), jacobians=Jacobians(max_pool="random"))
        measured.append(read(tmp_path / str(i)))
    totals = measured[0][measured[0]["parameter"] == ""].pivot(index="step", columns="choice", values="l1")
    assert (totals > 0).all(axis=None)
    assert (totals["a"] != totals["b"]).all()
    assert totals["a"].nunique() == len(totals)
    pd.testing.assert_frame_equal(*measured)


# ------------------------------------------------------------------------------------------- by hand, in float64
class NaiveReLU(nn.Module):
    def __init__(self, alpha):
        super().__init__()
        self.alpha = alpha

    def forward(self, x):
        return torch.where(x > 0, x, torch.where(x == 0, self.alpha * x, 0 * x))


class NaivePool(nn.Module):
    """beta * (equal shares, which is what `amax` does) + (1 - beta) * stock."""

    def __init__(self, beta, pool):
        super().__init__()
        self.beta, self.k, self.s = beta, pool.kernel_size, pool.stride

    def forward(self, x):
        n, c = x.shape[:2]
        windows = x.unfold(2, self.k, self.s).unfold(3, self.k, self.s)
        shared = windows.reshape(n, c, *windows.shape[2:4], -1).amax(-1)
        return self.beta * shared + (1 - self.beta) * F.max_pool2d(x, self.k, self.s)


def by_hand(state, batch, alpha, beta):
    net = Plain().double()
    net.load_state_dict(state)
    net.relu1, net.relu2, net.pool1 = NaiveReLU(alpha), NaiveReLU(alpha), NaivePool(beta, net.pool1)
    F.cross_entropy(net(batch[0].double()), batch[1]).backward()
    return {f"net.{name}": torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}


def norms_by_hand(other, own):
    names = list(own)
    rows = {}
    for parameter, members in [("", names), *((n, [n]) for n in names)]:
        a = torch.cat([other[n].flatten() for n in members])
        b = torch.cat([own[n].flatten() for n in members])
        d, length = a - b, b.norm()
        rows[parameter] = {
            "l1": d.abs().sum().item(),
            "l2": d.square().sum().sqrt().item(),
            "linf": d.abs().max().item(),
            "relative": (d.norm() / length).item() if length else 0.0,
            "cosine": torch.dot(a / a.norm(), b / length).item() if length else 1.0,
        }
    return rows


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 1e-3}, {"max_epochs": 2}],
    ids=["plain", "accumulated", "clipped", "two epochs"],
)
@pytest.mark.parametrize("method", ["subtract", "propagate"])
def test_values_are_those_of_separate_models(options, method, tmp_path):
    module = Module(Plain, Jacobians(relu=0.25, max_pool=0.5))
    callback = GradientDivergence(CHOICES, 2, method=method)
    trainer(tmp_path, callback, precision="64-true", **options).fit(module, data())
    rows = read(tmp_path)
    every = 2 * options.get("accumulate_grad_batches", 1)
    measured = module.noted[::every]
    assert sorted(set(rows["step"])) == [2 * i for i in range(len(measured))]
    assert not rows.duplicated(["step", "choice", "parameter"]).any()
    assert (rows[(rows["choice"] == "relu1") & (rows["parameter"] == "")]["relative"] > 1e-6).all()
    for i, (state, batch) in enumerate(measured):
        own = by_hand(state, batch, 0.25, 0.5)
        for choice, alpha, beta in (("relu1", 1, 0), ("minimal", 0, 1), ("both", 0.5, 10)):
            expected = norms_by_hand(by_hand(state, batch, alpha, beta), own)
            recorded = rows[(rows["step"] == 2 * i) & (rows["choice"] == choice)].set_index("parameter")
            assert sorted(recorded.index) == sorted(expected)
            for parameter, values in expected.items():
                got = recorded.loc[parameter, NORMS].to_dict()
                assert got == pytest.approx(values, rel=1e-9, abs=1e-13), (choice, parameter)


def test_choice_in_use_has_no_divergence(tmp_path):
    own = Jacobians(relu=0.25, max_pool=3.0)
    for precision in ("64-true", "bf16-mixed", "32-true"):
        run = trainer(tmp_path, GradientDivergence({"own": own}, 1), precision=precision)
        run.fit(Module(Net, own), data())
        rows = read(tmp_path)
        assert (rows[["l1", "l2", "linf", "relative"]] == 0).all(axis=None)
        assert (rows["cosine"] == 1).all()


def test_frozen_parameters_are_left_out(tmp_path):
    module = Module(Plain)
    module.net.conv1.requires_grad_(False)
    trainer(tmp_path, GradientDivergence(CHOICES, 1), precision="64-true", max_steps=1).fit(module, data())
    rows = read(tmp_path)
    assert set(rows["parameter"]) == {""} | {n for n, p in module.named_parameters() if p.requires_grad}
    state, batch = module.noted[0]
    own, other = by_hand(state, batch, 0, 0), by_hand(state, batch, 1, 0)
    own, other = ({n: g for n, g in gradients.items() if "conv1" not in n} for gradients in (own, other))
    total = rows[(rows["choice"] == "relu1") & (rows["parameter"] == "")].iloc[0]
    assert total["l1"] == pytest.approx(norms_by_hand(other, own)[""]["l1"], rel=1e-9)


def by_hand_in_fp16(state, batch, jacobians, scale):
    """Gradients in fp16 of the loss times a scale, divided by it."""
    net = Plain()
    net.load_state_dict(state)
    patch(net, jacobians, strict=False)
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(net(batch[0]).float(), batch[1])
    (loss * scale).backward()
    return {n: (torch.zeros_like(p) if p.grad is None else p.grad).double() / scale for n, p in net.named_parameters()}


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_values_are_unscaled_under_fp16(scale, tmp_path):
    """Against separate backwards of the loss under its scale, which grows every second step."""
    choices = {"relu1": CHOICES["relu1"], "beta": Jacobians(max_pool=3.0)}
    module = Module(Plain, lr=1e-4)
    run = trainer(tmp_path, GradientDivergence(choices, 1), plugins=fp16(scale), max_steps=5)
    run.fit(module, data())
    assert run.precision_plugin.scaler.get_scale() > scale
    rows = read(tmp_path)
    parts = rows[rows["parameter"] != ""].groupby(["choice", "step"])
    rows = rows[rows["parameter"] == ""].set_index(["choice", "step"])
    pd.testing.assert_series_equal(parts["l1"].sum().sort_index(), rows["l1"].sort_index())  # of all parameters
    pd.testing.assert_series_equal(parts["linf"].max().sort_index(), rows["linf"].sort_index())
    for step, (state, batch) in enumerate(module.noted):
        own = by_hand_in_fp16(state, batch, NATIVE, scale * 2 ** (step // 2))
        for name, choice in choices.items():
            other = by_hand_in_fp16(state, batch, choice, scale * 2 ** (step // 2))
            expected = norms_by_hand(other, own)[""]
            assert expected["l1"] > 0
            # A propagated difference is rounded to eleven bits at other places than a subtracted one.
            assert rows.loc[(name, step), NORMS].to_dict() == pytest.approx(expected, rel=1e-2), (name, step)


def test_overflow_is_reported(tmp_path):
    scales = []

    class Scales(Callback):
        def on_train_batch_end(self, trainer, *_):
            scales.append(trainer.precision_plugin.scaler.get_scale())

    run = trainer(tmp_path, GradientDivergence(CHOICES, 1), Scales(), plugins=fp16(2.0**22), max_epochs=3)
    run.fit(Module(Plain), data())
    totals = read(tmp_path)
    totals = totals[(totals["parameter"] == "") & (totals["choice"] == "relu1")].set_index("step")
    finite = np.isfinite(totals["l1"])
    overflowed = np.diff([2.0**22, *scales]) < 0  # when the step was skipped
    assert overflowed[0]
    assert not finite[overflowed].any()
    assert finite.any()
    assert totals["l1"][finite].max() < 100  # unscaled by its own step's scale
    assert (tmp_path / "divergence.csv").read_text().splitlines()[1] == "0,relu1,native,,nan,nan,nan,nan,nan,propagate"


def test_one_forward_and_one_backward_per_choice(tmp_path):
    counts = []

    class Watch(Callback):
        def on_train_batch_start(self, *_):
            Round.forwards = Round.backwards = 0

        def on_train_batch_end(self, *_):
            counts.append((Round.forwards, Round.backwards))

    watching = GradientDivergence(CHOICES, 3, method="subtract"), TieMonitor(3), Watch()
    trainer(tmp_path, *watching).fit(Module(Plain), data())  # which rounds twice
    assert counts == [(2, 2 * (1 + len(CHOICES))), (2, 2), (2, 2)] * 2


def test_propagation_adds_only_what_lies_below_a_tie(tmp_path):
    """The training backward serves as the reference's: without ties nothing is added to it."""
    counts = []

    class Watch(Callback):
        def on_train_batch_start(self, *_):
            Round.forwards = Round.backwards = 0

        def on_train_batch_end(self, *_):
            counts.append((Round.forwards, Round.backwards))

    class Tieless(Plain):
        def forward(self, x):
            noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(len(counts)))
            return super().forward(x + noise * (0 if len(counts) in (1, 3) else 1e-3))

    class NoRounding(Round):
        @staticmethod
        def forward(ctx, x):
            Round.forwards += 1
            return x.clone()

    module = Module(Tieless)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules[__name__], "Round", NoRounding)
        trainer(tmp_path, GradientDivergence({"relu1": CHOICES["relu1"]}, 2), Watch()).fit(module, data())
    assert counts == [(2, 2)] * 6
    assert (read(tmp_path)["l1"] == 0).all()
    counts.clear()
    trainer(tmp_path, GradientDivergence({"relu1": CHOICES["relu1"]}, 2), Watch()).fit(Module(Plain), data())
    # Where a difference was found first, one subtraction checks it.
    assert counts == [(2, 8), (2, 2), *[(2, 4), (2, 2)] * 2]


def test_interval_and_steps(tmp_path):
    file = runs.MetricsFile(tmp_path / "runs" / "001")
    run = trainer(tmp_path, GradientDivergence(CHOICES, 4), TieMonitor(3), logger=file, max_epochs=2)
    run.fit(Module(Plain), data())
    rows = read_exactly(tmp_path / "runs" / "001" / "metrics.csv")
    assert rows["step"][rows["train/loss"].notna()].tolist() == list(range(12))
    assert rows["step"][rows["divergence/relu1/l1"].notna()].tolist() == [0, 4, 8]
    assert rows["step"][rows["ties/total"].notna()].tolist() == [0, 3, 6, 9]
    assert set(rows.columns) == {
        "step", "epoch", "train/loss", "divergence/seconds", "divergence/share", "ties/total", "ties/relu1",
        "ties/pool1", "ties/relu2",
        *(f"divergence/{choice}/{norm}" for choice in CHOICES for norm in NORMS),
    }  # fmt: skip
    logged = rows[rows["divergence/seconds"].notna()]
    assert (logged["divergence/seconds"] > 0).all()
    written = read(tmp_path / "runs" / "001")
    written = written[written["parameter"] == ""]
    for choice in CHOICES:
        for norm in NORMS:
            of_choice = written[written["choice"] == choice]
            assert of_choice[norm].tolist() == logged[f"divergence/{choice}/{norm}"].tolist()


def test_ties_are_counted_by_hand(tmp_path):
    module = Module(Plain)
    file = runs.MetricsFile(tmp_path / "runs" / "001")
    run = trainer(tmp_path, TieMonitor(2), logger=file, accumulate_grad_batches=2)
    run.fit(module, data())
    rows = read_exactly(tmp_path / "runs" / "001" / "metrics.csv")
    rows = rows[rows["ties/total"].notna()]
    assert rows["step"].tolist() == [0, 2]
    for (state, batch), (_, row) in zip(module.noted[::4], rows.iterrows(), strict=True):
        net = Plain()
        net.load_state_dict(state)
        net.relu2.inplace = False
        with torch.no_grad():
            a = Round.apply(net.conv1(batch[0]))
            b = net.relu1(a)
            c = Round.apply(net.conv2(net.pool1(b)))
        windows = b.unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)
        tied = (windows == windows.amax(-1, keepdim=True)).sum(-1) > 1
        counts = {"relu1": a == 0, "pool1": tied, "relu2": c == 0}
        for site, hits in counts.items():
            assert row[f"ties/{site}"] == hits.double().mean().item()
        both = torch.cat([hits.flatten() for hits in counts.values()])
        assert row["ties/total"] == both.double().mean().item()
        assert 0 < row["ties/total"] < 1


@pytest.mark.parametrize("bad", ["", "a/b", "a b", "seconds", "per_layer", "a\nb"])
def test_names_are_checked(bad):
    with pytest.raises(ValueError, match="divergence/<choice>/<norm>"):
        GradientDivergence({bad: Jacobians()})


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="at least one choice"):
        GradientDivergence({})
    for callback in (lambda n: GradientDivergence(CHOICES, n), TieMonitor):
        with pytest.raises(ValueError, match="given 0"):
            callback(0)
    with pytest.raises(ValueError, match="share of the training time"):
        GradientDivergence(CHOICES, budget=0)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def adaptive(folder, monkeypatch, measuring, *callbacks, ckpt=None):
    """The steps that an adaptive interval measures, if a step takes a second and the n-th measurement as given."""
    clock = Clock()
    monkeypatch.setattr(divergence_module, "time", clock)

    class Slow(Module):
        def training_step(self, batch, batch_idx):
            clock.now += 1.0
            return super().training_step(batch, batch_idx)

    stock = divergence_module.measure_differences

    def slow(*arguments):
        clock.now += measuring(len(callback_steps(folder)))
        return stock(*arguments)

    monkeypatch.setattr(divergence_module, "measure_differences", slow)
    callback = GradientDivergence({"relu1": CHOICES["relu1"]}, budget=2.0**-4)
    run = trainer(folder, callback, *callbacks, max_epochs=10)
    run.fit(Slow(Plain), data(), ckpt_path=ckpt, weights_only=True)
    monkeypatch.undo()
    return callback_steps(folder), callback


def callback_steps(folder):
    file = Path(folder, "divergence.csv")
    return sorted(set(read(folder)["step"])) if file.exists() else []


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        # 1/16 s may be spent for each second: four steps pay for a measurement.
        (lambda n: 1 / 4, [0, 10, *range(12, 60, 4)]),
        (lambda n: 1 / 64, [0, *range(10, 60)]),
        # The first one, a warm-up, is paid off, too.
        (lambda n: 1 / 16 if n else 1.0, [0, 10, *range(18, 60)]),
        (lambda n: 5.0, [0, 10]),
    ],
)
def test_adaptive_interval_keeps_to_its_budget(seconds, steps, tmp_path, monkeypatch):
    measured, callback = adaptive(tmp_path, monkeypatch, seconds)
    assert measured == steps
    assert callback._trained == 60
    assert callback._spent == sum(seconds(i) for i in range(len(steps)))


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")  # other callbacks, on purpose
def test_adaptive_interval_goes_on_where_it_was(tmp_path, monkeypatch):
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, _ = adaptive(tmp_path / "whole", monkeypatch, lambda n: 1 / 2, saving)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "divergence.csv").write_text((tmp_path / "whole" / "divergence.csv").read_text())
    resumed, _ = adaptive(tmp_path / "parts", monkeypatch, lambda n: 1 / 2, ckpt=tmp_path / "step=29.ckpt")
    assert resumed == whole == [0, 10, *range(24, 60, 8)]


class Manual(Module):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.automatic_optimization = False


class OwnBackward(Module):
    def backward(self, loss):
        loss.backward()


def unpatched():
    module = Module(Plain)
    module.net = Plain()
    return module


def compiled():
    module = Module(Plain)
    module.net.compile(backend="eager")
    return module


@pytest.mark.parametrize(
    ("callback", "module", "message"),
    [
        (lambda: GradientDivergence(CHOICES), unpatched, r"patch\(model, Jacobians\(\)\)"),
        (lambda: TieMonitor(), unpatched, r"patch\(model, Jacobians\(\)\)"),
        (lambda: GradientDivergence(CHOICES), lambda: Manual(Plain), "manual optimization"),
        (lambda: GradientDivergence(CHOICES, method="propagate"), lambda: OwnBackward(Plain), "of the module's own"),
        (lambda: GradientDivergence(CHOICES), lambda: Twins({"a": NATIVE}, backbone="paper/fc"), "TwinDivergence"),
        (
            lambda: GradientDivergence(CHOICES, method="propagate"),
            lambda: Module(Plain, Jacobians(max_pool="random")),
            "another choice at each backward",
        ),
        (lambda: TieMonitor(), compiled, "model.compile=false"),
        (lambda: TieMonitor(), lambda: torch.compile(Module(Plain), backend="eager"), "model.compile=false"),
    ],
)
def test_refusals(callback, module, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, callback()).fit(module(), data())
    assert not (tmp_path / "divergence.csv").exists()
    assert torch._functorch.config.donated_buffer  # nothing is left behind


def test_sharded_gradients_are_refused(tmp_path):
    from lightning.pytorch.strategies import FSDPStrategy

    run = trainer(tmp_path)
    run.strategy.__class__ = FSDPStrategy  # a real one needs a GPU
    with pytest.raises(ValueError, match=r"strategy=ddp or with FSDP2 \(ModelParallelStrategy\), not FSDPStrategy"):
        GradientDivergence(CHOICES).on_fit_start(run, Module(Plain))


# -------------------------------------------------------------------------------------------- nothing left behind
def test_unmeasured_steps_keep_nothing(tmp_path):
    hooks, tensors = [], []

    class Watch(Callback):
        def on_train_batch_start(self, *_):
            gc.collect()
            assert all(graph() is None for graph in Round.graphs)

        def on_before_backward(self, trainer, pl_module, loss):
            assert any(graph() is not None for graph in Round.graphs)
            hooks.append(sum(len(p._backward_hooks or ()) for p in pl_module.parameters()))

        def on_train_batch_end(self, *_):
            gc.collect()
            tensors.append(sum(type(x) in (torch.Tensor, nn.Parameter) for x in gc.get_objects()))

    class Quiet(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.noted.clear()
            return loss

    callback, module = GradientDivergence(CHOICES, 4), Quiet(Net)
    trainer(tmp_path, callback, TieMonitor(4), Watch(), max_epochs=2).fit(module, data())
    parameters = len(list(module.parameters()))
    assert hooks == [parameters * (i % 4 == 0) for i in range(12)]
    # The share of the time is known from the second measurement on, and then among the metrics that can be monitored.
    assert len({tensors[i] for i in (5, 6, 7, 9, 10, 11)}) == 1, tensors
    assert not callback._others
    assert not callback._own
    assert not callback._hooks
    assert [s.observer for s in selections(module).values()] == [None]


@pytest.mark.filterwarnings("ignore:GradientDivergence subtracts")  # of a backward of the module's own
def test_a_failed_backward_leaves_nothing(tmp_path):
    class Failing(Module):
        def backward(self, loss):
            raise RuntimeError("out of memory")

    module, callback = Failing(Plain), GradientDivergence(CHOICES, 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path, callback, TieMonitor(1)).fit(module, data())
    assert not any(p._backward_hooks for p in module.parameters())
    assert not callback._others
    assert [s.observer for s in selections(module).values()] == [None]
    assert torch._functorch.config.donated_buffer


def test_a_training_that_fails_leaves_its_figure(tmp_path):
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path, GradientDivergence(CHOICES, 1)).fit(Failing(Plain), data())
    assert sorted(set(read(tmp_path)["step"])) == [0, 1, 2]
    assert (tmp_path / "divergence.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "divergence.png").stat().st_size > 5000


def test_a_step_without_loss(tmp_path):
    class Skips(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (0, 3) else loss

    file = runs.MetricsFile(tmp_path / "runs" / "001")
    module = Skips(Plain)
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        trainer(tmp_path, GradientDivergence(CHOICES, 1), TieMonitor(1), logger=file).fit(module, data())
    rows = read_exactly(tmp_path / "runs" / "001" / "metrics.csv")
    assert rows["step"][rows["divergence/relu1/l1"].notna()].tolist() == [1, 2, 4, 5]
    assert rows["step"][rows["ties/total"].notna()].tolist() == [1, 2, 4, 5]
    assert [s.observer for s in selections(module).values()] == [None]


# --------------------------------------------------------------------------------------------------- files, resume
def test_files(tmp_path):
    trainer(tmp_path, GradientDivergence(CHOICES, 2, per_layer=False)).fit(Module(Plain), data())
    rows = read(tmp_path)
    assert rows.columns.tolist() == ["step", "choice", "reference", "parameter", *NORMS, "method"]
    assert rows["choice"].tolist() == [*CHOICES] * 3
    assert set(rows["parameter"]) == {""}
    assert (tmp_path / "divergence.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "divergence.png").stat().st_size > 5000
    # A second run in the same folder starts the file again.
    trainer(tmp_path, GradientDivergence({"nan": Jacobians(relu=1)}, 3)).fit(Module(Plain), data())
    rows = read(tmp_path)
    assert rows["step"].unique().tolist() == [0, 3]
    assert set(rows["choice"]) == {"nan"}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # it goes on
@pytest.mark.filterwarnings("ignore:GradientDivergence subtracts")  # of a random choice
def test_resume_writes_every_step_once(tmp_path):
    """From the middle of an epoch, after the run had gone on beyond its checkpoint; digits and NaN survive."""

    class Stop(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 9:
                raise RuntimeError("stopped")

    def run(name, *more, ckpt=None, max_epochs=2):
        folder = tmp_path / name / "001"
        watching = [GradientDivergence(CHOICES, 1), TieMonitor(2), StepSeed(7), RunRecord({}, 7)]
        saving = ModelCheckpoint(folder / "checkpoints", "{step}", save_top_k=-1, every_n_train_steps=1)
        module = Module(Net, Jacobians(max_pool="random"))
        fit = trainer(
            tmp_path, *watching, *more, saving, logger=runs.MetricsFile(folder), plugins=fp16(2.0**30),
            max_epochs=max_epochs,
        )  # fmt: skip
        fit.fit(module, data(), ckpt_path=ckpt, weights_only=False)
        return folder, module

    whole, expected = run("whole")
    with pytest.raises(RuntimeError, match="stopped"):
        run("parts", Stop())
    parts = tmp_path / "parts" / "001"
    assert read(parts)["step"].max() == 8
    assert json.loads((parts / "run.json").read_text())["resumed_at_step"] is None
    with (parts / "metrics.csv").open("a") as file:
        file.write("0,1")  # as a killed process may leave it
    _, module = run("parts", ckpt=parts / "checkpoints" / "step=5.ckpt")
    assert json.loads((parts / "run.json").read_text())["resumed_at_step"] == 5
    assert equal(module.state_dict(), expected.state_dict())
    assert (parts / "divergence.csv").read_text() == (whole / "divergence.csv").read_text()
    assert "nan" in (parts / "divergence.csv").read_text()
    seconds = ["divergence/seconds", "divergence/share"]
    a, b = (read_exactly(f / "metrics.csv", dtype=str).drop(columns=seconds) for f in (whole, parts))
    pd.testing.assert_frame_equal(a, b)
    # A run that is complete already changes nothing.
    before = (parts / "metrics.csv").read_text()
    run("parts", ckpt=parts / "checkpoints" / "step=12.ckpt")
    assert (parts / "metrics.csv").read_text() == before
    assert (parts / "divergence.csv").read_text() == (whole / "divergence.csv").read_text()


# ------------------------------------------------------------------------------------------------------- compiled
def classifier(compile):
    torch.manual_seed(1)
    options = {"hidden": [16, 12]}
    module = ImageClassifier("paper/fc", 4, (1, 13, 13), backbone_options=options, compile=compile)
    with torch.no_grad():  # dead units are ties at every image, and stay dead: ReLU'(0) is 0 here
        module.backbone.fc1.weight[:4] = module.backbone.fc1.bias[:4] = 0
    return module


def eager_and_compiled(tmp_path):
    measured, weights = {}, {}
    for kind, compile, watch in (
        ("eager", False, True),
        ("compiled", True, True),
        ("alone", True, False),
    ):
        torch._dynamo.reset()
        module = classifier(compile)
        # A first fit compiles a backward that may overwrite its inputs.
        trainer(tmp_path, precision="64-true", max_steps=2).fit(module, data())
        choices = {"relu1": CHOICES["relu1"], "half": Jacobians(relu=0.5), "two": Jacobians(relu=2.0)}
        callbacks = [GradientDivergence(choices, 2)] * watch
        trainer(tmp_path / kind, *callbacks, precision="64-true").fit(module, data())
        weights[kind] = copy.deepcopy(module.state_dict())
        if watch:
            measured[kind] = read(tmp_path / kind)
    assert equal(weights["compiled"], weights["alone"])
    assert (measured["eager"][measured["eager"]["parameter"] == ""]["l1"] > 0).all()
    for rows in measured.values():
        del rows["method"]
    pd.testing.assert_frame_equal(measured["eager"], measured["compiled"], rtol=1e-7, atol=1e-12)
    assert torch._functorch.config.donated_buffer


@pytest.mark.filterwarnings("ignore:GradientDivergence subtracts")  # of a compiled loss
def test_compiled_backbone(tmp_path, monkeypatch):
    stock = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: stock(self, backend="aot_eager"))
    eager_and_compiled(tmp_path)


@pytest.mark.slow
def test_compiled_backbone_under_inductor(tmp_path):
    eager_and_compiled(tmp_path)


# ------------------------------------------------------------------------------------------------------------ W&B
def wandb_records(file):
    """The records of a W&B run file: a LevelDB log behind a header of 7 bytes, in blocks of 32 KiB."""
    raw, at, record, records = file.read_bytes(), 7, b"", []
    while at < len(raw):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", raw[at + 4 : at + 7])
        record += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(record))
            record = b""
    return records


def test_wandb(tmp_path):
    folder = tmp_path / "runs" / "001"
    logger = WandbLogger(project="nslightning", save_dir=str(folder), offline=True, id="abc12345")
    module = classifier(False)
    config = {"model": {"backbone": "paper/fc"}}
    loggers = [runs.MetricsFile(folder), logger]
    callbacks = [GradientDivergence(CHOICES, 2), TieMonitor(3), RunRecord(config, 0)]
    trainer(folder, *callbacks, logger=loggers).fit(module, data())
    logger.experiment.finish()

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    history, settings, defined = [], {}, {}
    for _ in range(600):  # W&B's own process writes the end after `finish` has returned
        if any(record.HasField("exit") for record in wandb_records(file)):
            break
        time.sleep(0.1)
    for record in wandb_records(file):
        if record.HasField("history"):
            items = record.history.item
            history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        elif record.HasField("run"):
            settings |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        elif record.HasField("config"):
            settings |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.config.update}
        elif record.HasField("metric"):
            defined[record.metric.name or record.metric.glob_name] = record.metric
    assert defined["*"].step_metric == "trainer/global_step"
    at = {}
    for row in history:
        for key in row:
            at.setdefault(key, []).append(row.get("trainer/global_step"))
    assert at["divergence/relu1/relative"] == [0, 2, 4]
    assert len(at["divergence/per_layer/nrows"]) == 1  # one table at the end, and no artifact per measurement
    assert len(at["divergence/figure/count"]) == 1
    assert defined["divergence/*"].summary.max
    assert defined["divergence/*"].summary.last
    assert at["ties/total"] == [0, 3]
    assert at["train/loss"] == list(range(6))
    parameters = [name for name, p in module.named_parameters() if p.requires_grad]
    rows = [row["divergence/per_layer/nrows"] for row in history if "divergence/per_layer/nrows" in row]
    assert rows == [3 * len(CHOICES) * len(parameters)]
    scalars = {f"divergence/{choice}/{norm}" for choice in CHOICES for norm in NORMS}
    scalars |= {"divergence/seconds", "divergence/share"}
    assert {key for key in at if re.match("divergence/(?!per_layer|figure)", key)} == scalars
    assert "patch_report/nrows" in at
    run = settings["run"]
    assert settings["config"] == config
    assert run["patch"]["sites"] == 2
    assert run["versions"]["torch"] == torch.__version__ == runs.environment()["versions"]["torch"]
    assert "git" in run
    written = read(folder)
    written = written[(written["choice"] == "relu1") & (written["parameter"] == "")]["relative"].tolist()
    key = "divergence/relu1/relative"
    assert [row[key] for row in history if key in row] == written
    assert (folder / "metrics.csv").exists()
    record = json.loads((folder / "run.json").read_text())
    assert (record.pop("ended_at_step"), record["ended"]) == (6, "finished")  # which W&B was told before the first step
    assert record | {"ended": None} == json.loads(json.dumps(run))


# ---------------------------------------------------------------------------------------------------------- runs.py
def test_metrics_file_goes_on(tmp_path):
    folder = tmp_path / "out" / "name" / "001"
    first = runs.MetricsFile(folder)
    first.log_metrics({"a": 0.1}, 0)
    first.log_metrics({"b": 1 / 3}, 1)
    assert Path(first.log_dir) == folder
    second = runs.MetricsFile(folder)
    second.log_metrics({"c": float("nan"), "a": 2.0}, 2)
    second.log_metrics({"c": torch.tensor(float("inf"))}, 3)
    file = folder / "metrics.csv"
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert rows == [
        {"a": "0.1", "b": "", "c": "", "step": "0"},
        {"a": "", "b": str(1 / 3), "c": "", "step": "1"},
        {"a": "2.0", "b": "", "c": "nan", "step": "2"},
        {"a": "", "b": "", "c": "inf", "step": "3"},
    ]
    runs.forget_from(file, 3)
    with file.open(newline="") as opened:
        assert list(csv.DictReader(opened)) == rows[:3]
    runs.MetricsFile(folder).log_metrics({"a": 5.0}, 3)
    with file.open(newline="") as opened:
        assert list(csv.DictReader(opened)) == [*rows[:3], {"a": "5.0", "b": "", "c": "", "step": "3"}]
    assert sorted(f.name for f in folder.iterdir()) == ["metrics.csv"]


def test_forget_from_odd_files(tmp_path):
    file = tmp_path / "x.csv"
    runs.forget_from(file, 3)
    assert not file.exists()
    for text, expected in (
        ("step,a\n1,0.1\n12,0.2\n1", "step,a\n1,0.1\n"),  # the rest of a 13, cut short
        ("a,step\n,1\n,2\n", "a,step\n,1\n,2\n"),
        ("step,a\n", "step,a\n"),
    ):
        file.write_text(text)
        runs.forget_from(file, 3)
        assert file.read_text() == expected
    for text in ("", "ste"):
        file.write_text(text)
        runs.forget_from(file, 3)
        assert not file.exists()


def test_run_folders(tmp_path, monkeypatch):
    assert runs.new_run_folder("out", "lenet") == Path("out/lenet/001")
    # The same process again, as in a loop over choices, is another run ...
    assert runs.new_run_folder("out", "lenet") == Path("out/lenet/002")
    # ... but a further process that this one starts is the same.
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runs.new_run_folder("out", "lenet") == Path("out/lenet/002")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert runs.new_run_folder("out", "lenet") == Path("out/lenet/003")
    Path("out/lenet/0041").mkdir()
    Path("out/lenet/notes").mkdir()
    assert runs.new_run_folder("out", "lenet") == Path("out/lenet/042")
    assert runs.new_run_folder("out", "vgg") == Path("out/vgg/001")


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"TORCHELASTIC_RUN_ID": "job7"}, "job7"),
        ({"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_NTASKS": "2"}, "12.3"),
        ({"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_NTASKS": "1"}, "001"),
        ({"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "bash"}, "001"),
    ],
)
def test_run_folders_under_launchers(variables, name, monkeypatch):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert runs.new_run_folder("out", "x") == Path("out/x", name)
    if name != "001":
        assert runs.new_run_folder("out", "x") == Path("out/x", name)


def test_torchrun_without_an_id(monkeypatch):
    """All processes that one launcher started, and no other ones, get the same folder."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with get_context("fork").Pool(2) as pool:
        folders = pool.starmap(runs.new_run_folder, [("out", "x")] * 6)
    assert len(set(folders)) == 1
    assert runs.new_run_folder("out", "x") not in folders


def test_two_runs_at_once_get_two_folders():
    with get_context("fork").Pool(4) as pool:
        folders = pool.starmap(runs.new_run_folder, [("out", "x")] * 24)
    assert sorted(folders) == [Path("out/x", f"{i + 1:03d}") for i in range(24)]


def test_last_run_folder(monkeypatch):
    assert runs.last_run_folder("out", "x") is None
    assert runs.last_checkpoint("out/x/001") is None
    for i, run in enumerate(("001", "002", "003")):
        Path("out/x", run, "checkpoints").mkdir(parents=True)
        for name in ("best", "last") if run != "003" else ():
            file = Path("out/x", run, "checkpoints", f"{name}.ckpt")
            torch.save({}, file)
            os.utime(file, (100 - i, 100 - i + (name == "last")))
    assert runs.last_run_folder("out", "x") == Path("out/x/001")
    assert runs.last_checkpoint("out/x/001") == Path("out/x/001/checkpoints/last.ckpt")
    # A process started by this one goes on with the same run, whatever is written meanwhile.
    torch.save({}, "out/x/003/checkpoints/new.ckpt")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runs.last_run_folder("out", "x") == Path("out/x/001")
    monkeypatch.delenv("LOCAL_RANK")
    assert runs.last_run_folder("out", "x") == Path("out/x/003")
    # A checkpoint cut short is passed over.
    file = Path("out/x/003/checkpoints/new.ckpt")
    file.write_bytes(file.read_bytes()[:-30])
    assert runs.last_run_folder("out", "x") == Path("out/x/001")


def git(folder, *arguments):
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *author, *arguments], check=True, capture_output=True)


def test_environment(tmp_path, monkeypatch):
    assert _commit(tmp_path) is None
    repository = tmp_path / "code"
    repository.mkdir()
    git(repository, "init")
    assert _commit(repository) is None  # no commit yet
    (repository / "a.py").write_text("1")
    git(repository, "add", "a.py")
    git(repository, "commit", "-m", "first")
    clean = _commit(repository)
    assert len(clean) == 40
    (repository / "sub").mkdir()
    (repository / "a.py").write_text("2")
    assert _commit(repository / "sub") == f"{clean}+changes"
    (repository / "a.py").write_text("1")
    results = repository / "results" / "grid"
    results.mkdir(parents=True)
    (results / "results.csv").write_text("1")
    assert _commit(repository) == f"{clean}+changes"  # the folder has no record yet: it may hold anything
    (results / "provenance.json").write_text("{}")
    git(repository, "add", "results")
    git(repository, "commit", "-m", "results")
    committed = _commit(repository)
    (results / "results.csv").write_text("1, 2")
    (results / "new cell.json").write_text("{}")
    (repository / "my run").mkdir()
    (repository / "my run" / "run.json").write_text("{}")
    assert _commit(repository) == committed  # a grid's own results change no number of its next cells
    git(repository, "mv", "a.py", "b.py")
    assert _commit(repository) == f"{committed}+changes"
    monkeypatch.setenv("PATH", "")
    assert _commit(repository) is None  # no git either
    environment = runs.environment()
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["python"] == sys.version.split()[0]
    json.dumps(environment)


# --------------------------------------------------------------------------------------------------------- StepSeed
def draws(folder, *, ckpt=None, max_epochs=1, seed=7):
    measured = {}

    class Draw(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                torch.rand(trainer.current_epoch + 1), random.random()  # whatever else may have drawn
            step = trainer.global_step
            (own,) = selections(pl_module).values()
            measured[step] = (
                torch.rand(3), random.random(), np.random.rand(),  # noqa: NPY002 # the legacy stream is meant
                torch.rand(3, generator=own.generator(torch.device("cpu"))),
            )  # fmt: skip

    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    torch.manual_seed(random.SystemRandom().randrange(2**31))
    run = trainer(folder, StepSeed(seed), Draw(), saving, max_epochs=max_epochs)
    run.fit(Module(Plain), data(), ckpt_path=ckpt, weights_only=False)
    return measured


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # in another folder
def test_step_seed(tmp_path):
    whole = draws(tmp_path / "a", max_epochs=2)
    assert len(whole) == 12
    assert len({float(d[0][0]) for d in whole.values()}) == 12
    resumed = draws(tmp_path / "b", max_epochs=2, ckpt=tmp_path / "a" / "step=4.ckpt")
    assert sorted(resumed) == list(range(4, 12))
    assert equal(resumed, {step: whole[step] for step in resumed})
    other = draws(tmp_path / "c", seed=8)
    assert not any(equal(other[step][0], whole[step][0]) for step in other)
    assert not any(equal(other[step][3], whole[step][3]) for step in other)


def test_step_seed_depends_on_seed_batch_and_rank():
    def draw(seed, batch, rank):
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=batch))
        StepSeed(seed).on_train_batch_start(SimpleNamespace(fit_loop=loop, global_rank=rank), None, None, 0)
        return torch.rand(()).item(), random.random(), np.random.rand()  # noqa: NPY002 - the stream seeded

    points = [(seed, batch, rank) for seed in (0, 1, 2**32 - 1) for batch in (0, 1, 5) for rank in (0, 1, 2)]
    first = [draw(*point) for point in points]
    torch.rand(3)
    assert [draw(*point) for point in points] == first
    for stream in zip(*first, strict=True):
        assert len(set(stream)) == len(points)


# ------------------------------------------------------------------------------------------- several processes
class Together:
    """A strategy of two processes, whose other one is given."""

    def __init__(self, other):
        self.other = other

    def broadcast(self, value):
        return self.other

    def reduce(self, value, reduce_op):
        assert reduce_op == "sum"
        return value + self.other


def test_all_processes_measure_next_at_the_same_step():
    callback = GradientDivergence(CHOICES)
    callback._account(SimpleNamespace(global_step=5, world_size=2, strategy=Together(37)))
    assert callback._next == 37
    callback._account(SimpleNamespace(global_step=5, world_size=1, strategy=None))
    assert callback._next == 15


def test_ties_of_all_processes_are_added_up(monkeypatch):
    logged = {}
    monkeypatch.setattr(sys.modules["nslightning.callbacks.tie_monitor"], "log_step", lambda _, m: logged.update(m))
    callback, module = TieMonitor(1), Module(Plain)
    other = torch.tensor([[30.0, 100.0], [0.0, 50.0]], dtype=torch.float64)
    callback._counts = {"b": Ties("relu", 0, 50), "a": Ties("relu", 10, 100)}
    trainer_of = SimpleNamespace(world_size=2, strategy=Together(other))
    callback.on_before_backward(trainer_of, module, torch.zeros(()))
    assert logged == {"ties/a": 0.2, "ties/b": 0.0, "ties/total": pytest.approx(40 / 300)}


def test_what_the_callback_cannot_see_is_said_once(tmp_path):
    """A reentrant checkpoint, and torch.vmap: subtracted, with the numbers of a network that hides nothing.

    The hidden part runs in sight, too, so that its parameters get gradients from two backwards of the checkpoint's.
    """

    class Hidden(LightningModule):
        def __init__(self, how):
            super().__init__()
            torch.manual_seed(0)
            self.how, self.net, self.head = how, nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 1)
            nn.init.zeros_(self.net[0].weight), nn.init.zeros_(self.net[0].bias)
            patch(self.net, Jacobians(relu=0.25))

        def training_step(self, batch, batch_idx):
            x = batch[0].flatten(1)[:, :4].requires_grad_()
            match self.how:
                case "reentrant":
                    h = checkpoint(self.net, x, use_reentrant=True)
                case "vmap":
                    h = torch.vmap(self.net)(x)
                case _:
                    h = self.net(x)
            return self.head(h + self.net(x + 1)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    measured, weights = {}, {}
    for how in ("shown", "reentrant", "vmap"):
        module = Hidden(how)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer(tmp_path / how, GradientDivergence({"one": Jacobians(relu=1.0)}, 1)).fit(module, data())
        measured[how], weights[how] = read(tmp_path / how), module.state_dict()
        assert len([w for w in said if "subtracts gradients" in str(w.message)]) == (how != "shown")
    assert set(measured["shown"]["method"]) == {"propagate"}
    for how in ("reentrant", "vmap"):
        assert set(measured[how].pop("method")) == {"subtract"}
        assert equal(weights[how], weights["shown"])
        pd.testing.assert_frame_equal(measured[how], measured["shown"].drop(columns="method"), rtol=1e-5)
    assert (measured["shown"]["l2"] > 0).any()


def dead_units():
    """Units that tie at every image, in a network of PyTorch's own functions."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(169, 4), nn.ReLU(), nn.Linear(4, 4))
    for p in net[1].parameters():
        nn.init.zeros_(p.data[:2])
    return net


def test_a_hook_of_a_parameter_that_clips_later_is_noticed(tmp_path):
    class Later(Module):
        def __init__(self):
            super().__init__(Plain)
            later = lambda g: g.clamp(-1e-4, 1e-4) if self.global_step >= 2 else g  # noqa: E731 # said once
            self.net.conv1.weight.register_hook(later)

    with pytest.warns(UserWarning, match="GradientDivergence subtracts gradients"):
        trainer(tmp_path, GradientDivergence({"one": Jacobians(relu=1.0)}, 1), precision="64-true").fit(Later(), data())
    rows = read(tmp_path)
    assert set(rows["method"][rows["step"] < 2]) == {"propagate"}
    assert set(rows["method"][rows["step"] >= 2]) == {"subtract"}


@pytest.mark.parametrize("where", ["tensor", "module", "parameter", "tensor of a network without custom functions"])
@pytest.mark.filterwarnings("ignore:GradientDivergence subtracts")  # which is what is tested
def test_a_hook_that_clips_is_noticed(where, tmp_path):
    class Clipping(Module):
        def __init__(self):
            super().__init__(Plain if "without" not in where else dead_units)
            clip = lambda g: g.clamp(-1e-4, 1e-4)  # noqa: E731 # said once
            if "without" in where:  # nothing but the first difference's check can notice it
                norm = lambda g: g / g.norm()  # noqa: E731 # of the live units' gradients, too
                self.net[1].register_forward_hook(lambda m, args, y: y.register_hook(norm) and None)
            elif where == "tensor":
                self.net.conv1.register_forward_hook(lambda m, args, y: y.register_hook(clip) and None)
            elif where == "module":
                self.net.conv1.register_full_backward_pre_hook(lambda m, g: (clip(g[0]),))
            else:
                self.net.conv1.weight.register_hook(clip)

    measured = {}
    for method in ("auto", "subtract"):
        watch = GradientDivergence({"one": Jacobians(relu=1.0)}, 1, method=method)
        trainer(tmp_path / method, watch, precision="64-true").fit(Clipping(), data())
        measured[method] = read(tmp_path / method)
    assert set(measured["auto"]["method"]) == {"subtract"}
    pd.testing.assert_frame_equal(measured["auto"], measured["subtract"])
