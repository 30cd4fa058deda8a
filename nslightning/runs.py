"""Run folders: ``<output>/<name>/<number>``, one per run, found again when the run goes on."""

from __future__ import annotations

import csv
import os
import platform
import shlex
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger

__all__ = ["MetricsFile", "environment", "forget_from", "last_checkpoint", "last_run_folder", "new_run_folder"]

_SHARED = "NSLIGHTNING_RUN_FOLDER"  # how the processes that one launch starts agree on the folder


def new_run_folder(output: str | Path, name: str) -> Path:
    """Make the folder of a new run; all processes of one launch get the same one.

    Args:
        output: Where runs are kept.
        name: The run's name.

    Returns:
        ``<output>/<name>/<number>``, the number one above the highest there is. Under a launcher that starts all
        processes by itself (``torchrun``, ``srun``), its id of the launch stands for the number.
    """
    if (shared := _from_parent()) is not None:
        return shared
    parent = Path(output) / name
    if (launch := _launch()) is not None:
        (parent / launch).mkdir(parents=True, exist_ok=True)
        return parent / launch
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


def _from_parent() -> Path | None:
    """The folder chosen by the process that started this one as a further rank; rank 0 chooses by itself."""
    shared = os.environ.get(_SHARED)
    return Path(shared) if shared and int(os.environ.get("LOCAL_RANK", "0")) > 0 else None


def _launch() -> str | None:
    """A name that all processes of one launch by ``torchrun`` or ``srun`` know; None elsewhere."""
    if run := os.environ.get("TORCHELASTIC_RUN_ID"):
        return run if run != "none" else f"torchrun-{os.getppid()}"  # it gives no id unless asked to
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in os.environ:
        # A job may hold several runs, each a step; an interactive shell is a step too, but has a single task.
        return f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    return None


def last_run_folder(output: str | Path, name: str) -> Path | None:
    """The newest run of that name that has a checkpoint.

    Args:
        output: Where runs are kept.
        name: The run's name.

    Returns:
        Its folder, or None where there is none.
    """
    if (shared := _from_parent()) is not None:
        return shared
    checkpoints = [c for f in Path(output, name).glob("*") if (c := last_checkpoint(f)) is not None]
    newest = max(checkpoints, key=lambda c: c.stat().st_mtime, default=None)
    if newest is None:
        return None
    folder = newest.parent.parent
    os.environ[_SHARED] = str(folder)
    return folder


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of a run that was written last; one that was cut short, by a full disk say, does not count.

    Args:
        folder: The run's folder.

    Returns:
        The file, or None where there is none.
    """
    # The directory of the zip archive that `torch.save` writes stands at its end.
    whole = (c for c in Path(folder, "checkpoints").glob("*.ckpt") if zipfile.is_zipfile(c))
    return max(whole, key=lambda c: c.stat().st_mtime_ns, default=None)


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
    """Write a CSV file at once: whoever is killed meanwhile leaves the old one."""
    new = file.with_name(f".{file.name}.new")
    with new.open("w", newline="") as opened:
        csv.writer(opened, lineterminator="\n").writerows(rows)
    new.replace(file)


class _Writer(_ExperimentWriter):
    """Goes on with the ``metrics.csv`` that is there, where Lightning's own would delete it."""

    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        if file.exists():
            with file.open(newline="") as opened:
                self.metrics_keys = next(csv.reader(opened), [])

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


def environment() -> dict[str, Any]:
    """What a number depends on besides the config: code, libraries, machine.

    Returns:
        The command, the git commit of the code (with ``+changes`` where the tree differs from it; None outside a
        repository), versions of Python and the libraries, the CUDA devices, and what the arithmetic depends on
        (:func:`nslightning.arithmetic.record`).
    """
    import torch

    from nslightning.arithmetic import record

    versions: dict[str, str | None] = {}
    for package in ("nslightning", "torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy", "wandb"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__  # which also says for which device it was built
    program = Path(sys.argv[0]).name  # not where it is installed
    return {
        "command": shlex.join(["nslightning" if program == "__main__.py" else program, *sys.argv[1:]]),
        "git": _commit(Path(__file__).parent) or _commit(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "arithmetic": record(),
    }


def _commit(folder: Path) -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ":/") else "")
    except (OSError, subprocess.SubprocessError):
        return None
