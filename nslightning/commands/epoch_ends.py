"""Does the work that Lightning leaves out when a training goes on from a checkpoint of an epoch's last step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nslightning import runs

__all__ = ["EpochEnds"]

_KEY = "nslightning_unfinished"  # of a checkpoint


class EpochEnds(Callback):
    """Makes a checkpoint that is written before a validation or an epoch is over go on with the rest of it.

    Lightning goes on behind a step's checkpoint as if the validation that follows the step, and the end of the epoch,
    had taken place; and no ``ReduceLROnPlateau`` moves in an epoch that was gone on with. With this callback such a
    training logs, validates and schedules as the one that was never stopped. A value that is
    logged as a mean over the epoch is then the mean over the steps since the checkpoint.

    It is the last of the callbacks but for the one that stops, so that it knows in which hook a checkpoint is written.

    In the checkpoint, it notes the rows that ``metrics.csv`` has of the last step and the metrics that schedules watch.
    """

    def __init__(self) -> None:
        self._moment: str | None = None  # "step" and "epoch", while the hooks of their ends run
        self._noted: dict[str, Any] = {}
        self._missing: str | None = None  # what is made up for: a "validation", or an "epoch"'s end alone

    def on_train_batch_start(self, *_: Any) -> None:
        """A step begins."""
        self._moment = "step"

    def on_train_batch_end(self, *_: Any) -> None:
        """Note that a checkpoint saved from now on counts the whole step."""
        self._moment = None

    def on_train_epoch_start(self, *_: Any) -> None:
        """The last epoch is over."""
        self._moment = None

    def on_train_end(self, *_: Any) -> None:
        """The last epoch is over."""
        self._moment = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the rows that the checkpoint counts, and note those that are missing."""
        files = [logger for logger in trainer.loggers if isinstance(logger, runs.MetricsFile)]
        if self._moment is not None:
            for file in files:
                file.log_ahead(trainer, epoch=self._moment == "epoch")
        if trainer.state.fn != "fit" or "loops" not in checkpoint:
            return
        noted: dict[str, Any] = {"moment": self._moment}
        if self._moment == "step":
            noted["missing"] = _open_again(trainer, checkpoint["loops"]["fit_loop"])
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            noted["rows"] = next((file.rows_of(step) for file in files), None)
            noted["step"] = step
        metrics = trainer.callback_metrics
        noted["metrics"] = {key: float(metrics[key]) for key in _watched(trainer) if key in metrics}
        checkpoint[_KEY] = noted

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read the note."""
        self._noted = checkpoint.get(_KEY, {})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch that lacks its end alone has no step, and no validation, left to do."""
        self._moment, self._missing = None, self._noted.get("missing")
        if self._missing == "epoch":
            trainer.fit_loop.epoch_loop.val_loop._has_run = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the tables and the schedules to where the checkpoint was written."""
        noted, self._noted = self._noted, {}
        for key, value in noted.get("metrics", {}).items():
            trainer.callback_metrics.setdefault(key, torch.tensor(value, dtype=torch.float64))
        if self._missing is not None and noted["rows"] is not None and trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, runs.MetricsFile):
                    logger.keep_rows_of(noted["step"], noted["rows"])
        if noted.get("moment") == "epoch" and _ready(trainer):
            completed = trainer.fit_loop.epoch_progress.current
            completed.completed -= 1  # the schedules count the epoch that is over
            trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            completed.completed += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the mark that led back to this validation."""
        if self._missing == "validation":
            self._missing = None
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the schedules that watch a metric move in an epoch that was gone on with, too."""
        self._moment = "epoch"
        if self._missing == "epoch":
            self._missing, steps = None, trainer.fit_loop.epoch_loop
            steps.val_loop._has_run = False
            steps.on_iteration_done()  # it had none, after which it would have ceased to be one that is gone on with
        if trainer.fit_loop.restarting and _ready(trainer):
            trainer.fit_loop.restarting = False


def _watched(trainer: Trainer) -> list[str]:
    """The metrics that schedules watch."""
    return [str(c.monitor) for c in trainer.lr_scheduler_configs if c.reduce_on_plateau]


def _ready(trainer: Trainer) -> bool:
    """Return whether there are schedules that watch metrics, and those metrics."""
    watched = _watched(trainer)
    return bool(watched) and all(key in trainer.callback_metrics for key in watched)


def _open_again(trainer: Trainer, loops: dict[str, Any]) -> str | None:
    """Change the progress that a step's checkpoint holds, so that Lightning does the work that comes after the step.

    Args:
        trainer: The trainer, at the end of a step.
        loops: The progress of its loops, changed in place.

    Returns:
        The event that follows: ``"validation"``, ``"epoch"`` for an epoch's end without one, or None for another step.
    """
    epoch, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    progress = loops["epoch_loop.batch_progress"]
    done = progress["current"]["processed"] == progress["current"]["ready"]
    if not done or fetcher is None:  # in the middle of a step, where an exception has one saved
        return None
    validates = epoch._should_check_val_fx(fetcher)
    if not validates and not progress["is_last_batch"]:
        return None
    for count in (progress["total"], progress["current"]):
        count["completed"] = count["processed"]
    if not validates:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        return "epoch"
    validation = loops["epoch_loop.val_loop.batch_progress"]
    # A validation of which one batch was begun is one that Lightning goes back to.
    validation["total"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    validation["current"] |= {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    return "validation"
