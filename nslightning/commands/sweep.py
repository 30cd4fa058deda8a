"""``nslightning sweep``: search any options of a config, each trial a run of ``fit``."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nslightning.commands.endings import CallError
from nslightning.commands.plain_parser import Arguments
from nslightning.commands.search import Search, Space, ended_trials, optuna_of, run_command, run_search, write_best
from nslightning.files import expanded, write_text
from nslightning.text_table import aligned

if TYPE_CHECKING:
    import optuna

__all__ = ["main", "make_parser"]

_HELP = """\
Search any options of a config: each trial is a run of `fit` with other values of them, drawn by Optuna's TPE sampler.

  nslightning sweep --config configs/quickstart.yaml --search model.optimizer.lr=log:1e-4..1e-1 \\
    --search data.batch_size=16|32|64 --trials 20 --epochs 5

A space is a range, 0.1..0.9, of whole numbers where both ends are: 1..8; log: before it draws by the logarithm; or a
list of values, a|b|c. --search FILE.yaml reads a mapping of options to spaces. Every other option is one of
fit.
A search that is called again goes on where it was."""


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: The command line from the subcommand on.

    Returns:
        0; 2 where the call is mistaken; what ``fit`` returned where a trial could not run.

    Raises:
        SystemExit: After ``--help`` (0) and for arguments that are not understood (2).
    """
    return run_command(make_parser(f"nslightning {argv[0]}"), argv[1:], _search)


def make_parser(prog: str) -> Arguments:
    """The command's parser.

    Args:
        prog: Name of the command in its usage and error messages.

    Returns:
        The parser.
    """
    parser = Arguments(
        prog,
        usage="nslightning sweep --config FILE --search OPTION=SPACE [options] [options of fit]",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--search", action="append", default=[], metavar="OPTION=SPACE", help="what is searched")
    parser.add_argument("--trials", type=int, default=20, help="trials, pruned ones included (default: 20)")
    parser.add_argument("--epochs", type=int, help="epochs of a trial (default: the config's)")
    parser.add_argument("--metric", default="val/acc1", help="what is optimised, as it is logged (default: val/acc1)")
    parser.add_argument("--minimise", action="store_true", help="search its minimum (default: its maximum)")
    parser.add_argument("--no-prune", action="store_true", help="compute each trial to its end")
    parser.add_argument("--storage", metavar="URL", help="a database that Optuna takes (default: a file in the folder)")
    parser.add_argument("--output", default="runs/sweep", help="folder of the search (default: runs/sweep)")
    parser.add_argument("--study", default="sweep", metavar="NAME", help="of the study (default: sweep)")
    parser.add_argument("--workers", type=int, default=1, help="trials side by side (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: the GPUs are shared out (default: cpu)")
    parser.add_argument("--executor", default="local", help="local (default), ray or submitit: who computes the trials")
    parser.add_argument("--gpus-per-trial", type=float, help="share of a GPU that a trial takes, such as 0.5")
    parser.add_argument(
        "--executor-option", action="append", default=[], metavar="KEY=VALUE",
        help="an option of the executor, such as timeout_min=60 (submitit) or address=auto (Ray)",
    )  # fmt: skip
    return parser


def _search(options: argparse.Namespace, fit: list[str]) -> int:
    from nslightning.commands.devices import check_device
    from nslightning.commands.experiment import pairs_of
    from nslightning.experiments.executors import Resources, make_executor

    spaces = _spaces(options.search)
    for name in ("trials", "epochs"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ValueError(f"--{name} is at least 1; given {number}")
    if not any(word.startswith(("--config", "-c", "--data")) for word in fit):
        raise CallError("--data is needed, as in --config configs/quickstart.yaml or --data=MNIST")
    optuna_of("sweep")
    check_device(options.device)
    folder = expanded(options.output).absolute()
    words = fit if options.epochs is None else [*fit, f"--trainer.max_epochs={options.epochs}"]
    search = Search(
        name=options.study,
        folder=folder,
        spaces=spaces,
        fit=tuple(words),
        command="sweep",
        metric=options.metric,
        direction="minimize" if options.minimise else "maximize",
        trials=options.trials,
        storage=options.storage,
        prune=not options.no_prune,
        common={"metric": options.metric, "fit": words, "search": sorted(options.search)},
    )
    resources = Resources(
        workers=options.workers,
        device=options.device,
        gpus_per_cell=options.gpus_per_trial,
        options={k: v[-1] for k, v in pairs_of(options.executor_option, "--executor-option").items()},
    )
    try:
        status = run_search(search, make_executor(options.executor, resources, folder))
    finally:  # an interrupted search has its table too
        if search.storage is not None or folder.exists():
            _write(search, search.study())
    return status


def _spaces(words: list[str]) -> dict[str, Space]:
    import yaml

    texts: dict[str, Any] = {}
    for word in words:
        option, equals, text = word.removeprefix("--").partition("=")
        if equals and option and text:
            texts[option] = text
        elif Path(word).is_file() and isinstance(content := yaml.safe_load(Path(word).read_text()), dict):
            texts |= content
        elif word.endswith((".yaml", ".yml")) and not Path(word).exists():
            raise ValueError(f"--search {word}: there is no such file")
        else:
            raise ValueError(
                "--search takes OPTION=SPACE, such as model.optimizer.lr=log:1e-4..1e-1, or a YAML file of such pairs; "
                f"given {word!r}"
            )
    if not texts:
        raise ValueError("--search names what is searched, such as --search model.optimizer.lr=log:1e-4..1e-1")
    return {
        option: Space.parse(option, "|".join(map(str, text)) if isinstance(text, list) else str(text))
        for option, text in texts.items()
    }


def _write(search: Search, study: optuna.Study) -> None:
    """The trials as a table, and the best one as a config."""
    import pandas as pd

    trials = ended_trials(study)
    if not trials:
        return
    rows = [
        {
            "trial": trial.number,
            **trial.params,
            "state": trial.state.name.lower(),
            "epochs": len(trial.intermediate_values),
            search.metric: trial.value if trial.state.name == "COMPLETE" else None,
        }
        for trial in trials
    ]
    table = pd.DataFrame(rows)
    write_text(search.folder / "trials.csv", table.to_csv(index=False))
    shown = [[f"{value:.5g}" if isinstance(value, float) else str(value) for value in row] for row in table.to_numpy()]
    print("\n".join(aligned([list(table.columns), *shown])))
    if any(trial.state.name == "COMPLETE" for trial in trials):
        file = shlex.quote(str(write_best(search, study)))
        print(f"best: trial {study.best_trial.number}, {search.metric}={study.best_value:.4f}")
        print(f"Written to {search.folder}: trials.csv, best.yaml; go on with: nslightning fit --config {file}")
