"""The parser of commands with a config: its errors are a few lines, and no key of its YAML is passed over."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_dumper, set_loader

from nslightning.commands.config_files import includes, refuse_duplicates, with_included
from nslightning.commands.rewritten import explained

__all__ = ["HelpfulErrors"]

_load = get_loader("yaml")


def _load_strictly(text: str) -> Any:
    """YAML as jsonargparse reads it, without keys that are given twice: the first value would be lost in silence.

    While jsonargparse reads a config file, the file's folder is the working one: there included files are looked for.
    """
    refuse_duplicates(text)
    content = _load(text)
    return _spelled_out(with_included(content, Path.cwd()) if includes(content) else content)


def _spelled_out(content: Any) -> Any:
    """Return a config in which each choice of one word, such as ``jacobians: jax``, is replaced by its fields."""
    if isinstance(content, list):
        return [_spelled_out(value) for value in content]
    if not isinstance(content, dict):
        return content
    read = {key: _spelled_out(value) for key, value in content.items()}
    if isinstance(read.get("jacobians"), str):
        read["jacobians"] = _fields(read["jacobians"])
    if isinstance(read.get("choices"), dict):
        read["choices"] = {n: _fields(v) if isinstance(v, str) else v for n, v in read["choices"].items()}
    return read


def _fields(word: str) -> dict[str, Any]:
    from nslightning.choices import to_jacobians  # imports torch, and a word is rare

    return {name: list(v) if isinstance(v, tuple) else v for name, v in to_jacobians(word).to_dict().items()}


def _words_spelled_out(argv: Sequence[str]) -> list[str]:
    """Return a command line in which each choice of one word, such as ``--model.jacobians=jax``, has its fields.

    Example:
        >>> _words_spelled_out(["--model.jacobians", "pytorch", "--name=jax"])[1][:24]
        '{"relu": 0.0, "relu6": ['
    """
    words = list(argv)
    for i, word in enumerate(words):
        if not (option := re.match(r"(--(?:[\w-]+\.)*(?:jacobians|choices\.[\w+-]+))(?:=(.*))?$", word)):
            continue
        flag, value = option[1], option[2]
        at = i if value is not None else i + 1
        value = value if value is not None else (words[at] if at < len(words) else "")
        if re.fullmatch(r"[a-z]+|[a-z_]\w*=[^{]*", value) and value not in ("null", "true", "false"):
            fields = json.dumps(_fields(value))
            words[at] = f"{flag}={fields}" if at == i else fields
    return words


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
        sentence, near = explained(message, ex, known)
        lines = [f"{program}: error: {sentence}", *dict.fromkeys(f"did you mean {n!r}?" for n in near)]
        sys.stderr.write("\n  ".join([*lines, f"{program} --help lists all options"]) + "\n")
        sys.exit(2)

    def parse_args(  # type: ignore[override] # whose overloads differ in their return type only
        self, args: Sequence[str] | None = None, *rest: Any, **options: Any
    ) -> Any:
        """Parse a command line, in which a Jacobian choice may be one word, as it may in a config."""
        try:
            return super().parse_args(_words_spelled_out(sys.argv[1:] if args is None else args), *rest, **options)
        except ValueError as error:  # a word that is no choice
            self.error(str(error))

    def dump(self, *args: Any, **options: Any) -> str:
        """Write a config; a default that a class makes for itself, such as a device, is none of it, and no warning."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\s*Unable to serialize instance")
            return str(super().dump(*args, **options))

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """No abbreviations: a mistyped option must not pass as the start of another."""
        return []
