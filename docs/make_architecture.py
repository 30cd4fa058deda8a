"""Draws docs/figures/architecture.svg: the layers, and the way of a gradient through them."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

FILE = Path(__file__).parent / "figures" / "architecture.svg"

# From the top down: what a module may import stands below it.
LAYERS = [
    [("cli, commands", "what a person types")],
    [
        ("experiments", "grids, tables, figures"),
        ("report, dashboard", "runs as pages"),
        ("integrations", "other loops"),
    ],
    [("callbacks", "patch and measure while training"), ("runs", "folders and records")],
    [("models", "LightningModules, backbones"), ("data", "LightningDataModules"), ("optim", "INNA, INNAprop")],
    [("probes", "ties, gradients, divergence, zones: without Lightning")],
    [("surgery", "find, plan, patch, report, unpatch")],
    [("ops", "the operations, one family a file; kernels beside them")],
    [("jacobians", "the choices")],
]


def main() -> None:
    """Draw the figure."""
    plt.rcParams |= {"svg.hashsalt": "nslightning", "svg.fonttype": "none", "font.size": 9}
    figure, axis = plt.subplots(figsize=(8, 5.2))
    height = len(LAYERS)
    for row, boxes in enumerate(LAYERS):
        width = 10 / len(boxes)
        for column, (name, contents) in enumerate(boxes):
            _box(
                axis, column * width + 0.08, height - row - 0.9, width - 0.16, name, contents, shade=row / (height - 1)
            )
    axis.annotate("", (10.5, 0.1), (10.5, height), arrowprops={"arrowstyle": "->", "color": "#555"})
    axis.text(10.62, height / 2, "imports", rotation=90, va="center", color="#555")
    axis.set(xlim=(0, 11), ylim=(0, height + 0.05))
    axis.axis("off")
    figure.savefig(FILE, bbox_inches="tight", metadata={"Date": None}, facecolor="white")
    print(FILE)


def _box(axis: Axes, x: float, y: float, width: float, name: str, contents: str, shade: float) -> None:
    colour = plt.get_cmap("Blues")(0.12 + 0.25 * shade)
    axis.add_patch(FancyBboxPatch((x, y), width, 0.72, "round,pad=0.02,rounding_size=0.08", fc=colour, ec="#346"))
    axis.text(x + width / 2, y + 0.47, name, ha="center", va="center", weight="bold", color="#123")
    axis.text(x + width / 2, y + 0.2, contents, ha="center", va="center", fontsize=7.5, color="#123")


if __name__ == "__main__":
    main()
