"""Figures of networks trained in lock-step, and of the zeros that a training meets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from nslightning.experiments.figures.results import blocks
from nslightning.experiments.figures.style import PAPER, canvas, caption, drawn, head, shades, tell, tell_choice, where
from nslightning.experiments.published import table
from nslightning.figures import COLOURS, DASHES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["closest_inputs", "weight_difference", "zeros_by_architecture"]

_BLOCK = ["experiment", "backbone", "backbone_options", "data", "precision"]
_CONTROL: dict[str, Any] = {"color": "black", "ls": (0, (1, 1)), "lw": 2.2, "zorder": 3}


def weight_difference(rows: pd.DataFrame) -> Figure:
    """Draw how far twins come apart: L1 distance of the weights to the first choice's, and test accuracy.

    The control repeats the first choice: what lies at or below it is not the choice's doing. It is always drawn.

    Args:
        rows: Results of twin experiments.

    Returns:
        The figure: a line of panels per experiment and precision, a column per rule; then the accuracy, where it was
        measured.
    """
    lines = blocks(rows, _BLOCK)
    accuracy = "test_accuracy" in set(rows["metric"])
    from matplotlib.ticker import MaxNLocator

    rules = [r for r in ("exact", "published") if r in set(rows["rule"])]
    figure, axes = canvas(len(lines), len(rules) * (1 + accuracy), 3.5 if len(rules) + accuracy > 1 else 5.0, 2.2)
    names: dict[str, Any] = {}
    for line, (key, block) in zip(axes, lines, strict=True):
        scale = _scale(block[block["metric"] == "l1_distance"]["value"])
        for i, rule in enumerate(rules):
            part = block[block["rule"] == rule]
            panels = [(line[i], _distances), *([(line[len(rules) + i], _accuracies)] if accuracy else [])]
            for axis, draw in panels:
                if part.empty:
                    axis.set_visible(False)
                    continue
                note = draw(axis, part, _looks(block), (*key, rule))
                if draw is _distances:
                    _rescale(axis, scale)
                head(axis, _title((*key, rule)), note)
                last = axis.dataLim.x1
                if last > 2 * block[_index(block)].max():  # the paper trained for longer
                    axis.set_xscale("symlog", linthresh=1, linscale=0.3)
                    axis.set_xticks(ticks := [t for t in (0, 1, 2, 5, 10, 20, 50, 100, 200) if t <= last], ticks)
                    axis.set_xlim(-0.2, 1.2 * last)
                    axis.minorticks_off()
                else:
                    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
                for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
                    names.setdefault(name, handle)
    columns = -(-len(names) // -(-len(names) // 5))  # rows of the same length
    figure.legend(names.values(), names.keys(), loc="outside upper left", ncols=columns, fontsize=7)
    caption(
        figure, rows, "Distance: L1 over all parameters, to the first choice's network. Dotted black: the control, the "
        "first choice once more. The axis is linear below its first power of ten, so that 0 has a place. A cross marks "
        "where a curve stops being finite. n = 1 run a curve.",
        "Hollow diamonds: the paper's curves, published rule." if drawn(figure, "paper") else "",
    )  # fmt: skip
    return figure


def _looks(block: pd.DataFrame) -> dict[str, dict[str, Any]]:
    twins = [t for t in dict.fromkeys(map(str, block["twin"])) if t != "control"]
    styles = shades([0, *twins[1:]])
    return dict(zip(twins, styles.values(), strict=True)) | {"control": _CONTROL}


def _index(rows: pd.DataFrame) -> str:
    return "step" if "step" in rows and rows["step"].notna().any() else "epoch"


def _title(key: tuple[Any, ...]) -> str:
    _, backbone, options, data, bits, *rule = key
    network = tell(backbone) + (" with ReLU6" if '"relu6"' in options else "")
    return f"{network}, {tell(data)}\n" + ", ".join([f"{bits} bit", *(f"{r} rule" for r in rule)])


def _published(key: tuple[Any, ...], quantity: str) -> pd.DataFrame:
    _, backbone, _, data, bits, _ = key
    published = table("lockstep")
    wanted = (published["precision"] == bits) & (published["quantity"] == quantity)
    same = backbone == "paper/vgg11" and data == "CIFAR10"
    return published[wanted] if same else published[:0]


def _distances(axis: Axes, block: pd.DataFrame, looks: dict[str, Any], key: tuple[Any, ...]) -> str:
    """Draw the distances, and tell which of them are always 0."""
    import numpy as np

    x = _index(block)
    rows = block[block["metric"] == "l1_distance"]
    first = next(iter(looks))
    _, top = _scale(rows["value"])
    theirs = _published(key, "L1_weight_difference") if x == "epoch" else _published(key, "")
    same = []
    for twin, look in looks.items():
        if twin == first:
            continue
        group = rows[rows["twin"].astype(str) == twin].sort_values(x)
        y = group["value"].to_numpy(float)
        name = f"{first} vs {first} (control)" if twin == "control" else f"{first} vs {_number(twin)}"
        axis.plot(group[x], np.where(np.isfinite(y), y, np.nan), label=name, gid=where(twin=twin), **look)
        lost = np.flatnonzero(~np.isfinite(y))
        if len(lost):
            axis.plot(group[x].iloc[lost[0]], top / 2, "x", color=look["color"], ms=6, gid=where(twin=twin, lost=1))
        if not y.any():
            same.append(name.removesuffix(" (control)"))
        paper = theirs[theirs["curve"] == f"0 vs {0 if twin == 'control' else twin}"]
        if len(paper):
            style = PAPER | {"mec": look["color"], "ms": 3.5}
            axis.plot(paper["epoch"], paper["value"].clip(lower=0), ls="", gid=where(twin=twin, paper=1), **style)
    axis.set(xlabel="optimizer step" if x == "step" else "epoch", ylabel="L1 distance")
    return f"always exactly 0: {', '.join(same)}" if same else ""


def _scale(values: pd.Series[float]) -> tuple[float, float]:
    """The power of ten below the least positive distance, and a bit more than the greatest one."""
    positive = values[(values > 0) & (values < math.inf)]
    if positive.empty:
        return 1.0, 1.0
    return 10.0 ** math.floor(math.log10(positive.min())), 4 * float(positive.max())


def _rescale(axis: Axes, scale: tuple[float, float]) -> None:
    """Set the scale that both rules share: linear up to its first power of ten, logarithmic from there."""
    import numpy as np

    low, top = scale
    theirs = [np.asarray(line.get_ydata()) for line in axis.lines if "paper" in str(line.get_gid())]
    top = max([top, *(3 * float(y.max()) for y in theirs)])
    decades = round(math.log10(top / low))
    ticks = [0.0, *(low * 10.0**k for k in range(0, decades + 1, 1 + decades // 5))]
    axis.set_yscale("symlog", linthresh=low, linscale=0.5)
    axis.set_yticks(ticks if decades else [0.0])
    axis.minorticks_off()
    axis.set_ylim(-0.15 * low, top)


def _number(twin: str) -> str:
    try:
        return tell_choice(float(twin))
    except ValueError:
        return twin


def _accuracies(axis: Axes, block: pd.DataFrame, looks: dict[str, Any], key: tuple[Any, ...]) -> str:
    """Draw the accuracies; there is nothing to tell."""
    rows = block[block["metric"] == "test_accuracy"]
    theirs = _published(key, "test_accuracy")
    for twin, look in looks.items():
        group = rows[rows["twin"].astype(str) == twin].sort_values("epoch")
        axis.plot(group["epoch"], group["value"], gid=where(twin=twin), **look)
        paper = theirs[theirs["curve"] == f"beta={twin}"]
        axis.plot(paper["epoch"], paper["value"], ls="", **PAPER | {"mec": look["color"], "ms": 3.5})
    axis.set(xlabel="epoch", ylabel="test accuracy")
    return ""


def closest_inputs(rows: pd.DataFrame) -> Figure:
    """Draw how close the first activation's inputs come to its kinks, step by step; exact zeros at the lower edge.

    Args:
        rows: Results of twin experiments by step.

    Returns:
        The figure.

    Raises:
        ValueError: If no experiment measured it.
    """
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    rows = rows[rows["metric"].isin(["min_abs_input", "min_abs_input_6"])]
    if rows.empty:
        raise ValueError("intro-min-activation needs min_abs_input, which twin experiments with `steps` measure")
    lines = blocks(rows, _BLOCK)
    figure, axes = canvas(len(lines), 1, 5.2, 2.0)
    positive = rows.loc[rows["value"] > 0, "value"]
    low = 10.0 ** math.floor(math.log10(positive.min()) - 0.5)
    for axis, (key, block) in zip(axes.flat, lines, strict=True):
        for i, (metric, name) in enumerate((("min_abs_input", "|z|"), ("min_abs_input_6", "|z - 6|"))):
            group = block[block["metric"] == metric].drop_duplicates("step").sort_values("step")
            if group.empty:
                continue
            y, step = group["value"].to_numpy(float), group["step"].to_numpy(float)
            look: dict[str, Any] = {"color": COLOURS[i], "ls": DASHES[i]}
            zero = step[y == 0]
            label = f"least {name}; exactly 0 at {len(zero)} of {len(y)} steps"
            axis.plot(step, np.where(y > 0, y, np.nan), lw=1, gid=where(metric=metric), label=label, **look)
            edge = axis.get_xaxis_transform()
            axis.plot(zero, [0.04] * len(zero), "v", color=COLOURS[1], ms=5, transform=edge, gid=where(zeros=metric))
        axis.set_yscale("log")
        axis.set_ylim(low, max(positive.max() * 100, 10 * low))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(xlabel="optimizer step", ylabel="distance to a kink")
        axis.set_title(_title(key).replace("\n", ", "), fontsize=8)
        axis.legend(fontsize=6.5, loc="upper right")
    caption(figure, rows, "Over the inputs of the first activation in the step's mini-batch, first twin. n = 1 run.")
    return figure


def zeros_by_architecture(rows: pd.DataFrame) -> Figure:
    """Draw which share of ReLU inputs is exactly 0 while training, by width, depth and precision.

    Args:
        rows: Results of training experiments with ``count_zeros``.

    Returns:
        The figure.

    Raises:
        ValueError: If no experiment counted them.
    """
    from matplotlib.lines import Line2D

    rows = rows[rows["metric"].isin(["zeros", "relu_calls"]) & rows["width"].notna()]
    if rows.empty:
        raise ValueError("zeros needs runs with `count_zeros: true` of networks with a width")
    sums = rows.groupby(["precision", "depth", "width", "metric"])["value"].sum().unstack("metric").reset_index()
    sums["share"] = sums["zeros"] / sums["relu_calls"]
    theirs = table("zeros")
    if set(rows["data"]) != {"MNIST"}:
        theirs = theirs[:0]
    figure, axes = canvas(1, sums["precision"].nunique(), 3.6, 3.0, sharey=True)
    positive = [*sums.loc[sums["share"] > 0, "share"], *theirs.loc[theirs["mean"] > 0, "mean"]]
    low = 10.0 ** math.floor(math.log10(min(positive, default=1e-9)) - 0.3)
    for axis, (bits, block) in zip(axes[0], sums.groupby("precision"), strict=True):
        depths = sorted(set(sums["depth"]))
        for i, (depth, look) in enumerate(zip(depths, shades(depths).values(), strict=True)):
            aside = 1.06 ** (i - (len(depths) - 1) / 2)  # zeros of all depths stand side by side, not on each other
            group = block[block["depth"] == depth]
            seen = group[group["share"] > 0]
            label = f"{depth:g} hidden layer{'s' * (depth > 1)}"
            gid = where(precision=bits, depth=f"{depth:g}")
            axis.plot(seen["width"], seen["share"], marker="o", ms=3.5, label=label, gid=gid, **look)
            for _, line in group.iterrows():
                if line["share"] > 0:
                    axis.annotate(
                        f"{line['zeros']:.0f}", (line["width"], line["share"]), xytext=(4, -2),
                        textcoords="offset points", fontsize=5, color=look["color"],
                    )  # fmt: skip
            none = group[group["share"] == 0]["width"] * aside
            axis.plot(none, [low * 1.4] * len(none), "v", color=look["color"], ms=4)
            paper = theirs[(theirs["precision"] == bits) & (theirs["depth"] == depth) & (theirs["mean"] > 0)]
            style = PAPER | {"mec": look["color"], "color": look["color"], "ms": 3.5}
            if len(paper):
                axis.plot(paper["width"], paper["mean"], ls=":", lw=0.5, gid=f"{gid};paper", **style)
        axis.set(xscale="log", yscale="log", xlabel="neurons per layer")
        widths = sorted({*sums["width"], *theirs["width"]})
        axis.set_xticks(widths, [f"{w:g}" for w in widths])
        axis.minorticks_off()
        axis.set_xlim(min(widths) / 1.5, max(widths) * 1.5)
        axis.set_ylim(bottom=low)
        axis.set_title(f"{bits} bit", fontsize=8)
    axes[0][0].set_ylabel("exact zeros per ReLU input")
    handles, labels = axes[0][0].get_legend_handles_labels()
    if len(theirs):
        handles.append(Line2D([], [], ls=":", **PAPER))
        labels.append("paper")
    figure.legend(handles, labels, loc="outside upper left", ncols=3, fontsize=7)
    caption(
        figure, rows, "Numbers: zeros that were met, over all epochs and runs; triangles: none.",
        "Hollow diamonds: the paper, 100 epochs." if len(theirs) else "",
    )  # fmt: skip
    return figure
