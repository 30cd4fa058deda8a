"""Turns every kind of error into the message and the exit status of a command."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from nslightning.commands.stopping import Stopped
from nslightning.commands.streams import NO_READER, reader_is_gone
from nslightning.commands.wandb_run import CORE_IS_GONE

__all__ = ["CallError", "Ending", "ended", "ending_of", "root_of"]

# jsonargparse's accounts of all the types that it tried, around the error that says why.
_WRAPPED = ("Does not validate against any", "Problem with given class_path", "Parser key", "Problem instantiating")

#: The end of the sentence about a file or a folder, by the system's error. For those in ``_PLACE`` the call named the
#: wrong place; for those in ``_DISK`` the disk is at fault.
_PLACE = {
    errno.EROFS: "cannot be written: the disk is read-only",
    errno.EACCES: "may not be read or written by this user",
    errno.EPERM: "may not be read or written by this user",
    errno.ENOTDIR: "is a file, and a folder is needed there",
    errno.EEXIST: "is a file, and a folder is needed there",
    errno.EISDIR: "is a folder, and a file is needed there",
    errno.ENAMETOOLONG: "has a longer name than the disk takes",
}
_DISK = {
    errno.ENOSPC: "cannot be written: the disk is full",
    errno.EDQUOT: "cannot be written: the disk quota is used up",
    errno.EIO: "cannot be read or written: the disk does not answer",
    errno.EFBIG: "cannot be written: the file is larger than the system allows (ulimit -f)",
}
#: What a mounted network says, and a socket too: without a file's name it is a socket's.
_OF_SOCKETS = (errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT)
_NETWORK = "cannot be read or written: the network's file system went away"
_DISK |= dict.fromkeys((errno.ESTALE, *_OF_SOCKETS), _NETWORK)


class CallError(ValueError):
    """The command was called wrongly: exit status 2, also where other errors have another one."""


class Ending:
    """The ending of a command: its exit status and its message.

    Args:
        status: The exit status: 1 where something outside the call is at fault, 2 where the call is.
        message: One line or a few: the fault, and the way out.
    """

    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message


def ended(
    program: str,
    work: Callable[[], int],
    *,
    go_on: str = "nothing was written",
    output: str = "--output=FOLDER",
    fault: int = 2,
) -> int:
    """Do a command's work, and say in a line or two how it ended where it did not end well.

    Args:
        program: Name of the command, which begins the message.
        work: The function to run; it returns the exit status.
        go_on: End of the message after Ctrl-C or SIGTERM: the way to go on. The exception's notes say where it stopped.
        output: The option that names where the command writes.
        fault: The exit status for what is refused and is no :class:`CallError`: 1 for a command whose model or data
            are more often at fault than its call.

    Returns:
        The exit status: the work's own; else 1 where something outside the call is at fault, 2 where the call is, 130
        after Ctrl-C and 143 after SIGTERM.

    Raises:
        Exception: An error of no known kind: it is a bug, and its traceback is wanted.

    Example:
        >>> ended("nslightning x", lambda: 0)
        0
    """
    try:
        return work()
    except KeyboardInterrupt as stop:
        by = stop.by if isinstance(stop, Stopped) else "Ctrl-C"
        where = "".join(f" {note}" for note in getattr(stop, "__notes__", ()))
        print(f"\n{program}: stopped by {by}{where}; {go_on}", file=sys.stderr)
        return stop.status if isinstance(stop, Stopped) else 130
    except Exception as error:
        ending = ending_of(error, began=False, output=output)
        if ending is None or ending.status == NO_READER:
            raise
        print(f"{program}: error: {ending.message}", file=sys.stderr)
        return ending.status if isinstance(error, CallError) or ending.status != 2 else fault


def root_of(error: BaseException) -> BaseException:
    """The error that says what was wrong, without the accounts around it.

    Args:
        error: The error as it was raised.

    Returns:
        The error itself, or its innermost cause.
    """
    while str(error).startswith(_WRAPPED) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def ending_of(
    error: BaseException, *, began: bool, go_on: str | None = None, output: str = "--output=FOLDER"
) -> Ending | None:
    """Return the ending of a command that raised an error.

    Args:
        error: The error that the command raised.
        began: Whether the work had begun. An error before that is a mistake in the call.
        go_on: The command that goes on with what was done, where there is one.
        output: The option that names where the command writes.

    Returns:
        Status and message; None for an error of no known kind, which is a bug.
    """
    cause = root_of(error)
    kinds: tuple[Callable[[BaseException, bool], Ending | None], ...] = (
        _data, _system, _reader, _worker, _peer, _own, _wandb, _memory, _network, _model, _mistake, _callback, _late,
        _frozen,
    )  # fmt: skip
    for kind in kinds:
        if (ending := kind(cause, began)) is not None:
            if go_on is not None and ending.status in (1, NO_READER):
                ending.message += f"\n  go on with: {go_on}"
            elif isinstance(cause, OSError) and cause.errno in _PLACE and not began:
                ending.message += f"; {output} names another place to write to"
            return ending
    return None


def _data(error: BaseException, began: bool) -> Ending | None:
    """Data that are missing or damaged."""
    if "nslightning.data.verify" not in sys.modules:  # it imports torch
        return None
    from nslightning.data.verify import DataError

    if not isinstance(error, DataError):
        return None
    return Ending(1, str(error).rpartition("DataError: ")[2].strip())  # a worker puts its traceback before the message


def _system(error: BaseException, began: bool) -> Ending | None:
    """The ending of a run whose file or folder the system refuses, also where a library then fails to tidy up."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    error = next((e for e in chain if isinstance(e, OSError) and e.errno in _DISK), error)
    if not isinstance(error, OSError) or error.errno not in (*_PLACE, *_DISK):
        return None
    where = error.filename2 or error.filename
    if where is None and error.errno in _OF_SOCKETS:
        return None
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and where is not None:
        where = next((p for p in (Path(str(where)), *Path(str(where)).parents) if p.is_file()), where)
    reason = (_PLACE | _DISK)[error.errno]
    return Ending(1 if began or error.errno in _DISK else 2, f"{'a file' if where is None else where} {reason}")


def _reader(error: BaseException, began: bool) -> Ending | None:
    """The program that read the output, such as `head`, has ended."""
    if not isinstance(error, BrokenPipeError) or not reader_is_gone():
        return None
    return Ending(NO_READER, "the program that read its output has ended")


def _worker(error: BaseException, began: bool) -> Ending | None:
    """A process that reads data, which the system ended or which does not answer."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader"):
        return None
    if "timed out" in text:
        longer = "--data.timeout=SECONDS waits longer, and 0 without end"
        return Ending(1, f"a process that reads the data does not answer ({text.rstrip('.')}); {longer}")
    if "killed by signal" in text or "exited unexpectedly" in text:
        first = text.splitlines()[0].rstrip(". ")
        fewer = "where memory ran out, fewer processes need less: --data.workers"
        return Ending(1, f"a process that reads the data was ended from outside ({first}); {fewer}")
    return None


def _peer(error: BaseException, began: bool) -> Ending | None:
    """Another process of the training ended or hangs, and this one noticed when they were to add up or to agree."""
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    silent = (
        "Timed out waiting",
        "timeout caused pair closure",
        "clients joined",
        "collective operation timeout",
        "client socket has timed out",
    )
    if not isinstance(error, RuntimeError):
        return None
    for signs, reason in (
        (gone, "ended; its own message says why, unless the system killed it"),
        (silent, "does not answer: it hangs, or its machine cannot be reached"),
    ):
        for line in str(error).splitlines():
            if any(sign in line for sign in signs):
                return Ending(1, f"another process of this training {reason} ({line.strip()})")
    return None


def _own(error: BaseException, began: bool) -> Ending | None:
    """Values that are not finite, which a callback of ours was asked to look for."""
    if "lightning.pytorch" not in sys.modules:
        return None
    from nslightning.callbacks import NonFiniteError

    return Ending(1, str(error)) if isinstance(error, NonFiniteError) else None


def _wandb(error: BaseException, began: bool) -> Ending | None:
    """Weights & Biases does not take the key, does not answer, or its process on this machine has ended."""
    gone = type(error).__module__.startswith("wandb") and type(error).__name__ in CORE_IS_GONE
    if gone or (isinstance(error, ConnectionError) and _passed("wandb", error)):
        without = "WANDB_MODE=disabled trains without it"
        return Ending(1, f"W&B's own process, wandb-core, was ended from outside; {without}")
    if not type(error).__module__.startswith("wandb"):
        return None
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    way = "log in with `wandb login`, or set WANDB_MODE=offline to train without an account"
    return Ending(1, f"W&B: {first.strip()}\n  {way}")


def _passed(package: str, error: BaseException) -> bool:
    """Return whether an error came through a package's code."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(package in Path(frame.filename).parts for frame in frames)


def _memory(error: BaseException, began: bool) -> Ending | None:
    """The device's memory is used up."""
    torch = sys.modules.get("torch")
    signs = ("not enough memory", "can't allocate memory")  # how a CPU says it, by the version of PyTorch
    refused = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    if torch is None or not (refused or isinstance(error, torch.OutOfMemoryError)):
        return None
    first = str(error).splitlines()[0]
    return Ending(1, f"{first}\n  a smaller batch, or --trainer.accumulate_grad_batches, needs less")


def _network(error: BaseException, began: bool) -> Ending | None:
    """Something could not be fetched."""
    name = f"{type(error).__module__}.{type(error).__name__}"
    if not name.startswith(("urllib.error.", "requests.", "httpx.", "httpcore.", "huggingface_hub.", "socket.")):
        return None
    first = next((line for line in str(error).splitlines() if line.strip()), name)
    return Ending(1, f"something could not be fetched: {first}")


def _model(error: BaseException, began: bool) -> Ending | None:
    """A model of the caller's that does not run, or does not take its inputs, or whose weights cannot be fetched."""
    if "torch" not in sys.modules:
        return None
    from nslightning.models.backbones import DownloadError
    from nslightning.models.own import OwnNetworkError
    from nslightning.probes.audit import NotRunningError

    kinds = (DownloadError, OwnNetworkError, NotRunningError)
    return Ending(1, str(error)) if isinstance(error, kinds) else None


def _mistake(error: BaseException, began: bool) -> Ending | None:
    """A value that is not allowed, or a file that is missing."""
    if isinstance(error, CallError):
        return Ending(2, str(error))
    kinds: tuple[type[BaseException], ...] = (FileNotFoundError, ImportError, ValueError)
    if "lightning.pytorch" in sys.modules:
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        from nslightning.surgery import UnreachedError

        if isinstance(error, UnreachedError):  # which the first step may find
            return Ending(2, str(error))
        kinds += (MisconfigurationException,)
    if twice := re.search(r"more than one stateful callback of type `(\w+)`", str(error)):  # Lightning's words
        return Ending(
            2, f"two of the callbacks are {twice[1]} with the same settings: leave one out, or let them differ"
        )
    if began or not isinstance(error, (*kinds, OSError)):
        return None
    if isinstance(error, FileNotFoundError) and error.errno is not None:
        return Ending(2, f"there is no file or folder {error.filename2 or error.filename}")
    if not isinstance(error, kinds):  # what else the system says
        return Ending(1, str(error))
    if (maker := _refused_by(error)) is not None:
        return Ending(2, f"{maker}: {error}")
    named = _raised_in(error.__traceback__)
    return Ending(2, f"{named}: {error}" if named and not _is_ours(named) else str(error))


def _callback(error: BaseException, began: bool) -> Ending | None:
    """Whatever a callback, a logger or a plugin raises before the first step: its arguments do not suit it."""
    if began or not isinstance(error, Exception):
        return None
    named = _raised_in(error.__traceback__)
    # Of our own ones it is a bug.
    if named is None or named.startswith("nslightning."):
        return None
    return Ending(2, f"{named}: {type(error).__name__}: {error}")


def _late(error: BaseException, began: bool) -> Ending | None:
    """Describe an error that one of Lightning's callbacks raises only in the course of a run."""
    if "lightning.pytorch" not in sys.modules or error.__traceback__ is None:
        return None
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    named, last = _raised_in(error.__traceback__), error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    inside = str(last.tb_frame.f_globals.get("__name__")).startswith("lightning.pytorch.callbacks.")
    if named is None or not inside or not isinstance(error, (MisconfigurationException, RuntimeError)):
        return None
    return Ending(2, f"{named}: {error}")


def _frozen(error: BaseException, began: bool) -> Ending | None:
    """A loss that no trained parameter takes part in."""
    if not isinstance(error, RuntimeError) or "does not require grad and does not have a grad_fn" not in str(error):
        return None
    return Ending(
        2,
        "the loss depends on no parameter that is trained: all are frozen (a callback such as BackboneFinetuning "
        "freezes them), or the loss is detached",
    )


def _refused_by(error: BaseException) -> str | None:
    """The class whose constructor refused an argument, and the option that gives it; None where it was elsewhere."""
    if "lightning.pytorch" not in sys.modules:
        return None
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    options = {
        Callback: "trainer.callbacks", Logger: "trainer.logger", Profiler: "trainer.profiler",
        Optimizer: "model.optimizer", LRScheduler: "model.lr_scheduler",
    }  # fmt: skip
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        option = next((option for kind, option in options.items() if isinstance(owner, kind)), None)
        if option is None or frame.f_code.co_name != "__init__":
            continue
        code = frame.f_code
        arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        meant = [name for name in arguments if re.search(rf"\b{name}\b", str(error))]
        return f"{type(owner).__name__} (--{option}{f'.{meant[0]}' if len(meant) == 1 else ''})"
    return None


def _is_ours(name: str) -> bool:
    return name.startswith(("nslightning.", "lightning."))


def _raised_in(traceback: TracebackType | None) -> str | None:
    """The callback, logger or plugin in whose method an error was raised; None where it was elsewhere."""
    if "lightning.pytorch" not in sys.modules:
        return None
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
