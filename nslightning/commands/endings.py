"""What a command says when it does not end well, and its exit status: every kind of error is known here."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

__all__ = ["Ending", "ending_of", "root_of"]

# jsonargparse's accounts of all the types that it tried, around the error that says why.
_WRAPPED = ("Does not validate against any", "Problem with given class_path", "Parser key", "Problem instantiating")

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "it may not be written",
    errno.EPERM: "it may not be written",
    errno.ENOTDIR: "a part of its path is a file",
    errno.EEXIST: "there is a file of that name",
    errno.EIO: "the disk does not answer",
}


class Ending:
    """How a command ends.

    Args:
        status: The exit status: 1 where something outside the call is at fault, 2 where the call is.
        message: What is wrong and what to do, in one line or a few.
    """

    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message


def root_of(error: BaseException) -> BaseException:
    """The error that says what was wrong, without the accounts around it.

    Args:
        error: What was raised.

    Returns:
        The error itself, or its innermost cause.
    """
    while str(error).startswith(_WRAPPED) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def ending_of(error: BaseException, *, began: bool, go_on: str | None = None) -> Ending | None:
    """How a command ends that raised an error.

    Args:
        error: What it raised.
        began: Whether the work had begun. What goes wrong before is a mistake in the call.
        go_on: The command that goes on with what was done, where there is one.

    Returns:
        Status and message; None for what is a bug: its traceback is wanted.
    """
    cause = root_of(error)
    kinds: tuple[Callable[[BaseException, bool], Ending | None], ...] = (
        _data, _disk, _own, _wandb, _memory, _network, _mistake, _callback,
    )  # fmt: skip
    for kind in kinds:
        if (ending := kind(cause, began)) is not None:
            if go_on is not None and ending.status == 1:
                ending.message += f"\n  go on with: {go_on}"
            return ending
    return None


def _data(error: BaseException, began: bool) -> Ending | None:
    """Data that are missing or damaged."""
    from nslightning.data import DataError

    if not isinstance(error, DataError):
        return None
    return Ending(1, str(error).rpartition("DataError: ")[2].strip())  # a worker puts its traceback before the message


def _disk(error: BaseException, began: bool) -> Ending | None:
    """A file that could not be written."""
    if not isinstance(error, OSError) or error.errno not in _DISK:
        return None
    where = error.filename2 or error.filename
    reason = _DISK[error.errno]
    if where is None:
        where = "a file"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST):
        part = next((p for p in (Path(str(where)), *Path(str(where)).parents) if p.is_file()), Path(str(where)))
        where, reason = str(part), "it is a file, and a folder is needed there"
    call = error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO) and not began
    hint = "; --output=FOLDER says where runs are kept" if call else ""
    return Ending(2 if call else 1, f"{where} cannot be written: {reason}{hint}")


def _own(error: BaseException, began: bool) -> Ending | None:
    """What a callback of ours was asked to find, and found."""
    from nslightning.callbacks import NonFiniteError

    return Ending(1, str(error)) if isinstance(error, NonFiniteError) else None


def _wandb(error: BaseException, began: bool) -> Ending | None:
    """Weights & Biases does not take the key, or does not answer."""
    if not type(error).__module__.startswith("wandb"):
        return None
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    way = "set WANDB_MODE=offline to train without an account, or log in with `wandb login`"
    return Ending(1 if began else 2, f"W&B: {first.strip()}\n  {way}")


def _memory(error: BaseException, began: bool) -> Ending | None:
    """The device's memory is used up."""
    import torch

    if not isinstance(error, torch.OutOfMemoryError):
        return None
    first = str(error).splitlines()[0]
    return Ending(1, f"{first}\n  a smaller --data.batch_size, or --trainer.accumulate_grad_batches, needs less")


def _network(error: BaseException, began: bool) -> Ending | None:
    """Something could not be fetched."""
    name = f"{type(error).__module__}.{type(error).__name__}"
    if not name.startswith(("urllib.error.", "requests.", "httpx.", "httpcore.", "huggingface_hub.", "socket.")):
        return None
    first = next((line for line in str(error).splitlines() if line.strip()), name)
    return Ending(1, f"something could not be fetched: {first}")


def _mistake(error: BaseException, began: bool) -> Ending | None:
    """What was given is not allowed, or not there."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from nslightning.surgery import UnreachedError

    kinds = (FileNotFoundError, ImportError, ValueError, MisconfigurationException)
    if isinstance(error, UnreachedError):  # which the first step may find
        return Ending(2, str(error))
    if began or not isinstance(error, kinds):
        return None
    named = _raised_in(error.__traceback__)
    return Ending(2, f"{named}: {error}" if named and not _is_ours(named) else str(error))


def _callback(error: BaseException, began: bool) -> Ending | None:
    """Whatever a callback, a logger or a plugin raises before the first step: what it was given does not suit it."""
    if began or not isinstance(error, Exception):
        return None
    named = _raised_in(error.__traceback__)
    # Of our own ones it is a bug.
    if named is None or named.startswith("nslightning."):
        return None
    return Ending(2, f"{named}: {type(error).__name__}: {error}")


def _is_ours(name: str) -> bool:
    return name.startswith(("nslightning.", "lightning."))


def _raised_in(traceback: TracebackType | None) -> str | None:
    """The callback, logger or plugin in whose method an error was raised; None where it was elsewhere."""
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, Precision
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler

    name = None
    while traceback is not None:
        code, local = traceback.tb_frame.f_code, traceback.tb_frame.f_locals
        owner = local.get("self")
        if isinstance(owner, (Callback, Logger, Profiler, CheckpointIO, ClusterEnvironment, Precision)):
            name = f"{type(owner).__module__}.{type(owner).__qualname__} ({code.co_name})"
        traceback = traceback.tb_next
    return name
