"""Error messages of the command line: what was given, what is allowed, what was probably meant."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from nslightning.spelling import closest

__all__ = ["HelpfulErrors"]

# Where a class that is given by its bare name may come from.
_HOMES = {
    "data": ("nslightning.data",),
    "optimizer": ("nslightning.optim", "torch.optim"),
    "lr_scheduler": ("torch.optim.lr_scheduler", "nslightning.optim"),
    "callbacks": ("nslightning.callbacks", "lightning.pytorch.callbacks"),
    "logger": ("lightning.pytorch.loggers",),
    "model": ("nslightning.models",),  # last: the options above may be a model's
}
# The papers' letters, and the options that set them.
_VOCABULARY = {"alpha": "model.jacobians.relu", "beta": "model.jacobians.max_pool"}


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
        what, near = _explain(message, ex, known)
        lines = [f"{program}: error: {what}", *dict.fromkeys(f"did you mean {n!r}?" for n in near)]
        sys.stderr.write("\n  ".join([*lines, f"{program} --help lists all options"]) + "\n")
        sys.exit(2)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """No abbreviations: a mistyped option must not pass as the start of another."""
        return []


def _explain(message: str, ex: Exception | None, known: set[str]) -> tuple[str, Iterable[str]]:
    """What is wrong in one sentence, and names that may have been meant.

    jsonargparse reports a value's failed attempts one inside the other; the innermost says what was wrong, and the
    keys on the way to it say where.
    """
    chain = []
    while ex is not None:
        chain.append(str(ex))
        ex = ex.__cause__ if isinstance(ex.__cause__, Exception) else None
    keys = [found[1] for text in chain if (found := re.match(r'Parser key "([^"]+)"', text))]
    key = ".".join(k for i, k in enumerate(keys) if i == 0 or k != keys[i - 1])
    paths = [p for text in chain for p in re.findall(r"class_path(?: |=)'([\w.]+)'", text)[:1]]
    root = chain[-1] if chain else message

    if option := re.match(r"Option '([\w.]+)' is not accepted$", root):
        takes = _parameters(paths[-1]) if paths else []
        near = closest(option[1], takes)
        owner = f": {paths[-1]} takes {', '.join(takes)}" if takes else ""
        return f"there is no option --{f'{key}.' * bool(key)}{option[1]}{owner}", near
    if option := re.search(r"does not accept option '([\w.]+)'", root):
        return f"there is no option --{option[1]}", _near(option[1], known)
    if option := re.match(r"unrecognized arguments: (.*)", root, re.DOTALL):
        words = [w for w in re.findall(r"(?:^|\s)--([A-Za-z_][\w.]*)", option[1]) if w not in known]
        return f"not understood: {option[1]}", [n for w in words for n in _near(w, known)]
    if linked := re.match(r'Linked "([\w.]+)" must be given via "([\w.]+)"', root):
        return f"--{linked[1]} cannot be given: it is set by {linked[2].replace('.init_args', '')}", []
    if needed := re.match(r"the following arguments are required: (?:\w+\.)?(.*)", root):
        example = ", as in --config configs/quickstart.yaml or --data=MNIST" if needed[1] == "data" else ""
        return f"--{needed[1]} is needed{example}", []
    if unread := re.match(r"Unexpected config: (.*)", root, re.DOTALL):
        return f"the config is not a mapping of options to values, but {_line(unread[1])}", []
    if (given := _unknown_class(root)) is not None:
        homes = next((h for part, h in _HOMES.items() if part in key), ())
        names = [n for home in homes for n in dir(import_module(home)) if n[0].isupper()]
        known_as = f"; expected a class of {' or '.join(homes)} by its name, or a class path" if homes else ""
        return f"--{key}: there is no class {given!r}{known_as}", closest(given.rpartition(".")[2], names)

    full = next((t for t in reversed(chain) if t.startswith("Parser key")), message)
    value = re.search(r"(?:Given|Got) value: (.*)", full)
    if not key or value is None:
        return _line(message), []
    names = _literals(full)
    given = value[1].strip().strip("'\"")
    expected = f"; expected {' or '.join(wanted)}" if (wanted := _wanted(full, names)) else ""
    return f"--{key}={given} is not allowed{expected}", closest(given, names)


def _line(text: str) -> str:
    """All in one line, and not too long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 400 else f"{flat[:400]} ..."


def _unknown_class(root: str) -> str | None:
    """The class that could not be found, as it was given."""
    if bare := re.search(r"Expected a dot import path string: (\S+)", root):
        return bare[1]
    if missing := re.search(r"(?:module|package) '([\w.]+)' has no attribute '(\w+)'", root):
        return f"{missing[1]}.{missing[2]}"
    return missing[1] if (missing := re.search(r"No module named '([\w.]+)'", root)) else None


def _parameters(path: str) -> list[str]:
    """The arguments that a class takes in a config."""
    module, _, name = path.rpartition(".")
    given = inspect.signature(getattr(import_module(module), name)).parameters.values()
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in given if p.kind not in variadic and p.name not in ("params", "optimizer")]


def _wanted(message: str, names: list[str]) -> list[str]:
    """The types and names that a message says are allowed."""
    rest = re.sub(r"typing\.Literal\[.*?\]", "", message)
    if count := re.search(r"Expected a tuple with (\d+) elements", rest):
        return [f"a list of {count[1]} values"]
    types = [t for t in ("float", "int", "bool", "list", "dict") if re.search(rf"class '{t}'|\b{t}\[", rest)]
    classes = [c.rpartition(".")[2] for c in re.findall(r"<class '([\w.]+)'>", rest) if "." in c]
    numbers = [f"an {t}" if t == "int" else f"a {t}" for t in types]
    return [*numbers, *([f"one of {', '.join(names)}"] if names else []), *dict.fromkeys(classes)]


def _near(word: str, known: set[str]) -> list[str]:
    """The option most like ``word``: in the same group if there is one, then by its last part, then in full."""
    group, _, last = word.rpartition(".")
    siblings = {k.removeprefix(f"{group}."): k for k in sorted(known) if k.startswith(f"{group}.")} if group else {}
    tails = {k.rpartition(".")[2]: k for k in sorted(known, key=lambda k: (-len(k), k))}
    for names in (siblings, tails):
        if close := closest(last, names, cutoff=0.7):
            return [names[close[0]]]
    if close := closest(word, sorted(known), cutoff=0.75):
        return close
    words = closest(last, _VOCABULARY, cutoff=0.7)
    return [_VOCABULARY[w] for w in words if _VOCABULARY[w] in known]


def _literals(message: str) -> list[str]:
    """All values that a message says are allowed by name."""
    found = ", ".join(re.findall(r"Literal\[(.*?)\]", message))
    return list(dict.fromkeys(w.strip("'") for w in found.split(", ") if w))
