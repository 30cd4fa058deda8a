"""Run folders: ``<output>/<name>/<number>``, one per run, found again when the run goes on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

__all__ = ["MetricsFile", "environment", "last_checkpoint", "last_run_folder", "new_run_folder"]

_SHARED = "NSLIGHTNING_RUN_FOLDER"  # how the processes that one launch starts agree on the folder


def new_run_folder(output: str | Path, name: str) -> Path:
    """Make the folder of a new run; all processes of one launch get the same one.

    Args:
        output: Where runs are kept.
        name: The run's name.

    Returns:
        ``<output>/<name>/<number>``, the number one above the highest there is. Under a cluster's launcher, which
        starts all processes by itself, the job's id stands for the number.
    """
    if shared := os.environ.get(_SHARED):
        return Path(shared)
    parent = Path(output) / name
    for variable in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        if (job := os.environ.get(variable, "none")) != "none" and "SLURM_JOB_NAME" not in _interactive():
            folder = parent / job
            folder.mkdir(parents=True, exist_ok=True)
            return folder
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [int(f.name) for f in parent.iterdir() if f.name.isdigit()]
        folder = parent / f"{max(numbers, default=0) + 1:03d}"
        try:
            folder.mkdir()
        except FileExistsError:  # another run, started at the same moment, was first
            continue
        os.environ[_SHARED] = str(folder)
        return folder


def _interactive() -> set[str]:
    """Slurm's variables are also set in an interactive shell, where each command is a run of its own."""
    return {"SLURM_JOB_NAME"} if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive") else set()


def last_run_folder(output: str | Path, name: str) -> Path | None:
    """The newest run of that name that has a checkpoint.

    Args:
        output: Where runs are kept.
        name: The run's name.

    Returns:
        Its folder, or None where there is none.
    """
    checkpoints = [c for f in Path(output, name).glob("*") if (c := last_checkpoint(f)) is not None]
    newest = max(checkpoints, key=lambda c: c.stat().st_mtime, default=None)
    if newest is None:
        return None
    folder = newest.parent.parent
    os.environ[_SHARED] = str(folder)
    return folder


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of a run that was written last.

    Args:
        folder: The run's folder.

    Returns:
        The file, or None where there is none.
    """
    return max(Path(folder, "checkpoints").glob("*.ckpt"), key=lambda c: c.stat().st_mtime, default=None)


class _Writer(_ExperimentWriter):
    """Goes on with the ``metrics.csv`` that is there, where Lightning's own would delete it."""

    def _check_log_dir_exists(self) -> None:
        if Path(self.metrics_file_path).exists():
            self.metrics_keys = list(pd.read_csv(self.metrics_file_path, nrows=0).columns)

    def forget_from(self, step: int) -> None:
        """Drop the rows of ``step`` and later, which a resumed run writes again."""
        file = Path(self.metrics_file_path)
        if file.exists():
            rows = pd.read_csv(file, dtype=str)
            rows[rows["step"].astype(float) < step].to_csv(file, index=False)


class MetricsFile(CSVLogger):
    """Writes a run's ``metrics.csv``; a resumed run goes on with the same file.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        super().__init__(str(folder.parent.parent), folder.parent.name, folder.name, flush_logs_every_n_steps=20)

    @property
    @rank_zero_experiment
    def experiment(self) -> _Writer:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _Writer(log_dir=self.log_dir)
        return self._experiment

    def save(self) -> None:
        """Write what was logged; hyperparameters are in the run's ``config.yaml``."""
        self.experiment.save()

    def log_hyperparams(self, params: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Nothing: see ``config.yaml``."""


def environment() -> dict[str, Any]:
    """What a number depends on besides the config: code, libraries, machine.

    Returns:
        The command, the git commit of the code (with ``+changes`` where the tree differs from it; None outside a
        repository), versions of Python and the libraries, and the CUDA devices.
    """
    import torch

    versions = {}
    for package in ("nslightning", "torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy", "wandb"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": " ".join(sys.argv),
        "git": _commit(Path(__file__).parent) or _commit(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
    }


def _commit(folder: Path) -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ":/") else "")
    except (OSError, subprocess.SubprocessError):
        return None
