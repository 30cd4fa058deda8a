"""The folder of a training: chosen, locked while it runs, left as a whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from nslightning import runs

__all__ = ["RunPlace", "rank"]


class RunPlace:
    """The folder in which a training keeps its files.

    Attributes:
        folder: The run's folder; None where nothing is trained.
        scratch: Whether the folder goes when the process ends.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.scratch = False
        self._made: Path | None = None
        self._lock: runs.RunLock | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def take_scratch(self) -> None:
        """Take a folder that is not kept."""
        self._temporary = tempfile.TemporaryDirectory()
        self.folder, self.scratch = Path(self._temporary.name), True

    def take(self, output: str, name: str, goes_on_in: Path | None) -> Path:
        """Take a new run's folder, or the one of a run that goes on.

        Args:
            output: The folder of all runs.
            name: The run's name.
            goes_on_in: The folder of the run that goes on.

        Returns:
            The folder.

        Raises:
            ValueError: If another process holds it.
            OSError: If it cannot be made.
        """
        if goes_on_in is None:
            self._made = runs.new_run_folder(output, name)
            runs.note_job(self._made)
        self.folder = folder = goes_on_in or self._made
        assert folder is not None
        if rank() == 0:
            self._lock = runs.RunLock(folder)
        return folder

    def go_on(self, program: str) -> str | None:
        """The command that goes on with this run.

        Args:
            program: The subcommand's name.

        Returns:
            The command; None where there is no checkpoint to go on from, or the disk does not say.
        """
        try:
            if self.folder is None or runs.last_checkpoint(self.folder) is None:
                return None
        except OSError:
            return None
        return _going_on(program, self.folder)

    def gone(self, error: BaseException, program: str) -> str | None:
        """Say that the run's folder went away while the run wrote into it, where that is why an error was raised.

        Args:
            error: The error.
            program: The subcommand's name.

        Returns:
            The message; None where the folder is there, or the error is another one.
        """
        if self.folder is None or self.scratch or not isinstance(error, FileNotFoundError):
            return None
        if runs.read_record(self.folder):
            return None
        return (
            f"the run's folder {self.folder} is gone: it was moved or deleted, or its disk went away\n"
            f"  once it is back, go on with: {_going_on(program, self.folder)}"
        )

    def leave(self, keep: bool) -> None:
        """Let go of the folder.

        Args:
            keep: Whether it has something to keep; a folder that was made for nothing is removed.
        """
        if self._lock is not None:
            self._lock.release()
        if self._temporary is not None:
            self._temporary.cleanup()
        if self._made is None or keep or rank() != 0:
            return
        shutil.rmtree(self._made, ignore_errors=True)
        for parent in list(self._made.parents)[:2]:  # <output>/<name>, <output>
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def _going_on(program: str, folder: Path) -> str:
    return f"nslightning {program} --config {folder / 'config.yaml'} --ckpt_path=last"


def rank() -> int:
    """The number of this process among those that train together."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)
