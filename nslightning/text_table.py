"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned"]

_WIDE = 100_000  # columns: a table is never wrapped, so that a file or a pipe gets it as a terminal does


def aligned(rows: Sequence[Sequence[str]], texts: int = 1, last_is_text: bool = False) -> list[str]:
    r"""Rows whose columns stand below each other, with a line below the first row.

    Args:
        rows: The header, and then the rows.
        texts: How many columns at the left hold texts; the others hold numbers and are set to the right.
        last_is_text: Whether the last column holds texts too.

    Returns:
        The lines.

    Example:
        >>> print("\n".join(aligned([["site", "ties"], ["relu1", "3"]])))
        site   ties
        ───────────
        relu1     3
    """
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    header, *others = rows
    # Two blanks between columns: one of the cell, one of the box.
    blank = " " * 4 + "\n"
    table = Table(box=Box(blank * 2 + " ── \n" + blank * 5), show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(header):
        text = i < texts or (last_is_text and i == len(header) - 1)
        table.add_column(Text(name), justify="left" if text else "right", no_wrap=True)
    for row in others:
        table.add_row(*map(Text, row))  # as they are: a bracket is no markup
    console = Console(width=_WIDE, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as written:
        console.print(table)
    return [line.rstrip() for line in written.get().splitlines()]
