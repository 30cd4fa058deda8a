"""Finds the start of a command: a new run, the folder of a run that goes on, or a checkpoint with its config.

A run that goes on takes its own config, not the one that began it or its name: a config file says how runs of its kind
begin, and the run's folder says how it went on. Flags change a run that goes on.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from nslightning import runs
from nslightning.commands.config_files import read_config

__all__ = ["Call", "Start", "start"]


@dataclass
class Call:
    """The statements of a command line about the run, read before a parser knows their types.

    Args:
        command: The subcommand.
        words: The words after it, each option with its value in one word.
        configs: The config files.
        options: The last value of each option that finds a run; flags win over config files.
    """

    command: str
    words: list[str]
    configs: list[str]
    options: dict[str, str]

    @classmethod
    def read(cls, argv: Sequence[str]) -> Call:
        """Read a command line.

        Args:
            argv: The command line from the subcommand on.

        Returns:
            The call, its config files and options apart.

        Raises:
            ValueError: If a config file cannot be read as one.
        """
        words, configs, options = _paired(argv[1:]), list[str](), dict[str, str]()
        for word in words:
            flag, equals, value = word.partition("=")
            if flag in ("--config", "-c") and equals:
                configs.append(value)
                if Path(value).is_file():
                    options |= _found_in(read_config(value))
            elif equals and flag == "--model":
                options |= {"task": "own", "model": value}
            elif equals and flag.startswith("--") and flag[2:] in (*_FINDING, "model.backbone"):
                options[flag[2:]] = value
        return cls(argv[0], words, configs, {k: v for k, v in options.items() if v != "null"})

    @property
    def output(self) -> str:
        """Return the folder where runs are kept."""
        return str(Path(self.options.get("output", "runs")).expanduser())

    @property
    def name(self) -> str:
        """The run's name: as given, or the config's, or the network's."""
        if self.options.get("name"):
            return self.options["name"]
        if not self.configs:
            network = self.options.get("model.backbone") or self.options.get("model")
            return re.sub(r"[/:]", "-", network or self.options.get("task", "images"))
        # configs/innaprop/cifar10_vgg11.yaml is another experiment than configs/cifar10_vgg11.yaml.
        file = Path(next((c for c in reversed(self.configs) if Path(c).parent.name != "fragments"), self.configs[-1]))
        folders = file.parent.parts
        inside = folders[folders.index("configs") + 1 :] if "configs" in folders else ()
        return "-".join([*inside, file.stem])


def _paired(argv: Sequence[str]) -> list[str]:
    """Each option with its value in one word.

    Example:
        >>> _paired(["--name", "x", "--seed_everything=1", "--help"])
        ['--name=x', '--seed_everything=1', '--help']
    """
    words = list[str]()
    waiting: str | None = None
    for word in argv:
        option = word.startswith("--") or word == "-c"
        if waiting is not None:
            words.append(waiting if option else f"{waiting}={word}")
        elif not option:
            words.append(word)
        waiting = word if option and "=" not in word else None
        if option and waiting is None:
            words.append(word)
    return words if waiting is None else [*words, waiting]


def _found_in(content: dict[str, Any]) -> dict[str, str]:
    """Read the options that find a run from a config file."""
    options = {key: str(content[key]) for key in _FINDING if content.get(key) is not None}
    model = content.get("model")
    fields = model if isinstance(model, dict) else {}
    if isinstance(model, str) or "class_path" in fields:  # the user's own LightningModule
        options = {"task": "own", "model": str(fields.get("class_path", model))} | options
    if fields.get("backbone") is not None:
        options["model.backbone"] = str(fields["backbone"])
    return options


_FINDING = ("name", "output", "ckpt_path", "task", "weights_only")


@dataclass
class Start:
    """The start of a command: a new run, or one that goes on.

    Args:
        argv: The command line to parse, the config of the run among its config files.
        name: The run's name.
        folder: The folder of the run that goes on; None where a new one begins, or nothing is trained.
        checkpoint: The checkpoint, read and found whole.
        content: The content of the checkpoint; empty where there is none.
    """

    argv: list[str]
    name: str
    folder: Path | None = None
    checkpoint: Path | None = None
    content: dict[str, Any] = field(default_factory=dict)


def start(argv: Sequence[str], command: str) -> tuple[Start, str]:
    """Find out where a command starts.

    Args:
        argv: The command line as it was typed, from the subcommand on.
        command: The subcommand that runs: ``fit`` for the commands that are one of its kind.

    Returns:
        Where it starts, and the task: the options depend on it.

    Raises:
        ValueError: If a config file or a checkpoint cannot be read.
        FileNotFoundError: If there is no such checkpoint.
    """
    call = Call.read(argv)
    begin = _start(call, argv, command)
    return begin, Call.read(begin.argv).options.get("task", "images")


def _start(call: Call, argv: Sequence[str], command: str) -> Start:
    plain = Start(list(argv), call.name)
    if any(word in ("-h", "--help") or word.startswith("--print_config") for word in call.words):
        return plain
    which = call.options.get("ckpt_path")
    fit = command == "fit"
    if which is None:
        folder = runs.folder_of_job(call.output, call.name) if fit else None
        return plain if folder is None else _going_on(call, folder, "last")
    if which.startswith("registry"):
        return plain
    if not which:
        raise ValueError("--ckpt_path= names no checkpoint: give --ckpt_path=last or a file, or leave it out")
    if which not in ("last", "best", "hpc"):
        return _from_file(call, Path(which).expanduser(), fit)
    if fit and which == "best":
        raise ValueError("--ckpt_path=best: a run goes on from its last checkpoint: --ckpt_path=last")
    own = [f for f in (Path(c).parent for c in call.configs) if runs.checkpoints_in(f)]
    folder = own[-1] if own else runs.last_run_folder(call.output, call.name)
    if folder is None or not (files := _candidates(folder, which)):
        missing = (
            f"--ckpt_path={which}: there is no checkpoint in {folder or Path(call.output, call.name, '*')}/checkpoints"
        )
        if not fit:
            raise FileNotFoundError(missing)
        rank_zero_warn(f"{missing} yet, so a new run starts")
        return Start(_without(call, ("ckpt_path",)), call.name)
    if fit:
        return _going_on(call, folder, which)
    checkpoint, content = _whole(files, which, call)
    rank_zero_info(f"Checkpoint: {checkpoint}")
    return Start(list(argv), call.name, None, checkpoint, content)


def _candidates(folder: Path, which: str) -> list[Path]:
    files = runs.checkpoints_in(folder)
    if which == "best":
        return [file for file in files if file.name == "best.ckpt"]
    return [file for file in files if file.parent == folder] if which == "hpc" else files


def _whole(files: Sequence[Path], which: str, call: Call) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that can be read; of those that cannot, one says so."""
    damaged = []
    for file in files:
        try:
            content = runs.read_checkpoint(file, _trusts(call))
        except ValueError as error:
            damaged.append(str(error))
            continue
        if damaged:
            rank_zero_warn(f"{'; '.join(damaged)}. The one before is taken: {file}")
        return file, content
    raise ValueError(
        f"--ckpt_path={which}: {'; '.join(damaged)}. There is no whole checkpoint before it: start a new run, without "
        "--ckpt_path"
    )


def _trusts(call: Call) -> bool:
    return call.options.get("weights_only", "").lower() != "false"


def _from_file(call: Call, file: Path, fit: bool) -> Start:
    """A checkpoint by its path, with the config of its run where none is given."""
    if not file.exists():
        raise FileNotFoundError(f"--ckpt_path: there is no file {file}")
    if file.is_dir():
        inside = runs.checkpoints_in(file)
        example = f": --ckpt_path={inside[0]}" if inside else ""
        raise ValueError(f"--ckpt_path={file} is a folder, and a checkpoint is a file{example}")
    try:
        content = runs.read_checkpoint(file, _trusts(call))
    except ValueError as error:
        others = [other for other in runs.checkpoints_in(file.parent.parent) if other != file and runs.is_whole(other)]
        before = f"; a whole one beside it: --ckpt_path={others[0]}" if others else ""
        raise ValueError(f"--ckpt_path: {error}{before}") from None
    words = [call.command, *call.words]
    beside = file.parent.parent / "config.yaml"
    if not call.configs and beside.is_file() and not any(w.startswith("--data=") for w in call.words):
        _refuse_unnamed_code(beside, call)
        rank_zero_info(f"Config: {beside}")
        words = [call.command, f"--config={beside}", *call.words]
    return Start(words, call.name, None, file, content)


def _refuse_unnamed_code(config: Path, call: Call) -> None:
    """A config that the call does not name runs the libraries' classes, and code that the call names itself."""
    if any(Path(file).resolve() == config.resolve() for file in call.configs):
        return
    asked = [*call.words, *(name for file in call.configs if Path(file).is_file() for name in _code_of(Path(file)))]
    for name in _code_of(config):
        if (":" in name or not name.startswith(_LIBRARIES)) and not any(name in word for word in asked):
            raise ValueError(
                f"{config} names code outside this package, {name}, and is not read unasked: if you trust it, add "
                f"--config={config}"
            )


#: Where the classes of a config may come from unasked. PyTorch has functions that run whatever they are given.
_LIBRARIES = ("nslightning.", "lightning.", "pytorch_lightning.", "torch.nn.", "torch.optim.")
#: Options whose text names a class, a function, or a file with one, where it is no mapping with a ``class_path``.
_NAMES_CODE = ("callbacks", "class_path", "data", "dict_kwargs", "init_args", "logger", "lr_scheduler", "model",
               "optimizer", "plugins", "profiler", "strategy", "trainer")  # fmt: skip
_DOTTED = re.compile(r"([A-Za-z_]\w*)(\.[A-Za-z_]\w*)+")


def _code_of(config: Path) -> list[str]:
    """The code that a config names."""
    return [name for key, text in _texts_in(read_config(config)) for name in _code_in(key, text, config.parent)]


def _texts_in(content: Any, key: str = "") -> list[tuple[str, str]]:
    """All texts of a config, each with the option that it belongs to.

    Example:
        >>> _texts_in({"model": {"backbone": "a.b:make"}, "x.callbacks+": ["c.D", {"class_path": "e.F"}]})
        [('backbone', 'a.b:make'), ('callbacks', 'c.D'), ('class_path', 'e.F')]
    """
    if isinstance(content, dict):
        keys = {name: str(name).rstrip("+").rpartition(".")[2] for name in content}
        return [text for name, value in content.items() for text in _texts_in(value, keys[name])]
    if isinstance(content, list):
        return [text for value in content for text in _texts_in(value, key)]
    return [(key, content)] if isinstance(content, str) else []


def _code_in(key: str, text: str, folder: Path) -> list[str]:
    """The code that a text of a config may have run: a class or a function by its path, or a file that names one.

    Example:
        >>> _code_in("backbone", "timm/resnet18", Path()), _code_in("backbone", "a.b:make", Path())
        ([], ['a.b:make'])
        >>> _code_in("on_fit_start", "os.getcwd", Path()), _code_in("root", "images.v2", Path())
        (['os.getcwd'], [])
    """
    if key == "backbone":  # torchvision/resnet18, timm/hf-hub:..., or package.module:factory
        return [text] if ":" in text.partition("/")[0] else []
    if key in _NAMES_CODE:  # text in place of a mapping may be the name of a file with one
        named = "." in text or os.sep in text or _is_file(text, folder)
        return [text] if named else []
    # Any option may take a function, by the path of one that can be imported.
    return [path[0] for path in _DOTTED.finditer(text) if _is_module(path[1])]


def _is_file(name: str, folder: Path) -> bool:
    try:
        return Path(name).is_file() or (folder / name).is_file()
    except OSError:  # of a text that is too long for a name
        return False


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # of a module without a specification, as `__main__`
        return True


def _going_on(call: Call, folder: Path, which: str) -> Start:
    """Go on in the run's folder and under its config, with the flags on top."""
    checkpoint, content = _whole(_candidates(folder, which), which, call)
    rank_zero_info(f"Checkpoint: {checkpoint}")
    own = folder / "config.yaml"
    if not own.is_file():
        warnings.warn(f"{own} is missing: the run goes on under the config that is given", stacklevel=2)
        return Start(_without(call, ("ckpt_path",)), folder.parent.name, folder, checkpoint, content)
    _refuse_unnamed_code(own, call)
    kept, own_seen = list[str](), False
    for word in call.words:
        flag, _, value = word.partition("=")
        if flag in ("--config", "-c"):
            if Path(value).resolve() == own.resolve():
                own_seen = True
                kept.clear()  # what follows the run's own config is asked for
            elif own_seen:
                kept.append(word)
            elif Path(value).is_file():
                _say_differences(Path(value), own)
        elif flag not in ("--ckpt_path", "--name", "--output"):
            kept.append(word)
    kept = _not_twice(kept, runs.segments(runs.read_record(folder)), read_config(own))
    return Start([call.command, f"--config={own}", *kept], folder.parent.name, folder, checkpoint, content)


def _without(call: Call, flags: Sequence[str]) -> list[str]:
    return [call.command, *(w for w in call.words if w.partition("=")[0] not in {f"--{flag}" for flag in flags})]


def _say_differences(asked: Path, own: Path) -> None:
    """Say what a config file asks for that the run does not have."""
    wanted, kept = runs.flat(read_config(asked)), runs.flat(read_config(own))
    choice = "model.jacobians."
    differing = [
        f"{name}: {value!r}, and the run has {kept[name]!r}"
        for name, value in wanted.items()
        if name in kept and not name.startswith("trainer.callbacks.") and not _alike(value, kept[name])
    ]
    if differing:
        example = next((name for name in wanted if name.startswith(choice)), "trainer.max_epochs")
        rank_zero_info(
            f"The run goes on under its own config, {own}; {asked} says otherwise, and is not followed ("
            f"{'; '.join(differing)}). Flags change a run that goes on, such as --{example}=..."
        )


def _alike(one: Any, other: Any) -> bool:
    """Return whether two values are equal; a class may be named with or without its module."""
    if isinstance(one, str) and isinstance(other, str):
        return one.rpartition(".")[2] == other.rpartition(".")[2]
    return bool(one == other)


def _not_twice(words: Sequence[str], segments: Sequence[runs.Segment], own: dict[str, Any]) -> list[str]:
    """Let additions to a list replace those that were made when the run began: the config has these already.

    The README's way to go on is the same line once more, with --ckpt_path=last.
    """
    flags = list(dict.fromkeys(word.partition("+=")[0] for word in words if "+=" in word))
    kept = list(words)
    for flag in flags:
        began = [_about(flag, _paired(segment.words)) for segment in segments]
        last = next((group for group in reversed(began) if any("+=" in word for word in group)), [])
        if not last:
            continue
        asked = _about(flag, words)
        kept = [word for word in kept if word not in asked]
        if asked == last:
            continue
        items: Any = own
        for part in flag.lstrip("-").split("."):
            items = items.get(part) or {}
        added = sum("+=" in word for word in last)
        kept += [f"{flag}={json.dumps(items[: len(items) - added])}", *asked]
    return kept


def _about(flag: str, words: Sequence[str]) -> list[str]:
    """The words that add to a list, and those that say more of its last item."""
    return [word for word in words if word.startswith((f"{flag}+=", f"{flag}."))]
