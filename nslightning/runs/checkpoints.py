"""The checkpoints of a run: written whole, listed, and checked for damage."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from nslightning.files import replacing, utf8

__all__ = ["WholeCheckpoints", "checkpoints_in", "is_whole", "last_checkpoint", "read_checkpoint"]


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the newest first.

    Args:
        folder: The run's folder.

    Returns:
        Those in ``checkpoints``, and those that Lightning writes before a SLURM job is requeued.
    """
    folder = Path(folder)
    files = [*folder.glob("checkpoints/[!.]*.ckpt"), *folder.glob("hpc_ckpt_*.ckpt")]
    return sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True)


def is_whole(file: Path) -> bool:
    """Return whether a checkpoint was written to its end.

    Args:
        file: A file, or the folder of a sharded checkpoint.

    Returns:
        True if it was.
    """
    # The directory of the zip archive that `torch.save` writes stands at its end.
    return file.is_dir() or zipfile.is_zipfile(file)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of a run that was written last; one that was cut short, by a full disk say, does not count.

    Args:
        folder: The run's folder.

    Returns:
        The file, or None where there is none.
    """
    return next(filter(is_whole, checkpoints_in(folder)), None)


def read_checkpoint(file: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """The checkpoint's content, its tensors left on disk.

    Args:
        file: The checkpoint.
        weights_only: False also makes what is not plain data, which runs code that the file names.

    Returns:
        The content; of a sharded checkpoint nothing.

    Raises:
        ValueError: If the file is damaged, or not the checkpoint of a run.
    """
    if file.is_dir():
        return {}
    if not utf8(file.absolute()):
        raise ValueError(f"{file} has a name that is no UTF-8, and PyTorch opens no such file: rename it")
    reason = _damage(file)
    content: Any = None
    if reason is None:
        try:
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=weights_only is not False)
        except Exception as error:  # unpickling raises anything
            unsafe = "weights_only" in str(error)
            trust = "it holds more than plain data; if you trust it, add --weights_only=false"
            reason = trust if unsafe else f"{type(error).__name__}: {str(error).splitlines()[0]}"
            if unsafe:
                raise ValueError(f"{file} is not loaded: {reason}") from None
    if reason is not None:
        raise ValueError(f"{file} is damaged, or not a checkpoint at all: {reason}") from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{file} is not a checkpoint of a run: it has no state_dict")
    return content


def _damage(file: Path) -> str | None:
    """Return in which way a checkpoint's bytes differ from those that were written; None where they do not."""
    if not zipfile.is_zipfile(file):
        return f"its end is missing ({file.stat().st_size:,} bytes are there)"
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        return str(error)
    return None if bad is None else f"its part {bad} has changed since it was written"


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there: a process killed meanwhile leaves the old one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: Its content.
            path: The file; an address with a protocol is left to Lightning.
            storage_options: As in Lightning: to be left out.

        Raises:
            OSError: If the file cannot be written; the old file stays as it was.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as partial:
            try:
                with partial.open("wb") as file:
                    torch.save(checkpoint, file)
            except RuntimeError as error:  # how torch reports what the system refused
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
        _make_newest(Path(path))


def _make_newest(file: Path) -> None:
    """Give a checkpoint a time after those of the run's others: the clock may have been set back since."""
    others = [other.stat().st_mtime_ns for other in checkpoints_in(file.parent.parent) if other != file]
    if others and file.stat().st_mtime_ns <= (newest := max(others)):
        os.utime(file, ns=(newest + 1, newest + 1))
