"""The common style of the figures: names, colours, counts, captions."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nslightning.experiments.figures.results import blocks
from nslightning.figures import COLOURS, DASHES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AXIS",
    "PAPER",
    "at_edge",
    "canvas",
    "caption",
    "counts_below",
    "drawn",
    "head",
    "plain_log",
    "precision_look",
    "shades",
    "tell",
    "tell_choice",
    "where",
]

#: Of each choice: the name of its axis.
AXIS = {"relu": r"$\alpha$ = ReLU$'(0)$", "max_pool": r"$\beta$ of MaxPool"}
#: How published numbers look, everywhere: hollow and grey, behind ours.
PAPER: dict[str, Any] = {"color": "0.45", "mfc": "white", "mec": "0.45", "marker": "D", "ms": 4.5, "zorder": 1.5}

_BACKBONES = {"fc": "MLP", "lenet5": "LeNet-5", "resnet": "ResNet", "densenet": "DenseNet", "vgg": "VGG"}
_DATA = {
    "CIFAR10": "CIFAR-10",
    "CIFAR100": "CIFAR-100",
    "FashionMNISTSample": "Fashion-MNIST sample",
    "Synthetic": "synthetic images",
}


def tell(name: str) -> str:
    """A backbone or data set as one writes it.

    Args:
        name: As in a setting.

    Returns:
        The name.

    Example:
        >>> tell("paper/resnet18"), tell("CIFAR10")
        ('ResNet18', 'CIFAR-10')
    """
    short = name.removeprefix("paper/")
    for start, written in _BACKBONES.items():
        if short.startswith(start):
            return written + short.removeprefix(start)
    return _DATA.get(short, short)


def tell_choice(value: Any) -> str:
    """A value of a choice, powers of ten as such."""
    if isinstance(value, str):
        return value
    power = math.log10(value) if value > 0 else 0.0
    return f"$10^{{{power:.0f}}}$" if power >= 3 and power.is_integer() else f"{value:g}".replace("-", "\N{MINUS SIGN}")


def where(**keys: Any) -> str:
    """The id of a drawn thing: what it stands for. It is kept in an SVG file, and read by the tests.

    Example:
        >>> where(rule="exact", choice=10)
        'rule=exact;choice=10'
    """
    return ";".join(f"{k}={v}" for k, v in keys.items())


def canvas(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure with a grid of axes.

    Args:
        rows: Number of rows of axes.
        columns: Number of columns of axes.
        width: Width of one axis, in inches.
        height: Height of one axis, in inches.
        **options: For ``Figure.subplots``.

    Returns:
        The figure, and its axes as an array.
    """
    from matplotlib.figure import Figure

    size = (max(4.5, width * columns), height * rows + 0.8)  # legend and caption want their place too
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def caption(figure: Figure, rows: pd.DataFrame, *notes: str) -> None:
    """Say below a figure which cells, data and devices its numbers come from.

    Args:
        figure: The figure.
        rows: The rows of the results that it draws.
        *notes: Sentences that follow.
    """
    lines = []
    if len(rows):
        made = ", ".join(
            f"{name} ({scale} scale, {part['cell'].nunique()} cell{'s' * (part['cell'].nunique() > 1)})"
            for (name, scale), part in blocks(rows, ["experiment", "scale"])
        )
        images = "; ".join(dict.fromkeys(rows["images"].dropna()))
        devices = "; ".join(dict.fromkeys(rows["device"].dropna()))
        lines.append(f"Ours: {made}; data: {images}; computed on {devices}.")
    width = int(figure.get_figwidth() * 22)
    text = "\n".join(textwrap.wrap(" ".join([*lines, *(n.strip() for n in notes if n)]), width))
    figure.supxlabel(text, fontsize=6, color="0.3", x=0.01, ha="left", ma="left", linespacing=1.3)


def head(axis: Axes, title: str, note: str = "") -> None:
    """Write a title above an axis, and the number of runs between the two, where no curve or bar is drawn.

    Args:
        axis: The axis.
        title: Title of the axis.
        note: Smaller lines.
    """
    if note:
        axis.annotate(
            note, (0.5, 1.0), xytext=(0, 3), xycoords="axes fraction", textcoords="offset points", ha="center",
            va="bottom", fontsize=6, color="0.25", linespacing=1.3,
        )  # fmt: skip
    axis.set_title(title, fontsize=8, pad=5 + 8 * len(note.splitlines()))


def plain_log(axis: Any) -> None:
    """Label a logarithmic axis also where it spans less than two decades: with plain numbers, at 1, 2 and 5 or closer.

    Args:
        axis: An ``XAxis`` or ``YAxis`` whose limits are final.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    low, high = axis.get_view_interval()
    if high / low < 1.01:  # all the same: closer, the labels would be so too
        axis.set_view_interval(low := low / 1.01, high := high * 1.01, ignore=True)
    if high / low < 100:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 8 else MaxNLocator(4, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())


def drawn(figure: Figure, mark_begins: str) -> bool:
    """Return whether a figure has a mark of that kind.

    Args:
        figure: The figure.
        mark_begins: Beginning of a part of the mark's id, such as ``paper`` or ``diverged``.

    Returns:
        Whether it has one.
    """
    marks = [mark for axis in figure.axes for mark in (*axis.lines, *axis.patches)]
    return any(part.startswith(mark_begins) for mark in marks for part in str(mark.get_gid()).split(";"))


def counts_below(axis: Axes, at: Sequence[float], counts: Mapping[str, Sequence[Any]]) -> None:
    """Write a small table below an axis, one column per box or bar; the tick labels move below it.

    Args:
        axis: The axis.
        at: Positions of the columns, in the axis's coordinates.
        counts: One line per name; empty texts leave a gap.
    """
    for i, (name, numbers) in enumerate(counts.items()):
        y = -4.0 - 7.5 * i
        place: dict[str, Any] = {"xycoords": axis.get_xaxis_transform(), "textcoords": "offset points", "va": "top"}
        axis.annotate(
            name,
            (0, 0),
            xytext=(-3, y),
            fontsize=5.5,
            ha="right",
            color="0.35",
            **place | {"xycoords": "axes fraction"},
        )
        for x, number in zip(at, numbers, strict=True):
            lost = name.endswith(("NaN", "below")) and number not in ("", 0)
            look: dict[str, Any] = {"color": COLOURS[1], "weight": "bold"} if lost else {"color": "0.35"}
            text = axis.annotate(str(number), (x, 0), xytext=(0, y), fontsize=5.5, ha="center", **place, **look)
            text.set_gid(where(count=name, at=round(float(x), 3)))
    axis.tick_params(axis="x", length=0, pad=5 + 7.5 * len(counts))


def at_edge(axis: Axes, x: float, marker: str, colour: Any, gid: str, height: float = 0.03) -> None:
    """Mark what has no place on the axis at its lower edge.

    Args:
        axis: The axis.
        x: Position, in the axis's coordinates.
        marker: ``x`` for runs that diverged, ``v`` for values below the axis.
        colour: Colour of the mark.
        gid: The values that it stands for, as :func:`where` writes them.
        height: Position above the lower edge, as a share of the axis.
    """
    (mark,) = axis.plot([x], [height], marker, color=colour, ms=4.5, mew=1.2, transform=axis.get_xaxis_transform())
    mark.set(clip_on=False, zorder=4, gid=gid)


def shades(choices: Sequence[Any]) -> dict[Any, dict[str, Any]]:
    """A line's look per choice: dark to light in order, so that it holds in grey; the reference 0 is black.

    Args:
        choices: The choices, in order.

    Returns:
        The look by choice.
    """
    from matplotlib import colormaps

    others = [c for c in choices if c != 0]
    shade = {c: colormaps["plasma"](0.12 + 0.72 * i / max(1, len(others) - 1)) for i, c in enumerate(others)}
    return {
        c: {"color": shade.get(c, "black"), "ls": DASHES[i % len(DASHES)] if c != 0 else "-"}
        for i, c in enumerate(choices)
    }


def precision_look(bits: int) -> dict[str, Any]:
    """A bar's look per precision."""
    return {
        16: {"facecolor": COLOURS[0], "hatch": ""},
        24: {"facecolor": COLOURS[3], "hatch": "xx"},
        32: {"facecolor": COLOURS[4], "hatch": "//"},
        64: {"facecolor": COLOURS[2], "hatch": ".."},
    }[bits] | {"edgecolor": "white", "linewidth": 0}
