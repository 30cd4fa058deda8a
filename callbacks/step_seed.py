"""Random numbers that depend on the seed and the step alone, so that a resumed run draws them again."""

import random
from functools import cache
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nslightning.ops.autograd.selection import Selection
from nslightning.surgery import selections

__all__ = ["StepSeed"]


class StepSeed(Callback):
    """Seeds the random streams before every training batch from (seed, batch number, rank).

    Dropout, and the ``"random"`` choice of max pooling, then draw the same numbers whether or not the run was
    interrupted: no random state needs to be saved, and none is lost with a killed process.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._selections: list[Selection] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the model's own random streams."""
        self._selections = list(selections(pl_module).values())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed Python's, NumPy's and PyTorch's streams, and the model's own ones."""
        words = (self.seed, trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank)
        state = int(np.random.SeedSequence([w % 2**32 for w in words]).generate_state(1, np.uint64)[0])
        random.seed(state)
        np.random.seed(state % 2**32)  # noqa: NPY002 # the legacy stream is what user transforms draw from
        _seed_torch(state % 2**63)
        for selection in self._selections:
            selection.reseed(state % 2**63)


def _seed_torch(seed: int) -> None:
    """Seed PyTorch's streams as ``torch.manual_seed`` does, but for devices that are not in use.

    A seed that waits for a device to be used costs ``torch.manual_seed`` a millisecond of Python, in each step.
    """
    if _device_type() not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@cache
def _device_type() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type
