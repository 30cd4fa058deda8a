"""The ``nslightning`` command: finds the subcommand's module and hands it the arguments.

Nothing heavy is imported before the command, its config files and the packaged defaults are known to exist, so that
``--help``, ``--version`` and most mistakes are answered at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from nslightning.commands.process import plain_warnings
from nslightning.commands.stopping import Stopped, signals
from nslightning.commands.streams import printing
from nslightning.spelling import did_you_mean

__all__ = ["main"]

COMMANDS = {
    "fit": ("nslightning.commands.train", "train a patched backbone and record what the Jacobian choice changes"),
    "validate": ("nslightning.commands.train", "evaluate a checkpoint on the validation images"),
    "test": ("nslightning.commands.train", "evaluate a checkpoint on the test images"),
    "predict": ("nslightning.commands.train", "write a checkpoint's predictions for the test images"),
    "zones": ("nslightning.commands.zones", "how often two choices' gradients differ, over initialisations"),
    "twins": ("nslightning.commands.twins", "train several choices in lockstep, and compare their weights"),
    "experiment": ("nslightning.commands.experiment", "run a grid of runs, and hold it against the papers"),
    "figure": ("nslightning.commands.figure", "draw a figure from the results of experiments"),
    "report": ("nslightning.commands.report", "show what runs recorded: one HTML page with interactive figures"),
    "dashboard": ("nslightning.commands.dashboard", "a W&B workspace with panels for what the callbacks log"),
    "sweep": ("nslightning.commands.sweep", "search any options of a config, each trial a run of fit"),
    "lr-search": ("nslightning.commands.lr_search", "find the learning rate, one search per Jacobian choice"),
    "push": ("nslightning.commands.push", "write a trained model as the folder of a model hub"),
    "tokens": ("nslightning.commands.tokens", "turn text into the token files that a language model is trained on"),
    "shards": ("nslightning.commands.shards", "turn a folder of images into a few large files, or verify them"),
    "cost": ("nslightning.commands.cost", "what a backbone's gradient costs under several Jacobian choices"),
    "audit": ("nslightning.commands.audit", "how far a model's gradients depend on the Jacobian choice"),
    "schema": ("nslightning.commands.schema", "JSON schemas, from which an editor completes and checks YAML files"),
}

# Whose work begins with imports that take many seconds.
_HEAVY = ("fit", "validate", "test", "predict", "zones", "twins", "experiment", "sweep", "lr-search", "cost", "audit")

USAGE = """\
usage: nslightning COMMAND [--config FILE] [options]

Train any timm, torchvision or paper backbone with a chosen derivative at the points
where it is not unique (ReLU'(0) = alpha, how MaxPool shares its gradient over ties),
and measure what that choice changes.

commands:
{commands}

  nslightning COMMAND --help   the options of a command
  nslightning --version        the installed version (--verbose: what it runs on, which kernels are in force)
  nslightning --print-completion bash|zsh|tcsh    completion for a shell, as in
                               eval "$(nslightning --print-completion bash)"

examples:
  nslightning fit --config configs/quickstart.yaml
  nslightning fit --config configs/quickstart.yaml --model.jacobians.relu=1 --model.jacobians.max_pool=10
  nslightning fit --config configs/quickstart.yaml --ckpt_path=last       # go on with the last run

packaged configs (also from outside the repository):
  {configs}
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        args: The command line without the program's name; ``sys.argv`` by default.

    Returns:
        The exit status: 0, 1 where a command failed, 2 where it was called wrongly, 129 after the end of its terminal,
        130 after Ctrl-C, 141 where the reader of its output is gone, and 143 after SIGTERM.

    Example:
        >>> main(["--version"])
        nslightning ...
        0
    """
    argv = list(sys.argv[1:] if args is None else args)
    with plain_warnings():
        return printing(lambda: _stoppable(argv))


def _stoppable(argv: list[str]) -> int:
    program = " ".join(["nslightning", *(word for word in argv[:1] if word in COMMANDS)])
    with signals() as handler:
        # The first process answers for those that Lightning started for its training: they stop with it, at a step, or
        # when it is gone. One that ends by itself has Lightning kill them all.
        if argv[:1] in (["fit"], ["twins"]) and os.environ.get("LOCAL_RANK", "0") not in ("", "0"):
            handler.answers, handler.waits = False, True
        try:
            status = _run(argv)
        except Stopped as stop:
            print(f"\n{program}: stopped by {stop.by}", file=sys.stderr)
            return stop.status
        # A command knows that it was interrupted; by what is known here.
        return 128 + handler.signum if status == 130 and handler.signum is not None else status


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--print-completion":
        from nslightning.commands.completion import SHELLS, script

        if argv[1:2] not in [[shell] for shell in SHELLS]:
            print(f"nslightning: --print-completion takes one of {', '.join(SHELLS)}", file=sys.stderr)
            return 2
        print(script(argv[1]))
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"nslightning {version('nslightning')}")
        if argv[1:] == ["--verbose"]:
            from nslightning.commands.installation import describe

            print(describe())
        elif argv[1:]:
            print(f"nslightning: --version takes --verbose; given {' '.join(argv[1:])}", file=sys.stderr)
            return 2
        return 0
    command, *rest = argv
    try:
        Path.cwd()
    except FileNotFoundError:
        print("nslightning: the folder that this shell stands in is gone: cd to one that exists", file=sys.stderr)
        return 2
    if command not in COMMANDS:
        hint = did_you_mean(command, [*COMMANDS, "--help", "--version"])
        print(f"nslightning: there is no command {command!r}{hint} Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        rest = _packaged_configs(rest)
    except FileNotFoundError as error:
        print(f"nslightning {command}: error: {error}", file=sys.stderr)
        return 2
    if wrong := [word for word in rest if word.startswith("--help=") and word != "--help=all"]:
        print(f"nslightning {command}: error: {wrong[0]}: there are --help and --help=all", file=sys.stderr)
        return 2
    if (text := _help(command, rest)) is not None:
        print(text, end="")
        return 0
    if command in _HEAVY and "torch" not in sys.modules and not {"-h", "--help"} & set(rest):
        print(f"nslightning {command}: loading torch and lightning ...", file=sys.stderr, flush=True)
    return int(import_module(COMMANDS[command][0]).main([command, *rest]))


def _help(command: str, words: list[str]) -> str | None:
    """The help that is asked for, of a command whose own parser takes long to build; None where none is."""
    from nslightning.commands import help as fast

    if command not in fast.COMMANDS:
        return None
    if {"-h", "--help"} & set(words):
        return fast.short(command)
    if "--help=all" not in words:
        return None

    def build() -> str:
        print(f"nslightning {command}: loading torch and lightning ...", file=sys.stderr, flush=True)
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            import_module(COMMANDS[command][0]).main([command, *kept, "--help"])
        return text.getvalue()

    kept = [word for word in words if word.startswith("--task=")]
    return fast.whole([command, *kept], build)


def _usage() -> str:
    from nslightning import configs

    folder = Path(configs.__file__).parent
    names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*.yaml"))
    commands = "\n".join(f"  {name:<12} {text}" for name, (_, text) in COMMANDS.items())
    return USAGE.format(commands=commands, configs="\n  ".join(f"configs/{name}" for name in names)).rstrip()


def _packaged_configs(argv: list[str]) -> list[str]:
    """Replace each ``--config`` that is no file here by the packaged one of that name."""
    from nslightning import configs

    words = list(argv)
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-c"):
            continue
        if not equals:
            if i + 1 == len(argv):
                raise FileNotFoundError(f"{flag} names a YAML file, such as {flag} configs/quickstart.yaml")
            value = argv[i + 1]
        if not value:
            raise FileNotFoundError(f"{flag}= names no file: give one, such as {flag} configs/quickstart.yaml")
        own = Path(value).expanduser()
        if own.exists() and str(own) == value:
            continue
        path = str(own if own.exists() else configs.path(value))
        words[i if equals else i + 1] = f"{flag}={path}" if equals else path
    return words
