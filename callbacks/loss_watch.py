"""Watches whether the loss of a training stays finite, and whether its steps are taken."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .measurements import starts_at_first_step

__all__ = ["LossWatch"]


_LOOKED_AT = 256  # losses that are looked at together


class LossWatch(Callback):
    """Says at the end of a training that its loss was not finite, from which step on, and how to find the origin.

    It says as well when fp16's loss scale left out half of the steps or more. The losses are kept where they are
    and looked at many at a time, on their device. The result is read once, at the end: no step computes
    anything, or waits, for it.
    """

    def __init__(self) -> None:
        self._step = 0
        self._kept: list[tuple[int, Tensor]] = []
        self._first: Tensor | None = None
        self._count: Tensor | None = None
        self._seen = 0
        self._began, self._taken = 0, 0
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier training."""
        if starts_at_first_step(trainer, stage):
            self._kept, self._first, self._count, self._seen = [], None, None, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the steps that are taken, where some may be left out."""
        self._began, self._taken = trainer.global_step, 0
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            self._hooks = [optimizer.register_step_post_hook(self._count_step) for optimizer in trainer.optimizers]

    def _count_step(self, *_: Any) -> None:
        self._taken += 1

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizers as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Note the step that this batch belongs to."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Keep the loss."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            return
        self._kept.append((self._step, loss.detach()))
        self._seen += 1
        if len(self._kept) == _LOOKED_AT:
            self._look()

    def _look(self) -> None:
        """Count the losses that are not finite among those kept, and note the first one's step, on their device."""
        if not self._kept:
            return
        steps, losses = zip(*self._kept, strict=True)
        self._kept = []
        bad = ~torch.isfinite(torch.stack([loss.sum() for loss in losses] if losses[0].dim() else losses))
        count = bad.sum()
        never = torch.iinfo(torch.int64).max
        first = torch.where(bad, torch.tensor(steps, device=bad.device), never).min()
        self._count = count if self._count is None else self._count + count
        self._first = first if self._first is None else torch.minimum(self._first, first)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it."""
        self._look()
        asked = trainer.global_step - self._began
        if self._hooks and (left_out := asked - self._taken) * 2 >= asked > 0:
            rank_zero_warn(
                f"fp16's loss scale left out {left_out:,} of {asked:,} steps, whose gradients overflowed; "
                "--trainer.precision=bf16-mixed has the range of 32 bits, and a longer training finds its scale"
            )
        if self._first is None or self._count is None or not (count := int(self._count)):
            return
        rank_zero_warn(
            f"the loss was not finite on {count:,} of {self._seen:,} batches, at step {int(self._first):,} first; "
            "--trainer.callbacks+=NonFiniteGuard stops there and names the module in which it began"
        )
