"""Whether the loss of a training stayed finite."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from .measurements import begins_anew

__all__ = ["LossWatch"]


class LossWatch(Callback):
    """Says at the end of a training that its loss was not finite, from which step on, and how to find the origin.

    It counts on the device, and reads the count once, at the end: no step waits for it.
    """

    def __init__(self) -> None:
        self._step = 0
        self._first: Tensor | None = None
        self._count: Tensor | None = None
        self._seen = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier training."""
        if begins_anew(trainer, stage):
            self._first, self._count, self._seen = None, None, 0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Note the step that this batch belongs to."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Count, without a look at the value."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            return
        bad = ~torch.isfinite(loss.detach()).all()
        if self._first is None or self._count is None:
            self._first, self._count = (
                torch.full_like(bad, -1, dtype=torch.int64),
                torch.zeros_like(bad, dtype=torch.int64),
            )
        self._first = torch.where(bad & (self._first < 0), self._step, self._first)
        self._count = self._count + bad
        self._seen += 1

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it."""
        if self._first is None or self._count is None or not (count := int(self._count)):
            return
        rank_zero_warn(
            f"the loss was not finite on {count:,} of {self._seen:,} batches, at step {int(self._first):,} first; "
            "--trainer.callbacks+=NonFiniteGuard stops there and names the module in which it began"
        )
