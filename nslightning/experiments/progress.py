"""Shows the progress of a grid: a live table in a terminal, a line per cell elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nslightning.experiments.grid import Planned

__all__ = ["Lines", "LiveTable", "Progress", "make_progress"]

#: Rows of the live table at most.
_SHOWN = 12


class Progress(Protocol):
    """A display of a grid's progress."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def ended(self, cell: Planned, seconds: float, error: str | None) -> None:
        """A cell is done.

        Args:
            cell: The cell.
            seconds: The time that it took.
            error: The reason why it failed; None for a finished cell.
        """
        ...


def make_progress(stream: TextIO | None, missing: Sequence[Planned], cells: Path) -> Progress:
    """Return the display that suits a stream.

    Args:
        stream: The stream to show it on; None shows nothing.
        missing: The cells that are to be computed.
        cells: The folder of the cells' files.

    Returns:
        A live table for a terminal, else lines.
    """
    if stream is not None and stream.isatty():
        return LiveTable(Console(file=stream), missing, cells)
    return Lines(stream, len(missing))


class Lines:
    """A line for each cell that is done.

    Args:
        stream: The stream to write to; None writes nothing.
        total: Number of cells to compute.
    """

    def __init__(self, stream: TextIO | None, total: int) -> None:
        self._stream, self._total, self._done, self._began = stream, total, 0, time.monotonic()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""

    def ended(self, cell: Planned, seconds: float, error: str | None) -> None:
        """Write a line; see :class:`Progress`."""
        self._done += 1
        if self._stream is None:
            return
        left = clock((time.monotonic() - self._began) / self._done * (self._total - self._done))
        state = f"failed: {error}" if error is not None else f"{seconds:.1f} s"
        line = f"{self._done}/{self._total} [{left} left] {words(cell)}: {state}"
        print(line, file=self._stream, flush=True)


class LiveTable:
    """Who computes which cell, and how many are left.

    Cells that are being computed are known by the files that their workers write, on whichever machine.

    Args:
        console: The terminal.
        missing: The cells that are to be computed.
        cells: The folder of the cells' files.
    """

    def __init__(self, console: Console, missing: Sequence[Planned], cells: Path) -> None:
        self._missing = {planned.id: planned for planned in missing}
        self._cells, self._began = cells, time.monotonic()
        self._done, self._failed, self._last = 0, 0, ""
        self._stale = set(self._running())  # of workers that were killed
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self.render)

    def __enter__(self) -> Self:
        """Show the table."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self._live.stop()

    def ended(self, cell: Planned, seconds: float, error: str | None) -> None:
        """Count a cell; see :class:`Progress`."""
        self._done += 1
        if error is not None:
            self._failed += 1
            self._live.console.print(Text(f"{words(cell)} failed: {error}", style="red"))
        else:
            self._last = f"{words(cell)}: {seconds:.1f} s"

    def render(self) -> RenderableType:
        """The table as it is now.

        Returns:
            The object that rich draws.
        """
        now = time.time()
        running = [
            (self._missing[name], host, pid, began)
            for name, host, pid, began in self._running()
            if (name, host, pid, began) not in self._stale
        ]
        left = len(self._missing) - self._done
        head = f"{self._done}/{len(self._missing)} done, {self._failed} failed, {len(running)} running"
        if self._done and left:
            head += f", {clock((time.monotonic() - self._began) / self._done * left)} left"
        table = Table(box=None, pad_edge=False)
        for column in ("cell", "computed by", "for"):
            table.add_column(column, overflow="ellipsis", no_wrap=True)
        for planned, host, pid, began in sorted(running, key=lambda row: row[3])[:_SHOWN]:
            table.add_row(words(planned), f"{host}:{pid}", clock(max(0.0, now - began)))  # another machine's clock
        if len(running) > _SHOWN:
            table.add_row(f"and {len(running) - _SHOWN} more", "", "")
        return Group(Text(head), table, Text(f"last: {self._last}" if self._last else "", style="dim"))

    def _running(self) -> list[tuple[str, str, int, float]]:
        """Cells that are being computed: name, machine, process, since when."""
        rows = []
        for file in self._cells.glob("*.running"):
            with suppress(OSError, ValueError, KeyError):  # it ended just now
                content = json.loads(file.read_text())
                if file.stem in self._missing:
                    rows.append((file.stem, content["host"], content["pid"], content["began"]))
        return rows


def words(cell: Planned) -> str:
    """Return the settings that distinguish a cell in its grid."""
    return ", ".join(f"{name}={value}" for name, value in cell.varied.items())


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
