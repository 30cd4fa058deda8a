"""The parser of commands with a config: its errors are a few lines, and no key of its YAML is passed over."""

from __future__ import annotations

import sys
from enum import Enum
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_dumper, set_loader

from nslightning.commands.config_files import refuse_duplicates
from nslightning.commands.rewritten import explained

__all__ = ["HelpfulErrors"]

_load = get_loader("yaml")


def _load_strictly(text: str) -> Any:
    """YAML as jsonargparse reads it, without keys that are given twice: the first value would be lost in silence."""
    refuse_duplicates(text)
    return _load(text)


class _Dumper(yaml.SafeDumper):
    """Writes the member of an enumeration as its value, which the config's parser takes for it."""


_Dumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def _dump(content: Any) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


set_dumper("yaml", _dump)
set_loader("yaml", _load_strictly, exceptions=(yaml.YAMLError,), json_superset=True)


class HelpfulErrors(ArgumentParser):
    """A parser whose errors are a few lines, with the nearest name that exists, and exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and end with status 2."""
        if not self.exit_on_error:  # a parser of part of a value: the outer one reports, with more context
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        if parser._subcommands_action is not None and len(sys.argv) > 1:
            parser = parser._subcommands_action.choices.get(sys.argv[1], parser)
        program = parser.prog.replace(" [options]", "")
        known = {option.lstrip("-") for option in parser._option_string_actions if option.startswith("--")}
        what, near = explained(message, ex, known)
        lines = [f"{program}: error: {what}", *dict.fromkeys(f"did you mean {n!r}?" for n in near)]
        sys.stderr.write("\n  ".join([*lines, f"{program} --help lists all options"]) + "\n")
        sys.exit(2)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """No abbreviations: a mistyped option must not pass as the start of another."""
        return []
