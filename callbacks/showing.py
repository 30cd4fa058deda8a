"""Records, tables and figures for every logger that can take them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

__all__ = ["show_figure", "show_file", "show_record", "show_table", "summarise"]


def show_record(trainer: Trainer, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Send a run's config and record to W&B, as its config; to MLflow, as a file; to TensorBoard, as text.

    Args:
        trainer: The trainer, on rank 0.
        config: The run's configuration as plain data.
        record: The content of ``run.json``.
    """
    content = json.loads(json.dumps({"config": config, "run": record}, default=str))
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.config.update(content, allow_val_change=True)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_dict(logger.run_id, content, "run.json")
        elif isinstance(logger, TensorBoardLogger):
            text = json.dumps(content, indent=2).replace("\n", "\n    ")  # a block of code in Markdown
            logger.experiment.add_text("run", f"    {text}", trainer.global_step)


def show_file(trainer: Trainer, name: str, file: Path) -> None:
    """Send a CSV file as a table, its numbers as numbers.

    Args:
        trainer: The trainer, on rank 0.
        name: Name of the table in the logger.
        file: The file; nothing is sent where there is none.
    """
    if not file.is_file():
        return
    with file.open(newline="", encoding="utf-8") as table:
        columns, *rows = list(csv.reader(table)) or [[]]
    show_table(trainer, name, columns, [[_number(cell) for cell in row] for row in rows])


def _number(cell: str) -> str | float:
    try:
        return float(cell)
    except ValueError:
        return cell


def show_table(trainer: Trainer, name: str, columns: Sequence[str], data: Sequence[Sequence[Any]]) -> None:
    """Send a table to W&B, MLflow and TensorBoard, which shows it as text.

    Args:
        trainer: The trainer, on rank 0.
        name: Name of the table in the logger.
        columns: The heads.
        data: The rows.
    """
    for logger in trainer.loggers if data else []:
        if isinstance(logger, WandbLogger):
            logger.log_table(name, columns=list(columns), data=[list(row) for row in data])
        elif isinstance(logger, MLFlowLogger):
            by_column = {column: [row[i] for row in data] for i, column in enumerate(columns)}
            logger.experiment.log_table(logger.run_id, by_column, f"{name}.json")
        elif isinstance(logger, TensorBoardLogger):
            lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
            lines += [" | ".join(map(str, row)) for row in data]
            logger.experiment.add_text(name, "\n".join(f"| {line} |" for line in lines), trainer.global_step)


def show_figure(trainer: Trainer, name: str, file: Path) -> None:
    """Send a figure to W&B, TensorBoard and MLflow.

    Args:
        trainer: The trainer, on rank 0.
        name: Name of the figure in the logger.
        file: A PNG.
    """
    for logger in trainer.loggers if file.is_file() else []:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(file)])
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(file), str(Path(name).parent))
        elif isinstance(logger, TensorBoardLogger):
            import numpy as np
            from PIL import Image

            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
            logger.experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")


def summarise(trainer: Trainer, name: str) -> None:
    """Have W&B keep the largest and the last value of what is logged below a name.

    Args:
        trainer: The trainer, on rank 0.
        name: The first part of the metrics' names.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.define_metric(f"{name}/*", summary="max,last")
