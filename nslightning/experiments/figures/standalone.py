"""Figures that need no experiment: ties in an image, the smallest programs, published ImageNet curves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from nslightning.experiments.figures.results import blocks, sorted_choices
from nslightning.experiments.figures.style import canvas, caption, shades, tell_choice, where
from nslightning.experiments.published import table
from nslightning.figures import COLOURS, DASHES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = ["imagenet_curves", "pool_ties", "small_programs", "tied_entries"]


def tied_entries(image: Tensor) -> Tensor:
    """Return which pixels tie for the maximum of their 2x2 pooling window.

    Args:
        image: ``(H, W)``, both even.

    Returns:
        bool ``(H, W)``: reaches the window's maximum, and so does another pixel of the window.

    Example:
        >>> import torch
        >>> tied_entries(torch.tensor([[1, 1, 0, 3], [0, 0, 2, 1]]))
        tensor([[ True,  True, False, False],
                [False, False, False, False]])
    """
    height, width = image.shape
    windows = image.reshape(height // 2, 2, width // 2, 2)
    greatest = windows == windows.amax((1, 3), keepdim=True)
    return (greatest & (greatest.sum((1, 3), keepdim=True) > 1)).reshape(height, width)


def pool_ties(rows: pd.DataFrame) -> Figure:
    """The ties of 2x2 max pooling in the first training image (paper B's introduction).

    Args:
        rows: Not needed. MNIST's image is drawn where NSLIGHTNING_DATA_DIR holds MNIST; else that of the embedded
            Fashion-MNIST sample.

    Returns:
        The figure: the image with a dot on every tied pixel.
    """
    import torch

    from nslightning.data.verify import DataError
    from nslightning.experiments.data import load

    cpu = torch.device("cpu")
    try:
        loaded = load("MNIST", (("holdout", 0),), cpu, False, False)
        images, _ = next(loaded.train.batches(1, torch.float32))
    except DataError:
        loaded = load("FashionMNISTSample", (), cpu, False, False)
        images, _ = next(loaded.train.batches(1, torch.float32))
    image = images[0, 0]
    tied = tied_entries(image)
    figure, axes = canvas(1, 2, 3.0, 2.65)
    for axis, dots, title in zip(axes[0], (tied, tied & (image > 0)), ("all ties", "ties above 0"), strict=True):
        axis.imshow(image.numpy(), cmap="gray", interpolation="nearest")
        y, x = dots.numpy().nonzero()
        axis.plot(x, y, "o", ms=2.2, color=COLOURS[1], mew=0, gid=where(ties=title))
        windows = int(dots.reshape(14, 2, 14, 2).any(3).any(1).sum())
        axis.set_title(f"{title}: {windows} of 196 windows, {len(x)} pixels", fontsize=8)
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
    caption(
        figure, rows[:0], f"The first training image of {loaded.variant}. A dot: the pixel reaches the maximum of its "
        "2x2 window, and so does another of the window; MaxPool's derivative there is a choice.",
    )  # fmt: skip
    return figure


def small_programs(rows: pd.DataFrame) -> Figure:
    """The smallest programs whose derivative is not that of the function they compute.

    Args:
        rows: Not needed.

    Returns:
        The figure: left the derivative at 0 of a program for the function 0, by ReLU'(0); right that of the difference
        of two programs for the maximum, at a tie that matters (bifurcation) and at one that does not (compensation).
    """
    import torch

    from nslightning.experiments.examples import max_of_library, max_of_scan, program_difference, zero_of_relus

    figure, axes = canvas(1, 3, 3.0, 2.5)
    left, middle, right = axes[0]
    alphas = torch.linspace(-1, 2, 13).tolist()
    slopes = []
    for alpha in alphas:
        t = torch.zeros((), requires_grad=True)
        slopes.append(float(torch.autograd.grad(zero_of_relus(t, alpha), t)[0]))
    left.plot(alphas, slopes, "o-", ms=3, color=COLOURS[0], gid=where(program="zero"))
    left.axhline(0, color="black", lw=0.8, ls=":")
    left.set(xlabel=r"$\alpha$ = ReLU$'(0)$", ylabel="derivative returned at 0")
    left.set_title(r"relu$(-t) + t -$ relu$(t) = 0$", fontsize=8)
    points = (-6.0, -1e-4, 0.0, 0.1, 1.0)
    looks = zip((torch.float16, torch.float32, torch.float64), "sov", COLOURS, DASHES, strict=False)
    for dtype, marker, colour, dash in looks:
        name = str(dtype).removeprefix("torch.")
        for axis, v in ((middle, (1, 2, 3, 4)), (right, (1.14,) * 4)):
            differences = [program_difference(max_of_scan, max_of_library, v, t, dtype) for t in points]
            size = [abs(f) for f in differences]
            if axis is right:
                sign = "\N{MINUS SIGN}" if differences[-1] < 0 else "+"
                label = f"{sign}$2^{{{math.log2(size[-1]):.0f}}}$"
                axis.annotate(label, (4, size[-1]), xytext=(0, 5), textcoords="offset points", fontsize=7, ha="center")
            axis.plot(
                range(len(points)), size if axis is right else differences, marker, ls=dash, lw=0.7, ms=4, mfc="none",
                color=colour, label=name, gid=where(v=v[0], dtype=name),
            )  # fmt: skip
    for axis, title in (
        (middle, "maximum of $t$·(1, 2, 3, 4), two programs:\na tie at 0 (bifurcation)"),
        (right, "maximum of $t$·(1.14, 1.14, 1.14, 1.14):\nties everywhere, rounding (compensation)"),
    ):
        axis.set_xticks(range(len(points)), [f"{t:g}".replace("-", "\N{MINUS SIGN}") for t in points])
        axis.set(xlabel="$t$", ylabel="derivative of difference" if axis is middle else "its absolute value")
        axis.set_title(title, fontsize=8)
    right.set_yscale("log")
    right.set_ylim(1e-18, 1)
    middle.legend(fontsize=7)
    caption(
        figure, rows[:0], "Computed when the figure is drawn (PyTorch, CPU). Every program is 0 at every t over the "
        "reals, and so is its derivative. Scan: strict comparisons from the left; library: torch.max.",
    )  # fmt: skip
    return figure


def imagenet_curves(rows: pd.DataFrame) -> Figure:
    """Published ImageNet curves of ResNet-50 in mixed precision, by MaxPool's beta. Not run here.

    Args:
        rows: Not needed.

    Returns:
        The figure.
    """
    from matplotlib.lines import Line2D

    theirs = table("imagenet")
    theirs = theirs[theirs["epoch"].str.isdecimal()].astype({"epoch": int})  # not the rows "best" and "last"
    looks = shades(sorted_choices(theirs["value"]))
    figure, axes = canvas(1, 1, 5.2, 3.0)
    axis = axes[0][0]
    for (beta, run), group in blocks(theirs, ["value", "run"]):
        group = group.sort_values("epoch")
        look = looks[beta]
        axis.plot(
            group["epoch"] + 1, group["accuracy"], lw=1, marker=("o", "s")[int(run)], ms=3.5, mfc="white",
            mec=look["color"], gid=where(beta=f"{beta:g}", run=run), **look,
        )  # fmt: skip
    axis.set(xlabel="epoch", ylabel="top-1 accuracy (%)", ylim=(-2, 80))
    handles = [Line2D([], [], label=rf"$\beta$ = {tell_choice(b)}", **look) for b, look in looks.items()]
    axis.legend(handles=handles, fontsize=7, loc="center right")
    axis.set_title("PUBLISHED numbers alone: ResNet-50, ImageNet, mixed precision", fontsize=8)
    caption(
        figure, rows[:0], "Paper B's released logs, one hollow mark per recorded epoch; circles and squares: runs 1 "
        "and 2 of each choice (n = 2). The second run at 1000 inherited NaN running statistics from the first, which "
        "had diverged. This project has not run ImageNet.",
    )  # fmt: skip
    return figure
