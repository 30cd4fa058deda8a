"""Figures of single commands, a function each: it writes a file, and a PNG beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nslightning.files import replacing

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["divergence_by_step", "learning_rate_search", "twins_by_step", "zone_shares"]

# Okabe and Ito's colours, told apart by the colour-blind; line styles tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
STYLE: dict[Any, Any] = {
    "figure.dpi": 150, "savefig.dpi": 200, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.5, "legend.frameon": False, "pdf.fonttype": 42,
    "savefig.bbox": "tight", "lines.linewidth": 1.4,
}  # fmt: skip


def divergence_by_step(rows: pd.DataFrame, path: str | Path, changes: Sequence[tuple[int, str]] = ()) -> Path:
    """Draw the relative divergence of each choice against the training step.

    Exact zeros (no tie met, or none that matters) and non-finite values have no place on a logarithmic axis: they are
    marked by ticks above the lower edge and crosses at the upper one.

    Args:
        rows: One row per step and choice, with columns ``step``, ``choice`` and ``relative``.
        path: The figure's file; a PNG of the same name is written beside it.
        changes: Steps from which another choice was in use, with which the others are compared; and the change in
            words.

    Returns:
        The path.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    path = Path(path)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.5, 3.2))
        for start, change in changes:
            axis.axvline(start, color="0.4", lw=0.8, ls="--", zorder=0)
            look: dict[str, Any] = {"va": "top", "fontsize": 7, "rotation": 90, "color": "0.3"}
            look |= {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "xytext": (3, -3)}
            axis.annotate(f"in use: {change}", (start, 1), **look)
        values = rows["relative"].to_numpy(float)
        positive = values[np.isfinite(values) & (values > 0)]
        low, high = (positive.min() / 5, positive.max() * 5) if len(positive) else (1e-8, 1.0)
        for i, (choice, group) in enumerate(rows.groupby("choice", sort=False)):
            group = group.sort_values("step")
            step, y = group["step"].to_numpy(), group["relative"].to_numpy(float)
            colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
            finite, zero, bad = np.isfinite(y) & (y > 0), y == 0, ~np.isfinite(y)
            axis.plot(step, np.where(finite, y, np.nan), color=colour, ls=dash, marker=".", ms=3, label=choice)
            floor = low * 1.35 ** (i + 1)  # choices one above the other
            axis.plot(step[zero], np.full(zero.sum(), floor), "|", color=colour, ms=5, mew=1)
            axis.plot(step[bad], np.full(bad.sum(), high / 1.5), "x", color=colour, ms=5)
            notes = [
                f"{n} of {len(y)} {kind}" for n, kind in ((zero.sum(), "exactly 0"), (bad.sum(), "not finite")) if n
            ]
            if notes:
                axis.lines[-3].set_label(f"{choice} ({', '.join(notes)})")
        axis.set_yscale("log")
        axis.set_ylim(low, high)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("relative L2 divergence")
        names = len(axis.get_legend_handles_labels()[1])
        figure.set_figheight(3.0 + 0.17 * -(-names // 2))  # the legend stands above the axes, two names a row
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, fontsize=8, borderaxespad=0.2)
        _save(figure, path)
    return path


def twins_by_step(rows: pd.DataFrame, path: str | Path) -> Path:
    """Draw how far twins come apart: the L1 distance of their weights against the step, and their accuracy.

    The control, which repeats the first choice, is drawn in black: what lies at or below it is not the choice's doing.
    The axis of the distances is logarithmic above its first tick and linear below, so that 0 has a place. Where
    weights are no longer finite the curve ends in a cross.

    Args:
        rows: One value a row, with columns ``step``, ``epoch``, ``twin``, ``metric`` and ``value``; the metrics drawn
            are ``weights/l1`` and ``val/acc1``.
        path: The figure's file; a PNG of the same name is written beside it.

    Returns:
        The path.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    path = Path(path)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9), layout="constrained")
        twins = list(dict.fromkeys(rows["twin"].iloc[::-1]))[::-1]
        first = [t for t in twins if t not in set(rows.loc[rows["metric"] == "weights/l1", "twin"])]
        colours = iter(COLOURS[:-1] * len(twins))
        look: dict[str, dict[str, Any]] = {
            t: {"color": "#000000", "ls": ":", "lw": 2, "zorder": 3}
            if t == "control"
            else {"color": next(colours), "ls": DASHES[i % (len(DASHES) - 1)]}
            for i, t in enumerate(first + [t for t in twins if t not in first])
        }
        distance = rows[rows["metric"] == "weights/l1"]
        values = distance["value"].to_numpy(float)
        positive = values[np.isfinite(values) & (values > 0)]
        low = 10.0 ** np.floor(np.log10(positive.min())) if len(positive) else 1.0
        top = positive.max() * 3 if len(positive) else 1.0
        for axis, metric, x in ((left, "weights/l1", "step"), (right, "val/acc1", "epoch")):
            for twin, style in look.items():
                group = rows[(rows["metric"] == metric) & (rows["twin"] == twin)].sort_values(["step", "epoch"])
                if group.empty:
                    continue
                at, y = group[x].to_numpy() + (x == "epoch"), group["value"].to_numpy(float)
                lost = np.flatnonzero(~np.isfinite(y))
                same = axis is left and not y.any()
                label = f"{twin} (always 0)" if same else twin
                marker = "." if len(at) <= 30 else ""
                axis.plot(at, np.where(np.isfinite(y), y, np.nan), label=label, marker=marker, ms=4, **style)
                if len(lost):
                    height = top / 1.5 if metric == "weights/l1" else 0.0
                    axis.plot(at[lost[0]], height, "x", color=style["color"], ms=6, clip_on=False)
        left.set_yscale("symlog", linthresh=low, linscale=0.5)
        left.set_ylim(0, top)
        left.set_xlabel("optimizer step")
        left.set_ylabel(f"L1 distance to {first[0]}" if first else "L1 distance")
        right.set_xlabel("epoch")
        right.set_ylabel("validation accuracy")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        lines = {line.get_label().split(" (")[0]: line for axis in (right, left) for line in axis.lines[::-1]}
        shown = [lines[twin] for twin in look if twin in lines]
        columns = -(-len(shown) // max(1, -(-len(shown) // 5)))  # up to five names a row, rows of the same length
        figure.legend(handles=shown, loc="outside upper left", ncols=columns or 1, fontsize=8)
        _save(figure, path)
    return path


def learning_rate_search(rows: pd.DataFrame, metric: str, path: str | Path) -> Path:
    """Draw what each learning rate of a search reached, one panel per choice.

    Args:
        rows: One row per trial and epoch, with columns ``choice``, ``trial``, ``lr``, ``epoch``, ``state`` and the
            metric; a trial's last epoch is drawn, hollow where it was pruned.
        metric: The metric's column.
        path: The figure's file; a PNG of the same name is written beside it.

    Returns:
        The path.
    """
    import matplotlib.pyplot as plt

    path = Path(path)
    ends = rows.sort_values("epoch").groupby(["choice", "trial"], sort=False).last().reset_index()
    choices = list(dict.fromkeys(rows["choice"]))
    with plt.rc_context(STYLE):
        size = (1.2 + 2.4 * len(choices), 2.6)
        figure, panels = plt.subplots(1, len(choices), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axis, choice in zip(panels[0], choices, strict=True):
            trials = ends[ends["choice"] == choice]
            complete = trials["state"] == "complete"
            axis.plot(trials["lr"][complete], trials[metric][complete], "o", ms=4, color=COLOURS[0], label="complete")
            axis.plot(
                trials["lr"][~complete], trials[metric][~complete], "o", ms=4, mfc="none", color=COLOURS[1],
                label="pruned",
            )  # fmt: skip
            if complete.any():
                best = trials[complete].sort_values(metric).iloc[-1]
                axis.axvline(best["lr"], color="0.5", lw=0.8, ls="--", zorder=0)
                at = {"xy": (best["lr"], 0), "xycoords": ("data", "axes fraction")}
                axis.annotate(f"{best['lr']:.3g}", **at, xytext=(-3, 3), textcoords="offset points", ha="right")
            axis.set(title=choice, xscale="log", xlabel="learning rate")
        panels[0][0].set_ylabel(metric)
        panels[0][0].legend(fontsize=8)
        _save(figure, path)
    return path


def zone_shares(rows: pd.DataFrame, title: str, whose: str, path: str | Path) -> Path:
    """Draw how often two choices differ, by precision, and what the mini-batches' zones are.

    Args:
        rows: One row per precision, with columns ``precision``, ``draws``, ``share``, ``low`` and ``high``, and the
            shares of the mini-batches in each zone where they were told apart.
        title: Title of the figure.
        whose: Name of the things that the share counts, such as ``draws``.
        path: The figure's file; a PNG of the same name is written beside it.

    Returns:
        The path.
    """
    import matplotlib.pyplot as plt

    path = Path(path)
    kinds = [k for k in ("regular", "compensation", "bifurcation") if k in rows]
    names = [f"{p} bit\nn = {n:,}" for p, n in zip(rows["precision"], rows["draws"], strict=True)]
    at = range(len(rows))
    with plt.rc_context(STYLE | {"axes.grid.axis": "y"}):
        figure, panels = plt.subplots(1, 1 + bool(kinds), figsize=(3.4 * (1 + bool(kinds)), 2.9), squeeze=False)
        figure.set_layout_engine("constrained")
        left = panels[0][0]
        error = [100 * (rows["share"] - rows["low"]), 100 * (rows["high"] - rows["share"])]
        left.bar(at, 100 * rows["share"], 0.6, color=COLOURS[0], alpha=0.85)
        left.errorbar(at, 100 * rows["share"], error, fmt="none", ecolor="black", elinewidth=1, capsize=3)
        left.set(ylabel=f"{whose} with different gradients (%)", xticks=at, xticklabels=names)
        left.set_ylim(0, max(1.0, 105 * rows["high"].max()))
        if kinds:
            below = 0.0 * rows["share"]
            for i, kind in enumerate(kinds):
                look = {"color": ("0.85", COLOURS[5], COLOURS[1])[i], "hatch": ("", "//", "")[i], "edgecolor": "white"}
                panels[0][1].bar(at, 100 * rows[kind], 0.6, bottom=below, label=kind, **look)
                below = below + 100 * rows[kind]
            panels[0][1].set(ylabel="mini-batches by zone (%)", xticks=at, xticklabels=names, ylim=(0, 100))
            panels[0][1].legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1)
        figure.suptitle(title, fontsize=9)
        _save(figure, path)
    return path


def _save(figure: Figure, path: Path) -> None:
    """Write a figure, and a PNG beside it."""
    import matplotlib.pyplot as plt

    for file in (path, path.with_suffix(".png")):
        with replacing(file) as partial:
            figure.savefig(partial)
    plt.close(figure)
