"""jsonargparse's messages, rewritten: they name the value, the allowed ones, and the one that was probably meant.

Its errors are texts and nothing else, so each kind is known by a pattern. ``pyproject.toml`` allows the versions whose
texts were seen, and a test of each row fails where a version says something else.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module

from nslightning.names import FAMILIES
from nslightning.spelling import closest

__all__ = ["ROWS", "Rejection", "Row", "explained", "rejection"]

# Where a class that is given by its bare name may come from.
_HOMES = {
    "data": ("nslightning.data",),
    "optimizer": ("nslightning.optim", "torch.optim"),
    "lr_scheduler": ("torch.optim.lr_scheduler", "nslightning.optim"),
    "callbacks": ("nslightning.callbacks", "lightning.pytorch.callbacks"),
    "logger": ("lightning.pytorch.loggers",),
    "model": ("nslightning.models",),  # last: the options above may be a model's
}
# Python's types, in words.
_TYPES = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "a word",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
}
_COUNTS = {2: "two", 3: "three"}
# The papers' letters, and the options that set them.
_VOCABULARY = {"alpha": "model.jacobians.relu", "beta": "model.jacobians.max_pool"}


@dataclass(frozen=True)
class Rejection:
    """The parts of jsonargparse's message about a mistake.

    It reports a value's failed attempts one inside the other: the innermost says what was wrong, and the keys on the
    way to it say where.

    Args:
        message: The outermost text.
        root: The innermost text.
        key: The option, with dots.
        value_text: The innermost text that begins with the option.
        paths: Class paths on the way, the innermost last.
        known: The options that the parser has.
    """

    message: str
    root: str
    key: str
    value_text: str
    paths: tuple[str, ...]
    known: frozenset[str]


#: The mistake in one sentence, and the names that were perhaps meant.
Explanation = tuple[str, Iterable[str]]


@dataclass(frozen=True)
class Row:
    """One kind of message.

    Args:
        name: Short name of the mistake.
        pattern: The text that it is known by.
        of: Place of the text: in the innermost one (``root``) or in the one of the value (``value_text``).
        explain: A function that says it in other words.
    """

    name: str
    pattern: re.Pattern[str]
    of: str
    explain: Callable[[re.Match[str], Rejection], Explanation]


def _option_of_a_class(match: re.Match[str], rejected: Rejection) -> Explanation:
    takes = _parameters(rejected.paths[-1]) if rejected.paths else []
    owner = f": {rejected.paths[-1]} takes {', '.join(takes)}" if takes else ""
    prefix = f"{rejected.key}." if rejected.key else ""
    near = closest(match[1], takes)
    return f"there is no option --{prefix}{match[1]}{owner}", _options(f"{prefix}{name}" for name in near)


def _option_in_a_config(match: re.Match[str], rejected: Rejection) -> Explanation:
    option = match[2] if match[1] is None or match[2].startswith(f"{match[1]}.") else f"{match[1]}.{match[2]}"
    if option.startswith("model.jacobians") and "model.choices" in rejected.known:
        field = option.removeprefix("model.jacobians").lstrip(".") or "relu"
        return f"--{option} names one choice, and several are trained: --model.choices.NAME.{field}=...", []
    return f"there is no option --{option}", _options(_near(option, rejected.known))


def _unrecognized(match: re.Match[str], rejected: Rejection) -> Explanation:
    words = [w for w in re.findall(r"(?:^|\s)--([A-Za-z_][\w.-]*)", match[1]) if w not in rejected.known]
    if not words and (file := re.search(r"\S+\.ya?ml\b", match[1])):
        return f"{file[0]} stands alone: a config file is named by --config", [f"--config {file[0]}"]
    if not words and (file := re.search(r"\S+\.ckpt\b", match[1])):
        return f"{file[0]} stands alone: a checkpoint is named by --ckpt_path", [f"--ckpt_path={file[0]}"]
    if not words:
        names = [option for option in ("model.backbone", "backbone") if option in rejected.known]
        network = next((word for word in match[1].split() if word.partition("/")[0] in FAMILIES), None)
        if names and network:
            return f"{network} stands alone: a network is named by --{names[0]}", [f"--{names[0]}={network}"]
        bare = (f"--{word}" for word in match[1].split() if word.partition("=")[0] in rejected.known)
        return f"not understood: {match[1]}; an option begins with --, such as --config", bare
    return f"there is no option --{words[0]}", _options(_near(words[0], rejected.known))


def _linked(match: re.Match[str], rejected: Rejection) -> Explanation:
    return f"--{match[1]} cannot be given: it is set by {match[2].replace('.init_args', '')}", []


def _required(match: re.Match[str], rejected: Rejection) -> Explanation:
    needed, *others = (name.removeprefix("fit.") for name in match[1].split(", "))
    if others:
        return f"{' and '.join(f'--{name}' for name in (needed, *others))} are needed, as a config file gives them", []
    prefix = f"{rejected.key}." if rejected.key and not needed.startswith(rejected.key) else ""
    if rejected.paths and prefix:
        return f"{rejected.paths[-1].rpartition('.')[2]} needs {needed}: give --{prefix}{needed}=...", []
    example = ", as in --config configs/quickstart.yaml or --data=MNIST" if needed == "data" else ""
    return f"--{prefix}{needed} is needed{example}", []


def _no_file(match: re.Match[str], rejected: Rejection) -> Explanation:
    reason = "there is no such file" if match[1] is None else "it is a folder, and a YAML file is needed"
    return f"--{rejected.key}={match[1] or match[2]}: {reason}", []


def _no_mapping(match: re.Match[str], rejected: Rejection) -> Explanation:
    return f"the config is not a mapping of options to values, but {_line(match[1]) or 'empty'}", []


def _no_class(match: re.Match[str], rejected: Rejection) -> Explanation:
    path = ".".join(filter(None, match.groups()))
    homes = next((h for part, h in _HOMES.items() if part in rejected.key), ())
    names = [n for home in homes for n in dir(import_module(home)) if n[0].isupper()]
    if path in names:
        return f"--{rejected.key}={path} is of another kind than is needed here", []
    known_as = f"; expected a class of {' or '.join(homes)} by its name, or a class path" if homes else ""
    return f"--{rejected.key}: there is no class {path!r}{known_as}", closest(path.rpartition(".")[2], names)


def _twice(match: re.Match[str], rejected: Rejection) -> Explanation:
    return f"{'--' * bool(rejected.key)}{rejected.key or 'a config'}: {match[1]} is given twice", []


def _empty(match: re.Match[str], rejected: Rejection) -> Explanation:
    return f"--{rejected.key}= has no value: give one, or leave the option out", []


def _no_options(match: re.Match[str], rejected: Rejection) -> Explanation:
    way = "a choice, such as relu=1 or jax" if rejected.key.endswith("jacobians") else f"--{rejected.key}.OPTION=VALUE"
    return f"--{rejected.key}={match[1]} is not a mapping of options, nor a file of one: give {way}", []


def _value(match: re.Match[str], rejected: Rejection) -> Explanation:
    if not rejected.key:
        return _line(rejected.message), []
    names = _literals(rejected.value_text)
    value = match[1].strip().strip("'\"")
    if made := re.match(r"Namespace\(class_path='([\w.]+)'", value):  # a class whose arguments do not suit it
        name = made[1].rpartition(".")[2]
        lacking = rf"class_path '{re.escape(made[1])}':\s+the following arguments are required: ([\w.]+)"
        if needed := re.search(lacking, rejected.value_text):
            return f"{name} needs {needed[1]}: give --{rejected.key}.{needed[1]}=...", []
        return f"--{rejected.key}={name} lacks arguments, or has wrong ones: give --{rejected.key}.ARGUMENT=...", []
    wanted = _wanted(rejected.value_text, names) or [_plain(rejected.root)]
    return f"--{rejected.key}={value} is not allowed; expected {' or '.join(wanted)}{_default(rejected)}", closest(
        value, names
    )


#: Every kind that is known, the first that fits wins.
ROWS = (
    Row("a class has no such argument", re.compile(r"Option '([\w.]+)' is not accepted$"), "root", _option_of_a_class),
    Row(
        "a config has no such option",
        re.compile(r"(?:Group '([\w.]+)')?.* does not accept option '([\w.]+)'"),
        "root",
        _option_in_a_config,
    ),
    Row("no such option", re.compile(r"unrecognized arguments: (.*)", re.DOTALL), "root", _unrecognized),
    Row("set by another", re.compile(r'Linked "([\w.]+)" must be given via "([\w.]+)"'), "root", _linked),
    Row("needed", re.compile(r"the following arguments are required: (?:\w+\.)?(.*)"), "root", _required),
    Row("no file", re.compile(r"Path is not a file: '(.*)'|Path does not exist: '(.*)'"), "root", _no_file),
    Row("no mapping", re.compile(r"Unexpected config: (.*)", re.DOTALL), "root", _no_mapping),
    Row("given twice", re.compile(r"line \d+: (\w+) is given twice"), "root", _twice),
    Row("no class path", re.compile(r"Expected a dot import path string: (\S+)"), "root", _no_class),
    Row("no such class", re.compile(r"(?:module|package) '([\w.]+)' has no attribute '(\w+)'"), "root", _no_class),
    Row("no such module", re.compile(r"No module named '([\w.]+)'"), "root", _no_class),
    Row("an empty value", re.compile(r"Unable to load config ['\"]{2}$"), "root", _empty),
    Row("a value in place of options", re.compile(r"Unable to load config ['\"](.+)['\"]$"), "root", _no_options),
    Row("a value that is not allowed", re.compile(r"(?:Given|Got) value: (.*)"), "value_text", _value),
)


def rejection(message: str, error: Exception | None, known: Iterable[str]) -> Rejection:
    """Read an error of jsonargparse.

    Args:
        message: Its message.
        error: The error.
        known: The options that the parser has.

    Returns:
        The rejected option, with the texts of the error and its causes.
    """
    chain = []
    while error is not None:
        chain.append(str(error))
        error = error.__cause__ if isinstance(error.__cause__, Exception) else None
    keys = [match[1] for text in chain if (match := re.match(r'Parser key "([^"]+)"', text))]
    key = ".".join(k for i, k in enumerate(keys) if i == 0 or k != keys[i - 1])
    paths = tuple(p for text in chain for p in re.findall(r"class_path(?: |=)'([\w.]+)'", text)[:1])
    value_text = next((t for t in reversed(chain) if t.startswith("Parser key")), message)
    return Rejection(message, chain[-1] if chain else message, key, value_text, paths, frozenset(known))


def explained(message: str, error: Exception | None, known: Iterable[str]) -> Explanation:
    """Describe the mistake in one sentence, and return names that may have been meant.

    Args:
        message: jsonargparse's message.
        error: Its error.
        known: The options that the parser has.

    Returns:
        Both; the message itself, in one line, where its kind is not known.
    """
    rejected = rejection(message, error, known)
    for row in ROWS:
        if (match := row.pattern.search(getattr(rejected, row.of))) is not None:
            return row.explain(match, rejected)
    reasons = re.findall(r'Parser key "([\w.]+)":\s*(?!Does not|Problem)(\S.*)', message)
    if reasons:  # the innermost account of a value
        inner, reason = reasons[-1]
        key = rejected.key if rejected.key.endswith(inner) else ".".join(filter(None, (rejected.key, inner)))
        return f"--{key}: {_line(reason)}", []
    return _line(message), []


def _line(text: str) -> str:
    """All in one line, and not too long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 400 else f"{flat[:400]} ..."


def _arguments(path: str) -> Mapping[str, inspect.Parameter]:
    """The arguments that a class takes."""
    module, _, name = path.rpartition(".")
    return inspect.signature(getattr(import_module(module), name)).parameters


def _parameters(path: str) -> list[str]:
    """The arguments that a class takes in a config."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    taken = (p for p in _arguments(path).values() if p.kind not in variadic)
    return [p.name for p in taken if p.name not in ("params", "optimizer")]


def _plain(reason: str) -> str:
    """The expected type in jsonargparse's words, without Python's marks around it."""
    return re.sub(r"<class '([\w.]+)'>", r"\1", _line(reason.partition(". Got value")[0])).removeprefix("Expected ")


def _default(rejected: Rejection) -> str:
    """The default of a class's argument where it is a tuple, which shows how to write one."""
    name = rejected.key.rpartition(".")[2]
    value = _arguments(rejected.paths[-1]).get(name) if rejected.paths else None
    if value is None or not isinstance(value.default, tuple):
        return ""
    return f", such as {list(value.default)}"


def _wanted(message: str, names: list[str]) -> list[str]:
    """The types and names that a message says are allowed."""
    rest = re.sub(r"typing\.Literal\[.*?\]|Given value.*", "", message)
    if pair := re.search(r"tuple\[((?:float|int)(?:, (?:float|int))*)\]", rest):
        count = pair[1].count(",") + 1
        return [f"{_COUNTS.get(count, count)} numbers, such as [{', '.join(['0'] * count)}]"]
    if pair := re.search(r"[Ee]xpected a tuple with (\d+) elements", rest):
        return [f"a list of {pair[1]} values"]
    types = [t for t in _TYPES if re.search(rf"class '{t}'|\b{t}\[", rest)]
    classes = [
        c.rpartition(".")[2] for c in re.findall(r"<class '([\w.]+)'>", rest) if "." in c and not c.startswith("torch.")
    ]
    numbers = list(dict.fromkeys(_TYPES[t] for t in types if not (t == "int" and "float" in types)))
    named = [names[0] if len(names) == 1 else f"one of {', '.join(names)}"] if names else []
    return [*numbers, *named, *dict.fromkeys(classes)]


def _near(word: str, known: Iterable[str]) -> list[str]:
    """The option most like ``word``: one of the same group, one of a group that was meant, then by its last part."""
    names = sorted(known)
    group, _, last = word.rpartition(".")
    if group:
        siblings = {k.removeprefix(f"{group}."): k for k in names if k.startswith(f"{group}.")}
        if close := closest(last, siblings, cutoff=0.7):
            return [siblings[close[0]]]
        groups = {k.rpartition(".")[0] for k in names if "." in k}
        for meant in closest(group, groups, most=3, cutoff=0.75):
            inside = {k.removeprefix(f"{meant}."): k for k in names if k.startswith(f"{meant}.")}
            if close := closest(last, inside, cutoff=0.7):
                return [inside[close[0]]]
    elif close := closest(word, [k for k in names if "." not in k], cutoff=0.7):
        return close
    tails = {k.rpartition(".")[2]: k for k in sorted(names, key=lambda k: (-len(k), k))}
    if close := closest(last, tails, cutoff=0.7):
        return [tails[close[0]]]
    if close := closest(word, names, cutoff=0.75):
        return close
    words = closest(last, _VOCABULARY, cutoff=0.7)
    return [_VOCABULARY[w] for w in words if _VOCABULARY[w] in known]


def _options(names: Iterable[str]) -> list[str]:
    return [f"--{name}" for name in names]


def _literals(message: str) -> list[str]:
    """All values that a message says are allowed by name."""
    quoted = ", ".join(re.findall(r"Literal\[(.*?)\]", message))
    return list(dict.fromkeys(word.strip("'") for word in quoted.split(", ") if word))
