"""Logging from callbacks: to the loggers, on the step axis that Lightning itself uses, and to tables in the folder."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from nslightning.choices import choice_label
from nslightning.files import named_in_errors, replacing
from nslightning.runs import forget_from
from nslightning.surgery import selections

__all__ = [
    "append_rows",
    "begin_table",
    "choice_in_use",
    "interval",
    "log_step",
    "own_name",
    "run_folder",
    "start_table",
    "starts_at_first_step",
]


def run_folder(trainer: Trainer) -> Path:
    """Return the folder where a run keeps its files.

    Args:
        trainer: The trainer, on all ranks: Lightning broadcasts the folder.

    Returns:
        The run's folder, which may not exist yet.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def own_name(trainer: Trainer, callback: Callback, name: str) -> str:
    """The name of a callback's files and metrics, which another one of its class does not share.

    Args:
        trainer: The trainer that holds the callback.
        callback: The callback.
        name: Name of the first callback of the class.

    Returns:
        ``name``; ``name-2`` for the second callback of that class, and so on, in the order of the trainer's list.
    """
    alike = [c for c in trainer.callbacks if type(c) is type(callback)]  # type: ignore[attr-defined] # set in __init__
    place = next((i for i, c in enumerate(alike) if c is callback), 0)
    return f"{name}-{place + 1}" if place else name


def starts_at_first_step(trainer: Trainer, stage: str) -> bool:
    """Return whether a training is about to begin at its first step, before Lightning restores a checkpoint.

    Args:
        trainer: The trainer, in ``setup``.
        stage: The stage.

    Returns:
        True for a fit that does not go on with what this trainer trained before.
    """
    return stage == "fit" and trainer.global_step == 0


def start_table(trainer: Trainer, file: Path) -> None:
    """Make a CSV file ready for a training's rows: those that are written again go, those of another training stay.

    Args:
        trainer: The trainer, in ``on_train_start``: only now does Lightning know at which step it goes on.
        file: The table. One that an earlier training left in the same folder is kept under another name.
    """
    if trainer.is_global_zero:
        begin_table(file, trainer.global_step)


def choice_in_use(module: nn.Module) -> str:
    """The choice that trains, with which other choices are compared: the column ``reference`` of ``divergence.csv``.

    Args:
        module: A patched model, or one that contains patched ones.

    Returns:
        Such as ``"max_pool=minimal"``; ``"native"`` for stock PyTorch's. Where sites have several choices, all of them,
        as in ``"max_pool=minimal | native"``.
    """
    labels = [choice_label(selection.jacobians.to_dict()) for selection in selections(module).values()]
    return " | ".join(dict.fromkeys(labels))


def begin_table(file: Path, step: int) -> None:
    """Make a CSV file ready for the rows of a training that begins, or goes on, at a step.

    Args:
        file: The table. One that an earlier training left in the same folder is kept under another name.
        step: The first optimizer step; rows from it on are written again, and go.
    """
    if step or not file.exists():
        forget_from(file, step)
        return
    taken = {f.name for f in file.parent.glob(f"{file.stem}.*{file.suffix}")}
    name = next(n for i in range(1, len(taken) + 2) if (n := f"{file.stem}.{i}{file.suffix}") not in taken)
    file.rename(file.with_name(name))
    rank_zero_info(f"{file} is of an earlier training in that folder, and is kept as {name}")


def append_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file, with a header where it is new.

    Args:
        file: The file.
        rows: Values by column, the same columns each time; a NaN is written as ``nan``, None as nothing.
    """
    if not rows:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    _widen(file, columns)
    with named_in_errors(file), file.open("a", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        if table.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def _widen(file: Path, columns: Sequence[str]) -> None:
    """Give a table that an earlier version began the columns that it lacks, empty."""
    if not file.exists():
        return
    with file.open(newline="", encoding="utf-8") as table:
        reader = csv.DictReader(table, restval="")
        if not reader.fieldnames or list(reader.fieldnames) == list(columns):
            return
        rows = list(reader)
    with replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, columns, lineterminator="\n", restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def interval(every_n_steps: int, name: str = "every_n_steps") -> int:
    """Check the steps between two measurements.

    Args:
        every_n_steps: The number of steps.
        name: Name of the argument in the error.

    Returns:
        The same.

    Raises:
        ValueError: If it is no whole number from 1 on.
    """
    if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
        raise ValueError(f"{name} is a whole number of steps from 1 on; given {every_n_steps!r}")
    return every_n_steps


def log_step(trainer: Trainer, metrics: Mapping[str, float] | None) -> None:
    """Send values of the current training step to every logger, whatever ``log_every_n_steps`` says.

    They are in ``trainer.callback_metrics`` as well, so that a checkpoint or early stopping can monitor them.

    Args:
        trainer: The trainer, on all ranks.
        metrics: Values by name; only those of rank 0 count, and the others may pass None.
    """
    if trainer.world_size > 1:
        metrics = trainer.strategy.broadcast(metrics)
    values = dict(metrics or {})
    trainer.callback_metrics.update({name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)
