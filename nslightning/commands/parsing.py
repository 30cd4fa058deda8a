"""Error messages of the command line: what was given, what is allowed, what was probably meant."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any, NoReturn

__all__ = ["HelpfulErrors"]

# Where a class that is given by its bare name may come from.
_HOMES = {
    "data": ("nslightning.data",),
    "optimizer": ("torch.optim", "nslightning.optim"),
    "lr_scheduler": ("torch.optim.lr_scheduler",),
    "callbacks": ("nslightning.callbacks", "lightning.pytorch.callbacks"),
    "logger": ("lightning.pytorch.loggers",),
}
# The papers' letters, and the options that set them.
_VOCABULARY = {"alpha": "model.jacobians.relu", "beta": "model.jacobians.max_pool"}


class HelpfulErrors:
    """Mixed into a jsonargparse parser: errors of a few lines, with the nearest name that exists, and status 2."""

    prog: str
    _option_string_actions: dict[str, Any]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and end with status 2."""
        program = self.prog.replace(" [options]", "")
        lines = [f"{program}: error: {self._shorten(message)}", *self._suggestions(message)]
        sys.stderr.write("\n  ".join([*lines, f"{program} --help lists all options"]) + "\n")
        sys.exit(2)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """No abbreviations: a mistyped option must not pass as the start of another."""
        return []

    def _shorten(self, message: str) -> str:
        """The gist of jsonargparse's list of attempts."""
        key, given = re.search(r'key "([^"]+)"', message), _given(message)
        if not key or given is None:
            return " ".join(message.split())
        names = _literals(message)
        rest = re.sub(r"typing\.Literal\[.*?\]", "", message)
        types = [t for t in ("float", "int", "bool", "list", "dict") if re.search(rf"class '{t}'|\b{t}\[", rest)]
        classes = [c.rpartition(".")[2] for c in re.findall(r"<class '([\w.]+)'>", rest) if "." in c]
        wanted = [*(f"an {t}" if t == "int" else f"a {t}" for t in types), *([f"one of {', '.join(names)}"] * bool(names)), *dict.fromkeys(classes)]
        expected = f"; expected {' or '.join(wanted)}" if wanted else ""
        return f"--{key[1]}={given} is not allowed{expected}"

    def _suggestions(self, message: str) -> Iterable[str]:
        """``did you mean`` lines for values and for unknown keys."""
        if (given := _given(message)) is not None:
            key = re.search(r'key "([^"]+)"', message)
            path = re.search(r"class_path['\"]?[:=]\s*['\"]?([\w.]+)", given)
            names = _literals(message) or _class_names(key[1] if key else "")
            word = (path[1] if path else given).rpartition(".")[2]
            return [f"did you mean {c!r}?" for c in difflib.get_close_matches(word, names, 1, 0.6)]
        known = {option.lstrip("-") for option in self._option_string_actions if option.startswith("--")}
        words = re.findall(r"--([A-Za-z_][\w.]*)", message) + re.findall(r"['\"]([A-Za-z_][\w.]*)['\"]", message)
        return dict.fromkeys(
            f"did you mean {near!r}?" for word in words if word not in known for near in _near(word, known)
        )


def _given(message: str) -> str | None:
    """The value that jsonargparse refused."""
    found = re.search(r"Giv(?:en) value: (.*)|Got value: (.*)|import path string: (\S+)", message)
    return next(g for g in found.groups() if g).strip().strip("'\"") if found else None


def _near(word: str, known: set[str]) -> list[str]:
    """The option most like ``word``: in the same group if there is one, then by its last part, then in full."""
    group, _, last = word.rpartition(".")
    siblings = {k.removeprefix(f"{group}."): k for k in known if k.startswith(f"{group}.")} if group else {}
    tails = {k.rpartition(".")[2]: k for k in sorted(known, key=len, reverse=True)}
    for names in (siblings, tails):
        if close := difflib.get_close_matches(last, names, 1, 0.7):
            return [names[close[0]]]
    if close := difflib.get_close_matches(word, known, 1, 0.75):
        return close
    words = difflib.get_close_matches(last, _VOCABULARY, 1, 0.7)
    return [_VOCABULARY[w] for w in words if _VOCABULARY[w] in known]


def _literals(message: str) -> list[str]:
    """All values that a message says are allowed by name."""
    found = ", ".join(re.findall(r"Literal\[(.*?)\]", message))
    return list(dict.fromkeys(w.strip("'") for w in found.split(", ") if w))


def _class_names(key: str) -> list[str]:
    homes = next((h for part, h in _HOMES.items() if part in key), ())
    return [n for home in homes for n in dir(import_module(home)) if n[0].isupper()]
