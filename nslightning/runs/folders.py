"""Run folders: ``<output>/<name>/<number>``, one per run, found again when the run goes on."""

from __future__ import annotations

import os
from pathlib import Path

from nslightning.runs.checkpoints import checkpoints_in, is_whole
from nslightning.runs.record import ended

__all__ = ["folder_of_job", "last_run_folder", "new_run_folder"]

_SHARED = "NSLIGHTNING_RUN_FOLDER"  # how the processes that one launch starts agree on the folder
_JOB = "slurm_job"  # a file in the folder: the batch job that the run belongs to


def new_run_folder(output: str | Path, name: str) -> Path:
    """Make the folder of a new run; all processes of one launch get the same one.

    Args:
        output: The folder of all runs.
        name: The run's name.

    Returns:
        ``<output>/<name>/<number>``, the number one above the highest there is. Under a launcher that starts all
        processes by itself (``torchrun``, ``srun``), its id of the launch stands for the number.

    Raises:
        ValueError: If a launch on several machines has no name, or one that a finished run has.
    """
    if (shared := _from_parent()) is not None:
        return shared
    parent = Path(output) / name
    if (launch := _launch()) is not None:
        folder = parent / launch
        if ended(folder) == "finished":
            raise ValueError(
                f"{folder} holds a finished run: give this launch another name, as in torchrun --rdzv-id=NAME, or go "
                "on with that run by --ckpt_path=last"
            )
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


def _from_parent() -> Path | None:
    """The folder chosen by the process that started this one as a further rank; rank 0 chooses by itself."""
    shared = os.environ.get(_SHARED)
    return Path(shared) if shared and int(os.environ.get("LOCAL_RANK", "0")) > 0 else None


def _launch() -> str | None:
    """A name that all processes of one launch by ``torchrun`` or ``srun`` know; None elsewhere."""
    if run := os.environ.get("TORCHELASTIC_RUN_ID"):
        if run != "none":  # it gives no id unless asked to
            return run
        if os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE"):
            raise ValueError(
                "the processes on several machines do not know their common run folder: name the launch, as in "
                "torchrun --rdzv-id=NAME"
            )
        return f"torchrun-{os.getppid()}"
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in os.environ:
        # A job may hold several runs, each a step; an interactive shell is a step too, but has a single task.
        return f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    return None


def last_run_folder(output: str | Path, name: str) -> Path | None:
    """The newest run of that name that has a checkpoint, be it a damaged one.

    Args:
        output: The folder of all runs.
        name: The run's name.

    Returns:
        Its folder, or None where there is none.
    """
    if (shared := _from_parent()) is not None:
        return shared
    files = [(file, folder) for folder in Path(output, name).glob("*") for file in checkpoints_in(folder)]
    if not files:
        return None
    # A file that is cut short does not make its run the newest, unless there is no other.
    _, folder = max(files, key=lambda pair: (is_whole(pair[0]), pair[0].stat().st_mtime_ns))
    return _shared(folder)


def folder_of_job(output: str | Path, name: str) -> Path | None:
    """The folder that this SLURM job left when it was requeued, or ``torchrun`` when it started its processes again.

    Args:
        output: The folder of all runs.
        name: The run's name.

    Returns:
        The first run of that name that this job or launch began, that has a checkpoint and is not finished; None where
        there is none, or this is neither.
    """
    if (shared := _from_parent()) is not None:  # which is that of a new run, where the first process begins one
        return shared if checkpoints_in(shared) else None
    # Not by its count of restarts: on a machine that replaces one that failed, it is 0.
    if "TORCHELASTIC_RUN_ID" in os.environ and (launch := _launch()) is not None:
        folder = Path(output, name, launch)
        return _shared(folder) if ended(folder) != "finished" and checkpoints_in(folder) else None
    job = _job()
    if job is None:
        return None
    for file in sorted(Path(output, name).glob(f"*/{_JOB}")):
        folder = file.parent
        requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0 or any(folder.glob("hpc_ckpt_*.ckpt"))
        if file.read_text().strip() == job and requeued and ended(folder) != "finished" and checkpoints_in(folder):
            return _shared(folder)
    return None


def note_job(folder: Path) -> None:
    """Write down the batch job that a run belongs to, for :func:`folder_of_job`.

    Args:
        folder: The run's folder.
    """
    if (job := _job()) is not None:
        (folder / _JOB).write_text(f"{job}\n")


def _shared(folder: Path) -> Path:
    os.environ[_SHARED] = str(folder)
    return folder


def _job() -> str | None:
    """Return a name of this batch job and its step that stays when the job is requeued."""
    if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) and (task := os.environ.get("SLURM_ARRAY_TASK_ID")):
        job = f"{array}_{task}"
    elif (single := os.environ.get("SLURM_JOB_ID")) is not None and os.environ.get("SLURM_JOB_NAME") not in (
        "bash",
        "interactive",  # where Lightning, too, takes SLURM for absent
    ):
        job = single
    else:
        return None
    return f"{job}.{os.environ.get('SLURM_STEP_ID', '')}"
