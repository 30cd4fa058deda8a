"""Completion of commands and options in a shell, by shtab; made without importing what the commands run."""

from __future__ import annotations

import argparse
from importlib import import_module

from nslightning.commands import help as short_help

__all__ = ["SHELLS", "script"]

SHELLS = ("bash", "zsh", "tcsh")
_FILES = {"--config", "--ckpt_path", "--json", "--html", "--text", "--tokenizer"}
_FOLDERS = {"--output", "--from"}


def script(shell: str) -> str:
    """The completion script of a shell.

    Args:
        shell: One of ``SHELLS``.

    Returns:
        The script, to be read by the shell when it starts.
    """
    import shtab

    return str(shtab.complete(_parser(), shell))


def _parser() -> argparse.ArgumentParser:
    """All commands with the options that a person types."""
    from nslightning.cli import COMMANDS

    top = argparse.ArgumentParser("nslightning")
    commands = top.add_subparsers()
    for name, (module, text) in COMMANDS.items():
        parser = commands.add_parser(name, help=text, allow_abbrev=False)
        if name in short_help.COMMANDS:
            for option in short_help.options(name):
                _add(parser, [option.flag], option.text)
            continue
        own: argparse.ArgumentParser = import_module(module).make_parser(f"nslightning {name}")
        for action in own._actions:
            if action.option_strings and "--help" not in action.option_strings:
                _add(parser, list(action.option_strings), action.help or "", action.choices)
        if any(not action.option_strings for action in own._actions):
            parser.add_argument("words", nargs="*").complete = _complete("FILE")  # type: ignore[attr-defined] # shtab's
    return top


def _add(parser: argparse.ArgumentParser, flags: list[str], text: str, choices: object = None) -> None:
    options = {"choices": list(choices)} if isinstance(choices, (list, tuple)) else {}
    action = parser.add_argument(*flags, help=text.replace("%", "%%"), **options)  # type: ignore[arg-type] # `choices` or nothing
    if _FILES & set(flags):
        action.complete = _complete("FILE")  # type: ignore[attr-defined] # what shtab reads
    elif _FOLDERS & set(flags):
        action.complete = _complete("DIRECTORY")  # type: ignore[attr-defined] # what shtab reads


def _complete(kind: str) -> object:
    import shtab

    return getattr(shtab, kind)
