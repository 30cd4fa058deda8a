"""Training runs, many and small: one lean loop that takes the same steps as the LightningModule.

Lightning's per-step work (hooks, logging, progress) costs 1.4 ms on the machine that this was written on: 11 % of a
LeNet-5 step of 128 images, 40 % of a 3x256 MLP's. Checkpoints and resuming are the grid's, cell by cell; nothing else
of the Trainer is missed. That the weights are those of ``Trainer.fit`` bit for bit is tested.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.experiments.cells import Outcome, Row, TrainCell
from nslightning.experiments.data import Images
from nslightning.experiments.networks import build, loaded, provenance
from nslightning.experiments.optimizers import make_optimizer
from nslightning.experiments.partial import Partial
from nslightning.experiments.precision import PRECISIONS, computing
from nslightning.models.captured import CapturedStep
from nslightning.models.fused import fused
from nslightning.models.patched import at_least_float32
from nslightning.surgery import selections

__all__ = ["Run", "evaluate", "train"]

_CAPTURING = ("cuda",)  # devices that have graphs
_CHECKED_EVERY = 50  # steps between looks for weights that are NaN
_shared_scalers: dict[str, torch.amp.GradScaler] = {}  # of `shared_scaler`, by device


def train(cell: TrainCell, device: str, kept: Path | None = None) -> Outcome:
    """Train one network and test it after every epoch.

    A run whose weights are NaN stays so: it ends there, and its later epochs repeat what the test gave.

    Args:
        cell: The settings.
        device: The device to train on.
        kept: File for the state of an unfinished training; a training goes on from it, with the bits of one that was
            not interrupted.

    Returns:
        Per epoch (from 0): ``train_loss`` and ``train_accuracy`` (means over the epoch, while training),
        ``test_loss``, ``test_accuracy``, the same for ``val`` where images are held out, ``nan`` (1 where the training
        loss is not finite), ``learning_rate``, and ``zeros`` and ``relu_calls`` if they are counted.
    """
    where = torch.device(device)
    images = loaded(cell, where)
    network, report = build(cell, images, where, cell.init)
    run = Run(cell, network, where)
    splits = {"test": images.test} if images.shares_test else {"val": images.val, "test": images.test}
    rows: list[Row] = []
    tested: dict[str, float] = {}
    first, partial = 0, Partial(kept)
    if (state := partial.load()) is not None:
        first, rows, tested = state["epoch"], state["rows"], state["tested"]
        run.load_state_dict(state["run"])

    def keep(epoch: int) -> None:
        if partial.due:
            partial.save({"epoch": epoch, "rows": rows, "tested": tested, "run": run.state_dict()})

    for epoch in range(first, cell.epochs):
        measured: dict[str, float] = {"learning_rate": run.optimizer.param_groups[0]["lr"]}
        if run.alive:
            with _counting_zeros(network, cell.count_zeros, where) as zeros:
                # A training that counts zeros is saved between epochs only: the counts are not part of the state.
                within = None if cell.count_zeros else functools.partial(keep, epoch)
                measured["train_loss"], measured["train_accuracy"] = run.epoch(images.train, epoch, within)
            tested = {
                f"{name}_{metric}": value
                for name, split in splits.items()
                for metric, value in evaluate(cell, network, split).items()
            }
            measured |= zeros
        else:
            measured |= {"train_loss": math.nan, "train_accuracy": math.nan}
        measured |= tested | {"nan": float(not math.isfinite(measured["train_loss"]))}
        rows += [{"epoch": epoch, "metric": name, "value": value} for name, value in measured.items()]
        run.end_epoch()
        keep(epoch + 1)
    return Outcome(rows, provenance(cell, images, report, where))


class Run:
    """A network in training, with its optimizer, schedule and loss scaler.

    Args:
        cell: The settings.
        network: The patched network.
        device: The network's device.

    Attributes:
        alive: Whether its weights are numbers.
    """

    def __init__(self, cell: TrainCell, network: nn.Module, device: torch.device) -> None:
        if isinstance(cell.learning_rate, str):
            raise ValueError(f"learning_rate={cell.learning_rate!r} is looked up when the grid is expanded")
        self.cell, self.network, self.device, self.alive = cell, network, device, True
        options = cell.optimizer_options or {}
        if cell.optimizer == "sgd":
            options = {"momentum": cell.momentum, "weight_decay": cell.weight_decay}
        self.optimizer = fused(make_optimizer(cell.optimizer, network, cell.learning_rate, options))
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR
        last = cell.schedule_epochs or cell.epochs
        self.schedule = cosine(self.optimizer, last) if cell.schedule == "cosine" else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=cell.precision == 24)
        if cell.shared_scaler and cell.precision == 24:
            self.scaler = _shared_scalers.setdefault(device.type, self.scaler)
        self._watched = next(network.parameters())
        self._gradients_of: Callable[[Tensor, Tensor], tuple[Tensor, ...]] = self._differentiate
        if device.type in _CAPTURING and _repeats(cell, network):
            self._gradients_of = CapturedStep(network, self._differentiate)
        self._taken: list[tuple[Tensor, Tensor]] = []  # of the epoch that has begun
        self._seen = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on.

        Returns:
            Tensors, numbers and containers of them.
        """
        streams = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            streams["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "alive": self.alive,
            "taken": [torch.stack(values) for values in zip(*self._taken, strict=True)],
            "seen": self._seen,
            "streams": streams,
            "choices": {name: s.generator(self.device).get_state() for name, s in selections(self.network).items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where the state was taken.

        Args:
            state: A dict that :meth:`state_dict` returned.
        """
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.alive, self._seen = state["alive"], state["seen"]
        self._taken = list(zip(*(values.to(self.device).unbind() for values in state["taken"]), strict=True))
        torch.set_rng_state(state["streams"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["streams"]["cuda"], self.device)
        for name, selection in selections(self.network).items():
            selection.generator(self.device).set_state(state["choices"][name])

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            x: Images, in the network's dtype.
            y: Labels.

        Returns:
            The loss, and how many images were classified correctly.
        """
        self.optimizer.zero_grad()
        loss, correct = self._gradients_of(x, y)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss, correct

    def _differentiate(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Form the scaled loss' gradients, and return what :meth:`step` returns."""
        with computing(self.cell.precision, self.device):
            logits = self.network(x)
            loss = _loss(self.cell, logits, y)
        self.scaler.scale(loss).backward()
        return loss.detach(), (logits.argmax(1) == y).sum()

    def epoch(self, images: Images, epoch: int, after_step: Callable[[], None] | None = None) -> tuple[float, float]:
        """Take the steps of an epoch, or those until the weights are NaN: one NaN makes them all so.

        Args:
            images: The training images.
            epoch: Which. One that a loaded state is in the middle of is gone on with.
            after_step: Called between two steps.

        Returns:
            The mean of the batches' losses, and the accuracy; NaN if the weights became so.
        """
        self.network.train()
        order = self.cell.seed if self.cell.shuffle else None
        dtype, begun = PRECISIONS[self.cell.precision], len(self._taken)
        batches = images.batches(self.cell.batch_size, dtype, epoch=epoch, seed=order, start=begun)
        for i, (x, y) in enumerate(batches, begun):
            if i % _CHECKED_EVERY == 0 and self._dead():
                self._taken, self._seen = [], 0
                return math.nan, math.nan
            self._taken.append(self.step(x, y))
            self._seen += len(y)
            if after_step is not None:
                after_step()
        self._dead()
        losses, correct = (torch.stack(values) for values in zip(*self._taken, strict=True))
        seen, self._taken, self._seen = self._seen, [], 0
        return float(losses.double().mean()), int(correct.sum()) / seen

    def end_epoch(self) -> None:
        """Step the schedule."""
        if self.schedule is not None:
            self.schedule.step()

    def _dead(self) -> bool:
        self.alive = self.alive and not bool(self._watched.isnan().any())
        return not self.alive


def _repeats(cell: TrainCell, network: nn.Module) -> bool:
    """Return whether a step makes the same launches each time: random choices and arithmetics do not."""
    choices = [choice for s in selections(network).values() for choice in dataclasses.astuple(s.jacobians)]
    return not ("random" in choices or cell.computed.random_rounding or cell.computed.order == "random_order")


def _loss(cell: TrainCell, logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits if cell.half_loss else at_least_float32(logits), y)


@torch.no_grad()
def evaluate(cell: TrainCell, network: nn.Module, images: Images) -> dict[str, float]:
    """Classify a split in evaluation mode.

    Args:
        cell: The settings.
        network: The network.
        images: The split.

    Returns:
        ``loss`` and ``accuracy``, means over the images.
    """
    network.eval()
    precision = 32 if cell.precision == 24 and cell.eval_float32 else cell.precision
    batches_seen = []
    for x, y in images.batches(cell.eval_batch_size, PRECISIONS[cell.precision]):
        with computing(precision, images.device):
            logits = network(x)
            loss = _loss(cell, logits, y)
        batches_seen.append((loss.double() * len(y), (logits.argmax(1) == y).sum()))
    losses, correct = (torch.stack(values) for values in zip(*batches_seen, strict=True))
    return {"loss": float(losses.sum()) / len(images), "accuracy": int(correct.sum()) / len(images)}


@contextmanager
def _counting_zeros(network: nn.Module, wanted: bool, device: torch.device) -> Iterator[dict[str, Any]]:
    """Count the zeros at ReLU inputs inside the block: ``{"zeros": ..., "relu_calls": ...}``, filled at its end."""
    counts: dict[str, Any] = {}
    if not wanted:
        yield counts
        return
    zeros, calls = torch.zeros((), dtype=torch.long, device=device), 0

    def observe(site: str, operation: Any, call: Any) -> None:
        nonlocal zeros, calls
        if operation.name == "relu":
            zeros += call.x.numel() - torch.count_nonzero(call.x.detach())
            calls += call.x.numel()

    (selection,) = selections(network).values()
    selection.observer = observe
    try:
        yield counts
    finally:
        selection.observer = None
    counts |= {"zeros": float(zeros), "relu_calls": float(calls)}
