"""``nslightning lr-search``: the learning rate at which a config trains best, one search per Jacobian choice."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from nslightning.commands.endings import CallError
from nslightning.commands.plain_parser import Arguments
from nslightning.commands.search import Search, Space, ended_trials, optuna_of, run_command, run_search
from nslightning.files import expanded, write_text

if TYPE_CHECKING:
    import optuna

    from nslightning.jacobians import Jacobians

__all__ = ["main", "make_parser"]

_HELP = """\
The learning rate at which a config trains best: one search per Jacobian choice, each trial a run of `fit`.

Trials are drawn log-uniformly by Optuna's TPE sampler; one whose metric lies below the median of the earlier trials at
the same epoch is pruned. This is the search of both papers, with one difference: where the config holds images out
(`--data.holdout`), the metric is of those. A search that is called again goes on where it was.

All other options are those of `nslightning fit`."""


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
        usage="nslightning lr-search --config FILE [options] [options of fit]",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--trials", type=int, default=20, help="trials per choice, pruned ones included (default: 20)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of a trial (default: 10)")
    parser.add_argument("--low", type=float, default=1e-5, help="smallest learning rate (default: 1e-5)")
    parser.add_argument("--high", type=float, default=1e-1, help="largest learning rate (default: 0.1)")
    parser.add_argument("--metric", default="val/acc1", help="what to maximise (default: val/acc1)")
    parser.add_argument(
        "--choices",
        nargs="+",
        metavar="NAME:FIELD=VALUE",
        help="Jacobian choices, as beta10:max_pool=10, one search each (default: the config's own)",
    )
    parser.add_argument("--keep-schedule", action="store_true", help="keep the config's schedule (default: constant)")
    parser.add_argument("--output", default="runs/lr-search", help="folder of the search (default: runs/lr-search)")
    return parser


def _search(options: argparse.Namespace, fit: list[str]) -> int:
    from nslightning.choices import named_choices
    from nslightning.experiments.executors import Resources, make_executor

    if not 0 < options.low < options.high < math.inf:
        raise ValueError(f"--low and --high are to be 0 < low < high; given {options.low} and {options.high}")
    for name in ("trials", "epochs"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is at least 1; given {getattr(options, name)}")
    if not any(word.startswith(("--config", "-c", "--data")) for word in fit):
        raise CallError("--data is needed, as in --config configs/quickstart.yaml or --data=MNIST")
    choices: dict[str, Jacobians | None] = {"config": None}
    if options.choices:
        choices = dict(named_choices(options.choices))
    optuna_of("lr-search")
    folder = expanded(options.output)
    studies: dict[str, optuna.Study] = {}
    for name, jacobians in choices.items():
        choice = {} if jacobians is None else jacobians.to_dict()
        words = [*fit, f"--trainer.max_epochs={options.epochs}"] + ["--model.lr_scheduler=null"] * (
            not options.keep_schedule
        )
        words += [f"--model.jacobians.{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in choice.items()]
        common = {name: getattr(options, name) for name in ("metric", "epochs", "low", "high")} | {"fit": fit}
        search = Search(
            name=name,
            folder=folder,
            spaces={"lr": Space("model.optimizer.lr", options.low, options.high, log=True)},
            fit=tuple(words),
            command="lr-search",
            metric=options.metric,
            trials=options.trials,
            common={**common, "choice": choice or None},
        )
        if status := run_search(search, make_executor("local", Resources(workers=1), folder)):
            return status
        studies[name] = search.study()
    _write(folder, studies, options.metric)
    return 0


def _write(folder: Path, studies: dict[str, optuna.Study], metric: str) -> None:
    """The trials as a table and a figure, and the best learning rates in words."""
    import pandas as pd

    from nslightning.figures import learning_rate_search

    rows = [
        {
            "choice": name,
            "trial": trial.number,
            "lr": trial.params["lr"],
            "epoch": epoch,
            metric: value,
            "state": trial.state.name.lower(),
        }
        for name, study in studies.items()
        for trial in ended_trials(study)
        for epoch, value in trial.intermediate_values.items()
    ]
    table = pd.DataFrame(rows)
    write_text(folder / "trials.csv", table.to_csv(index=False))
    best = {name: study.best_trial for name, study in studies.items()}
    for ending in ("png", "pdf"):
        learning_rate_search(table, metric, folder / f"lr_search.{ending}")
    for name, trial in best.items():
        print(f"{name}: best lr {trial.params['lr']:.5g} ({metric}={trial.value:.4f}, trial {trial.number})")
    print(f"Written to {folder}: trials.csv, lr_search.png, lr_search.pdf")
