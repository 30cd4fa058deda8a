"""Runs side by side, as a page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

from nslightning.choices import choice_word

from . import pages
from .pages import MISSING, Figure, Fold, Page, Part, Section, Text, table
from .run_folders import RunFolder, flatten, short

__all__ = ["page"]

_POINTS = 1500  # of one line; a screen shows no more
_CELLS = 40_000  # of one heat map, all runs and choices together
_NOT_SETTINGS = re.compile(r"(name|output|ckpt_path|trainer\.logger.*|trainer\.default_root_dir|.*\.id)")
_NOT_IN_LABELS = re.compile(r"(seed_everything|.*seed|model\.jacobians.*|choices.*|trainer\.callbacks.*|.*T_max)")
_CURVE = re.compile(r"(?P<part>train|val)/(?:(?P<twin>[^/]+)/)?(?P<kind>loss|acc1|perplexity)")
_KINDS = {"loss": "Loss", "acc1": "Accuracy", "perplexity": "Perplexity"}
_ZONES = ("regular", "compensation", "bifurcation", "not finite")
_LEAD = (
    "Where an operation has no unique derivative (ReLU at 0, a pooling window whose maximum is reached twice: a tie), "
    "the Jacobian choice says what the backward pass returns. These runs record what it changed."
)


def page(runs: Sequence[RunFolder]) -> str:
    """Runs side by side as one HTML page.

    Args:
        runs: The runs, at least one.

    Returns:
        The page's source, about 1 MB and what the runs recorded; it makes no request to any server.
    """
    runs = _distinct(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    sections = [
        _overview(runs),
        _curves(runs),
        _divergence(runs),
        _layers(runs),
        _ties(runs),
        _zones(runs),
        _weights(runs),
        *_segments(runs),
        Section("Settings", _settings(runs)),
        Section("Provenance", _compared(runs, [_provenance(run) for run in runs], "provenance")),
        _patches(runs),
    ]
    return pages.render(Page(title if len(title) < 90 else f"{title[:89]}…", _LEAD, sections))


def _distinct(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """Runs that share a name are named by their folders instead."""
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else replace(run, name=str(run.folder)) for run in runs]


def _compared(runs: Sequence[RunFolder], values: Sequence[Mapping[str, Any]], label: str) -> list[Part]:
    """Values by run: what differs stands first and out, what all have in common folds away."""
    keys = list(dict.fromkeys(key for each in values for key in each))
    shown = {key: [short(each[key]) if key in each else MISSING for each in values] for key in keys}
    differing = [key for key in keys if len(set(shown[key])) > 1]
    common = table(label, ["", "value"], [[key, shown[key][0]] for key in keys if key not in differing])
    if len(runs) == 1:
        return [Fold(f"All {len(keys)}", [common])]
    parts: list[Part] = [Fold(f"The same in all runs: {len(keys) - len(differing)}", [common])]
    if differing:
        rows = [[key, *shown[key]] for key in differing]
        head = ["", *(run.name for run in runs)]
        parts.insert(0, table(f"{label} in which the runs differ", head, rows, ["differs"] * len(rows)))
    return parts


def _labels(runs: Sequence[RunFolder]) -> dict[str, str]:
    """Return the label of a run's lines: its choice, and the few other settings in which the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    differing = [
        key for key in keys
        if not (_NOT_SETTINGS.fullmatch(key) or _NOT_IN_LABELS.fullmatch(key))
        and len({short(run.config.get(key)) for run in runs}) > 1
    ]  # fmt: skip
    if len(differing) > 3:
        return {run.name: f"{run.choice} · {run.name}" for run in runs}
    return {
        run.name: " · ".join([run.choice, *(f"{k.rpartition('.')[2]}={short(run.config.get(k))}" for k in differing)])
        for run in runs
    }


def _thin(data: pd.DataFrame, limit: int) -> pd.DataFrame:
    """Keep the rows of at most ``limit`` steps, which are spread evenly from the first to the last."""
    steps = np.unique(data["step"])
    if len(steps) <= limit:
        return data
    kept = steps[np.unique(np.linspace(0, len(steps) - 1, max(limit, 2)).round().astype(int))]
    return data[data["step"].isin(kept)]


def _recorded_by(runs: Sequence[RunFolder], without: Sequence[RunFolder], callback: str) -> list[Part]:
    """One line on the callback that records what is missing; nothing where nothing is."""
    if not without:
        return []
    names = f" by {', '.join(run.name for run in without)}" if len(without) < len(runs) else ""
    return [Text(f"Not recorded{names}: add `{callback}` to `trainer.callbacks`.", "missing")]


# ------------------------------------------------------------------------------------------------ sections
def _logged(run: RunFolder) -> pd.DataFrame:
    """Losses and accuracies of a run with ``part``, ``twin`` (empty where there are none) and ``kind``."""
    parts = run.metrics["metric"].astype(str).str.extract(_CURVE)
    whole = run.metrics["metric"].astype(str).str.fullmatch(_CURVE)
    rows = run.metrics.join(parts)[whole].assign(twin=lambda rows: rows["twin"].fillna(""))
    return rows.sort_values("twin", key=lambda twins: _place(run, twins), kind="stable")


def _place(run: RunFolder, twins: pd.Series) -> pd.Series:
    """The twins' places in the config, where the first is the one to compare with; the control comes last."""
    prefix = "model.choices."
    named = [key.removeprefix(prefix) for key in run.config if key.startswith(prefix)]
    return twins.map({name: i for i, name in enumerate(named)}).fillna(len(named))


def _overview(runs: Sequence[RunFolder]) -> Section:
    rows = []
    for run in runs:
        logged = _logged(run)
        twins = list(dict.fromkeys(logged["twin"])) or [""]
        kinds = [kind for kind in _KINDS if (logged["kind"] == kind).any()]
        epochs = run.config.get("trainer.max_epochs")
        epoch = run.metrics["epoch"].max() if len(run.metrics) else float("nan")
        seen = "0" if math.isnan(epoch) else f"{epoch + 1:.0f}"
        written = MISSING if run.written is None else f"{datetime.fromtimestamp(run.written, UTC):%Y-%m-%d %H:%M}"
        for twin in twins:
            last = {k: run.last("/".join(["val", twin, k] if twin else ["val", k])) for k in kinds}
            rows.append(
                [run.name, twin or run.choice, short(run.config.get("model.backbone")), short(run.config.get("data")),
                 str(run.record.get("precision", MISSING)), str(run.record.get("seed", MISSING)),
                 int(run.metrics["step"].max()) if len(run.metrics) else 0,
                 f"{seen} of {short(epochs)}" if isinstance(epochs, int) and epochs > 0 else seen,
                 last.get("loss"), last.get("acc1"), written]
            )  # fmt: skip
    head = ["run", "choice", "backbone", "data", "precision", "seed", "step", "epochs", "val/loss",
            "val/acc1", "last written, UTC"]  # fmt: skip
    note = "The values logged last. A run with epochs to go is still going, or was stopped when it was last written."
    lost = [[run.name, *(run.nonfinite.get(key) for key in ("step", "kind", "where")), _fed(run.nonfinite)]
            for run in runs if run.nonfinite is not None]  # fmt: skip
    parts: list[Part] = [Text(note, "quiet"), table("runs", head, rows)]
    if lost:
        columns = ["not finite in", "from step", "first in", "of", "ties that fed it"]
        parts.append(table("where values stopped being finite", columns, lost))
    return Section("Runs", parts)


def _fed(nonfinite: Mapping[str, Any]) -> str:
    return ", ".join(f"{count:,} at {site}" for site, count in (nonfinite.get("ties") or {}).items()) or "none"


def _curves(runs: Sequence[RunFolder]) -> Section:
    labels, curves, without = _labels(runs), [], []
    for run in runs:
        logged = _logged(run)
        if logged.empty:
            without.append(run)
        label = logged["twin"].where(logged["twin"] != "", labels[run.name])
        part = logged["part"].map({"train": "training", "val": "validation"})
        curves.append(_thin(logged.assign(label=label, part=part, name=run.name), _POINTS))
    rows = pd.concat(curves, ignore_index=True)
    figures = [
        Figure(
            "curves",
            rows.loc[rows["kind"] == kind, ["step", "value", "label", "part", "name"]],
            f"{title} by optimizer step, a line for each of {rows['label'].nunique()} choices.",
            title=title,
            focus="label",
        )
        for kind, title in _KINDS.items()
        if (rows["kind"] == kind).any()
    ]
    note = (
        "Hover for values. Click a legend entry to see it alone, with Shift to add others; the list above each figure "
        "does it by keyboard. Drag to move, Shift and wheel to zoom, double-click to go back."
    )
    names = ", ".join(run.name for run in without)
    missing = f"No loss was logged yet by {names}: `trainer.log_every_n_steps` says how often it is."
    parts: list[Part] = [
        *([Text(note, "quiet")] if figures else []),
        *figures,
        *([Text(missing, "missing")] if without else []),
    ]
    return Section("Loss and accuracy by choice", parts)


def _with(parts: Iterable[tuple[RunFolder, pd.DataFrame | None]]) -> tuple[list[pd.DataFrame], list[RunFolder]]:
    """The tables that have rows, each row with its run's name; and the runs that have none."""
    tables, without = [], []
    for run, rows in parts:
        if rows is None or rows.empty:
            without.append(run)
        else:
            tables.append(rows.assign(name=run.name))
    return tables, without


def _log_series(tables: Sequence[pd.DataFrame], series: str, value: str, note: str, alt: str) -> Figure:
    rows = pd.concat([_thin(t, _POINTS) for t in tables], ignore_index=True)
    line = rows[series] if len(tables) == 1 else rows[series] + " · " + rows["name"]
    data = pd.DataFrame(
        {"step": rows["step"], "value": rows[value], "series": rows[series], "line": line, "name": rows["name"]}
    )
    extent = min(190, 30 + 7 * int(line.str.len().max()))
    return Figure("log_series", data, alt, note=note, focus="series", extent=extent)


def _divergence(runs: Sequence[RunFolder]) -> Section:
    tables, without = _with((run, None if (d := run.divergence) is None else d[d["parameter"] == ""]) for run in runs)
    missing = _recorded_by(runs, without, "nslightning.callbacks.GradientDivergence")
    title = "Divergence by choice"
    if not tables:
        return Section(title, missing)
    note = (
        "How far the gradient would have been under another choice, at the same weights and on the same batch: "
        "relative L2 distance to the gradient in use. Bars in the strip below: exactly 0, no tie mattered. Crosses: "
        "not finite."
    )
    alt = "Relative divergence of each choice by optimizer step; the table below sums it up."
    figure = _log_series(tables, "choice", "relative", note, alt)
    rows = [
        [name, choice, len(v), int((v == 0).sum()), int((~np.isfinite(v)).sum()), *_spread(v, group["step"])]
        for (name, choice), group in pd.concat(tables).groupby(["name", "choice"], sort=False)
        for v in [group["relative"]]
    ]
    head = ["run", "choice", "measured steps", "exactly 0", "not finite", "median", "largest", "at step"]
    return Section(title, [figure, table("divergence by choice", head, rows), *missing])


def _spread(values: pd.Series, steps: pd.Series) -> tuple[float | None, float | None, int | None]:
    finite = values[np.isfinite(values)]
    if finite.empty:
        return None, None, None
    return float(finite.median()), float(finite.max()), int(steps[finite.idxmax()])


def _layers(runs: Sequence[RunFolder]) -> Section:
    tables, without = _with((run, None if (d := run.divergence) is None else d[d["parameter"] != ""]) for run in runs)
    title = "Divergence by layer and step"
    missing = _recorded_by(runs, without, "nslightning.callbacks.GradientDivergence(per_layer=True)")
    if not tables:
        return Section(title, missing)
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
    alt = f"Heat map of the relative divergence of {data['parameter'].nunique()} parameters by optimizer step."
    extent = _label_extent(data["parameter"])
    figure = Figure("layers", data, alt, note=note, choose=("name", "choice"), extent=extent)
    return Section(title, [figure, *missing])


def _label_extent(labels: pd.Series) -> int:
    return min(230, 20 + int(6.2 * labels.str.len().max()))


def _ties(runs: Sequence[RunFolder]) -> Section:
    tables, without = _with((run, _sites(run)) for run in runs)
    missing = _recorded_by(runs, without, "nslightning.callbacks.TieMonitor")
    title = "Ties by site"
    if not tables:
        return Section(title, missing)
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
    numbers = table("ties by site", ["run", "site", "last", "largest"], last)
    alt = f"Heat map of the tied share of {data['site'].nunique()} sites by optimizer step; below it as numbers."
    figure = Figure("ties", data, alt, note=note, choose=("name",), extent=_label_extent(data["site"]))
    return Section(title, [figure, Fold("As numbers", [numbers]), *missing])


def _sites(run: RunFolder) -> pd.DataFrame:
    """Tie fractions in the order in which the sites are patched, the total last."""
    rows = run.metrics[run.metrics["metric"].astype(str).str.startswith("ties/")]
    rows = rows.assign(site=rows["metric"].astype(str).str.removeprefix("ties/")).rename(columns={"value": "fraction"})
    order = [site["name"] for site in (run.sites or {}).get("sites", [])]
    place = {name: i for i, name in enumerate(order)} | {"total": len(order) + 1}
    return rows.sort_values(by="site", key=lambda s: s.map(place).fillna(len(order)), kind="stable")


def _zones(runs: Sequence[RunFolder]) -> Section:
    tables, without = _with((run, _zone_shares(run)) for run in runs)
    missing = _recorded_by(runs, without, "nslightning.callbacks.ZoneMonitor")
    if not tables:
        return Section("Zones", missing)
    note = (
        "Regular: the two choices give the same gradient. Bifurcation: they give different ones. Compensation: they "
        "differ in the precision trained in, and agree over the reals."
    )
    thinned = [_thin(t, max(10, _CELLS // len(tables) // t["choice"].nunique())) for t in tables]
    columns = ["name", "choice", "step", "zone", "share", "observed", "difference"]
    alt = "The zone of each measured step, a row of bars for each choice; the table below counts them."
    figure = Figure("zones", pd.concat(thinned)[columns], alt, note=note, choose=("name",), extent=8)
    rows = []
    for (name, choice), group in pd.concat(tables).groupby(["name", "choice"], sort=False):
        steps = group["step"].nunique()
        shares = group.groupby("zone")["share"].sum() / steps
        rows.append([name, choice, steps, *(f"{100 * shares.get(zone, 0.0):.0f} %" for zone in _ZONES)])
    shares_table = table("zones by choice", ["run", "choice", "measured steps", *_ZONES], rows)
    return Section("Zones", [figure, shares_table, *missing])


def _zone_shares(run: RunFolder) -> pd.DataFrame:
    """One row per step, choice and zone with a share; gradients that are not finite have no zone."""
    names = run.metrics["metric"].astype(str).str.extract(r"^zones/(?P<choice>.+)/(?P<number>[^/]+)$")
    logged = run.metrics.join(names)[names["number"].notna()].drop_duplicates(["choice", "step", "number"], keep="last")
    wide = logged.pivot(index=["choice", "step"], columns="number", values="value").reset_index()
    if wide.empty:
        return wide
    wide["not finite"] = wide["regular"].isna().astype(float)
    rows = wide.melt(["choice", "step", "observed", "difference"], list(_ZONES), "zone", "share")
    order = {choice: i for i, choice in enumerate(dict.fromkeys(logged["choice"]))}
    return rows[rows["share"] > 0].sort_values(
        ["choice", "step"], key=lambda c: c.map(order) if c.name == "choice" else c
    )


def _weights(runs: Sequence[RunFolder]) -> Section:
    tables, _ = _with((run, _distances(run)) for run in runs)
    title = "Weights"
    if not tables:
        missing = (
            "No run compared weights: `nslightning twins` does, and so does the callback "
            "`nslightning.callbacks.WeightDivergence`."
        )
        return Section(title, [Text(missing, "missing")])
    note = (
        "L1 distance of all weights to those of the first twin, which started from the same weights and saw the same "
        "batches, or to the reference that is named. Bars in the strip below: exactly 0, the same to the bit. "
        "Distances at or below the control's are not the choice's doing."
    )
    alt = "L1 distance of the weights by optimizer step, a line for each twin or reference."
    return Section(title, [_log_series(tables, "twin", "value", note, alt)])


def _distances(run: RunFolder) -> pd.DataFrame:
    """L1 distances with ``twin``, or what the weights are compared with where there are no twins."""
    parts = run.metrics["metric"].astype(str).str.extract(r"^(weights)/(?:([^/]+)/)?l1$")
    reference = short(run.config.get("trainer.callbacks.WeightDivergence.reference", "reference"))
    rows = run.metrics.assign(twin=parts[1].fillna(f"to {reference}"))[parts[0].notna()]
    return rows.sort_values("twin", key=lambda twins: _place(run, twins), kind="stable")


def _settings(runs: Sequence[RunFolder]) -> list[Part]:
    settings = [{k: v for k, v in run.config.items() if not _NOT_SETTINGS.fullmatch(k)} for run in runs]
    return _compared(runs, settings, "settings")


def _segments(runs: Sequence[RunFolder]) -> list[Section]:
    """List the changes between the segments of runs; empty without changes."""
    rows = []
    for run in runs:
        segments = run.segments
        for i, segment in enumerate(segments if len(segments) > 1 else ()):
            end = "" if segment.to_step is None else f" to {segment.to_step}"
            changed = [f"{name}: {short(then)} to {short(now)}" for name, (then, now) in segment.changed.items()]
            resumed = ", ".join(map(str, segment.resumed_at)) or MISSING
            rows.append([run.name, f"{segment.from_step}{end}", segment.choice or MISSING,
                         "; ".join(changed) if i else "the beginning", resumed, segment.git or MISSING])  # fmt: skip
    if not rows:
        return []
    note = "A run that goes on under another config, choice, code or machine starts a new segment."
    head = ["run", "steps", "choice in use", "what changed", "went on at", "commit"]
    return [Section("Segments", [Text(note, "quiet"), table("segments", head, rows)])]


def _provenance(run: RunFolder) -> dict[str, Any]:
    record = flatten({key: value for key, value in run.record.items() if key not in ("patch", "segments")})
    patch = run.record.get("patch") or {}
    return record | {"patched model": patch.get("model"), "patch fingerprint": patch.get("fingerprint")}


def _patches(runs: Sequence[RunFolder]) -> Section:
    """The sites, once for all runs that share them."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        if run.sites is not None:
            groups.setdefault(json.dumps([run.sites.get("fingerprint"), run.choice]), []).append(run)
    parts: list[Part] = []
    for members in groups.values():
        sites = members[0].sites or {}
        listed: list[dict[str, Any]] = sites.get("sites", [])
        unreached = [s for s in listed if s["how"] == "unreached"]
        counts = pd.Series([s["operation"] for s in listed if s["how"] != "unreached"], dtype=str).value_counts()
        patched = ", ".join(f"{n} {operation}" for operation, n in counts.items()) or "nothing"
        parts += [
            Text(", ".join(run.name for run in members), "heading"),
            Text(f"{sites.get('model')}: {patched}, with {members[0].choice} [`{sites.get('fingerprint')}`]"),
        ]
        if unreached:
            names = ", ".join(f"{s['name'] or '(model)'} ({s['kind']})" for s in unreached)
            parts.append(Text(f"Not reached, PyTorch's own derivative there: {names}.", "missing"))
        rows = [
            [s["name"] or "(model)", s["operation"], choice_word(s["operation"], s["choice"]), s["how"],
             s["kind"], "yes" if s.get("inplace") else "no", ", ".join(s.get("aliases", []))]
            for s in listed
        ]  # fmt: skip
        head = ["site", "operation", "choice", "reached by", "kind", "in place", "shared with"]
        parts.append(Fold(f"All {len(listed)} sites", [table("sites", head, rows)]))
    without = [run for run in runs if run.sites is None]
    if without:
        parts.append(Text(f"No patch_report.json in {', '.join(run.name for run in without)}.", "missing"))
    return Section("Patch report", parts)
