"""Figures of how often two choices' gradients differ: bars by factor, curves by images seen, norms by decade."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nslightning.experiments.figures.results import blocks, share_interval
from nslightning.experiments.figures.style import (
    PAPER,
    canvas,
    caption,
    counts_below,
    drawn,
    head,
    plain_log,
    precision_look,
    tell,
    tell_choice,
    where,
)
from nslightning.experiments.published import table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["impact_factors", "norms_by_decade", "volume_curves", "volume_mnist"]


class _Panel(NamedTuple):
    """A factor that varies while the others keep their base values."""

    column: str
    label: str
    base: Mapping[str, Any]


_MNIST_BASE = {"depth": 3, "width": 256, "batch_size": 256}
_VGG_BASE = {"backbone": "paper/vgg11", "batch_size": 128, "batch_norm": False}
_SHARES = "Lines on bars: Wilson's 95 % intervals. "


def volume_mnist(rows: pd.DataFrame) -> Figure:
    """Share of parameter vectors whose gradient depends on ReLU'(0): four factors, by precision.

    Args:
        rows: Results of ``mnist_volume_relu``, and of ``mnist_volume_relu_samples`` for the number of images.

    Returns:
        The figure.
    """
    figure, axes = canvas(2, 2, 3.7, 2.5, sharey=True)
    # paper A's notebook measured the sample size on another network, which the second experiment has
    first_activation = rows["backbone_options"].str.contains("first_activation").fillna(False)
    walks = rows[first_activation] if first_activation.any() else rows[_matches(rows, _MNIST_BASE)]
    _by_sample_size(axes.flat[0], walks[walks["rule"] == "exact"])
    own = rows[~first_activation]
    for axis, panel in zip(
        list(axes.flat)[1:],
        (
            _Panel("width", "neurons per layer", _MNIST_BASE),
            _Panel("depth", "hidden layers", _MNIST_BASE),
            _Panel("batch_size", "mini-batch size", _MNIST_BASE),
        ),
        strict=True,
    ):
        theirs = _of_data(table("volume_relu_mnist"), own)
        shares = _vectors(own[_matches(own, panel.base, but=panel.column)])
        _bars(axis, shares, panel.column, theirs[theirs["factor"] == panel.column])
        axis.set_xlabel(panel.label)
    for line in axes:
        line[0].set_ylabel("affected vectors (%)")
    _finish(
        figure, rows, "Affected: on some mini-batch, the first layer's gradients under ReLU'(0) = 0 and 1 differ in "
        f"any bit. n: parameter vectors; NaN: mini-batches whose gradients are not finite. {_SHARES}",
        "Diamonds: the paper (its 64-bit zeros were set, not measured)." if drawn(figure, "paper") else "",
    )  # fmt: skip
    return figure


def impact_factors(rows: pd.DataFrame) -> Figure:
    """Share of mini-batches on which MaxPool's beta = 0 and 1 give other gradients: three factors, by precision.

    Args:
        rows: Results of ``cifar10_vgg_volume_max_pool``.

    Returns:
        The figure.
    """
    theirs = table("volume_max_pool_cifar10")
    theirs = theirs[theirs["figure"] == "impactfactors"].assign(backbone="paper/" + theirs["backbone"])
    theirs = _of_data(theirs, rows)
    figure, axes = canvas(1, 3, 3.0, 2.7, sharey=True)
    panels = (
        ("network", _Panel("backbone", "network", _VGG_BASE)),
        ("batch_size", _Panel("batch_size", "mini-batch size", _VGG_BASE)),
        ("batch_norm", _Panel("batch_norm", "batch normalisation", _VGG_BASE)),
    )
    for axis, (factor, panel) in zip(axes[0], panels, strict=True):
        _bars(axis, _batches(rows[_matches(rows, panel.base, panel.column)]), panel.column,
              theirs[theirs["factor"] == factor])  # fmt: skip
        axis.set_xlabel(panel.label)
    axes[0][0].set_ylabel("mini-batches with\ndifferent gradients (%)")
    tau = ", ".join(f"{t:.0e} ({p} bit)" for p, t in dict(zip(rows["precision"], rows["tau"], strict=True)).items())
    _finish(
        figure, rows, f"n: mini-batches. They differ where the Linf norms of the difference, summed over the parameter "
        f"tensors, exceed {tau}. {_SHARES}The mini-batches of one parameter vector are not independent: the intervals "
        "do not cover other vectors.",
        "Diamonds: the paper, one parameter vector each." if drawn(figure, "paper") else "",
    )  # fmt: skip
    return figure


def _of_data(published: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The published rows of our data, where that is one data set."""
    return published[published["data"].isin(rows["data"])] if rows["data"].nunique() == 1 else published[:0]


def _matches(rows: pd.DataFrame, base: Mapping[str, Any], but: str = "") -> pd.Series[bool]:
    """The rows whose factors have their base value; where none has (at smoke scale), the most frequent one."""
    import pandas as pd

    kept = pd.Series(True, index=rows.index)
    for column, value in base.items():
        if column != but and len(rows):
            equal = rows[column].isin([value])
            kept &= equal if equal.any() else rows[column].isin(rows[column].mode()[:1])
    return kept


def _vectors(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per parameter vector: hits 1 where any mini-batch differed."""
    one = rows[rows["metric"] == "differing"]
    lost = _not_finite(rows)
    return one.assign(hits=(one["value"] > 0).astype(float), n=1.0, lost=lost)


def _batches(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per parameter vector: hits and n count its mini-batches."""
    one = rows[rows["metric"] == "differing"]
    n = rows.loc[rows["metric"] == "batches", "value"].to_numpy()
    return one.assign(hits=one["value"], n=n, lost=_not_finite(rows))


def _not_finite(rows: pd.DataFrame) -> Any:
    return rows.loc[rows["metric"] == "not_finite", "value"].to_numpy()


def _bars(axis: Axes, shares: pd.DataFrame, column: str, published: pd.DataFrame) -> None:
    """Bars of shares in percent, one per level and precision; published ones as diamonds."""
    levels = sorted(set(shares[column]))
    precisions = sorted(set(shares["precision"]))
    width = 0.8 / max(1, len(precisions))
    at, counts = [], {"n": [], "NaN": []}  # type: tuple[list[float], dict[str, list[Any]]]
    for i, level in enumerate(levels):
        for j, bits in enumerate(precisions):
            x = i + (j - (len(precisions) - 1) / 2) * width
            group = shares[(shares[column] == level) & (shares["precision"] == bits)]
            for rule in ("exact", "published"):
                part = group[group["rule"] == rule]
                n, hits = float(part["n"].sum()), float(part["hits"].sum())
                gid = where(level=level, precision=bits, rule=rule)
                if n and rule == "exact":
                    _bar(axis, x, width, hits, n, bits, gid)
                elif n:
                    axis.plot(x, 100 * hits / n, "x", color="black", ms=4.5, mew=1, zorder=4, gid=gid)
            own = group[group["rule"] == "exact"]
            at.append(x)
            counts["n"].append(f"{own['n'].sum():.0f}" if len(own) else "")
            counts["NaN"].append(int(own["lost"].sum()) if len(own) else "")
            theirs = published[(published[column] == level) & (published["precision"] == bits)]
            if len(theirs) and len(own):
                gid = f"{where(level=level, precision=bits)};paper"
                axis.plot(x, 100 * theirs["mean"].iloc[0], ls="", gid=gid, **{**PAPER, "zorder": 3.5, "clip_on": False})
    _levels(axis, column, levels, at, counts)


def _bar(axis: Axes, x: float, width: float, hits: float, n: float, bits: int, gid: str) -> None:
    share, (low, high) = hits / n, share_interval(hits, n)
    (bar,) = axis.bar([x], [100 * share], 0.94 * width, **precision_look(bits))
    bar.set_gid(gid)
    axis.vlines([x], [100 * low], [100 * high], color="black", lw=0.9, zorder=3)
    if hits == 0:
        axis.annotate("0", (x, 0), xytext=(2, 2), textcoords="offset points", ha="left", fontsize=6, zorder=5)


def _levels(axis: Axes, column: str, levels: Sequence[Any], at: Sequence[float], counts: Mapping[str, Any]) -> None:
    names = [tell(v) if column == "backbone" else {True: "with", False: "without"}[v] if column == "batch_norm"
             else f"{v:g}" for v in levels]  # fmt: skip
    axis.set_xticks(range(len(levels)), names)
    axis.set_xlim(-0.55, max(1, len(levels)) - 0.45)
    axis.set_ylim(0, 104)
    axis.grid(visible=False, axis="x")
    if len(at) <= 16:
        counts_below(axis, at, counts)


def _finish(figure: Figure, rows: pd.DataFrame, *notes: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bits = sorted(set(rows["precision"]))
    handles: list[Any] = [Patch(**precision_look(p), label=f"{p} bit") for p in bits]
    if drawn(figure, "paper"):
        handles.append(Line2D([], [], ls="", label="paper", **PAPER))
    if "published" in set(rows["rule"]):
        handles.append(Line2D([], [], ls="", marker="x", color="black", ms=5, label="published rule"))
    figure.legend(handles=handles, loc="outside upper left", ncols=5, fontsize=8)
    caption(figure, rows, *notes)


def _by_sample_size(axis: Axes, rows: pd.DataFrame) -> None:
    """Draw a bar for each number of training images that a walk has seen."""
    levels = (1, 10, 20, 30, 40, 50, 60)
    precisions = sorted(set(rows["precision"]))
    width = 0.8 / max(1, len(precisions))
    draws = {}
    for j, bits in enumerate(precisions):
        first, last, images = _first(rows[rows["precision"] == bits])
        draws[bits] = len(first)
        for i, thousands in enumerate(levels):
            if 1000 * thousands > last:  # not measured
                continue
            x = i + (j - (len(precisions) - 1) / 2) * width
            hits = float((first * images <= 1000 * thousands).sum())
            _bar(axis, x, width, hits, len(first), bits, where(level=thousands, precision=bits, rule="exact"))
    axis.set_xticks(range(len(levels)), [str(v) for v in levels])
    axis.set_xlim(-0.55, len(levels) - 0.45)
    axis.set_ylim(0, 104)
    axis.set_xlabel("images met (thousands)")
    axis.grid(visible=False, axis="x")
    n = ", ".join(f"{n} ({bits} bit)" for bits, n in draws.items())
    axis.set_title(f"n = {n}" if draws else "", fontsize=6, color="0.35")
    if not axis.patches:
        axis.text(0.5, 0.5, "fewer than 1000\nimages were met", transform=axis.transAxes, ha="center", fontsize=7)


def _first(rows: pd.DataFrame) -> tuple[Any, float, int]:
    """Return each vector's first mini-batch that differs (else infinity), the longest walk, and the batch size."""
    first = rows.loc[rows["metric"] == "first_differing", "value"].fillna(math.inf).to_numpy(float)
    size = int(rows["batch_size"].iloc[0])
    walked = rows.loc[rows["metric"] == "batches", "value"]
    # A walk that stopped at its first hit says nothing of the length; one without a hit has gone all the way.
    whole = float(walked[[math.isinf(f) for f in first]].max()) if any(map(math.isinf, first)) else math.inf
    return first, whole * size, size


def volume_curves(rows: pd.DataFrame) -> Figure:
    """Share of parameter vectors that were affected by then, against the images met: a panel per network.

    Args:
        rows: Results of zone experiments that stop at the first mini-batch that differs.

    Returns:
        The figure.
    """
    import numpy as np
    from matplotlib.lines import Line2D

    keys = ["data", "backbone", "batch_norm"]
    panels = blocks(rows, keys)
    columns = min(4, len(panels))
    figure, axes = canvas(-(-len(panels) // columns), columns, 3.1, 2.5, sharey=True)
    theirs = table("volume_relu_cifar10")
    shown: dict[tuple[str, int], dict[str, Any]] = {}
    for axis, (key, block) in zip(axes.flat, panels, strict=False):
        data, backbone, norm = key
        notes = []
        for (rule, bits), part in sorted(blocks(block, ["rule", "precision"]), key=lambda b: b[0]):
            first, whole, size = _first(part)
            look = {"color": precision_look(bits)["facecolor"], "ls": "-" if rule == "exact" else "--"}
            shown[rule, bits] = look
            hits = np.sort(first[np.isfinite(first)])
            end = min(whole, 2 * size * hits[-1]) if len(hits) else whole
            x = np.concatenate([[size / 2], hits * size, [end]])
            y = np.concatenate([[0.0], np.arange(1, len(hits) + 1), [len(hits)]]) / len(first)
            axis.step(x, 100 * y, where="post", gid=where(rule=rule, precision=bits), **look)
            lost = int(_not_finite(part).sum())
            notes.append(f"n = {len(first)} ({bits} bit, {rule}{f'; {lost} NaN' if lost else ''})")
            paper = theirs[
                (theirs["data"] == data) & ("paper/" + theirs["backbone"] == backbone)
                & (theirs["batch_norm"] == norm) & (theirs["precision"] == bits)
            ]  # fmt: skip
            if len(paper):
                style = PAPER | {"color": look["color"], "mec": look["color"], "ms": 3.5}
                gid = where(paper=1, precision=bits)
                axis.plot(paper["batches"] * 128, 100 * paper["mean"], ls=":", lw=0.7, gid=gid, **style)
        title = [tell(backbone), tell(data)]
        if norm is not None and norm == norm:
            title.append("batch norm" if norm else "no batch norm")
        head(axis, ", ".join(title), "\n".join(notes))
        axis.set(xscale="log", xlabel="images met", ylim=(-3, 103))
        plain_log(axis.xaxis)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for line in axes:
        line[0].set_ylabel("affected vectors (%)")
    handles = [Line2D([], [], label=f"{bits} bit, {rule} rule", **look) for (rule, bits), look in shown.items()]
    if drawn(figure, "paper"):
        handles.append(Line2D([], [], ls=":", label="paper", **PAPER))
    figure.legend(handles=handles, loc="outside upper left", ncols=min(5, columns * 2), fontsize=7)
    caption(
        figure, rows, "Affected: on some mini-batch met so far, the first layer's gradients under ReLU'(0) = 0 and 1 "
        "differ in any bit. Curves end where the walks did.",
        "Diamonds: the paper, 1000 vectors, published rule, mini-batches of 128." if drawn(figure, "paper") else "",
    )  # fmt: skip
    return figure


def norms_by_decade(rows: pd.DataFrame, *, published: Mapping[int, str]) -> Figure:
    """Draw how large the gradient difference is, mini-batch by mini-batch: shares by decade.

    Args:
        rows: Results of zone experiments with ``histogram``.
        published: The published histogram, by precision.

    Returns:
        The figure.
    """
    panels = blocks(rows, ["data", "backbone", "against", "precision"])
    columns = min(3, len(panels))
    figure, axes = canvas(-(-len(panels) // columns), columns, 3.1, 2.2, sharey=True)
    everywhere = table("threshold_histograms")
    for axis, ((data, backbone, against, bits), block) in zip(axes.flat, panels, strict=False):
        total = float(block.loc[block["metric"] == "batches", "value"].sum())
        lost = int(_not_finite(block).sum())
        theirs = everywhere[(everywhere["figure"] == published.get(bits, "")) & (json.loads(against) != {"relu": 1})]
        theirs = theirs if data in _PAPERS_DATA else theirs[:0]
        at = _decades(rows[rows["precision"] == bits], theirs)
        ours: dict[int | None, float] = {}
        for k in at:
            metric = "norm_zero" if k is None else f"norm_1e{k}"
            ours[k] = 100 * float(block.loc[block["metric"] == metric, "value"].sum()) / total
        aside = 0.2 if len(theirs) else 0.0
        bars = axis.bar([at[k] - aside for k in ours], ours.values(), 0.4, **precision_look(bits))
        for bar, k in zip(bars, ours, strict=True):
            bar.set_gid(where(decade=k))
        places = [at.get(None if math.isnan(v) else round(math.log10(v))) for v in theirs["bin_low"]]
        kept = [(x, y) for x, y in zip(places, theirs["percent"], strict=True) if x is not None]
        if kept:
            xs, ys = zip(*kept, strict=True)
            hollow = {"color": "white", "edgecolor": PAPER["color"], "linewidth": 0.8}
            for bar in axis.bar([x + 0.2 for x in xs], ys, 0.4, zorder=1.5, **hollow):
                bar.set_gid("paper")
        alternative = " and ".join(f"{_SYMBOLS.get(k, k)} = {tell_choice(v)}" for k, v in json.loads(against).items())
        axis.set_yscale("symlog", linthresh=0.1, linscale=0.3)
        axis.set_ylim(0, 150)
        axis.set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
        edges = range(min(k for k in at if k is not None), max(k for k in at if k is not None) + 2)
        shown = edges[:: 1 if len(at) < 11 else 2]
        axis.set_xticks([at[None], *shown], ["0", *(f"$10^{{{k}}}$" for k in shown)], fontsize=7)
        note = f"n = {total:.0f} mini-batches" + (f", NaN: {lost}" if lost else "")
        head(axis, f"{tell(backbone)}/{tell(data)}\n{alternative}, {bits} bit", note)
        axis.grid(visible=False, axis="x")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for line in axes:
        line[0].set_ylabel("mini-batches (%)")
    for axis in axes.flat:
        axis.set_xlabel("norm of the gradient difference", fontsize=7)
    caption(
        figure, rows, "0: exactly 0, in every bit. L1 norm of the difference, summed over the parameter tensors; the "
        "reference is ReLU'(0) = 0 with native pooling.",
        f"Filled: ours. Hollow: the paper's histogram of that precision ({', '.join(dict.fromkeys(published.values()))}"
        "), whatever its network." if drawn(figure, "paper") else "",
    )  # fmt: skip
    return figure


def _decades(rows: pd.DataFrame, published: pd.DataFrame) -> dict[int | None, float]:
    """Return where the bars of each decade stand, in its middle, that of exact zeros (None) apart from the others."""
    decades = [int(m.removeprefix("norm_1e")) for m in rows["metric"].unique() if m.startswith("norm_1e")]
    decades += [round(math.log10(v)) for v in published.loc[published["percent"] > 0, "bin_low"].dropna()]
    low, high = min(decades, default=-8), max(decades, default=-1)
    low = min(low, high - 4)  # a few decades at least
    return {None: low - 1.1} | {k: k + 0.5 for k in range(low, high + 1)}


_PAPERS_DATA = ("MNIST", "CIFAR10", "CIFAR100", "SVHN")
_SYMBOLS = {"relu": r"$\alpha$", "max_pool": r"$\beta$", "norm": "norm$'(0)$"}
