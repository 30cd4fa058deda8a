"""Runs side by side on one HTML page that loads nothing: figures drawn by Vega, which the page carries with it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

from .read import Run, flatten, short

__all__ = ["bundle", "chart", "page"]

_VEGA_LITE = "6.4"
_POINTS = 1500  # of one line; a screen shows no more
_CELLS = 40_000  # of one heat map, all runs and choices together
_NOT_SETTINGS = re.compile(r"(name|output|ckpt_path|trainer\.logger.*|trainer\.default_root_dir|.*\.id)")
_NOT_TOLD = re.compile(r"(seed_everything|.*seed|model\.jacobians.*|choices.*|trainer\.callbacks.*|.*T_max)")
_CURVE = re.compile(r"(?P<part>train|val)/(?:(?P<twin>[^/]+)/)?(?P<kind>loss|acc1|perplexity)")
_KINDS = {"loss": "Loss", "acc1": "Accuracy", "perplexity": "Perplexity"}
_ZONES = ("regular", "compensation", "bifurcation", "not finite")
_MISSING = "-"


def chart(name: str) -> dict[str, Any]:
    """A Vega-Lite spec of this package. Its data set is called ``wandb``, as in W&B's custom charts.

    Args:
        name: ``"curves"``, ``"log_series"``, ``"layers"``, ``"ties"`` or ``"zones"``.

    Returns:
        The spec.

    Example:
        >>> chart("layers")["data"]
        {'name': 'wandb'}
    """
    spec: dict[str, Any] = json.loads(_source(f"charts/{name}.json"))
    return spec


def _source(name: str) -> str:
    return files("nslightning.report").joinpath(name).read_text(encoding="utf-8")


@cache
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that sets ``vegaEmbed``.

    Returns:
        The script, about 0.9 MB.

    Raises:
        ImportError: If the package that holds it is not installed.
    """
    try:
        from vl_convert import javascript_bundle
    except ImportError as error:
        raise ImportError(
            "the page's figures need vl-convert-python, which is not installed: pip install 'nslightning[report]'"
        ) from error
    script: str = javascript_bundle("window.vegaEmbed = vegaEmbed;", _VEGA_LITE)
    return script


@dataclass
class _Figure:
    """A figure and what its caption says.

    Args:
        spec: Name of the Vega-Lite spec.
        title: Its heading.
        data: One row per mark.
        choose: Columns of which the reader picks one value.
        extent: Pixels for the labels of the vertical axis.
        note: What a reader must know to read it.
    """

    spec: str
    title: str
    data: pd.DataFrame
    choose: tuple[str, ...] = ()
    extent: int = 56
    note: str = ""


@dataclass
class _Section:
    """A part of the page; its figures and tables, or who would have recorded what is missing."""

    title: str
    figures: list[_Figure] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    note: str = ""
    missing: str = ""


def page(runs: Sequence[Run]) -> str:
    """Runs side by side as one HTML page.

    Args:
        runs: The runs, at least one.

    Returns:
        The page's source, about 1 MB and what the runs recorded; it makes no request to any server.

    Raises:
        ImportError: If the extra ``report`` is not installed.
    """
    runs = _distinct(runs)
    sections = [
        _overview(runs),
        _curves(runs),
        _divergence(runs),
        _layers(runs),
        _ties(runs),
        _zones(runs),
        _weights(runs),
        *_segments(runs),
        _Section("Settings", tables=[_settings(runs)]),
        _Section("Provenance", tables=[_compared(runs, [_provenance(run) for run in runs])]),
        _patches(runs),
    ]
    figures: list[dict[str, Any]] = []
    body = "".join(_html(section, figures) for section in sections)
    specs = {name: chart(name) for name in sorted({figure["spec"] for figure in figures})}
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    short_title = title if len(title) < 90 else f"{title[:89]}…"
    links = "".join(f'<li><a href="#{_anchor(s.title)}">{escape(s.title)}</a></li>' for s in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # The browser itself refuses whatever would leave the page; Vega compiles its expressions.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline' 'unsafe-eval'; img-src data: blob:\">\n"
        f"<title>{escape(short_title)}</title>\n<style>{_source('page.css')}</style></head>\n<body>\n"
        f'<header><h1>{escape(short_title)}</h1><p class="quiet">Where an operation has no unique derivative (ReLU at '
        "0, a pooling window whose maximum is reached twice: a <i>tie</i>), the Jacobian choice says what the backward "
        "pass returns. These runs record what it changed.</p>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n<main>\n{body}</main>\n'
        "<noscript><p>The figures are drawn by JavaScript, which is off; the tables do without.</p></noscript>\n"
        f'<script type="application/json" id="figures">{_json({"specs": specs, "figures": figures})}</script>\n'
        "<!-- Vega, Vega-Lite, Vega-Embed: BSD-3-Clause, University of Washington Interactive Data Lab -->\n"
        f"<script>{_inline(bundle())}</script>\n<script>{_inline(_source('page.js'))}</script>\n</body></html>\n"
    )


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name are told apart by their folders."""
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else replace(run, name=str(run.folder)) for run in runs]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _inline(script: str) -> str:
    return script.replace("</script", "<\\/script")


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


def _html(section: _Section, figures: list[dict[str, Any]]) -> str:
    """A section's source; its figures' data go to the list."""
    anchor = _anchor(section.title)
    parts = [f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(section.title)}</h2>']
    if section.note:
        parts.append(f'<p class="quiet">{section.note}</p>')
    for figure in section.figures:
        number = f"figure-{len(figures) + 1}"
        figures.append(
            {"id": number, "spec": figure.spec, "choose": figure.choose, "extent": figure.extent,
             "columns": _columns(figure.data)}
        )  # fmt: skip
        heading = f"<h3>{escape(figure.title)}</h3>" if figure.title else ""
        note = f'<p class="quiet">{figure.note}</p>' if figure.note else ""
        parts.append(
            f'{heading}{note}<div class="choose" id="{number}-choose"></div><div class="figure" id="{number}"></div>'
        )
    parts += section.tables
    if section.missing:
        parts.append(f'<p class="missing">{section.missing}</p>')
    return "".join([*parts, "</section>\n"])


def _columns(data: pd.DataFrame) -> dict[str, Any]:
    """A table as lists: texts as distinct values and codes, numbers to five digits, what is not finite as null."""
    columns: dict[str, Any] = {}
    for name, column in data.items():
        if pd.api.types.is_numeric_dtype(column):
            columns[str(name)] = [_digits(v) for v in column.astype(float)]
        else:
            codes, values = pd.factorize(column)
            columns[str(name)] = {"values": list(values), "codes": codes.tolist()}
    return columns


def _digits(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 2**53 else float(f"{value:.5g}")


def _number(value: float | None) -> str:
    if value is None:
        return _MISSING
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], marked: Iterable[bool] = ()) -> str:
    """Rows of texts and numbers; the first cell names the row. Marked rows stand out."""
    rows, marks = list(rows), list(marked)
    numeric = [bool(rows) and all(isinstance(row[i], (int, float, type(None))) for row in rows)
               for i in range(len(head))]  # fmt: skip
    cells = [f'<th scope="col"{" class=number" * n}>{escape(h)}</th>' for h, n in zip(head, numeric, strict=True)]
    lines = []
    for i, (first, *others) in enumerate(rows):
        line = [f'<th scope="row">{re.sub(r"(?<=[./])", "<wbr>", escape(str(first)))}</th>']
        for value, is_number in zip(others, numeric[1:], strict=True):
            text = _number(value) if value is None or isinstance(value, float) else str(value)
            kind = " class=number" if is_number else " class=long" * (len(text) > 32)
            line.append(f"<td{kind}>{escape(text)}</td>")
        lines.append(f"<tr{' class=differs' * bool(marks and marks[i])}>{''.join(line)}</tr>")
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>'
        f"<thead><tr>{''.join(cells)}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _compared(runs: Sequence[Run], settings: Sequence[Mapping[str, Any]]) -> str:
    """Settings by run: what differs stands first and out, what all have in common folds away."""
    keys = list(dict.fromkeys(key for each in settings for key in each))
    shown = {key: [short(each[key]) if key in each else _MISSING for each in settings] for key in keys}
    differing = [key for key in keys if len(set(shown[key])) > 1]
    parts = []
    if differing:
        rows = [[key, *shown[key]] for key in differing]
        parts.append(_table(["", *(run.name for run in runs)], rows, [True] * len(rows)))
    common = _table(["", "value"], [[key, shown[key][0]] for key in keys if key not in differing])
    if len(runs) == 1:
        return f"<details><summary>All {len(keys)}</summary>{common}</details>"
    parts.append(f"<details><summary>The same in all runs: {len(keys) - len(differing)}</summary>{common}</details>")
    return "".join(parts)


def _labels(runs: Sequence[Run]) -> dict[str, str]:
    """What a run's lines are called: its choice, and the few other settings in which the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    told = [
        key for key in keys
        if not (_NOT_SETTINGS.fullmatch(key) or _NOT_TOLD.fullmatch(key))
        and len({short(run.config.get(key)) for run in runs}) > 1
    ]  # fmt: skip
    if len(told) > 3:
        return {run.name: f"{run.choice} · {run.name}" for run in runs}
    return {
        run.name: " · ".join([run.choice, *(f"{k.rpartition('.')[2]}={short(run.config.get(k))}" for k in told)])
        for run in runs
    }


def _thin(data: pd.DataFrame, limit: int) -> pd.DataFrame:
    """The rows of at most so many steps, spread evenly over all, the first and the last among them."""
    steps = np.unique(data["step"])
    if len(steps) <= limit:
        return data
    kept = steps[np.unique(np.linspace(0, len(steps) - 1, max(limit, 2)).round().astype(int))]
    return data[data["step"].isin(kept)]


def _recorded_by(runs: Sequence[Run], without: Sequence[Run], callback: str) -> str:
    """One line on who records what is missing; nothing where nothing is."""
    if not without:
        return ""
    who = "Not recorded" + (f" by {escape(', '.join(r.name for r in without))}" if len(without) < len(runs) else "")
    return f"{who}: add <code>{callback}</code> to <code>trainer.callbacks</code>."


# ------------------------------------------------------------------------------------------------ sections
def _logged(run: Run) -> pd.DataFrame:
    """Losses and accuracies of a run with ``part``, ``twin`` (empty where there are none) and ``kind``."""
    found = run.metrics["metric"].astype(str).str.extract(_CURVE)
    whole = run.metrics["metric"].astype(str).str.fullmatch(_CURVE)
    rows = run.metrics.join(found)[whole].assign(twin=lambda rows: rows["twin"].fillna(""))
    return rows.sort_values("twin", key=lambda twins: _place(run, twins), kind="stable")


def _place(run: Run, twins: pd.Series) -> pd.Series:
    """The twins' places in the config, where the first is the one to compare with; the control comes last."""
    prefix = "model.choices."
    named = [key.removeprefix(prefix) for key in run.config if key.startswith(prefix)]
    return twins.map({name: i for i, name in enumerate(named)}).fillna(len(named))


def _overview(runs: Sequence[Run]) -> _Section:
    rows = []
    for run in runs:
        logged = _logged(run)
        twins = list(dict.fromkeys(logged["twin"])) or [""]
        kinds = [kind for kind in _KINDS if (logged["kind"] == kind).any()]
        epochs = run.config.get("trainer.max_epochs")
        epoch = run.metrics["epoch"].max() if len(run.metrics) else float("nan")
        seen = "0" if math.isnan(epoch) else f"{epoch + 1:.0f}"
        written = _MISSING if run.written is None else f"{datetime.fromtimestamp(run.written, UTC):%Y-%m-%d %H:%M}"
        for twin in twins:
            last = {k: run.last("/".join(["val", twin, k] if twin else ["val", k])) for k in kinds}
            rows.append(
                [run.name, twin or run.choice, short(run.config.get("model.backbone")), short(run.config.get("data")),
                 str(run.record.get("precision", _MISSING)), str(run.record.get("seed", _MISSING)),
                 int(run.metrics["step"].max()) if len(run.metrics) else 0,
                 f"{seen} of {short(epochs)}" if isinstance(epochs, int) and epochs > 0 else seen,
                 last.get("loss"), last.get("acc1"), written]
            )  # fmt: skip
    head = ["run", "choice", "backbone", "data", "precision", "seed", "step", "epochs", "val/loss",
            "val/acc1", "last written, UTC"]  # fmt: skip
    note = "The values logged last. A run with epochs to go is still going, or was stopped when it was last written."
    lost = [[run.name, *(run.nonfinite.get(key) for key in ("step", "what", "where")), _fed(run.nonfinite)]
            for run in runs if run.nonfinite is not None]  # fmt: skip
    found = _table(["not finite in", "from step", "first in", "of", "ties that fed it"], lost)
    return _Section("Runs", tables=[_table(head, rows), *([found] if lost else [])], note=note)


def _fed(nonfinite: Mapping[str, Any]) -> str:
    return ", ".join(f"{count:,} at {site}" for site, count in (nonfinite.get("ties") or {}).items()) or "none"


def _curves(runs: Sequence[Run]) -> _Section:
    labels, parts, without = _labels(runs), [], []
    for run in runs:
        logged = _logged(run)
        if logged.empty:
            without.append(run)
        label = logged["twin"].where(logged["twin"] != "", labels[run.name])
        part = logged["part"].map({"train": "training", "val": "validation"})
        parts.append(_thin(logged.assign(label=label, part=part, name=run.name), _POINTS))
    rows = pd.concat(parts, ignore_index=True)
    figures = [
        _Figure("curves", title, rows.loc[rows["kind"] == kind, ["step", "value", "label", "part", "name"]])
        for kind, title in _KINDS.items()
        if (rows["kind"] == kind).any()
    ]
    note = (
        "Hover for values. Click a legend entry to see it alone, with Shift to add others. Drag to move, Shift and "
        "wheel to zoom, double-click to go back."
    )
    names = escape(", ".join(run.name for run in without))
    missing = f"No loss was logged yet by {names}: trainer.log_every_n_steps says how often it is." if without else ""
    return _Section("Loss and accuracy by choice", figures, note=note if figures else "", missing=missing)


def _with(parts: Iterable[tuple[Run, pd.DataFrame | None]]) -> tuple[list[pd.DataFrame], list[Run]]:
    """The tables that have rows, each row with its run's name; and the runs that have none."""
    tables, without = [], []
    for run, rows in parts:
        if rows is None or rows.empty:
            without.append(run)
        else:
            tables.append(rows.assign(name=run.name))
    return tables, without


def _log_series(title: str, tables: Sequence[pd.DataFrame], series: str, value: str, note: str) -> _Figure:
    rows = pd.concat([_thin(t, _POINTS) for t in tables], ignore_index=True)
    line = rows[series] if len(tables) == 1 else rows[series] + " · " + rows["name"]
    data = pd.DataFrame(
        {"step": rows["step"], "value": rows[value], "series": rows[series], "line": line, "name": rows["name"]}
    )
    return _Figure("log_series", title, data, extent=min(190, 30 + 7 * int(line.str.len().max())), note=note)


def _divergence(runs: Sequence[Run]) -> _Section:
    tables, without = _with((run, None if (d := run.divergence) is None else d[d["parameter"] == ""]) for run in runs)
    missing = _recorded_by(runs, without, "nslightning.callbacks.GradientDivergence")
    title = "Divergence by choice"
    if not tables:
        return _Section(title, missing=missing)
    note = (
        "How far the gradient would have been under another choice, at the same weights and on the same batch: "
        "relative L2 distance to the gradient in use. Bars in the strip below: exactly 0, no tie mattered. Crosses: "
        "not finite."
    )
    figure = _log_series("", tables, "choice", "relative", note)
    rows = [
        [name, choice, len(v), int((v == 0).sum()), int((~np.isfinite(v)).sum()), *_spread(v, group["step"])]
        for (name, choice), group in pd.concat(tables).groupby(["name", "choice"], sort=False)
        for v in [group["relative"]]
    ]
    head = ["run", "choice", "measured steps", "exactly 0", "not finite", "median", "largest", "at step"]
    return _Section(title, [figure], [_table(head, rows)], missing=missing)


def _spread(values: pd.Series, steps: pd.Series) -> tuple[float | None, float | None, int | None]:
    finite = values[np.isfinite(values)]
    if finite.empty:
        return None, None, None
    return float(finite.median()), float(finite.max()), int(steps[finite.idxmax()])


def _layers(runs: Sequence[Run]) -> _Section:
    tables, without = _with((run, None if (d := run.divergence) is None else d[d["parameter"] != ""]) for run in runs)
    title = "Divergence by layer and step"
    missing = _recorded_by(runs, without, "nslightning.callbacks.GradientDivergence(per_layer=True)")
    if not tables:
        return _Section(title, missing=missing)
    thinned, cut = [], False
    for rows in tables:
        per_step = len(rows) / rows["step"].nunique()
        thinned.append(_thin(rows, max(10, int(_CELLS / len(tables) / per_step))))
        cut |= len(thinned[-1]) < len(rows)
    data = pd.concat(thinned)[["name", "choice", "parameter", "step", "relative"]]
    data["parameter"] = data["parameter"].str.removeprefix("backbone.")
    note = (
        "Relative L2 divergence of each parameter's gradient, the network from top to bottom. Grey: exactly 0, nothing "
        "of this choice reached the layer. Red: not finite."
        + (" Of the measured steps a part is shown, evenly spread." if cut else "")
    )
    figure = _Figure("layers", "", data, ("name", "choice"), _label_extent(data["parameter"]), note)
    return _Section(title, [figure], missing=missing)


def _label_extent(labels: pd.Series) -> int:
    return min(230, 20 + int(6.2 * labels.str.len().max()))


def _ties(runs: Sequence[Run]) -> _Section:
    tables, without = _with((run, _sites(run)) for run in runs)
    missing = _recorded_by(runs, without, "nslightning.callbacks.TieMonitor")
    title = "Ties by site"
    if not tables:
        return _Section(title, missing=missing)
    thinned = [_thin(t, max(10, _CELLS // len(tables) // t["site"].nunique())) for t in tables]
    data = pd.concat(thinned)[["name", "site", "step", "fraction"]]
    note = (
        "The share of a site's evaluations that met a tie: entries of the input for an activation, windows for a pool. "
        "Grey: none."
    )
    last = [
        [name, site, float(group["fraction"].iloc[-1]), float(group["fraction"].max())]
        for (name, site), group in pd.concat(tables).groupby(["name", "site"], sort=False)
    ]
    table = _table(["run", "site", "last", "largest"], last)
    figure = _Figure("ties", "", data, ("name",), _label_extent(data["site"]), note)
    return _Section(title, [figure], [f"<details><summary>As numbers</summary>{table}</details>"], missing=missing)


def _sites(run: Run) -> pd.DataFrame:
    """Tie fractions in the order in which the sites are patched, the total last."""
    rows = run.metrics[run.metrics["metric"].astype(str).str.startswith("ties/")]
    rows = rows.assign(site=rows["metric"].astype(str).str.removeprefix("ties/")).rename(columns={"value": "fraction"})
    order = [site["name"] for site in (run.sites or {}).get("sites", [])]
    place = {name: i for i, name in enumerate(order)} | {"total": len(order) + 1}
    return rows.sort_values(by="site", key=lambda s: s.map(place).fillna(len(order)), kind="stable")


def _zones(runs: Sequence[Run]) -> _Section:
    tables, without = _with((run, _zone_shares(run)) for run in runs)
    missing = _recorded_by(runs, without, "nslightning.callbacks.ZoneMonitor")
    if not tables:
        return _Section("Zones", missing=missing)
    note = (
        "Regular: the two choices give the same gradient. Bifurcation: they give different ones. Compensation: they "
        "differ in the precision trained in, and agree over the reals."
    )
    thinned = [_thin(t, max(10, _CELLS // len(tables) // t["choice"].nunique())) for t in tables]
    columns = ["name", "choice", "step", "zone", "share", "observed", "difference"]
    figure = _Figure("zones", "", pd.concat(thinned)[columns], ("name",), 8, note)
    rows = []
    for (name, choice), group in pd.concat(tables).groupby(["name", "choice"], sort=False):
        steps = group["step"].nunique()
        shares = group.groupby("zone")["share"].sum() / steps
        rows.append([name, choice, steps, *(f"{100 * shares.get(zone, 0.0):.0f} %" for zone in _ZONES)])
    return _Section("Zones", [figure], [_table(["run", "choice", "measured steps", *_ZONES], rows)], missing=missing)


def _zone_shares(run: Run) -> pd.DataFrame:
    """One row per step, choice and zone with a share; gradients that are not finite have no zone."""
    names = run.metrics["metric"].astype(str).str.extract(r"^zones/(?P<choice>.+)/(?P<what>[^/]+)$")
    logged = run.metrics.join(names)[names["what"].notna()].drop_duplicates(["choice", "step", "what"], keep="last")
    wide = logged.pivot(index=["choice", "step"], columns="what", values="value").reset_index()
    if wide.empty:
        return wide
    wide["not finite"] = wide["regular"].isna().astype(float)
    rows = wide.melt(["choice", "step", "observed", "difference"], list(_ZONES), "zone", "share")
    order = {choice: i for i, choice in enumerate(dict.fromkeys(logged["choice"]))}
    return rows[rows["share"] > 0].sort_values(
        ["choice", "step"], key=lambda c: c.map(order) if c.name == "choice" else c
    )


def _weights(runs: Sequence[Run]) -> _Section:
    tables, _ = _with((run, _distances(run)) for run in runs)
    title = "Weights"
    if not tables:
        missing = (
            "No run compared weights: <code>nslightning twins</code> does, and so does the callback "
            "<code>nslightning.callbacks.WeightDivergence</code>."
        )
        return _Section(title, missing=missing)
    note = (
        "L1 distance of all weights to those of the first twin, which started from the same weights and saw the same "
        "batches, or to the reference that is named. Bars in the strip below: exactly 0, the same to the bit. What "
        "lies at or below the control is not the choice's doing."
    )
    return _Section(title, [_log_series("", tables, "twin", "value", note)])


def _distances(run: Run) -> pd.DataFrame:
    """L1 distances with ``twin``, or what the weights are compared with where there are no twins."""
    found = run.metrics["metric"].astype(str).str.extract(r"^(weights)/(?:([^/]+)/)?l1$")
    reference = short(run.config.get("trainer.callbacks.WeightDivergence.reference", "reference"))
    rows = run.metrics.assign(twin=found[1].fillna(f"to {reference}"))[found[0].notna()]
    return rows.sort_values("twin", key=lambda twins: _place(run, twins), kind="stable")


def _settings(runs: Sequence[Run]) -> str:
    return _compared(runs, [{k: v for k, v in r.config.items() if not _NOT_SETTINGS.fullmatch(k)} for r in runs])


def _segments(runs: Sequence[Run]) -> list[_Section]:
    """What changed while runs went on; nothing where nothing did."""
    rows = []
    for run in runs:
        told = run.segments
        for i, segment in enumerate(told if len(told) > 1 else ()):
            end = "" if segment.to_step is None else f" to {segment.to_step}"
            changed = [f"{name}: {short(then)} to {short(now)}" for name, (then, now) in segment.changed.items()]
            resumed = ", ".join(map(str, segment.resumed_at)) or _MISSING
            rows.append([run.name, f"{segment.from_step}{end}", segment.choice or _MISSING,
                         "; ".join(changed) if i else "the beginning", resumed, segment.git or _MISSING])  # fmt: skip
    if not rows:
        return []
    note = "A run that goes on under another config, choice, code or machine starts a new segment."
    head = ["run", "steps", "choice in use", "what changed", "went on at", "commit"]
    return [_Section("Segments", tables=[_table(head, rows)], note=note)]


def _provenance(run: Run) -> dict[str, Any]:
    record = flatten({key: value for key, value in run.record.items() if key not in ("patch", "segments")})
    patch = run.record.get("patch") or {}
    return record | {"patched model": patch.get("model"), "patch fingerprint": patch.get("fingerprint")}


def _patches(runs: Sequence[Run]) -> _Section:
    """The sites, once for all runs that share them."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.sites is not None:
            groups.setdefault(json.dumps([run.sites.get("fingerprint"), run.choice]), []).append(run)
    parts = []
    for members in groups.values():
        sites = members[0].sites or {}
        listed: list[dict[str, Any]] = sites.get("sites", [])
        unreached = [s for s in listed if s["how"] == "unreached"]
        counts = pd.Series([s["operation"] for s in listed if s["how"] != "unreached"], dtype=str).value_counts()
        found = ", ".join(f"{n} {operation}" for operation, n in counts.items()) or "nothing"
        parts.append(
            f"<h3>{escape(', '.join(run.name for run in members))}</h3><p>{escape(str(sites.get('model')))}: "
            f"{escape(found)}, with {escape(members[0].choice)} "
            f"[<code>{escape(str(sites.get('fingerprint')))}</code>]</p>"
        )
        if unreached:
            names = ", ".join(f"{s['name'] or '(model)'} ({s['kind']})" for s in unreached)
            parts.append(f'<p class="missing">Not reached, PyTorch\'s own derivative there: {escape(names)}.</p>')
        rows = [
            [s["name"] or "(model)", s["operation"], "native" if s["choice"] is None else short(s["choice"]), s["how"],
             s["kind"], "yes" if s.get("inplace") else "no", ", ".join(s.get("aliases", []))]
            for s in listed
        ]  # fmt: skip
        table = _table(["site", "operation", "choice", "reached by", "kind", "in place", "shared with"], rows)
        parts.append(f"<details><summary>All {len(listed)} sites</summary>{table}</details>")
    without = [run for run in runs if run.sites is None]
    missing = f"No patch_report.json in {escape(', '.join(run.name for run in without))}." if without else ""
    return _Section("Patch report", tables=parts, missing=missing)
