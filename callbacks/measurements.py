"""Logging from callbacks: to the loggers, on the step axis that Lightning itself uses, and to tables in the folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch import Trainer

__all__ = ["append_rows", "interval", "log_step", "run_folder"]


def run_folder(trainer: Trainer) -> Path:
    """Where a run keeps its files.

    Args:
        trainer: The trainer, on all ranks: Lightning broadcasts the folder.

    Returns:
        The run's folder, which may not exist yet.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def append_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file, with a header where it is new.

    Args:
        file: The file.
        rows: Values by column, the same columns each time.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(file, mode="a", header=not file.exists(), index=False, na_rep="nan")


def interval(every_n_steps: int) -> int:
    """Check the steps between two measurements.

    Args:
        every_n_steps: What was given.

    Returns:
        The same.

    Raises:
        ValueError: If it is not positive.
    """
    if every_n_steps < 1:
        raise ValueError(f"every_n_steps is a number of steps from 1 on; given {every_n_steps}")
    return every_n_steps


def log_step(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Send values of the current training step to every logger, whatever ``log_every_n_steps`` says.

    Args:
        trainer: The trainer, on rank 0 or on all ranks; loggers write on rank 0 only.
        metrics: Values by name.
    """
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)
