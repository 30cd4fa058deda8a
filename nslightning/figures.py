"""Figures, one function each. Each writes the file named and a PNG beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["divergence_by_step"]

# Okabe and Ito's colours, told apart by the colour-blind; line styles tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
STYLE: dict[Any, Any] = {
    "figure.dpi": 150, "savefig.dpi": 200, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.5, "legend.frameon": False, "pdf.fonttype": 42,
    "savefig.bbox": "tight", "lines.linewidth": 1.4,
}  # fmt: skip


def divergence_by_step(rows: pd.DataFrame, path: str | Path) -> Path:
    """Draw the relative divergence of each choice against the training step.

    Exact zeros (no tie met, or none that matters) and non-finite values have no place on a logarithmic axis: they are
    marked by ticks above the lower edge and crosses at the upper one.

    Args:
        rows: One row per step and choice, with columns ``step``, ``choice`` and ``relative``.
        path: The figure's file; a PNG of the same name is written beside it.

    Returns:
        The path.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    path = Path(path)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.5, 3.2))
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
                f"{n} of {len(y)} {what}" for n, what in ((zero.sum(), "exactly 0"), (bad.sum(), "not finite")) if n
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
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        figure.savefig(path.with_suffix(".png"))
        plt.close(figure)
    return path
