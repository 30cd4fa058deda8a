"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned"]


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
        ─────  ────
        relu1     3
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    end = len(widths) - last_is_text

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i < texts or i >= end else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    header, *others = rows
    return [line(header), "  ".join("─" * width for width in widths), *map(line, others)]
