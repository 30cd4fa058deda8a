"""Training runs, many and small: one lean loop that takes the same steps as the LightningModule.

Lightning's per-step work (hooks, logging, progress) costs 1.4 ms on the machine that this was written on: 11 % of a
LeNet-5 step of 128 images, 40 % of a 3x256 MLP's. Checkpoints and resuming are the grid's, cell by cell; nothing else
of the Trainer is missed. That the weights are those of ``Trainer.fit`` bit for bit is tested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.experiments.cells import Outcome, Row, TrainCell
from nslightning.experiments.data import Images
from nslightning.experiments.networks import build, loaded, provenance
from nslightning.experiments.optimizers import make_optimizer
from nslightning.experiments.precision import PRECISIONS, computing
from nslightning.models.patched import at_least_float32
from nslightning.surgery import selections

__all__ = ["Run", "evaluate", "train"]

_CHECKED_EVERY = 50  # steps between looks for weights that are NaN
_shared_scalers: dict[str, torch.amp.GradScaler] = {}  # of `shared_scaler`, by device


def train(cell: TrainCell, device: str) -> Outcome:
    """Train one network and test it after every epoch.

    A run whose weights are NaN stays so: it ends there, and its later epochs repeat what the test gave.

    Args:
        cell: The settings.
        device: Where.

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
    for epoch in range(cell.epochs):
        found: dict[str, float] = {"learning_rate": run.optimizer.param_groups[0]["lr"]}
        if run.alive:
            with _counting_zeros(network, cell.count_zeros, where) as zeros:
                found["train_loss"], found["train_accuracy"] = run.epoch(images.train, epoch)
            tested = {
                f"{name}_{what}": value
                for name, split in splits.items()
                for what, value in evaluate(cell, network, split).items()
            }
            found |= zeros
        else:
            found |= {"train_loss": math.nan, "train_accuracy": math.nan}
        found |= tested | {"nan": float(not math.isfinite(found["train_loss"]))}
        rows += [{"epoch": epoch, "metric": name, "value": value} for name, value in found.items()]
        run.end_epoch()
    return Outcome(rows, provenance(cell, images, report, where))


class Run:
    """A network in training, with its optimizer, schedule and loss scaler.

    Args:
        cell: The settings.
        network: The patched network.
        device: Where it is.

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
        self.optimizer = make_optimizer(cell.optimizer, network, cell.learning_rate, options)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR
        last = cell.schedule_epochs or cell.epochs
        self.schedule = cosine(self.optimizer, last) if cell.schedule == "cosine" else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=cell.precision == 24)
        if cell.shared_scaler and cell.precision == 24:
            self.scaler = _shared_scalers.setdefault(device.type, self.scaler)
        self._watched = next(network.parameters())

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            x: Images, in the network's dtype.
            y: Labels.

        Returns:
            The loss, and how many images were classified correctly.
        """
        self.optimizer.zero_grad()
        with computing(self.cell.precision, self.device):
            logits = self.network(x)
            loss = _loss(self.cell, logits, y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), (logits.argmax(1) == y).sum()

    def epoch(self, images: Images, epoch: int) -> tuple[float, float]:
        """Take the steps of an epoch, or those until the weights are NaN: one NaN makes them all so.

        Args:
            images: The training images.
            epoch: Which.

        Returns:
            The mean of the batches' losses, and the accuracy; NaN if the weights became so.
        """
        self.network.train()
        taken, seen = [], 0
        order = self.cell.seed if self.cell.shuffle else None
        batches = images.batches(self.cell.batch_size, PRECISIONS[self.cell.precision], epoch=epoch, seed=order)
        for i, (x, y) in enumerate(batches):
            if i % _CHECKED_EVERY == 0 and self._dead():
                return math.nan, math.nan
            taken.append(self.step(x, y))
            seen += len(y)
        self._dead()
        losses, correct = (torch.stack(values) for values in zip(*taken, strict=True))
        return float(losses.double().mean()), int(correct.sum()) / seen

    def end_epoch(self) -> None:
        """Step the schedule."""
        if self.schedule is not None:
            self.schedule.step()

    def _dead(self) -> bool:
        self.alive = self.alive and not bool(self._watched.isnan().any())
        return not self.alive


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
    found = []
    for x, y in images.batches(cell.eval_batch_size, PRECISIONS[cell.precision]):
        with computing(precision, images.device):
            logits = network(x)
            loss = _loss(cell, logits, y)
        found.append((loss.double() * len(y), (logits.argmax(1) == y).sum()))
    losses, correct = (torch.stack(values) for values in zip(*found, strict=True))
    return {"loss": float(losses.sum()) / len(images), "accuracy": int(correct.sum()) / len(images)}


@contextmanager
def _counting_zeros(network: nn.Module, wanted: bool, device: torch.device) -> Iterator[dict[str, Any]]:
    """Count the zeros at ReLU inputs inside the block: ``{"zeros": ..., "relu_calls": ...}``, filled at its end."""
    found: dict[str, Any] = {}
    if not wanted:
        yield found
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
        yield found
    finally:
        selection.observer = None
    found |= {"zeros": float(zeros), "relu_calls": float(calls)}
