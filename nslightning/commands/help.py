"""``--help`` of the training commands without importing what they train with: the options that a run needs, at once.

The options are read from the source of the classes that take them, signature and docstring, so that nothing is said
twice. ``--help=all`` prints the whole list, Lightning's own options included. Building that one imports everything
and takes a quarter of a minute, so it is kept in the cache of the user, for as long as nothing it depends on changes.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from nslightning.files import cache_folder, write_text

__all__ = ["COMMANDS", "Option", "options", "short", "whole"]

#: The commands whose parser is Lightning's.
COMMANDS = ("fit", "validate", "test", "predict", "twins")
_PACKAGE = Path(__file__).parents[1]
_LINKED = {"num_classes", "image_shape", "seed"}  # set by the data, or by --seed_everything
_TRAINER = {
    "max_epochs": "Stop after so many epochs.",
    "precision": "32-true, bf16-mixed, 16-mixed, 64-true, ...",
    "accelerator": "cpu, gpu, auto, ...",
    "devices": "How many, or which.",
    "limit_train_batches": "Batches of an epoch, as a number or a share.",
    "fast_dev_run": "Run one batch of everything, and write nothing.",
    "callbacks": "Callbacks that watch the training, as in configs/watched_vgg11.yaml.",
    "logger": "Where metrics go besides metrics.csv; false: nowhere.",
}
_RUN = {
    "--config FILE": "A YAML file with any of the options; several files add up, flags win.",
    "--name NAME": "Name of the run; by default the config's.",
    "--output FOLDER": "Where run folders are kept (default: runs).",
    "--ckpt_path FILE": "A checkpoint; last: go on with the last run of that name.",
    "--seed_everything N": "Seed of weights, order, augmentation and dropout (default: 0).",
    "--task images|text|own": "To train a backbone, GPT-2 or your own LightningModule, which --model=CLASS_PATH "
    "implies (default: images).",
}


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Args:
        section: Heading of the help under which it stands.
        flag: As it is written, such as ``--model.backbone``.
        value: The form of its values.
        text: One sentence on its effect.
    """

    section: str
    flag: str
    value: str
    text: str


def options(command: str) -> list[Option]:
    """The options that a run needs; the trainer has many more.

    Args:
        command: One of ``COMMANDS``.

    Returns:
        The options in the order in which they are shown.

    Example:
        >>> [o.flag for o in options("fit")][:2]
        ['--config', '--name']
    """
    shown = [Option("run", *_split(flag), text) for flag, text in _RUN.items()]
    model = _of_class("models/classifier.py", "ImageClassifier", "--model.")
    twins = command == "twins"
    if twins:  # one section of the twins' options and of those that they share; their networks are backbones
        shown = [option for option in shown if option.flag != "--task"]
        shown += _of_class("models/twins.py", "Twins", "--model.")
        shown += [option for option in model if option.flag != "--model.jacobians"]
        shown += _of_class("callbacks/twin_divergence.py", "TwinDivergence", "--divergence.")
    else:
        shown += model
        shown += [
            Option("Jacobian choice, as --model.jacobians=jax or", f"--model.jacobians.{name}", "", "")
            for name in (*_operations(), "rule")
        ]
    names = ", ".join(_data_sets("ImageDataModule" if twins else "ResumableDataModule"))
    shown += [
        Option("data", "--data", "NAME", f"The data set: {names}."),
        *_of_class("data/base.py", "ResumableDataModule", "--data."),
    ]
    return shown + [Option("trainer", f"--trainer.{name}", "", text) for name, text in _TRAINER.items()]


def short(command: str) -> str:
    """The short help.

    Args:
        command: One of ``COMMANDS``.

    Returns:
        The text.
    """
    from nslightning.cli import COMMANDS as KNOWN

    lines = [f"usage: nslightning {command} --config FILE [options]", "", _sentence(KNOWN[command][1])]
    section = ""
    for option in options(command):
        if option.section != section:
            section = option.section
            lines += ["", f"{section}:"]
        if not option.text:  # the fields of the choice: their meaning is in the docs, their names fit on lines
            lines.append(option.flag)
            continue
        words = f"{option.flag} {option.value}".rstrip()
        lines += textwrap.wrap(option.text, 108, initial_indent=f"  {words:<36} ", subsequent_indent=" " * 39)
    text = re.sub(r"(?:^--model\.jacobians\.\w+\n)+", _in_columns, "\n".join(lines) + "\n", flags=re.MULTILINE)
    return text + f"\nnslightning {command} --help=all lists every option, those of Lightning's Trainer included.\n"


def _in_columns(block: re.Match[str]) -> str:
    joined = "  ".join(block[0].split())
    return textwrap.fill(joined, 108, initial_indent="  ", subsequent_indent="  ") + "\n"


def whole(words: Sequence[str], build: Callable[[], str]) -> str:
    """The whole help, from the cache where nothing has changed since it was built.

    Args:
        words: The command line without the program's name: the command, and a task where one is named.
        build: Builds it; called where the cache has none.

    Returns:
        The text.
    """
    command, state = words[0], _fingerprint([*words, str(shutil.get_terminal_size().columns)])
    file = cache_folder("help") / f"{command}-{state}.txt"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    text = build()
    with suppress(OSError):  # a cache that cannot be written is none
        write_text(file, text)
    return text


def _fingerprint(words: Sequence[str]) -> str:
    """Describe everything that the help depends on besides the words: versions, and this package's source."""
    packages = ("nslightning", "lightning", "jsonargparse", "torch", "docstring-parser", "rich-argparse")
    state = [sys.version, *words, *(f"{p}={_version(p)}" for p in packages)]
    for file in sorted(_PACKAGE.rglob("*.py")):
        facts = file.stat()
        state.append(f"{file.relative_to(_PACKAGE)} {facts.st_size} {facts.st_mtime_ns}")
    return hashlib.sha256("\n".join(state).encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "none"


def _split(flag: str) -> tuple[str, str]:
    name, _, value = flag.partition(" ")
    return name, value


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _data_sets(kind: str) -> Iterator[str]:
    """The names of the data sets in the package's list: the classes below a data module."""
    bases: dict[str, list[str]] = {}
    for file in (_PACKAGE / "data").glob("*.py"):
        classes = (n for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef))
        bases |= {cls.name: [ast.unparse(base) for base in cls.bases] for cls in classes}

    def below(name: str) -> bool:
        return any(base == kind or below(base) for base in bases.get(name, ()))

    tree = ast.parse((_PACKAGE / "data" / "__init__.py").read_text(encoding="utf-8"))
    listed = next(n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    for name in ast.literal_eval(listed):
        if below(name) and not name.endswith("DataModule"):
            yield name


def _operations() -> Iterator[str]:
    """The names of the operations that have a choice, from their records: importing these takes torch."""
    for file in sorted((_PACKAGE / "ops").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Operation", "pointwise_operation"):
                name = next((k.value for k in node.keywords if k.arg == "name"), node.args[0] if node.args else None)
                if isinstance(name, ast.Constant):
                    yield str(name.value)


def _of_class(file: str, name: str, prefix: str) -> list[Option]:
    """The options of a class: its arguments, with what the docstring says of them in its first sentence."""
    tree = ast.parse((_PACKAGE / file).read_text(encoding="utf-8"))
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    start = next(n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    descriptions = _arguments(ast.get_docstring(cls) or "")
    arguments = start.args.args[1:]
    defaults = [None] * (len(arguments) - len(start.args.defaults)) + list(start.args.defaults)
    options_of_class = []
    for argument, default in zip(arguments, defaults, strict=True):
        if argument.arg in _LINKED:
            continue
        simple = isinstance(default, ast.Constant) and default.value not in (None, "")
        by = f" (default: {ast.unparse(default)})" if simple and default is not None else ""
        role = r"``|:(?:class|func|meth|mod|data):`~?(?:\w+\.)*(\w+)`"
        text = re.sub(role, lambda m: m[1] or "", descriptions.get(argument.arg, ""))
        section = prefix.strip("-.")
        options_of_class.append(Option(section, f"{prefix}{argument.arg}", "", _first(text) + by))
    return options_of_class


def _first(text: str) -> str:
    """The first sentence."""
    return re.split(r"(?<=[.;:])\s+(?=[A-Z`])", text.strip(), maxsplit=1)[0].rstrip(".;: ")


def _arguments(docstring: str) -> dict[str, str]:
    """The section `Args` of a docstring in Google's style."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", inspect.cleandoc(docstring), re.MULTILINE)
    descriptions: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(section[1]).splitlines() if section else []:
        if start := re.match(r"(\*{0,2}\w+): (.*)", line):
            name = start[1]
            descriptions[name] = start[2]
        elif name:
            descriptions[name] += f" {line.strip()}"
    return descriptions
