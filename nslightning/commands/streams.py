"""Standard output: a command ends in one line where a disk is full, and quietly where its reader is gone."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress

__all__ = ["NO_READER", "printing", "reader_is_gone"]

#: The exit status of a command whose output has no reader: 128 + SIGPIPE, as of other programs in a pipe.
NO_READER = 141

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def printing(work: Callable[[], int]) -> int:
    """Do a command's work and see to it that its output arrives.

    A name that the terminal's encoding does not have is printed with escapes.

    Args:
        work: The function to run; it returns the exit status.

    Returns:
        The work's exit status; ``NO_READER`` where the reader of the output is gone; 1 where its disk is full.

    Example:
        >>> printing(lambda: 0)
        0
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return work()
        finally:
            if sys.stdout is not None:  # which the caller may have closed
                sys.stdout.flush()
    except BrokenPipeError:
        if not reader_is_gone():  # another pipe of the work's
            raise
        _discard()
        return NO_READER
    except OSError as error:
        if error.filename is not None or error.errno not in _FULL:  # of a file
            raise
        _discard()
        with suppress(OSError):
            print(f"nslightning: error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 1


def reader_is_gone() -> bool:
    """Return whether standard output, or error, is a pipe that no one reads any more.

    Returns:
        True if one is; False where the system cannot say.
    """
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _discard() -> None:
    """Let go of what was not written, so that Python does not try once more when it ends."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
            continue
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
