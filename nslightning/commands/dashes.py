"""Options are spelled with dashes, as ``--batch-size``; the old spellings go on working for one version."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence

__all__ = ["spelled_with_dashes", "with_new_spellings", "with_underscores"]

_PRINT = "--print_config"  # jsonargparse looks for this word, to which it gives a value


def spelled_with_dashes(parser: argparse.ArgumentParser) -> None:
    """Give every option of a parser dashes for underscores; the names of its values stay.

    Args:
        parser: A parser whose options are made; one of jsonargparse as well, which makes them from a function.
    """
    known = parser._option_string_actions
    for action in parser._actions:
        if _PRINT in action.option_strings:
            continue
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
    known, rest = parser._option_string_actions, iter(_switched_on(parser, argv))
    for word in rest:
        option, equals, value = word.partition("=")
        flag, dot, part = option.partition(".")
        new = flag
        if flag == _PRINT.replace("_", "-"):
            words.append(_PRINT + equals + value)
            continue
        if flag.startswith("--") and flag not in known:
            new = flag.replace("_", "-")
            new = (renamed or {}).get(new, new)
        if new not in known:
            words.append(word)
            continue
        if new != flag:
            print(f"{parser.prog}: {flag} is spelled {new} today; the next version takes only that", file=sys.stderr)
        action = known[new]
        if equals and action.nargs == "+" and (several := re.fullmatch(r"\[(.*)\]", value)):
            items = [item.strip() for item in several[1].split(",")]
            print(f"{parser.prog}: {new}={value} is spelled {new} {' '.join(items)} today", file=sys.stderr)
            words += [new, *items]
        elif dot:  # a part of a mapping, as in --backbone-options.hidden=[5,6]
            parts.setdefault(new, []).append(f"{part}: {value if equals else next(rest, '')}")
        else:
            words.append(f"{new}{equals}{value}")
    return words + [f"{flag}={{{', '.join(fields)}}}" for flag, fields in parts.items()]


def with_underscores(argv: Sequence[str]) -> list[str]:
    """The words of a training command, whose options are named after arguments: dashes in their names are underscores.

    Args:
        argv: The command line.

    Returns:
        The words as the parser takes them. Names of choices, and names that a class takes as they are written, keep
        their dashes.

    Example:
        >>> with_underscores(["--data.batch-size=3", "--seed-everything", "-1", "--model.choices.a-b.max-pool=1"])
        ['--data.batch_size=3', '--seed_everything', '-1', '--model.choices.a-b.max_pool=1']
    """
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            parts = flag[2:].split(".")
            own = [i > 0 and parts[i - 1] in ("choices", "dict_kwargs") for i in range(len(parts))]
            parts = [part if kept else part.replace("-", "_") for part, kept in zip(parts, own, strict=True)]
            flag = f"--{'.'.join(parts)}"
        words.append(f"{flag}{equals}{value}")
    return words


def _switched_on(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """A command line in which what is true or false may stand alone: ``--download`` is ``--download=true``."""
    known = parser._option_string_actions
    words: list[str] = []
    for word in argv:  # [16,32] after an option of several is its value
        if words and word.startswith("[") and words[-1] in known and known[words[-1]].nargs == "+":
            words[-1] += f"={word}"
        else:
            words.append(word)
    for i, word in enumerate(words):
        alone = i + 1 == len(words) or words[i + 1].startswith("--")
        if alone and word in known and getattr(known[word], "_typehint", None) is bool:
            words[i] = f"{word}=true"
    return words
