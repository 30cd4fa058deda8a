"""Our numbers beside the published ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nslightning.experiments.cells import Cell
from nslightning.experiments.grid import Experiment, Planned, setting
from nslightning.experiments.published import table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["comparison", "markdown"]

_KEYS = ("published", "where", "match", "of", "metric", "at", "statistic", "within", "over", "drop_nan", "draws")
_STATISTICS = ("mean", "proportion", "within", "probability", "share", "rate")


def comparison(experiment: Experiment, results: pd.DataFrame) -> pd.DataFrame:
    r"""Compare an experiment with the published numbers that its file names.

    Each entry of ``compare`` has ``published`` (a table of :mod:`nslightning.experiments.published`), ``where``
    (the table's rows to compare with), ``match`` (the table's columns that are our settings, ``{column:
    setting}``), ``of`` (the settings of the cells to compare, by default all cells), ``metric`` (ours), and
    ``statistic``:

    - ``mean`` (default): the mean over seeds of ``metric`` at the epoch ``at``, ``last`` (default), or ``best``: each
      run's maximum over epochs, which selects on the test images. Inside: the difference is at most two published
      standard deviations; where these are unknown, ``inside`` stays empty.
    - ``proportion``: the share of parameter vectors with ``metric`` > 0.
    - ``within``: the share of parameter vectors whose ``metric`` is at most ``within``.
    - ``probability``: the mean over parameter vectors of ``metric``, a chance that was counted for each.
    - ``share``: the sum of ``metric`` over the sum of ``batches``. ``draws`` says how many parameter vectors the
      published mini-batches are of.
    - ``rate``: the sum of ``metric`` over the sum of the metric ``over``; the published rate has no known spread.

    Parameter vectors are independent of one another, the mini-batches of one are not. A share of n draws has the
    standard deviation :math:`\sqrt{p(1-p)/n}`; inside means a difference of at most two of them, those of both sides
    taken together, with p from both. A ``probability`` has that of our mean over the draws, :math:`s / \sqrt n`,
    together with that of the published share. A ``share`` of mini-batches has the spread s of the draws' own shares;
    inside means at most Student's 97.5 % quantile with n - 1 degrees of freedom times :math:`s \sqrt{1/n +
    1/n_{published}}`. Where all n draws say 0, or all 1, it means what n such draws cannot exclude at 5 %,
    :math:`1 - 0.05^{1/n}`. One draw has no spread, and ``inside`` stays empty.

    Published rows of a data set that did not run are left out.

    Runs with NaN keep the accuracy that their constant output has, as in the published tables; ``drop_nan: true``
    leaves them out, as the published box plots did.

    Args:
        experiment: The experiment, with its ``compare``.
        results: Its tidy table.

    Returns:
        One row per setting that was run: what varies (seeds aside), ``published_mean``, ``published_sd``,
        ``published_n``, ``published_nan``, ``mean``, ``sd``, ``n`` (runs or draws), ``nan``, ``difference``,
        ``inside`` (``yes``, ``no``, or empty), ``data``, ``scale``. Settings that no paper ran have empty published
        columns.

    Raises:
        ValueError: If ``compare`` names an unknown table, column or setting.
    """
    import pandas as pd

    finished = set(results["cell"]) if len(results) else set()
    groups: dict[str, tuple[dict[str, Any], list[Planned]]] = {}
    for planned in experiment.cells():
        if planned.id in finished:
            head = {k: v for k, v in planned.varied.items() if k != "seed"}
            groups.setdefault(str(head), (head, []))[1].append(planned)
    rows, compared = [], set()
    for must_match in (True, False):  # a group that no entry matches comes once, after the rest
        for entry in experiment.compare:
            for key, (head, cells) in groups.items():
                if any(not _equal(value, setting(cells[0].cell, name)) for name, value in entry.get("of", {}).items()):
                    continue
                theirs = _published(entry, cells[0].cell)
                if bool(theirs) == must_match and (must_match or key not in compared):
                    ours = results[results["cell"].isin([p.id for p in cells])]
                    rows.append(_row(head, ours, theirs, entry, experiment.scale))
                    compared.add(key)
    return pd.DataFrame(rows)


def _published(entry: Mapping[str, Any], cell: Cell) -> list[dict[str, Any]]:
    """The published rows that an entry holds a cell against."""
    for key in entry:
        if key not in _KEYS:
            raise ValueError(f"compare has {key!r}; known here: {', '.join(_KEYS)}")
    ours = {column: setting(cell, name) for column, name in {"data": "data", **entry.get("match", {})}.items()}
    wanted = json.dumps(entry.get("where", {}), sort_keys=True)
    return _by_columns(table, entry["published"], wanted, tuple(ours)).get(tuple(map(_normal, ours.values())), [])


@lru_cache(maxsize=64)
def _by_columns(
    read: Callable[[str], pd.DataFrame], published: str, where: str, columns: tuple[str, ...]
) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """The published rows that are meant, by what they have in some columns."""
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in _meant({"published": published, "where": json.loads(where)}, columns, read):
        rows.setdefault(tuple(_normal(row[c]) for c in columns), []).append(row)
    return rows


def _meant(
    entry: Mapping[str, Any],
    columns: Iterable[str] = ("data",),
    read: Callable[[str], pd.DataFrame] | None = None,
) -> list[dict[str, Any]]:
    """The published rows, with these columns, that an entry refers to; the results play no part."""
    published, where = (read or table)(entry["published"]), entry.get("where", {})
    for column in (*where, *columns):
        if column not in published:
            raise ValueError(
                f"compare: {entry['published']} has no column {column!r}, but {', '.join(map(str, published))}"
            )
    rows = published.to_dict("records")
    return [{str(k): v for k, v in row.items()} for row in rows if all(_equal(row[c], v) for c, v in where.items())]


def _nothing_published(experiment: Experiment) -> str:
    """Return which data no published number is of, and which data would have some."""
    theirs = dict.fromkeys(str(row["data"]) for entry in experiment.compare for row in _meant(entry))
    without = [data for data in dict.fromkeys(p.cell.data for p in experiment.cells()) if data not in theirs]
    if not without or not theirs:
        return ""
    have = f"{', '.join(theirs)} {'has' if len(theirs) == 1 else 'have'}"
    return f"Nothing is published for {', '.join(without)}; {have} published numbers."


def _row(
    head: Mapping[str, Any],
    ours: pd.DataFrame,
    theirs: list[dict[str, Any]],
    entry: Mapping[str, Any],
    scale: str,
) -> dict[str, Any]:
    statistic = entry.get("statistic", "mean")
    if statistic not in _STATISTICS:
        raise ValueError(f"compare.statistic={statistic!r} is not one of {', '.join(_STATISTICS)}")
    values = ours[ours["metric"] == entry["metric"]]
    if values.empty:
        raise ValueError(f"compare.metric: there is no {entry['metric']!r}, but {', '.join(ours['metric'].unique())}")
    nan = 0
    if statistic == "mean":
        last = values["epoch"].max()
        diverged = set(ours.loc[(ours["metric"] == "nan") & (ours["epoch"] == last) & (ours["value"] > 0), "cell"])
        nan = len(diverged)
        if entry.get("drop_nan"):
            values = values[~values["cell"].isin(diverged)]
        best = entry.get("at", "last") == "best"
        one = values.groupby("cell")["value"].max() if best else values[values["epoch"] == last]["value"]
        mean, sd, n = float(one.mean()), float(one.std()), len(one)
    elif statistic in ("proportion", "within"):
        hit = values["value"] > 0 if statistic == "proportion" else values["value"] <= entry["within"]
        mean, n = float(hit.mean()), len(values)
        sd = _binomial(mean, n)
    elif statistic == "probability":
        mean, n = float(values["value"].mean()), len(values)
        sd = float(values["value"].std()) / math.sqrt(n)
    else:
        mean, spread_of_draws, n = _ratio(ours, entry["metric"], entry.get("over", "batches"))
        sd = spread_of_draws / math.sqrt(n)
    row = {
        **head,
        "metric": entry["metric"],
        **{f"published_{k}": math.nan for k in ("mean", "sd", "n", "nan")},
        "mean": mean,
        "sd": sd,
        "n": n,
        "nan": nan,
        "difference": math.nan,
        "inside": "",
        "data": "; ".join(dict.fromkeys(ours["data"])),
        "scale": scale,
    }
    if not theirs:
        return row
    if len(theirs) > 1:
        raise ValueError(f"compare: {len(theirs)} rows of {entry['published']} match {dict(head)}; add to `where`")
    reference = theirs[0]
    published_mean, count = float(reference["mean"]), float(reference.get("n", math.nan))
    if statistic in ("mean", "rate"):
        spread = float(reference.get("sd", math.nan))
        limit = 2 * spread
    elif statistic == "share":
        spread = math.nan
        limit = _student(n) * spread_of_draws * math.sqrt(1 / n + 1 / entry.get("draws", 1))
        if limit == 0 and mean in (0, 1):  # all draws alike: n draws bound the share only so far
            limit = 1 - 0.05 ** (1 / n)
    elif statistic == "probability":
        spread = _binomial(published_mean, count)
        limit = 2 * math.hypot(spread, sd)
    else:
        spread = _binomial(published_mean, count)
        pooled = (published_mean * count + mean * n) / (count + n)
        limit = 2 * math.sqrt(pooled * (1 - pooled) * (1 / count + 1 / n))
    difference = mean - published_mean
    row |= {
        "published_mean": published_mean,
        "published_sd": spread,
        "published_n": count,
        "published_nan": float(reference.get("n_nan", 0)),
        "difference": difference,
        "inside": "" if math.isnan(limit) else "yes" if abs(difference) <= limit + 1e-12 else "no",
    }
    return row


def _ratio(ours: pd.DataFrame, metric: str, over: str) -> tuple[float, float, int]:
    """A ratio of sums, the spread of the draws' own ratios, and how many draws there are."""
    index = [name for name in ("cell", "theta") if name in ours and ours[name].notna().any()]
    sums = ours[ours["metric"].isin([metric, over])].groupby([*index, "metric"])["value"].sum().unstack()
    each = sums[metric] / sums[over]
    return float(sums[metric].sum() / sums[over].sum()), float(each.std()), len(each)


def _student(n: int) -> float:
    """Student's 97.5 % quantile for a mean of n; NaN for one."""
    from scipy import stats

    return float(stats.t.ppf(0.975, n - 1)) if n > 1 else math.nan


def _binomial(p: float, n: float) -> float:
    return math.sqrt(p * (1 - p) / n)


def _equal(published: Any, ours: Any) -> bool:
    """Return whether a published value and a setting are the same: numbers as numbers, networks by their own name."""
    return _normal(published) == _normal(ours)


def _normal(value: Any) -> str:
    """A value in one spelling: numbers to nine digits, networks by their own name."""
    if str(value) in ("True", "False"):
        return str(value)
    try:
        return f"{float(value):.9g}"
    except (TypeError, ValueError):
        return str(value).removeprefix("paper/")


def markdown(experiment: Experiment, compared: pd.DataFrame) -> str:
    """The comparison as a table to read.

    Args:
        experiment: Whose it is.
        compared: A table from :func:`comparison`.

    Returns:
        Markdown.
    """
    title = f"# {experiment.title or experiment.name}, {experiment.scale} scale\n"
    if compared.empty:
        reason = "no cell is finished" if experiment.compare else "the file names no published numbers"
        return f"{title}\nNothing to compare: {reason}.\n"
    numbers = ("mean", "sd", "difference")
    some = compared["published_mean"].notna().any()
    theirs = () if some else ("difference", *(c for c in compared if str(c).startswith("published_")))
    names = [c for c in compared if c not in ("data", "scale", "inside", *theirs)]
    shown = compared[[*names, "inside"] if some else names].astype(object)
    for column in shown:
        digits = 4 if str(column).endswith(numbers) else 6
        shown[column] = [_in_digits(v, digits) for v in compared[column]]
    lines = ["| " + " | ".join(map(str, shown)) + " |", "|" + "---|" * len(shown.columns)]
    lines += ["| " + " | ".join(row) + " |" for row in shown.itertuples(index=False)]
    notes = [f"Data: {'; '.join(dict.fromkeys(compared['data']))}. Scale: {experiment.scale}."]
    notes.append(_nothing_published(experiment))
    if some:
        notes.append(
            "Inside: within two standard deviations (published ones for means over runs; both sides' for shares, by "
            "draws of the parameters: mini-batches of one draw are not independent)."
        )
        if experiment.scale != "paper":
            notes.append("Only at the paper scale do the settings equal the published ones.")
    notes.append(experiment.note)
    return "\n".join([title, *lines, "", *filter(None, notes), ""])


def _in_digits(value: Any, digits: int) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if math.isnan(value) else f"{value:.{digits}g}"
