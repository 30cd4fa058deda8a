"""Finds the name that a mistyped name was probably meant to be, and writes values as a person does."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = ["closest", "did_you_mean", "short"]


def closest(unknown: object, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """The known names most like the unknown one; swapped letters are the likeliest slip.

    Args:
        unknown: The name that is not known.
        known: The names that are.
        most: Largest number of names to return.
        cutoff: Likeness that a name must reach, from 0 to 1.

    Returns:
        The names, the closest first; empty where none is alike.

    Example:
        >>> closest("rleu", ["relu", "rule"]), closest("huge", ["smoke", "small"])
        (['relu'], [])
    """
    word, names = str(unknown), list(dict.fromkeys(map(str, known)))
    swapped = [name for name in names if name != word and sorted(name) == sorted(word)]
    alike = difflib.get_close_matches(word, names, most, cutoff)
    same = [name for name in names if name == word]
    return list(dict.fromkeys([*same, *swapped, *alike]))[:most]


def did_you_mean(unknown: object, known: Iterable[str], most: int = 1, *, otherwise: str = ".") -> str:
    """The end of a sentence that names something unknown: the name that was probably meant, as a question.

    Args:
        unknown: The name that is not known.
        known: The names that are.
        most: Largest number of names to ask about.
        otherwise: End of the sentence where no known name is alike.

    Returns:
        The question, or ``otherwise``.

    Example:
        >>> did_you_mean("smal", ["smoke", "small"]), did_you_mean("huge", ["smoke", "small"])
        ("; did you mean 'small'?", '.')
    """
    names = closest(unknown, known, most)
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else otherwise


def short(value: Any) -> str:
    """A setting as a person would write it.

    Args:
        value: A value of a config file.

    Returns:
        The text; numbers without trailing zeros.

    Example:
        >>> [short(v) for v in (1.0, 0.00035, [0.0, 1.0], None, "bf16-true")]
        ['1', '0.00035', '[0, 1]', 'none', 'bf16-true']
    """
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(short, value))}]"
    return "none" if value is None else str(value)
