"""A run's ``metrics.csv``, which a resumed run goes on with."""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from nslightning.files import named_in_errors, replacing

__all__ = ["MetricsFile", "forget_from"]


def forget_from(file: Path, step: int) -> None:
    """Drop the rows of a CSV file that a resumed run writes again, and a last row that a killed run left unfinished.

    Args:
        file: A CSV file with a column ``step``; nothing happens where it does not exist.
        step: The first step that is run again.
    """
    if not file.exists():
        return
    with file.open(newline="") as opened:
        lines = [line for line in opened if line.endswith("\n")]
    if not lines:
        file.unlink()
        return
    header, *rows = csv.reader(lines)
    _replace(file, [header, *(row for row in rows if float(row[header.index("step")]) < step)])


def _replace(file: Path, rows: Iterable[Sequence[str]]) -> None:
    with replacing(file) as partial, partial.open("w", newline="") as opened:
        csv.writer(opened, lineterminator="\n").writerows(rows)


class _Writer(_ExperimentWriter):
    """Goes on with the ``metrics.csv`` that is there, where Lightning's own would delete it."""

    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        if file.exists():
            with file.open(newline="") as opened:
                self.metrics_keys = next(csv.reader(opened), [])

    def save(self) -> None:
        with named_in_errors(self.metrics_file_path):
            super().save()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        file = Path(self.metrics_file_path)
        with file.open(newline="") as opened:
            rows = list(csv.DictReader(opened, restval=""))
        _replace(file, [fieldnames, *([row.get(key, "") for key in fieldnames] for row in rows)])


class MetricsFile(CSVLogger):
    """Writes a run's ``metrics.csv``; a resumed run goes on with the same file.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        super().__init__(str(folder.parent.parent), folder.parent.name, folder.name, flush_logs_every_n_steps=1)
        self._ahead: str | None = None
        self._step: int | None = None
        self._rows = 0

    def log_ahead(self, trainer: Trainer, *, epoch: bool = False) -> None:
        """Write what was logged before Lightning does, which does it after a checkpoint that counts it.

        A process that is killed in between would leave a checkpoint that counts a step, or an epoch, without its row.

        Args:
            trainer: The trainer, at the end of a step or of an epoch.
            epoch: Whether it is the end of an epoch.
        """
        loggers, connector, steps = trainer.loggers, trainer._logger_connector, trainer.fit_loop.epoch_loop
        trainer.loggers = [self]
        try:
            if epoch:
                steps._batches_that_stepped -= 1  # as Lightning does: the row is one of the epoch's last step
                connector.log_metrics(connector.metrics["log"])
                steps._batches_that_stepped += 1
            else:
                connector.update_train_step_metrics()
        finally:
            trainer.loggers = loggers

    def rows_of(self, step: int) -> int:
        """The rows that were written of a step, if it is the last one that has any.

        Args:
            step: The step, as in the table.

        Returns:
            Their number.
        """
        return self._rows if self._step == step else 0

    def keep_rows_of(self, step: int, rows: int) -> None:
        """Drop the rows of a step that a checkpoint does not know, since they are written again.

        Args:
            step: The last step that the checkpoint counts, as in the table.
            rows: The number that :meth:`rows_of` returned when the checkpoint was written.
        """
        file = Path(self.experiment.metrics_file_path)
        if not file.exists():
            return
        with file.open(newline="") as opened:
            header, *lines = csv.reader(opened)
        place = header.index("step")
        of_step = [i for i, line in enumerate(lines) if float(line[place]) == step]
        dropped = set(of_step[rows:])
        if dropped:
            _replace(file, [header, *(line for i, line in enumerate(lines) if i not in dropped)])
        self._step, self._rows = step, min(rows, len(of_step))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row; the same row, a second time in a row, is Lightning's own after :meth:`log_ahead`.

        Args:
            metrics: Values by name.
            step: The step that they are of.
        """
        row = repr((step, sorted(metrics.items())))
        if row != self._ahead:
            super().log_metrics(dict(metrics), step)
            self._rows = self._rows + 1 if step == self._step else 1
            self._step = step
        self._ahead = row

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _Writer(log_dir=self.log_dir)
        return self._experiment

    def save(self) -> None:
        """Write what was logged; hyperparameters are in the run's ``config.yaml``."""
        self.experiment.save()

    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """Nothing: see ``config.yaml``."""
