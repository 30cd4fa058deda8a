"""The parser of commands with few options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NoReturn

from nslightning.commands.dashes import with_new_spellings
from nslightning.spelling import closest

__all__ = ["Arguments", "refuse_unknown"]


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are a few lines, with the nearest option that exists, and exit status 2.

    Args:
        renamed: Options that have another name today, by the old one.
    """

    def __init__(self, *args: Any, renamed: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.renamed = dict(renamed or {})

    def parse_args(  # type: ignore[override] # whose overloads differ in their return type only
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse a command line; an option that is not known is named before any that is missing."""
        words = with_new_spellings(self, sys.argv[1:] if args is None else args, self.renamed)
        refuse_unknown(self, words, self.renamed)
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and end with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n  {self.prog} --help lists all options\n")


def refuse_unknown(
    parser: argparse.ArgumentParser, words: Sequence[str], renamed: Mapping[str, str] | None = None
) -> None:
    """End with status 2 if a word is an option that a parser does not have, with the nearest one that it has.

    Args:
        parser: The parser.
        words: The command line.
        renamed: Options that have another name today, by the old one.
    """
    known = {option: option for option in parser._option_string_actions if option.startswith("--")} | dict(
        renamed or {}
    )
    for word in words:
        if word == "--":
            return
        option = word.partition("=")[0]
        if option.startswith("--") and option not in known:
            near = closest(option.removeprefix("--"), [name.removeprefix("--") for name in known])
            hint = f"\n  did you mean {known['--' + near[0]]!r}?" if near else ""
            parser.error(f"there is no option {option}{hint}")
    refuse_empty(parser, words)


def refuse_empty(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """End with status 2 if one of a parser's options has an empty value: what an unset variable leaves in a script.

    Args:
        parser: The parser.
        words: The command line.
    """
    for word, following in zip_longest(words, words[1:]):
        option, equals, value = word.partition("=")
        if option in parser._option_string_actions and ((equals and not value) or (not equals and following == "")):
            parser.error(f"{option} has no value: give one, or leave the option out")
