"""Figures of training runs: accuracy at the end by choice, loss by epoch, and what the published rule adds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nslightning.experiments.figures.results import blocks, runs_at_end, sorted_choices, with_choice
from nslightning.experiments.figures.style import (
    AXIS,
    PAPER,
    at_edge,
    canvas,
    caption,
    counts_below,
    drawn,
    head,
    plain_log,
    shades,
    tell,
    tell_choice,
    where,
)
from nslightning.experiments.published import table
from nslightning.figures import COLOURS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accuracy_by_choice", "accuracy_by_dropout", "loss_by_epoch", "rule_effect", "training"]

_BLOCK = ["parameter", "data", "backbone", "optimizer", "precision"]
_SAME_PROGRAM = {"relu": (0,), "max_pool": (0, 1)}  # the choices that both rules compute alike
_RULES = {"exact": "exact rule", "published": "published rule"}


def training(rows: pd.DataFrame, *, show: Sequence[str] = ("test", "train"), plain: bool = False) -> Figure:
    """Test accuracy at the last epoch and training loss by epoch, by choice: a column per rule.

    Choices that both rules compute alike are drawn under both, from whichever was run.

    Args:
        rows: Results of training experiments.
        show: ``test`` (boxes), ``train`` (curves), or both.
        plain: Loss curves without batch normalisation alone, where there are both.

    Returns:
        The figure.
    """
    rows = with_choice(rows)
    same = blocks(rows, _BLOCK)
    rules = [r for r in _RULES if r in set(rows["rule"])]
    plan: list[tuple[str, tuple[Any, ...], pd.DataFrame]] = []
    for key, block in same:
        if "test" in show:
            plan.append(("test", key, block))
        if "train" in show:
            for norm in _norms(block)[: 1 if plain else None]:
                plan.append(("train", (*key, norm), block[block["batch_norm"].isin([norm]) | (norm is None)]))
    figure, axes = canvas(len(plan), len(rules), 3.6, 2.4)
    for line, (panel, key, block) in zip(axes, plan, strict=True):
        for axis, rule in zip(line, rules, strict=True):
            part, note = _under(block, rule, key[0]), ""
            if panel == "test":
                runs = runs_at_end(part, "test_accuracy")
                accuracy_by_choice(axis, runs, "choice", "batch_norm", _published("training", key, "test_accuracy"))
                axis.set_xlabel(AXIS[key[0]])
            else:
                theirs = _published("curves", key, "train_loss")
                note = loss_by_epoch(axis, part, theirs[theirs["batch_norm"].isin([key[-1]])])
            head(axis, ", ".join([_RULES[rule], *_title(key, rows)]), note)
            if axis is not line[0]:
                axis.set_ylabel("")
        _share_y(line, panel)
    _legends(figure, rows, plan)
    caption(figure, rows, *_notes(show, drawn(figure, "paper")), _borrowed_note(rows))
    return figure


def _norms(rows: pd.DataFrame) -> list[Any]:
    norms = rows["batch_norm"]
    return sorted(set(norms.dropna()), key=bool) or [None]


def _under(block: pd.DataFrame, rule: str, parameter: str) -> pd.DataFrame:
    """The runs under a rule, with those of the other where both are one program."""
    import pandas as pd

    own = block[block["rule"] == rule]
    absent = [c for c in _SAME_PROGRAM[parameter] if c not in set(own["choice"])]
    other = block[(block["rule"] != rule) & block["choice"].isin(absent)]
    return pd.concat([own, other])


def _borrowed_note(rows: pd.DataFrame) -> str:
    for _, block in blocks(rows, _BLOCK):
        parameter = block["parameter"].iloc[0]
        ran = {rule: set(part["choice"]) for rule, part in block.groupby("rule")}
        if len(ran) == 2 and (ran["exact"] ^ ran["published"]) & set(_SAME_PROGRAM[parameter]):
            return "Choices that both rules compute alike are drawn under both, from the runs of one."
    return ""


def _published(name: str, key: tuple[Any, ...], metric: str) -> pd.DataFrame:
    """The paper's numbers of a block."""
    parameter, data, backbone, optimizer, precision = key[:5]
    wanted = {
        "parameter": {"relu": "alpha", "max_pool": "beta"}[parameter],
        "data": data,
        "backbone": backbone.removeprefix("paper/"),
        "optimizer": optimizer,
        "precision": precision,
        "metric": metric,
    }
    published = table(name).rename(columns={"value": "choice"})
    for column, value in wanted.items():
        published = published[published[column] == value]
    return published


def _subject(rows: pd.DataFrame) -> str:
    pairs = dict.fromkeys(zip(rows["backbone"], rows["data"], strict=True))
    return "; ".join(f"{tell(backbone)}, {tell(data)}" for backbone, data in pairs)


def _title(key: tuple[Any, ...], rows: pd.DataFrame) -> list[str]:
    """Return the part of an axis's key that the other axes do not share."""
    _, data, backbone, optimizer, precision, *norm = key
    words = []
    if rows[["backbone", "data"]].drop_duplicates().shape[0] > 1:
        words.append(f"{tell(backbone)}/{tell(data)}")
    if rows["optimizer"].nunique() > 1:
        words.append(_optimizer(optimizer))
    words.append(f"{precision} bit")
    if norm and norm[0] is not None:
        words.append("with batch norm" if norm[0] else "no batch norm")
    return words


def _optimizer(name: str) -> str:
    """An optimizer's usual name; those that a cell names by class have it."""
    return {"sgd": "SGD", "adam": "Adam"}.get(name, name)


def _notes(show: Sequence[str], paper: bool) -> Iterator[str]:
    if "test" in show:
        yield (
            "Test accuracy at the last epoch. Dots: runs; boxes: quartiles of those on the axis, whiskers: all of "
            "these; crosses: runs that diverged; triangles: runs or means below the axis, which leaves out what is "
            "under half of the best run."
        )
    if "train" in show:
        yield (
            "Lines: means over the runs that are finite at that epoch, bands: standard deviation; a curve ends in a "
            "cross where its last run diverges."
        )
    if paper:
        yield (
            "Hollow diamonds: the paper's means and standard deviations (or medians read from its figure), made with "
            "the published rule."
        )


def _share_y(axes: Sequence[Axes], panel: str) -> None:
    low, high = min(a.get_ylim()[0] for a in axes), max(a.get_ylim()[1] for a in axes)
    for axis in axes:
        axis.set_ylim(low, high)
        if panel == "train":
            left, right = min(a.get_xlim()[0] for a in axes), max(a.get_xlim()[1] for a in axes)
            axis.set_xlim(left, right)
            plain_log(axis.yaxis)


def _legends(figure: Figure, rows: pd.DataFrame, plan: Sequence[Any]) -> None:
    """Beside the figure: one legend for the boxes, one per parameter for the curves."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if any(panel == "test" for panel, *_ in plan):
        for norm in _norms(rows):
            name = "ours" + ("" if norm is None else ", with batch norm" if norm else ", no batch norm")
            handles.append(Patch(**_box_look(norm), label=name))
        if drawn(figure, "paper"):
            handles.append(Line2D([], [], ls="", label="paper", **PAPER))
        if drawn(figure, "diverged"):
            handles.append(Line2D([], [], ls="", marker="x", color="0.3", ms=5, label="diverged run"))
    if any(panel == "train" for panel, *_ in plan):
        for parameter in dict.fromkeys(key[0] for panel, key, _ in plan if panel == "train"):
            for choice, look in _choice_looks(rows[rows["parameter"] == parameter]).items():
                symbol = {"relu": r"$\alpha$", "max_pool": r"$\beta$"}[parameter]
                handles.append(Line2D([], [], label=f"{symbol} = {tell_choice(choice)}", **look))
    columns = min(len(handles), max(3, int(figure.get_figwidth() / 1.35)))
    columns = -(-len(handles) // -(-len(handles) // columns))  # rows of the same length
    figure.legend(handles=handles, ncols=columns, handlelength=2.2, **_legend_of(rows))


def _legend_of(rows: pd.DataFrame) -> dict[str, Any]:
    """A legend above the figure that says whose runs these are."""
    return {
        "loc": "outside upper left", "fontsize": 7, "title": _subject(rows), "title_fontsize": 9, "alignment": "left"
    }  # fmt: skip


def _box_look(hue: Any) -> dict[str, Any]:
    colour = COLOURS[1] if hue else COLOURS[0]
    return {"facecolor": colour, "edgecolor": colour, "alpha": 0.55, "hatch": "////" if hue else ""}


def _choice_looks(rows: pd.DataFrame) -> dict[Any, dict[str, Any]]:
    return shades(sorted_choices(rows["choice"]))


def accuracy_by_choice(axis: Axes, runs: pd.DataFrame, x: str, hue: str, published: pd.DataFrame) -> None:
    """Draw a box per group of runs, every run, those that diverged, and the published means behind.

    The axis shows the runs that are not below half of the best one; what is below (at chance, mostly) is marked at the
    edge, and counted.

    Args:
        axis: The axis to draw on.
        runs: One row per run, as from :func:`~nslightning.experiments.figures.results.runs_at_end`.
        x: The column along the axis.
        hue: The column that stands side by side.
        published: Published rows with ``mean``, ``sd``, ``n`` and ``n_nan``, and both columns; may be empty.
    """
    levels = sorted_choices(runs[x])
    hues = sorted_choices(runs[hue].dropna()) or [None]
    alive = runs[~runs["diverged"]]
    theirs = published[published[x].isin([v for v in levels if not isinstance(v, str)])]
    best = max([*alive["value"], *theirs["mean"]], default=1.0)
    floor = 0.5 * best
    width = 0.76 / len(hues)
    counts: dict[str, list[Any]] = {"n": [], "NaN": [], "below": [], "paper n": [], "paper NaN": []}
    at = []
    for i, level in enumerate(levels):
        for j, one in enumerate(hues):
            place = i + (j - (len(hues) - 1) / 2) * width
            at.append(place)
            group = runs[(runs[x] == level) & (runs[hue].isin([one]) | (one is None))]
            look, gid = _hue_look(one, hue, hues), where(x=level, hue=one)
            finished = group.loc[~group["diverged"], "value"].to_numpy(float)
            shown = finished[finished >= floor]
            if len(shown) > 1:
                axis.boxplot(
                    [shown], positions=[place], widths=0.72 * width, whis=(0, 100), patch_artist=True,
                    manage_ticks=False, showfliers=False, zorder=2, boxprops=look | {"linewidth": 0.8},
                    medianprops={"color": "black", "linewidth": 1}, whiskerprops={"linewidth": 0.8},
                    capprops={"linewidth": 0.8},
                )  # fmt: skip
            colour = look["edgecolor"]
            axis.plot([place] * len(shown), shown, "o", ms=2.6, mfc=colour, mec="white", mew=0.4, zorder=3, gid=gid)
            diverged, below = int(group["diverged"].sum()), len(finished) - len(shown)
            for marker, number in (("x", diverged), ("v", below)):
                if number:
                    at_edge(axis, place, marker, colour, f"{gid};{'diverged' if marker == 'x' else 'below'}={number}")
            paper = theirs[(theirs[x] == level) & (theirs[hue].isin([one]) | (one is None))] if len(theirs) else theirs
            _paper_point(axis, paper, place, floor, gid)
            counts["n"].append(len(group) or "")
            counts["NaN"].append(diverged if len(group) else "")
            counts["below"].append(below if len(group) else "")
            for name, column in (("paper n", "n"), ("paper NaN", "n_nan")):
                known = len(paper) and not math.isnan(paper[column].iloc[0])
                counts[name].append(int(paper[column].iloc[0]) if known else "")
    if not any(counts["below"]):
        del counts["below"]
    counts = {k: v for k, v in counts.items() if any(n != "" for n in v)}
    spread = [*alive["value"], *(theirs["mean"] - theirs["sd"].fillna(0)), *(theirs["mean"] + theirs["sd"].fillna(0))]
    inside = [v for v in spread if floor <= v <= 1]
    low, high = min(inside, default=0.0), max(inside, default=1.0)
    margin = max(high - low, 0.005)
    axis.set_ylim(low - 0.14 * margin, high + 0.06 * margin)
    axis.set_xlim(-0.6, len(levels) - 0.4)
    size = 7 if len(levels) > 8 else 8
    axis.set_xticks(range(len(levels)), [tell_choice(v) for v in levels], fontsize=size)
    axis.set_ylabel("test accuracy")
    axis.grid(visible=False, axis="x")
    counts_below(axis, at, counts)


def _hue_look(value: Any, hue: str, hues: Sequence[Any]) -> dict[str, Any]:
    if hue == "batch_norm":
        return _box_look(value)
    i = list(hues).index(value)
    return {"facecolor": COLOURS[i], "edgecolor": COLOURS[i], "alpha": 0.55, "hatch": ("", "////", "....", "xx")[i % 4]}


def _paper_point(axis: Axes, paper: pd.DataFrame, place: float, floor: float, gid: str) -> None:
    if paper.empty:
        return
    mean, sd = float(paper["mean"].iloc[0]), float(paper["sd"].iloc[0])
    if mean < floor:
        at_edge(axis, place, "v", PAPER["color"], f"{gid};paper-below", 0.1)
        axis.lines[-1].set_markerfacecolor("white")
        return
    drawn = axis.errorbar([place], [mean], None if math.isnan(sd) else [sd], ls="", elinewidth=1, capsize=2, **PAPER)
    drawn.lines[0].set_gid(f"{gid};paper")


def loss_by_epoch(axis: Axes, rows: pd.DataFrame, published: pd.DataFrame) -> str:
    """Draw the training loss of each choice, mean and spread over runs, and the published means as hollow marks.

    Args:
        axis: The axis to draw on.
        rows: Results of training runs under one rule.
        published: Published rows with ``choice``, ``epoch`` and ``mean``; may be empty.

    Returns:
        How many runs there are, and how many diverged.
    """
    import numpy as np
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

    loss = rows[rows["metric"] == "train_loss"]
    looks, lost = _choice_looks(rows), []
    epochs = int(loss["epoch"].max()) + 1
    for choice, look in looks.items():
        runs = loss[loss["choice"] == choice].pivot(index="epoch", columns="cell", values="value").to_numpy(float)
        alive = np.isfinite(runs)
        n = alive.sum(1)
        values = np.where(alive, runs, 0.0)
        mean = np.divide(values.sum(1), n, out=np.full(len(n), np.nan), where=n > 0)
        square = np.where(alive, (runs - mean[:, None]) ** 2, 0.0).sum(1)
        sd = np.sqrt(np.divide(square, n - 1, out=np.zeros(len(n)), where=n > 1))
        at = np.arange(len(n)) + 1
        axis.plot(at, mean, lw=1.2, marker="." if epochs <= 20 else "", ms=3, gid=where(choice=choice), **look)
        axis.fill_between(at, np.maximum(mean - sd, mean / 20), mean + sd, color=look["color"], alpha=0.15, lw=0)
        dead = runs.shape[1] - int(n[-1])
        if dead:
            lost.append(f"{dead} of {runs.shape[1]} at {tell_choice(choice)}")
        if dead and n[0] and n[-1] == 0:
            end = int(np.flatnonzero(n)[-1])
            axis.plot(at[end], mean[end], "x", color=look["color"], ms=6, mew=1.5, gid=where(choice=choice, ends=1))
        paper = published[(published["choice"] == choice) & (published["mean"] > 0)]
        style = {"marker": "D", "ms": 3, "mfc": "white", "mec": look["color"], "color": look["color"], "lw": 0.5}
        if len(paper):
            axis.plot(
                paper["epoch"] + 1, paper["mean"], ls=":", zorder=1.5, gid=where(choice=choice, paper=1),
                **{**style, "alpha": 0.7},
            )  # fmt: skip
    axis.set_yscale("log")
    axis.set(xlabel="epoch", ylabel="training loss")
    last = max(epochs, int(published["epoch"].max()) + 1 if len(published) else 0)
    if last > 2 * epochs:  # the paper trained for longer
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set_xlim(0.5, last + 0.5)
    axis.yaxis.set_minor_formatter(NullFormatter())
    per_choice = loss.groupby("choice")["cell"].nunique()
    note = f"n = {' to '.join(map(str, dict.fromkeys((per_choice.min(), per_choice.max()))))} per choice"
    return "\n".join([note, *textwrap.wrap(f"NaN: {', '.join(lost)}", 76)] if lost else [note])


def accuracy_by_dropout(rows: pd.DataFrame) -> Figure:
    """Test accuracy by the probability of dropout, the values of ReLU'(0) side by side.

    Args:
        rows: Results of ``mnist_mlp_dropout``.

    Returns:
        The figure.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = with_choice(rows).assign(parameter="relu")
    rows["choice"] = rows["relu"]
    rules = [r for r in _RULES if r in set(rows["rule"])]
    theirs = table("training").rename(columns={"value": "dropout"})
    theirs = theirs[(theirs["parameter"] == "dropout_p") & (theirs["metric"] == "test_accuracy")].assign(choice=0)
    if set(rows["data"]) != {"MNIST"}:
        theirs = theirs[:0]
    figure, axes = canvas(1, len(rules), 4.2, 2.6)
    for axis, rule in zip(axes[0], rules, strict=True):
        runs = runs_at_end(_under(rows, rule, "relu"), "test_accuracy")
        accuracy_by_choice(axis, runs, "dropout", "choice", theirs)
        axis.set(xlabel="probability of dropout")
        axis.set_title(_RULES[rule], fontsize=8)
    _share_y(axes[0], "test")
    alphas = sorted_choices(rows["choice"])
    handles: list[Any] = [
        Patch(**_hue_look(a, "choice", alphas), label=rf"ours, $\alpha$ = {tell_choice(a)}") for a in alphas
    ]
    if drawn(figure, "paper"):
        handles.append(Line2D([], [], ls="", label=r"paper, $\alpha$ = 0", **PAPER))
    axes[0][-1].set_ylabel("test accuracy" if len(rules) == 1 else "")
    figure.legend(handles=handles, ncols=4, **_legend_of(rows))
    caption(figure, rows, *_notes(("test",), drawn(figure, "paper")))
    return figure


def rule_effect(rows: pd.DataFrame) -> Figure:
    """Draw the effect of a choice under the exact and under the published rule: accuracy, and runs that diverge.

    Args:
        rows: Results of training experiments in which both rules were run.

    Returns:
        The figure: above the change of the test accuracy against choice 0 with the same seed, below the share of runs
        that diverged. Settings in which every run of a seed ends with the same accuracy are left out, and the caption
        counts them.

    Raises:
        ValueError: If no experiment has both rules and a choice 0.
    """
    import pandas as pd

    rows = with_choice(rows)
    if "dropout" in rows:  # an experiment that varies it is another figure's
        varies = rows.groupby("experiment")["dropout"].transform(lambda p: p.astype(float).max())
        rows = rows[~(varies > 0)]
    keys = [*_BLOCK, "batch_norm", "experiment"]
    same = [
        (key, block) for key, block in blocks(rows, keys) if block["rule"].nunique() == 2 and 0 in set(block["choice"])
    ]
    if not same:
        raise ValueError("rule-effect needs runs of both rules, exact and published, and of choice 0; there are none")
    settings = len(same)
    same = [(key, block) for key, block in same if _moves(block)] or same
    bands = -(-len(same) // 4)
    columns = -(-len(same) // bands)
    figure, axes = canvas(2 * bands, columns, 2.5, 1.85, height_ratios=[2, 1] * bands)
    for axis in axes.flat[:]:
        axis.set_visible(False)
    for i, (key, block) in enumerate(same):
        band, column = divmod(i, columns)
        top, bottom = axes[2 * band][column], axes[2 * band + 1][column]
        norm = key[-2]
        levels = sorted_choices(set(block["choice"]))
        at = {c: k for k, c in enumerate(levels)}
        drawn_nan = False
        for j, rule in enumerate(_RULES):
            runs = runs_at_end(_under(block, rule, key[0]), "test_accuracy")
            base = runs[(runs["choice"] == 0) & ~runs["diverged"]].set_index("seed")["value"]
            colour, shift = COLOURS[j], 0.19 * (2 * j - 1)
            finished = runs[~runs["diverged"] & runs["seed"].isin(base.index)]
            change = finished.assign(value=100 * (finished["value"] - finished["seed"].map(base)))
            top.plot(
                [at[c] + shift for c in change["choice"]], change["value"], "os"[j], ms=3, color=colour, mfc="none",
                gid=where(rule=rule), label=f"run, {_RULES[rule]}",
            )  # fmt: skip
            mean = change.groupby("choice")["value"].mean()
            middle = [at[c] + shift for c in mean.index]
            top.hlines(mean, [m - 0.15 for m in middle], [m + 0.15 for m in middle], color=colour, lw=2)
            share = runs.groupby("choice")["diverged"].agg(["sum", "size"])
            bars = bottom.bar(
                [at[c] + shift for c in share.index], 100 * share["sum"] / share["size"], 0.36, color=colour,
                hatch=("", "////")[j], edgecolor="white", linewidth=0,
            )  # fmt: skip
            for bar, (choice, line) in zip(bars, share.iterrows(), strict=True):
                bar.set_gid(where(rule=rule, choice=choice))
                if line["sum"]:
                    drawn_nan = True
                    among = f"{line['sum']:.0f} of {line['size']:.0f}"
                    inner = bar.get_x() + (0.36, 0.0)[j]  # away from the bar beside it
                    height = bar.get_height() + 3
                    bottom.text(inner, height, among, ha=("right", "left")[j], fontsize=5, color=colour)
            numbers = " to ".join(f"{n:.0f}" for n in sorted({share["size"].min(), share["size"].max()}))
            bottom.text(
                0.02 + 0.5 * j, 0.97, f"n = {numbers} ({rule})", transform=bottom.transAxes, va="top", fontsize=5,
                color=colour,
            )  # fmt: skip
        top.axhline(0, color="black", lw=0.6, zorder=1)
        title = [f"{key[4]} bit"]
        title += [] if key[3] == "sgd" else [_optimizer(key[3])]
        title += [] if norm is None or norm != norm else ["BN" if norm else "no BN"]
        top.set_title(f"{tell(key[2])}/{tell(key[1])}\n{', '.join(title)}", fontsize=8)
        if not drawn_nan:
            bottom.text(0.5, 0.4, "no run diverged", transform=bottom.transAxes, ha="center", fontsize=6, color="0.35")
        for axis in (top, bottom):
            axis.set_visible(True)
            axis.set_xlim(-0.6, len(levels) - 0.4)
            axis.set_xticks(range(len(levels)), [tell_choice(c) for c in levels], fontsize=7)
            axis.grid(visible=False, axis="x")
        _percentage_points(top)
        top.tick_params(labelbottom=False)
        bottom.set(ylim=(0, 150), yticks=[0, 50, 100], xlabel=AXIS[key[0]])
        if column == 0:
            top.set_ylabel("accuracy change\n(percentage points)", fontsize=8)
            bottom.set_ylabel("NaN (%)", fontsize=8)
    drawn = pd.concat([block for _, block in same])
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=2, fontsize=7)
    caption(
        figure,
        drawn,
        "Above: test accuracy at the last epoch minus that of choice 0 with the same seed; bars: means over the runs "
        "that stayed finite; linear between -0.1 and 0.1, logarithmic beyond. Below: runs whose loss is not finite at "
        "the last epoch, of all runs.",
        f"Left out: {settings - len(same)} settings whose accuracy is the same for all choices under both rules."
        if settings > len(same)
        else "",
        _borrowed_note(drawn),
    )
    return figure


def _moves(block: pd.DataFrame) -> bool:
    """Return whether the runs of a seed end with different accuracies."""
    return bool((runs_at_end(block, "test_accuracy").groupby("seed")["value"].nunique() > 1).any())


def _percentage_points(axis: Axes) -> None:
    """Linear between -0.1 and 0.1, logarithmic beyond, with room for the marks."""
    low, high = axis.dataLim.intervaly
    axis.set_yscale("symlog", linthresh=0.1, linscale=0.6)
    axis.set_ylim(min(-0.2, 1.7 * low), max(0.2, 1.7 * high))
    ticks = [t for t in (-100, -10, -1, -0.1, 0, 0.1, 1, 10, 100) if axis.get_ylim()[0] <= t <= axis.get_ylim()[1]]
    axis.set_yticks(ticks, [f"{t:+g}".replace("-", "\N{MINUS SIGN}") if t else "0" for t in ticks])
    axis.minorticks_off()
