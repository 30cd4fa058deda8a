"""Options are spelled with dashes, as ``--batch-size``; the old spellings go on working for one version."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

__all__ = ["spelled_with_dashes", "with_new_spellings"]


def spelled_with_dashes(parser: argparse.ArgumentParser) -> None:
    """Give every option of a parser dashes for underscores; the names of its values stay.

    Args:
        parser: A parser whose options are made; one of jsonargparse as well, which makes them from a function.
    """
    known = parser._option_string_actions
    for action in parser._actions:
        old = list(action.option_strings)
        action.option_strings = [word.replace("_", "-") if word.startswith("--") else word for word in old]
        for before, after in zip(old, action.option_strings, strict=True):
            known[after] = known.pop(before)


def with_new_spellings(
    parser: argparse.ArgumentParser, argv: Sequence[str], renamed: Mapping[str, str] | None = None
) -> list[str]:
    """Replace old spellings of options by those of today, with a warning.

    Args:
        parser: The parser of today's options.
        argv: The command line.
        renamed: Options that have another name today, such as ``{"--model": "--backbone"}``.

    Returns:
        The command line that the parser takes.
    """
    words: list[str] = []
    parts: dict[str, list[str]] = {}
    known, rest = parser._option_string_actions, iter(argv)
    for word in rest:
        option, equals, value = word.partition("=")
        flag, dot, part = option.partition(".")
        new = flag
        if flag.startswith("--") and flag not in known:
            new = flag.replace("_", "-")
            new = (renamed or {}).get(new, new)
        if new not in known:
            words.append(word)
            continue
        if new != flag:
            print(f"{parser.prog}: {flag} is spelled {new} today; the next version takes only that", file=sys.stderr)
        if dot:  # a part of a mapping, as in --backbone-options.hidden=[5,6]
            parts.setdefault(new, []).append(f"{part}: {value if equals else next(rest, '')}")
        else:
            words.append(f"{new}{equals}{value}")
    return words + [f"{flag}={{{', '.join(given)}}}" for flag, given in parts.items()]
