"""One line that says how far a command is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]

_PERIOD = 10.0  # seconds between two lines where lines cannot be overwritten, as in a log file


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show how far a command is, on stderr: in a terminal one line that is overwritten, elsewhere a line now and then.

    Yields:
        Takes a line.
    """
    terminal = sys.stderr.isatty()
    last = time.monotonic()

    def show(line: str) -> None:
        nonlocal last
        if terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - last >= _PERIOD:
            last = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
