"""Run folders as data: what a run has recorded so far. It may still be going, or have been killed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from nslightning.choices import choice_label
from nslightning.runs import Segment, segments
from nslightning.spelling import short

__all__ = ["ReportError", "RunFolder", "choice_label", "find_runs", "flatten", "read_run", "short"]

_NO_METRICS = pd.DataFrame({"step": [], "epoch": [], "metric": [], "value": []})
_DEPTH = 3  # folders between the one that is named and a run: an experiment's, a grid's


class ReportError(ValueError):
    """A folder that holds no run, or a file in it that cannot be read."""


@dataclass
class RunFolder:
    """The contents of one run folder.

    Args:
        folder: The folder.
        name: The run's name and number, such as ``quickstart/001``.
        record: ``run.json``: seed, precision, device, versions, data, patch.
        config: ``config.yaml``, flat: ``{"model.optimizer.lr": 0.02}``; empty where there is none.
        sites: ``patch_report.json``; None where there is none.
        nonfinite: ``nonfinite.json`` (:class:`~nslightning.callbacks.NonFiniteGuard`), or None.
        metrics: ``metrics.csv``, one row per logged value: ``step``, ``epoch``, ``metric``, ``value``.
        divergence: ``divergence.csv`` (:class:`~nslightning.callbacks.GradientDivergence`), or None.
        written: Time of the last metric, in seconds since the epoch; None before the first one.
    """

    folder: Path
    name: str
    record: dict[str, Any]
    config: dict[str, Any]
    sites: dict[str, Any] | None
    nonfinite: dict[str, Any] | None
    metrics: pd.DataFrame
    divergence: pd.DataFrame | None
    written: float | None

    @property
    def choice(self) -> str:
        """The Jacobian choice in use, in short; of a run that changed it, each one with its steps."""
        choices = [(s.from_step, s.choice) for s in self.segments]
        changes = [pair for i, pair in enumerate(choices) if i == 0 or pair[1] != choices[i - 1][1]]
        if len(changes) > 1:
            return "; then ".join(f"{choice} from step {step}" for step, choice in changes)
        return choice_label((self.record.get("patch") or {}).get("jacobians"))

    @property
    def segments(self) -> list[Segment]:
        """The steps under one config, choice, code and machine each."""
        return segments(self.record)

    def last(self, metric: str) -> float | None:
        """The value logged last under that name.

        Args:
            metric: Such as ``"val/acc1"``.

        Returns:
            The value, or None where the run has logged none.
        """
        values = self.metrics.loc[self.metrics["metric"] == metric, "value"]
        return None if values.empty else float(values.iloc[-1])


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config without its nesting: classes and choices in short, a class's arguments under the option's own name.

    Args:
        config: A config file's content.
        prefix: Beginning of each name.

    Returns:
        Values by dotted name.

    Example:
        >>> flatten({"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}, "seed": 0})
        {'optimizer': 'SGD', 'optimizer.lr': 0.1, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and all(isinstance(v, dict) and "class_path" in v for v in value):
            for v in value:  # callbacks, loggers: each under its class's name
                kind = v["class_path"].rpartition(".")[2]
                flat |= {f"{name}.{kind}": "yes"} | flatten(v.get("init_args") or {}, f"{name}.{kind}.")
        elif isinstance(value, dict) and "class_path" in value:
            flat |= {name: value["class_path"].rpartition(".")[2]} | flatten(value.get("init_args") or {}, f"{name}.")
        elif isinstance(value, dict) and {"relu", "max_pool", "rule"} <= value.keys():
            flat[name] = choice_label(value)
        elif isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """The run folders among the paths and below them, each once.

    Args:
        paths: Run folders, or folders of runs.

    Returns:
        The folders, in the order of the paths and, below one, of their names.

    Raises:
        ReportError: If a path is no folder, or there is no run in it.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            fault = "is a file" if path.exists() else "does not exist"
            raise ReportError(
                f"{path} {fault}; give the folder of a run, such as runs/quickstart/001, or a folder of runs"
            )
        inside = [path] if (path / "run.json").is_file() else []
        for depth in range(1, _DEPTH + 1) if not inside else ():
            inside += [file.parent for file in sorted(path.glob("*/" * depth + "run.json"))]
        if not inside:
            raise ReportError(
                f"{path} holds no run: a run's folder has a run.json, which `nslightning fit` writes before its first "
                "step; runs are kept where --output says, by default in runs/<name>/<number>"
            )
        folders |= {folder.resolve(): folder for folder in inside}
    return list(folders.values())


def read_run(folder: str | Path) -> RunFolder:
    """Read a run folder. A last line that a killed run left unfinished does not count.

    Args:
        folder: The folder.

    Returns:
        The run's record, config and measurements.

    Raises:
        ReportError: If a file in it is not what a run writes.
    """
    folder = Path(folder)
    metrics = folder / "metrics.csv"
    config = _mapping(folder / "config.yaml", yaml.safe_load) or {}
    return RunFolder(
        folder=folder,
        name="/".join(folder.resolve().parts[-2:]),
        record=_mapping(folder / "run.json", json.loads) or {},
        config=flatten(config),
        sites=_mapping(folder / "patch_report.json", json.loads),
        nonfinite=_mapping(folder / "nonfinite.json", json.loads),
        metrics=_metrics(metrics),
        divergence=_divergence(folder / "divergence.csv"),
        written=metrics.stat().st_mtime if metrics.is_file() else None,
    )


def _mapping(file: Path, parse: Any) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, OSError) as error:
        raise ReportError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ReportError(f"{file} is not the record of a run: it holds a {type(content).__name__}")
    return content


def _text_table(file: Path, needed: Sequence[str]) -> pd.DataFrame | None:
    """A CSV file's whole lines, every cell as text; None where there is no file or only a part of its first line."""
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if not whole:
            return None
        rows = pd.read_csv(io.StringIO(whole), dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # what pandas and the decoder raise are ValueErrors
        raise ReportError(f"{file} cannot be read as CSV: {str(error).splitlines()[0].strip()}") from error
    if missing := [name for name in needed if name not in rows]:
        raise ReportError(
            f"{file} has no column {' nor '.join(map(repr, missing))}; it has {', '.join(map(repr, rows.columns))}"
        )
    return rows


def _numbers(texts: pd.Series, file: Path) -> pd.Series:
    try:
        return pd.Series(texts.to_numpy(object).astype(float), texts.index)
    except ValueError as error:
        raise ReportError(f"{file}: column {texts.name!r} is to hold numbers: {error}") from error


def _divergence(file: Path) -> pd.DataFrame | None:
    numbers = ("step", "relative")
    rows = _text_table(file, ("choice", "parameter", *numbers))
    if rows is None:
        return None
    rows = rows.assign(**{name: _numbers(rows[name], file) for name in numbers})
    # Compared with another choice in use, a choice is another line.
    if "reference" in rows and rows["reference"].nunique() > 1:
        rows = rows.assign(choice=rows["choice"] + " against " + rows["reference"])
    return rows


def _metrics(file: Path) -> pd.DataFrame:
    rows = _text_table(file, ("step",))
    if rows is None:
        return _NO_METRICS.copy()
    steps = _numbers(rows["step"], file)
    epochs = pd.to_numeric(rows["epoch"], errors="coerce") if "epoch" in rows else float("nan")
    parts = []
    for name in rows.columns.difference(["step", "epoch"], sort=False):
        logged = rows[name] != ""  # an empty cell is a value not logged in this row; "nan" is one that was
        part = pd.DataFrame({"step": steps, "epoch": epochs, "metric": name})[logged]
        parts.append(part.assign(value=_numbers(rows.loc[logged, name], file)))
    return pd.concat(parts, ignore_index=True) if parts else _NO_METRICS.copy()
