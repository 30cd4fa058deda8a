"""Counts how often training evaluates an operation where its Jacobian is not unique."""

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from nslightning._torch import is_compiled
from nslightning.probes import Ties, counting
from nslightning.surgery import selections

from .measurements import interval, log_step

__all__ = ["TieMonitor"]


class TieMonitor(Callback):
    """Logs the fraction of ties that the training forward meets, per site.

    Under DDP the counts of all processes are added up. Training is bit for bit what it is without the callback.

    Logged every ``every_n_steps`` optimizer steps:

    ================== ===============================================================
    ``ties/<site>``    tied evaluations over all evaluations of that site
    ``ties/total``     the same over all sites
    ================== ===============================================================

    Args:
        every_n_steps: Optimizer steps between two measurements.

    Raises:
        ValueError: If the interval is not positive.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = interval(every_n_steps)
        self._measured_step = -1
        self._counts: dict[str, Ties] | None = None
        self._open = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model without sites, and a compiled one, whose activations cannot be watched."""
        if not selections(pl_module):
            raise ValueError("TieMonitor needs a patched model: call `patch(model, Jacobians())` before training")
        if any(map(is_compiled, pl_module.modules())):
            raise ValueError("TieMonitor watches activations as they are computed: train with --model.compile=false")
        self._measured_step = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start counting."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._measured_step:
            self._measured_step = step
            self._counts = self._open.enter_context(counting(pl_module))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop counting, and log."""
        if self._counts is None:
            return
        self._open.close()
        counts, self._counts = self._counts, None
        sites = sorted(counts)
        pairs = [[counts[s].tied, counts[s].total] for s in sites]
        table = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
        if trainer.world_size > 1:
            table = trainer.strategy.reduce(table.to(pl_module.device), reduce_op="sum").cpu()
        fractions = (table[:, 0] / table[:, 1]).tolist()
        total = (table[:, 0].sum() / table[:, 1].sum()).item() if sites else 0.0
        log_step(trainer, {f"ties/{site}": f for site, f in zip(sites, fractions, strict=True)} | {"ties/total": total})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop counting also where the step returned no loss."""
        self._open.close()
        self._counts = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._open.close()
