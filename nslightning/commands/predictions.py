"""``predictions.csv``: a row for each input, written as the batches come."""

from __future__ import annotations

import csv
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from nslightning.files import replacing

__all__ = ["PredictionsFile"]


class PredictionsFile(BasePredictionWriter):
    """Writes the likeliest class of each input and its probability; the file is there once all of them are.

    Args:
        file: The CSV file, with the columns ``image``, ``class`` and ``probability``.

    Attributes:
        count: The rows written.

    Example:
        >>> PredictionsFile("runs/a/001/predictions.csv").interval.on_batch
        True
    """

    def __init__(self, file: str | Path) -> None:
        super().__init__(write_interval="batch")
        self.file, self.count = Path(file), 0
        self._open = ExitStack()
        self._rows: Any = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the file beside its place."""
        partial = self._open.enter_context(replacing(self.file))
        self._rows = csv.writer(
            self._open.enter_context(partial.open("w", newline="", encoding="utf-8")), lineterminator="\n"
        )
        self._rows.writerow(["image", "class", "probability"])

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Tensor,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the rows of one batch of probabilities, of shape (N, classes)."""
        probability, label = prediction.max(1)
        for row in zip(label.tolist(), probability.tolist(), strict=True):
            self._rows.writerow([self.count, *row])
            self.count += 1

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the file into its place."""
        self._open.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no file, and the one of an earlier command as it was."""
        self._open.__exit__(type(exception), exception, exception.__traceback__)
