"""``nslightning lr-search``: the learning rate at which a config trains best, one search per Jacobian choice."""

from __future__ import annotations

import argparse
import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nslightning.commands.dashes import with_underscores
from nslightning.commands.endings import CallError, ended
from nslightning.commands.plain_parser import Arguments, refuse_empty
from nslightning.commands.stopping import Stopped
from nslightning.files import expanded, write_text
from nslightning.spelling import closest

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


#: Options of `fit` without a group.
_OF_FIT = ("config", "name", "seed_everything", "task", "arithmetic", "ckpt_path", "weights_only", "model", "data")


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: The command line from the subcommand on.

    Returns:
        0; 2 where the call is mistaken; what ``fit`` returned where a trial could not run.

    Raises:
        SystemExit: After ``--help`` (0) and for arguments that are not understood (2).
    """
    parser = make_parser(f"nslightning {argv[0]}")
    refuse_empty(parser, argv[1:])
    given, fit = parser.parse_known_args(argv[1:])
    fit = with_underscores(fit)
    own = [option for option in parser._option_string_actions if option.startswith("--")]
    known = [*own, *(f"--{name}" for name in _OF_FIT)]
    for option in (word.partition("=")[0] for word in fit):
        if option.startswith("--") and "." not in option and option not in known:
            hint = f"\n  did you mean {near[0]!r}?" if (near := closest(option, known)) else ""
            parser.error(f"there is no option {option}{hint}")
    return ended(parser.prog, lambda: _search(given, fit), go_on="the same command goes on")


def make_parser(prog: str) -> Arguments:
    """The command's parser.

    Args:
        prog: What the command is called.

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


def _search(given: argparse.Namespace, fit: list[str]) -> int:
    from nslightning.choices import named_choices

    if not 0 < given.low < given.high < math.inf:
        raise ValueError(f"--low and --high are to be 0 < low < high; given {given.low} and {given.high}")
    for name in ("trials", "epochs"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name} is at least 1; given {getattr(given, name)}")
    if not any(word.startswith(("--config", "-c", "--data")) for word in fit):
        raise CallError("--data is needed, as in --config configs/quickstart.yaml or --data=MNIST")
    choices: dict[str, Jacobians | None] = {"config": None}
    if given.choices:
        choices = dict(named_choices(given.choices))
    optuna = _optuna()
    folder = expanded(given.output)
    folder.mkdir(parents=True, exist_ok=True)
    journal = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    storage = optuna.storages.JournalStorage(journal)
    studies: dict[str, Any] = {}
    for name, jacobians in choices.items():
        study = optuna.create_study(
            study_name=name,
            storage=storage,
            direction="maximize",
            load_if_exists=True,
            # By the number of the trial: a search that goes on does not draw its first trials again.
            sampler=optuna.samplers.TPESampler(seed=_trials_of(storage, name)),
            pruner=optuna.pruners.MedianPruner(),
        )
        fixed = {"metric": given.metric, "epochs": given.epochs, "low": given.low, "high": given.high, "fit": fit}
        fixed["choice"] = None if jacobians is None else jacobians.to_dict()
        if study.user_attrs.get("search", fixed) != json.loads(json.dumps(fixed)) and study.trials:
            raise ValueError(
                f"{folder} holds another search for {name!r} ({_changed(study.user_attrs['search'], fixed)}): "
                "name another folder with --output"
            )
        study.set_user_attr("search", fixed)
        studies[name] = study
        while len(_ended(study)) < given.trials:
            trial = study.ask()
            lr = trial.suggest_float("lr", given.low, given.high, log=True)
            try:
                status, value = _run(trial, _command(given, fit, folder, name, jacobians, lr), given.metric)
            except optuna.TrialPruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                print(f"{name}: trial {trial.number}: lr={lr:.5g} pruned after epoch {len(_reports(study, trial))}")
                continue
            except BaseException as error:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                error.add_note(_done(study, given.trials, name))
                raise
            if status:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                if status > 128:
                    stop = Stopped(status - 128)
                    stop.add_note(_done(study, given.trials, name))
                    raise stop
                return status
            study.tell(trial, value)
            print(f"{name}: trial {trial.number}: lr={lr:.5g} {given.metric}={value:.4f}")
    _write(folder, studies, given.metric)
    return 0


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("lr-search needs Optuna: pip install 'nslightning[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _trials_of(storage: Any, name: str) -> int:
    studies = {s.study_name: s._study_id for s in storage.get_all_studies()}
    return len(storage.get_all_trials(studies[name])) if name in studies else 0


def _ended(study: optuna.Study) -> list[Any]:
    return [t for t in study.trials if t.state.name in ("COMPLETE", "PRUNED")]


def _done(study: optuna.Study, trials: int, name: str) -> str:
    return f"after {len(_ended(study))} of {trials} trials of {name!r}"


def _reports(study: optuna.Study, trial: optuna.Trial) -> dict[int, float]:
    return study.trials[trial.number].intermediate_values


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    return ", ".join(f"{k} was {old.get(k)!r} and is {v!r}" for k, v in new.items() if old.get(k) != v)


def _command(
    given: argparse.Namespace, fit: list[str], folder: Path, name: str, jacobians: Jacobians | None, lr: float
) -> list[str]:
    """The trial as a call of `fit`; what comes last wins."""
    command = [
        "fit",
        *fit,
        "--trainer.callbacks=null",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
    ]
    command += [f"--output={folder / 'trials'}", f"--name={name}", f"--trainer.max_epochs={given.epochs}"]
    command += [f"--model.optimizer.lr={lr!r}"] + ["--model.lr_scheduler=null"] * (not given.keep_schedule)
    changed = {} if jacobians is None else jacobians.to_dict()
    return command + [
        f"--model.jacobians.{field}={value if isinstance(value, str) else json.dumps(value)}"
        for field, value in changed.items()
    ]


def _run(trial: optuna.Trial, command: list[str], metric: str) -> tuple[int, float]:
    """One trial: the exit status of `fit`, and the metric at its end."""
    import optuna
    from lightning.pytorch import Callback, LightningModule, Trainer

    from nslightning.commands import train, training_cli

    seen: list[float] = []

    class Report(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.sanity_checking:
                return
            if metric not in trainer.callback_metrics:
                known = ", ".join(sorted(trainer.callback_metrics))
                raise ValueError(f"--metric={metric} is not logged by this config; it logs {known}")
            value = float(trainer.callback_metrics[metric])
            seen.append(0.0 if math.isnan(value) else value)  # a diverged trial is a bad one, not a broken one
            trial.report(seen[-1], len(seen))
            if trial.should_prune():
                raise optuna.TrialPruned

    class Reporting(training_cli.TrainCLI):
        silent_stop = True

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(Report())
            return trainer

    chatter = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in chatter]
    for logger in chatter:
        logger.setLevel(logging.WARNING)  # a trial is one line
    try:
        status = train.main(command, Reporting)
    finally:
        for logger, level in zip(chatter, levels, strict=True):
            logger.setLevel(level)
    return status, seen[-1] if seen else math.nan


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
        for trial in _ended(study)
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
