"""Adds to the Trainer of a config: callbacks, loggers, half precision on a CPU, whole files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from nslightning import runs
from nslightning.callbacks import ArithmeticSetting, LossWatch, Performance, RunRecord, StepSeed
from nslightning.commands.run_callbacks import Bar
from nslightning.commands.trainer_options import runs_on_cpu

__all__ = ["for_a_training", "for_an_evaluation", "listed", "whole_checkpoints", "with_half_precision_on_a_cpu"]


def listed(value: Any) -> list[Any]:
    """One object, several or none, as a list."""
    if isinstance(value, list):
        return list(value)
    return [value] if value not in (None, True, False) else []


def _common(trainer: Namespace, arithmetic: str) -> list[Callback]:
    """The config's callbacks, with the arithmetic and a progress bar where the config has none."""
    callbacks: list[Callback] = listed(trainer.callbacks)
    if not any(isinstance(c, ArithmeticSetting) for c in callbacks):
        callbacks.insert(0, ArithmeticSetting(arithmetic))
    if trainer.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
        callbacks.append(Bar())
    return callbacks


def for_an_evaluation(trainer: Namespace, arithmetic: str) -> None:
    """Change a Trainer's arguments for a command that trains nothing, and saves nothing.

    Args:
        trainer: The arguments, objects made; changed in place.
        arithmetic: Value of ``--arithmetic``.
    """
    trainer.callbacks = [c for c in _common(trainer, arithmetic) if not isinstance(c, Checkpoint)]
    trainer.enable_checkpointing = False


def for_a_training(trainer: Namespace, arithmetic: str, seed: int, record: RunRecord, folder: Path | None) -> None:
    """Change a Trainer's arguments for a run: seeds per step, the record, metrics in its folder.

    Args:
        trainer: The arguments, objects made; changed in place.
        arithmetic: Value of ``--arithmetic``.
        seed: The run's seed.
        record: Writes what the run is.
        folder: The run's folder.
    """
    callbacks = _common(trainer, arithmetic)
    performance = [] if any(isinstance(c, Performance) for c in callbacks) else [Performance()]
    trainer.callbacks = [StepSeed(seed), *callbacks, *performance, LossWatch(), record]
    if folder is None or trainer.logger is False or trainer.fast_dev_run:
        return
    trainer.logger = [runs.MetricsFile(folder), *(x for x in listed(trainer.logger) if isinstance(x, Logger))]
    for logger in trainer.logger:
        if isinstance(logger, WandbLogger) and logger._wandb_init.get("anonymous") is None:
            # Lightning always passes it on, and wandb warns that it is deprecated.
            logger._wandb_init.pop("anonymous", None)


def with_half_precision_on_a_cpu(trainer: Namespace) -> None:
    """Lightning falls back to bfloat16 there, from a time when CPUs had no fp16 autocast.

    Args:
        trainer: The arguments, changed in place.
    """
    if trainer.precision in ("16-mixed", "16", 16) and runs_on_cpu(trainer.accelerator):
        trainer.plugins = [*listed(trainer.plugins), MixedPrecision("16-mixed", "cpu")]
        trainer.precision = None


def whole_checkpoints(trainer: Trainer) -> None:
    """Have checkpoints written whole or not at all, where Lightning's own way is in force.

    Args:
        trainer: The trainer.
    """
    strategy = trainer.strategy
    plain = type(strategy.checkpoint_io) is TorchCheckpointIO
    if plain and isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        strategy.checkpoint_io = runs.WholeCheckpoints()
