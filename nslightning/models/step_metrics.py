"""Training metrics at the steps that show them: what a step does not show is not computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule, Trainer

__all__ = ["StepMetrics"]

_SHOWN_EVERY = 0.25  # seconds between two values of a progress bar
_LIBRARIES = ("lightning.", "pytorch_lightning.", "nslightning.")  # whose callbacks are known


class StepMetrics:
    """Computes and logs a training step's metrics where something reads them.

    Readers are the loggers, every ``log_every_n_steps``; a progress bar, a few times a second; checkpoints, early
    stopping and schedulers that watch a training metric by its name; and callbacks that may look at any step: the
    user's own, and those of this package that set ``reads_step_metrics``. Where there is one of the last two kinds,
    each step is logged. The last step of an epoch and of a training is logged always. On a device, a step that shows
    nothing computes nothing for it and waits for nothing.
    """

    def __init__(self) -> None:
        self._next_shown = 0.0
        self._unlogged: Callable[[], Mapping[str, Tensor]] | None = None

    def step(self, module: LightningModule, metrics: Callable[[], Mapping[str, Tensor]]) -> None:
        """Log the metrics of a step if it shows them; inside ``training_step``.

        Args:
            module: Logs.
            metrics: Computes the values by name.
        """
        trainer = module._trainer
        if trainer is None or self._is_shown(trainer):
            self._unlogged = None
            _log(module, metrics())
        else:
            self._unlogged = metrics

    def step_ends(self, module: LightningModule) -> None:
        """Log the metrics after all where a callback has just ended the training: its last step shows them.

        Args:
            module: Logs, in ``on_train_batch_end``.
        """
        unlogged, self._unlogged = self._unlogged, None
        if unlogged is not None and module.trainer.should_stop:
            with _as_training_step(module.trainer.lightning_module):
                _log(module, unlogged())

    def _is_shown(self, trainer: Trainer) -> bool:
        loop = trainer.fit_loop.epoch_loop
        if (
            trainer.fast_dev_run  # type: ignore[attr-defined] # set in Trainer.__init__
            or trainer._logger_connector.should_update_logs
            or loop.batch_progress.is_last_batch
            or 0 < trainer.max_steps <= loop.global_step + 1
            or _reads_each_step(trainer)
        ):
            return True
        if trainer.progress_bar_callback is None or (now := time.monotonic()) < self._next_shown:
            return False
        self._next_shown = now + _SHOWN_EVERY
        return True


def _log(module: LightningModule, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        module.log(name, value, prog_bar=True)


@contextmanager
def _as_training_step(module: LightningModule) -> Iterator[None]:
    """Have Lightning keep what is logged where it keeps what the training step logs, not a second time beside it."""
    hook, module._current_fx_name = module._current_fx_name, "training_step"
    try:
        yield
    finally:
        module._current_fx_name = hook


def _reads_each_step(trainer: Trainer) -> bool:
    """Return whether something of a trainer may read the metrics of any training step."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # set in Trainer.__init__
        if getattr(callback, "reads_step_metrics", not type(callback).__module__.startswith(_LIBRARIES)):
            return True
        if str(getattr(callback, "monitor", None)).startswith("train/"):
            return True
    return any(str(config.monitor).startswith("train/") for config in trainer.lr_scheduler_configs)
