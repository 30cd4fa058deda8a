"""Searches on Optuna: trials that are runs of ``fit``, computed by any executor, kept in a storage, gone on with."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from nslightning.commands.dashes import with_underscores
from nslightning.commands.endings import ended
from nslightning.commands.plain_parser import Arguments, refuse_empty
from nslightning.commands.stopping import Stopped
from nslightning.files import write_text
from nslightning.spelling import closest

if TYPE_CHECKING:
    import optuna

    from nslightning.experiments.executors import Executor

__all__ = ["Search", "Space", "TrialEnd", "ended_trials", "optuna_of", "run_command", "run_search", "write_best"]

#: Options of `fit` without a group.
_OPTIONS_OF_FIT = (
    "config",
    "name",
    "seed_everything",
    "task",
    "arithmetic",
    "ckpt_path",
    "weights_only",
    "model",
    "data",
)

#: Options that a trial sets, and the best trial's config leaves out.
_OF_TRIAL = ("callbacks", "logger", "enable_checkpointing")


@dataclass(frozen=True)
class Space:
    """The space in which an option is searched.

    Args:
        option: An option of ``fit``, such as ``model.optimizer.lr``.
        low: The smallest number; None for a list of values.
        high: The largest one.
        log: Whether numbers are drawn by their logarithm.
        whole: Whether they are whole numbers.
        values: The values, where they are listed.
    """

    option: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False
    values: tuple[Any, ...] = ()

    @classmethod
    def parse(cls, option: str, text: str) -> Space:
        """Read a space.

        Args:
            option: The option.
            text: ``0.1..0.9``, ``1..8`` (whole numbers), ``log:1e-4..1e-1``, or values: ``16|32|64``.

        Returns:
            The space.

        Raises:
            ValueError: If the text is no space.

        Example:
            >>> Space.parse("model.optimizer.lr", "log:1e-4..1e-1")
            Space(option='model.optimizer.lr', low=0.0001, high=0.1, log=True, whole=False, values=())
            >>> Space.parse("data.batch_size", "16|32").values
            (16, 32)
        """
        import yaml

        words, log = text.removeprefix("log:"), text.startswith("log:")
        if (bounds := re.fullmatch(r"(\S+?)\.\.(\S+)", words)) is not None:
            try:
                low, high = (float(bound) for bound in bounds.groups())
            except ValueError:
                low, high = math.nan, math.nan
            if not -math.inf < low < high < math.inf or (log and low <= 0):
                raise ValueError(
                    f"--search {option}={text}: a range is two numbers, the smaller first"
                    f"{' and above 0' if log else ''}, such as log:1e-4..1e-1"
                )
            whole = all(re.fullmatch(r"[+-]?\d+", bound) is not None for bound in bounds.groups())
            return cls(option, low, high, log, whole)
        if log or "|" not in words:
            raise ValueError(
                f"--search {option}={text} is not a space: give a range, such as 0.1..0.9 or log:1e-4..1e-1, or "
                "values, such as 16|32|64"
            )
        return cls(option, values=tuple(yaml.safe_load(value) for value in words.split("|")))

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """Let a trial take a value.

        Args:
            trial: The trial.
            name: Name of the parameter in the study.

        Returns:
            The value.
        """
        if self.low is None or self.high is None:
            # Optuna's categories are numbers and text; a list or a mapping goes by its text.
            texts = [json.dumps(value) for value in self.values]
            return json.loads(trial.suggest_categorical(name, texts))
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True, kw_only=True)
class Search:
    """One study: what its trials have in common.

    Args:
        name: Name of the study.
        folder: Folder of its trials; of the storage too, unless a URL is named.
        spaces: The values to search, by the parameter's name.
        fit: Options of ``fit``; what comes last wins.
        command: The command that searches, by its name.
        metric: Logged name of the metric to optimise.
        direction: ``maximize`` or ``minimize``.
        trials: Number of trials, pruned ones included.
        storage: A URL of a database that Optuna takes; None is a file in the folder.
        prune: Whether a trial is given up whose metric is worse than the median of the earlier ones at its epoch.
        common: Settings that a search which goes on must share with its earlier trials.

    Raises:
        ValueError: If the largest loss is searched for.
    """

    name: str
    folder: Path
    spaces: Mapping[str, Space]
    fit: tuple[str, ...]
    command: str
    metric: str
    direction: Literal["maximize", "minimize"] = "maximize"
    trials: int = 20
    storage: str | None = None
    prune: bool = True
    common: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.direction == "maximize" and "loss" in self.metric.rpartition("/")[2]:
            way = "add --minimise" if self.command == "sweep" else "`nslightning sweep --minimise` finds the smallest"
            raise ValueError(f"--metric={self.metric} is a loss, and the largest value would win: {way}")

    def study(self, seed: int = 0) -> optuna.Study:
        """Open the study, or make it.

        Args:
            seed: Seed of its sampler. A search that goes on, and several workers, are to draw different first trials.

        Returns:
            The study.

        Raises:
            ValueError: If another search is kept there.
        """
        library = optuna_of(self.command)
        study: optuna.Study = library.create_study(
            study_name=self.name,
            storage=self._storage(library),
            direction=self.direction,
            load_if_exists=True,
            sampler=library.samplers.TPESampler(seed=seed),
            pruner=library.pruners.MedianPruner() if self.prune else library.pruners.NopPruner(),
        )
        common = json.loads(json.dumps(self.common))
        kept = study.user_attrs.get("search", common)
        if kept != common and any(trial.state.name != "FAIL" for trial in study.trials):
            changed = ", ".join(f"{k} was {kept.get(k)!r} and is {v!r}" for k, v in common.items() if kept.get(k) != v)
            raise ValueError(
                f"{self.folder} holds another search for {self.name!r} ({changed}): name another folder with --output"
            )
        study.set_user_attr("search", common)
        return study

    def _storage(self, library: Any) -> Any:
        if self.storage is not None:
            if "://" not in self.storage:
                raise ValueError(f"--storage={self.storage} is no URL of a database, such as sqlite:///search.db")
            return self.storage
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = library.storages.journal.JournalFileBackend(str(self.folder / "study.journal"))
        return library.storages.JournalStorage(journal)


class TrialEnd(NamedTuple):
    """The ending of a trial.

    Args:
        number: Number of the trial.
        values: The values that it tried, by parameter.
        metric: The metric after its last epoch; None where it was pruned or failed.
        epochs: Number of epochs that it trained.
        status: The exit status of ``fit``.
    """

    number: int
    values: dict[str, Any]
    metric: float | None
    epochs: int
    status: int = 0


def optuna_of(command: str) -> Any:
    """Optuna, with little to say.

    Args:
        command: Name of the command that needs it.

    Returns:
        The module.

    Raises:
        ImportError: With the extra that has it.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f"{command} needs Optuna: pip install 'nslightning[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def run_command(parser: Arguments, words: list[str], search: Callable[[argparse.Namespace, list[str]], int]) -> int:
    """Run a command that searches: its own options, and those of ``fit`` for its trials.

    Args:
        parser: The command's parser.
        words: The command line after the command.
        search: Takes the command's options, and the options of ``fit``.

    Returns:
        The exit status of the search; 2 where the call is mistaken.

    Raises:
        SystemExit: After ``--help`` (0) and for arguments that are not understood (2).
    """
    refuse_empty(parser, words)
    options, fit = parser.parse_known_args(words)
    fit = with_underscores(fit)
    own = [option for option in parser._option_string_actions if option.startswith("--")]
    known = [*own, *(f"--{name}" for name in _OPTIONS_OF_FIT)]
    for option in (word.partition("=")[0] for word in fit):
        if option.startswith("--") and "." not in option and option not in known:
            hint = f"\n  did you mean {near[0]!r}?" if (near := closest(option, known)) else ""
            parser.error(f"there is no option {option}{hint}")
    return ended(parser.prog, lambda: search(options, fit), go_on="the same command goes on")


def ended_trials(study: optuna.Study) -> list[Any]:
    """The trials of a study that were computed to their end, or pruned."""
    return [t for t in study.get_trials(deepcopy=False) if t.state.name in ("COMPLETE", "PRUNED")]


def run_search(search: Search, executor: Executor) -> int:
    """Compute the trials that are missing, each a line when it is done.

    Args:
        search: The search.
        executor: The executor that computes them.

    Returns:
        0, or the exit status of the first trial that could not run.

    Raises:
        KeyboardInterrupt: After Ctrl-C or SIGTERM; its note says how many trials are done.
    """
    made = None if search.folder.exists() else search.folder
    study = search.study()
    missing, first = search.trials - len(ended_trials(study)), len(study.get_trials(deepcopy=False))
    try:
        with closing(executor.results(functools.partial(_trial, search), range(first, first + missing))) as results:  # type: ignore[type-var] # a generator, which has `close`
            for _, end, error in results:
                if end is None:
                    print(f"{search.name}: a trial failed: {error}", file=sys.stderr)
                    return 1
                if end.status > 128:
                    raise Stopped(end.status - 128)
                if end.status:
                    if end.status == 2:
                        _leave_nothing(made, study)
                    return end.status
                tried = ", ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in end.values.items())
                reached = (
                    f"pruned after epoch {end.epochs}" if end.metric is None else f"{search.metric}={end.metric:.4f}"
                )
                print(f"{search.name}: trial {end.number}: {tried} {reached}", flush=True)
    except ValueError:
        _leave_nothing(made, study)
        raise
    except BaseException as error:
        error.add_note(f"after {len(ended_trials(study))} of {search.trials} trials of {search.name!r}")
        raise
    return 0


def _leave_nothing(made: Path | None, study: optuna.Study) -> None:
    """Remove the folder that a mistaken call made, unless a trial came of it."""
    if made is not None and all(trial.state.name == "FAIL" for trial in study.trials):
        shutil.rmtree(made, ignore_errors=True)


def _trial(search: Search, seed: int, device: str) -> TrialEnd:
    """One trial, in whichever process."""
    optuna = optuna_of("a search")
    study = search.study(seed)
    trial = study.ask()
    values = {name: space.suggest(trial, name) for name, space in search.spaces.items()}
    command = ["fit", *search.fit, "--trainer.callbacks=null", "--trainer.logger=false"]
    command += ["--trainer.enable_checkpointing=false", f"--output={search.folder / 'trials'}", f"--name={search.name}"]
    if device.startswith("cuda"):
        command += ["--trainer.accelerator=gpu", f"--trainer.devices=[{device.partition(':')[2] or 0}]"]
    for name, space in search.spaces.items():
        value = values[name]
        command.append(f"--{space.option}={value if isinstance(value, str) else json.dumps(value)}")
    state = optuna.trial.TrialState
    reports: list[float] = []
    try:
        status = _fit(trial, command, search, reports)
    except optuna.TrialPruned:
        study.tell(trial, state=state.PRUNED)
        return TrialEnd(trial.number, values, None, len(reports))
    except BaseException:
        study.tell(trial, state=state.FAIL)
        raise
    if status:
        study.tell(trial, state=state.FAIL)
        return TrialEnd(trial.number, values, None, len(reports), status)
    metric = reports[-1] if reports else math.nan
    study.tell(trial, metric)
    return TrialEnd(trial.number, values, metric, len(reports))


def _fit(trial: optuna.Trial, command: list[str], search: Search, reports: list[float]) -> int:
    """Run ``fit`` for a trial, and keep what it reports: its exit status."""
    import optuna
    from lightning.pytorch import Callback, LightningModule, Trainer

    from nslightning.commands import train, training_cli

    class Report(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.sanity_checking:
                return
            if search.metric not in trainer.callback_metrics:
                known = ", ".join(sorted(trainer.callback_metrics))
                raise ValueError(f"--metric={search.metric} is not logged by this config; it logs {known}")
            value = float(trainer.callback_metrics[search.metric])
            # A diverged trial is a bad one, not a broken one.
            worst = 0.0 if search.direction == "maximize" else sys.float_info.max
            reports.append(worst if math.isnan(value) else value)
            trial.report(reports[-1], len(reports))
            if trial.should_prune():
                raise optuna.TrialPruned

    class Reporting(training_cli.TrainCLI):
        program = search.command
        silent_stop = True

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(Report())
            if self.place.folder is not None:
                trial.set_user_attr("run", str(self.place.folder))
            return trainer

    chatter = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in chatter]
    for logger in chatter:
        logger.setLevel(logging.WARNING)  # a trial is one line
    try:
        return train.main(command, Reporting)
    finally:
        for logger, level in zip(chatter, levels, strict=True):
            logger.setLevel(level)


def write_best(search: Search, study: optuna.Study) -> Path:
    """Write the config of the best trial, without what every trial sets.

    Args:
        search: The search.
        study: Its study.

    Returns:
        The file, which ``fit --config`` takes.
    """
    import yaml

    trial = study.best_trial
    config = yaml.safe_load((Path(trial.user_attrs["run"]) / "config.yaml").read_text(encoding="utf-8"))
    for key in ("output", "name", "ckpt_path"):
        config.pop(key, None)
    for key in _OF_TRIAL:
        config.get("trainer", {}).pop(key, None)
    head = (
        f"# Trial {trial.number} of {search.trials}: {search.metric} = {trial.value:.6g}, from `nslightning sweep`.\n"
    )
    write_text(path := search.folder / "best.yaml", head + yaml.safe_dump(config, sort_keys=False))
    return path
