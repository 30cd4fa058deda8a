"""Measures the speed of a training, and how long it waits for its data."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .measurements import log_step

__all__ = ["Performance"]


class Performance(Callback):
    """Logs the speed of a training every ``log_every_n_steps``, over the steps since the last time.

    ``nslightning fit`` adds one by itself. Validation, checkpoints and other work between two steps count for nothing.
    No step waits for a device: the device is at work while the host runs ahead, and where it falls behind, the host
    waits in the next step that shows a value.

    ========================== ===========================================================================
    ``perf/images_per_second`` items of the batches, of all processes, over the time of their steps
    ``perf/data_wait``         share of that time in which the host waited for the next batch
    ``perf/memory_gib``        most memory so far: of tensors on the CUDA device, else of the process
    ========================== ===========================================================================
    """

    def __init__(self) -> None:
        self._items, self._waited, self._seconds = 0, 0.0, 0.0
        self._ended: float | None = None  # when the last step ended; None where other work followed
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._items, self._waited, self._seconds, self._ended = 0, 0.0, 0.0, None
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note how long the batch took to come."""
        self._began = time.perf_counter()
        if self._ended is not None:
            self._waited += self._began - self._ended
            self._seconds += self._began - self._ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, and log where the trainer logs."""
        self._items += _items(batch) * trainer.world_size
        self._ended = time.perf_counter()
        self._seconds += self._ended - self._began
        if not trainer.loggers or not trainer._logger_connector.should_update_logs:
            return
        values = {
            "perf/images_per_second": self._items / self._seconds,
            "perf/data_wait": self._waited / self._seconds,
        }
        if (peak := _peak_memory(pl_module.device)) is not None:
            values["perf/memory_gib"] = peak / 2**30
        self._items, self._waited, self._seconds = 0, 0.0, 0.0
        log_step(trainer, values if trainer.is_global_zero else None)
        self._ended = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the end of the last batch: no step follows."""
        self._ended = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the end of the last batch: no step follows."""
        self._ended = None


def _items(batch: Any) -> int:
    """The length of a batch's first tensor."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def _peak_memory(device: torch.device) -> int | None:
    """Bytes; None where the system does not count them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # which has no such count
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
