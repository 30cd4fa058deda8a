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
from nslightning.experiments.precision import PRECISIONS, computing
from nslightning.models.patched import at_least_float32
from nslightning.surgery import selections

__all__ = ["train"]

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
    if not isinstance(cell.learning_rate, float):
        raise ValueError(f"learning_rate={cell.learning_rate!r} is looked up when the grid is expanded")
    optimizer = _optimizer(cell, network)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cell.epochs) if cell.schedule == "cosine" else None
    scaler = _scaler(cell, where)
    splits = {"test": images.test} if images.shares_test else {"val": images.val, "test": images.test}
    rows: list[Row] = []
    tested: dict[str, float] = {}
    alive = True
    for epoch in range(cell.epochs):
        found: dict[str, float] = {"learning_rate": optimizer.param_groups[0]["lr"]}
        if alive:
            with _counting_zeros(network, cell.count_zeros, where) as zeros:
                trained, alive = _epoch(cell, network, optimizer, scaler, images.train, epoch)
            tested = {
                f"{name}_{what}": value
                for name, split in splits.items()
                for what, value in _test(cell, network, split).items()
            }
            found |= {"train_loss": trained[0], "train_accuracy": trained[1], **zeros}
        else:
            found |= {"train_loss": math.nan, "train_accuracy": math.nan}
        found |= tested | {"nan": float(not math.isfinite(found["train_loss"]))}
        rows += [{"epoch": epoch, "metric": name, "value": value} for name, value in found.items()]
        if schedule is not None:
            schedule.step()
    return Outcome(rows, provenance(cell, images, report, where))


def _optimizer(cell: TrainCell, network: nn.Module) -> torch.optim.Optimizer:
    if cell.optimizer == "adam":
        return torch.optim.Adam(network.parameters(), lr=float(cell.learning_rate))
    return torch.optim.SGD(
        network.parameters(), lr=float(cell.learning_rate), momentum=0.9, weight_decay=cell.weight_decay
    )


def _scaler(cell: TrainCell, device: torch.device) -> torch.amp.GradScaler:
    fresh = torch.amp.GradScaler(device.type, enabled=cell.precision == 24)
    return _shared_scalers.setdefault(device.type, fresh) if cell.shared_scaler and cell.precision == 24 else fresh


def _loss(cell: TrainCell, logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits if cell.half_loss else at_least_float32(logits), y)


def _epoch(
    cell: TrainCell,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    images: Images,
    epoch: int,
) -> tuple[tuple[float, float], bool]:
    """Take the steps of an epoch: (mean loss over batches, accuracy), and whether the weights are still numbers."""
    network.train()
    losses, correct, seen = [], torch.zeros((), dtype=torch.long, device=images.device), 0
    first = next(network.parameters())
    order = cell.seed if cell.shuffle else None
    batches = images.batches(cell.batch_size, PRECISIONS[cell.precision], epoch=epoch, seed=order)
    for step, (x, y) in enumerate(batches):
        if step % _CHECKED_EVERY == 0 and bool(first.isnan().any()):
            return (math.nan, math.nan), False
        optimizer.zero_grad()
        with computing(cell.precision, images.device):
            logits = network(x)
            loss = _loss(cell, logits, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
        correct += (logits.argmax(1) == y).sum()
        seen += len(y)
    return (float(torch.stack(losses).double().mean()), int(correct) / seen), not bool(first.isnan().any())


@torch.no_grad()
def _test(cell: TrainCell, network: nn.Module, images: Images) -> dict[str, float]:
    """Loss (mean over batches of 100, as published) and accuracy in evaluation mode."""
    network.eval()
    precision = 32 if cell.precision == 24 and cell.eval_float32 else cell.precision
    losses, correct = [], torch.zeros((), dtype=torch.long, device=images.device)
    for x, y in images.batches(cell.eval_batch_size, PRECISIONS[cell.precision]):
        with computing(precision, images.device):
            logits = network(x)
            losses.append(_loss(cell, logits, y) * len(y))
        correct += (logits.argmax(1) == y).sum()
    return {
        "loss": float(torch.stack(losses).double().sum()) / len(images),
        "accuracy": int(correct) / len(images),
    }


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
