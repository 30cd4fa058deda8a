"""Figures of what gradients cost, for papers: no colour carries what a marker does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nslightning.figures import COLOURS, STYLE
from nslightning.files import replacing
from nslightning.probes.cost_data import STOCK, CostReport, CostScaling

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_cost", "plot_scaling"]

_COLOURS = ("#000000", *COLOURS[:-1])  # black for the stock model
_MARKERS = "osD^vPX"
_STYLE: dict[Any, Any] = STYLE | {"legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8}


def plot_cost(reports: CostReport | Mapping[str, CostReport], path: str | Path, *, most: int = 12) -> Path:
    """Draw the overhead ratio of each choice next to the theoretical bound.

    A marker is the ratio of the fastest runs, a bar the quartiles of the ratio round by round. A single
    report gets a second panel: its modules, each called alone, with their share of the stock model's time.

    Args:
        reports: One report, or several by the name that the figure gives them.
        path: The file, in a format that matplotlib knows by its ending; its folder is created.
        most: Number of modules in the second panel, those that take most time.

    Returns:
        The path written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    named = {reports.model: reports} if isinstance(reports, CostReport) else dict(reports)
    first = next(iter(named.values()))
    choices = list(dict.fromkeys(c.name for r in named.values() for c in r.choices))
    modules = isinstance(reports, CostReport) and bool(first.modules)
    rows = max(len(named) * (len(choices) + 1), min(most, len(first.modules)) if modules else 0)
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.4 if modules else 5.6, 1.3 + 0.17 * rows), layout="constrained")
        axes = figure.subplots(1, 1 + modules, squeeze=False)[0]
        _draw_choices(axes[0], named, choices)
        if modules:
            _draw_modules(axes[1], first, choices, most)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=6, columnspacing=1.2, handletextpad=0.4)
        figure.supxlabel(_caption(list(named.values())), fontsize=6.5, color="#404040")
        return _write(figure, path)


def _draw_choices(ax: Axes, reports: Mapping[str, CostReport], choices: Sequence[str]) -> None:
    step = len(choices) + 1
    labelled: set[str] = set()
    for i, report in enumerate(reports.values()):
        for c in report.choices:
            k = choices.index(c.name)
            y = i * step + k
            label = c.name if c.name not in labelled else None
            labelled.add(c.name)
            ax.plot(c.spread[::2], (y, y), color=_COLOURS[k % 7], lw=2.4, solid_capstyle="butt", alpha=0.45)
            ax.plot(report.ratio(c.name), y, _MARKERS[k % 7], color=_COLOURS[k % 7], ms=4.5, label=label)
        if i:
            ax.axhline(i * step - 1, color="#C0C0C0", lw=0.6)
    bounds = sorted({r.bound for r in reports.values()})
    for bound in bounds:
        ax.axvline(bound, color="#404040", lw=1, ls=(0, (5, 3)), label=f"bound {bound:g}")
    middle = (len(choices) - 1) / 2
    ax.set_yticks(
        [i * step + middle for i in range(len(reports))],
        [f"{name}\n{_count(r.parameters)} parameters, batch {r.batch}" for name, r in reports.items()],
    )
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.set_ylim(len(reports) * step - 1, -1)
    ax.set_xlim(0, 1.1 * max(*bounds, *(c.spread[2] for r in reports.values() for c in r.choices)))
    ax.set_xlabel("time (forward + backward) / forward")


def _draw_modules(ax: Axes, report: CostReport, choices: Sequence[str], most: int) -> None:
    cost = {m.name: m.calls * m.gradient.minimum for m in report.modules if m.choice == STOCK}
    names = sorted(cost, key=lambda name: -cost[name])[:most]
    total = report[STOCK].gradient.minimum
    kinds = {m.name: m.kind for m in report.modules if m.choice == STOCK}
    drawn = [m for m in report.modules if m.name in names]
    for m in drawn:
        k = choices.index(m.choice)
        ax.plot(m.ratio, names.index(m.name), _MARKERS[k % 7], color=_COLOURS[k % 7], ms=4.5)
    ax.axvline(report.bound, color="#404040", lw=1, ls=(0, (5, 3)))
    ax.set_xscale("log")
    ax.set_xticks([1, 2, 3, 5, 10, 20, 50], ["1", "2", "3", "5", "10", "20", "50"])
    ax.minorticks_off()
    ratios = [m.ratio for m in drawn]
    ax.set_xlim(min(1.0, *ratios) * 0.85, max(report.bound, *ratios) * 1.25)
    ax.set_yticks(range(len(names)), [f"{n} ({kinds[n]}) {cost[n] / total:.0%}" for n in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_axisbelow(True)
    ax.set_xlabel("the same for one module alone (%: share of stock time)")


def _count(n: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)


def plot_scaling(
    scalings: CostScaling | Mapping[str, CostScaling],
    path: str | Path,
    *,
    choice: str = STOCK,
    published: tuple[float, float] | None = None,
) -> Path:
    """Draw how the gradient's cost grows with the number of parameters, backward and forward mode.

    Args:
        scalings: One scaling, or several by the name that the legend gives them.
        path: The file, in a format that matplotlib knows by its ending; its folder is created.
        choice: The choice drawn.
        published: The range of published ratios, drawn as a band behind ours.

    Returns:
        The path written.
    """
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    named = {"": scalings} if isinstance(scalings, CostScaling) else dict(scalings)
    reports = [r for s in named.values() for r in s.reports]
    forward = all(r.jvp is not None for r in reports)
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2 if forward else 4.2, 3.1), layout="constrained")
        axes = figure.subplots(1, 2 if forward else 1, squeeze=False)[0]
        ax = axes[0]
        note: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "fontsize": 7.5, "color": "#404040"}
        if published is not None:
            ax.axhspan(*published, color="#ECECEC", lw=0)
            ax.text(0.98, published[1], "published range", ha="right", va="top", **note)
        for bound in {r.bound for r in reports}:
            ax.axhline(bound, color="#404040", lw=1, ls=(0, (5, 3)))
            ax.text(0.02, bound, f"bound {bound:g}", va="bottom", **note)
        shades = [colormaps["cividis"](0.78 * i / max(1, len(named) - 1)) for i in range(len(named))]
        for (name, scaling), colour, marker in zip(named.items(), shades, cycle(_MARKERS), strict=False):
            p = [r.parameters for r in scaling.reports]
            ratios = [r.ratio(choice) for r in scaling.reports]
            style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 4.5, "lw": 1}
            for x, r in zip(p, scaling.reports, strict=True):
                ax.plot((x, x), r[choice].spread[::2], color=colour, lw=2.2, alpha=0.45)
            slopes = scaling.slopes()
            ax.plot(p, ratios, **style, label=f"{name}: {slopes[choice]:+.2f}".lstrip(": "))
            if forward:
                label = f"{name}: {slopes['forward mode']:+.2f}".lstrip(": ")
                axes[1].plot(p, [r.forward_mode_ratio for r in scaling.reports], **style, label=label)
        top = max(
            *(value for r in reports for value in (r.bound, r.ratio(choice), r[choice].spread[2])),
            *(published or ()),
        )
        ax.set_ylim(0, 1.1 * top)
        ax.set_ylabel("time (forward + backward) / forward")
        ax.set_title(f"backward mode, {choice} (theory: slope 0)")
        if forward:
            axes[1].set_yscale("log")
            axes[1].set_ylabel("p · time of one JVP / forward")
            axes[1].set_title("forward mode, estimated (theory: slope 1)")
        for panel in axes:
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(numticks=9))
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_xlabel("number of parameters p")
            panel.legend(
                title="slope in log-log scale",
                loc="lower center" if panel is ax else "upper left",
                ncols=2 if panel is ax and len(named) > 2 else 1,
                columnspacing=1.2,
                title_fontsize=8,
            )
        figure.supxlabel(_caption(reports), fontsize=7, color="#404040")
        return _write(figure, path)


def _caption(reports: Sequence[CostReport]) -> str:
    """Name the source of the figure's numbers, without which they mean nothing."""

    def one(values: Sequence[Any]) -> str:
        return " / ".join(str(v) for v in dict.fromkeys(values))

    env = [r.environment for r in reports]
    return (
        f"{one([e['machine'] for e in env])}, {one([e['cores'] for e in env])} cores, "
        f"threads: {one([e['threads'] for e in env])}, {one([e['clock'] for e in env])}; "
        f"{one([r.dtype for r in reports])}, batch {one([r.batch for r in reports])}; "
        f"marker: ratio of minima, bar: quartiles of n = {one([r.forward.n for r in reports])} rounds"
    )


def _write(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    with replacing(path) as partial:
        figure.savefig(partial)
    return path
