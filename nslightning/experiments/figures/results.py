"""The tidy tables of experiments, read for drawing: every row with all settings of its cell."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nslightning.exact_csv import read_exactly

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["blocks", "read", "runs_at_end", "share_interval", "sorted_choices", "with_choice"]


def read(paths: Sequence[str | Path]) -> pd.DataFrame:
    """Read results of experiments.

    Args:
        paths: Folders ``<output>/<name>/<scale>``, or their ``results.csv``.

    Returns:
        The rows of all tables; besides the table's own columns, every setting of the cell (``data`` is the data set's
        name), and as ``images`` which copy of it was read. Empty, where no path is given.

    Raises:
        ValueError: If a path holds no results of an experiment.
    """
    import pandas as pd

    parts = []
    for path in dict.fromkeys(map(Path, paths)):
        file = path / "results.csv" if path.is_dir() else path
        record = file.with_name("provenance.json")
        if file.name != "results.csv" or not file.is_file() or not record.is_file():
            inside = sorted(f.parent for f in path.glob("**/results.csv")) if path.is_dir() else []
            hint = f"; there are {', '.join(map(str, inside))}" if inside else ""
            raise ValueError(
                f"{path} holds no results (results.csv and provenance.json, which "
                f"`nslightning experiment NAME` writes){hint}"
            )
        # A metric is called "nan", and must stay a word.
        rows = read_exactly(file, keep_default_na=False, na_values=[""]).rename(columns={"data": "images"})
        if rows.empty:
            raise ValueError(f"{file} is empty: no cell of the experiment is finished yet")
        cells = json.loads(record.read_text())["cells"]
        absent = set(rows["cell"]) - set(cells)
        if absent:
            raise ValueError(f"{record} does not know cell {min(absent)} of {file.name}: they are of different calls")
        settings = {name: cells[name]["settings"] for name in set(rows["cell"])}
        for column in dict.fromkeys(k for s in settings.values() for k in s):
            rows[column] = [_hashable(settings[cell].get(column)) for cell in rows["cell"]]
        parts.append(rows)
    if not parts:
        return pd.DataFrame(columns=["experiment", "scale", "cell", "metric", "value", "images"])
    return pd.concat(parts, ignore_index=True)


def _hashable(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def with_choice(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the name of the choice that an experiment varies, and its value.

    Args:
        rows: Results from :func:`read`.

    Returns:
        The rows of training runs, with ``parameter`` (``relu`` or ``max_pool``) and ``choice``.
    """
    import pandas as pd

    parts = []
    for _, part in rows.groupby(["experiment", "scale"], sort=False):
        parameter = "max_pool" if part["max_pool"].astype(str).nunique() > 1 else "relu"
        parts.append(part.assign(parameter=parameter, choice=[_number(v) for v in part[parameter]]))
    return pd.concat(parts, ignore_index=True)


def _number(value: Any) -> Any:
    """A choice so that 10 and 10.0 are one."""
    if isinstance(value, str) or value is None:
        return value or "native"
    return int(value) if float(value).is_integer() else float(value)


def blocks(rows: pd.DataFrame, keys: list[str]) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    """The rows by what they have in common, in the order of the table.

    Args:
        rows: Results from :func:`read`.
        keys: Columns; None is a value like any other.

    Returns:
        The common values, and the rows that have them.
    """
    return [(key, part) for key, part in rows.groupby(keys, sort=False, dropna=False)]


def sorted_choices(values: Iterable[Any]) -> list[Any]:
    """Numbers by size, then names."""
    return sorted(set(values), key=lambda v: (isinstance(v, str), v))


def runs_at_end(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Each run's value of a metric at its last epoch.

    Args:
        rows: Results of training runs.
        metric: Which.

    Returns:
        One row per run; ``diverged`` says that its training loss was no longer finite there.
    """
    last = rows[rows["epoch"] == rows.groupby("cell")["epoch"].transform("max")]
    dead = set(last.loc[(last["metric"] == "nan") & (last["value"] > 0), "cell"])
    finals = last[last["metric"] == metric]
    return finals.assign(diverged=finals["cell"].isin(dead) | ~finals["value"].map(math.isfinite))


def share_interval(hits: float, n: float) -> tuple[float, float]:
    r"""Wilson's 95 % interval of a share, which also holds where the share is 0 or 1.

    Args:
        hits: Number of hits.
        n: Number of trials.

    Returns:
        The lower and the upper end.

    Example:
        >>> [round(v, 4) for v in share_interval(0, 100)]
        [0.0, 0.037]
    """
    from scipy.stats import binomtest

    interval = binomtest(round(hits), round(n)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
