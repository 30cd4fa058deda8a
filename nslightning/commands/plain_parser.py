"""The parser of commands with few options."""

from __future__ import annotations

import argparse
from typing import NoReturn

from nslightning.spelling import closest

__all__ = ["Arguments"]


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are a few lines, with the nearest option that exists, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and end with status 2."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        given = [word.partition("=")[0].rstrip(":") for word in message.split() if word.startswith("--")]
        meant = [n for word in given if word not in known for n in closest(word, known)]
        hint = f"\n  did you mean {meant[0]!r}?" if meant else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}\n  {self.prog} --help lists all options\n")
