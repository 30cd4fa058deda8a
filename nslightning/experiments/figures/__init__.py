"""Figures of experiments: one function each, in one table that the command, the gallery and the tests read.

A function takes the rows of :func:`read` and returns a matplotlib figure; :func:`draw` writes it as PDF and PNG.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nslightning.experiments.figures import standalone, twins, volume
from nslightning.experiments.figures import training as train
from nslightning.experiments.figures.results import read
from nslightning.figures import STYLE
from nslightning.files import replacing
from nslightning.spelling import did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "Drawing", "draw", "feeding", "find", "make", "read"]


class Drawing(NamedTuple):
    """A figure that can be drawn.

    Args:
        title: Its subject in a line, for ``nslightning figure --list``.
        paper: The published figure that it stands beside.
        make: Draws it from the rows of :func:`read`.
        kind: Fed by every experiment of this kind that varies ``varies``, not only by those whose file names it.
        varies: A setting of experiments.
        needs_results: Whether it is drawn from results at all.
    """

    title: str
    paper: str
    make: Callable[[pd.DataFrame], Figure]
    kind: str | None = None
    varies: str = ""
    needs_results: bool = True


def _training(title: str, paper: str, *show: str, **options: Any) -> Drawing:
    return Drawing(title, paper, partial(train.training, show=show or ("test", "train"), **options))


_STYLE = STYLE | {"hatch.linewidth": 0.5}
_TEST, _TRAIN = "Test accuracy at the last epoch", "Training loss by epoch"
_BOTH = f"{_TEST} and training loss by epoch"

#: Every figure by its name, the one that `figures:` of an experiment's file gives.
FIGURES: dict[str, Drawing] = {
    "fig3": _training(
        f"VGG11 on CIFAR-10: {_BOTH.lower()}, for ReLU'(0) and for MaxPool's beta, exact and published rule",
        "Figure 3, by inference: the numbering of neither paper could be read",
        plain=True,
    ),
    "rule-effect": Drawing(
        "The effect of a choice under the exact and under the published rule",
        "none: this project's own",
        train.rule_effect,
        kind="train",
        varies="rule",
    ),
    "mnist-lenet-test": _training(f"LeNet-5 on MNIST, beta: {_TEST.lower()}", "B: mnistLeNetTest16/32", "test"),
    "mnist-lenet-train": _training(f"LeNet-5 on MNIST, beta: {_TRAIN.lower()}", "B: mnistLeNetTrain16/32", "train"),
    "mnist-lenet-beta-adam": _training(f"LeNet-5 on MNIST, beta, Adam: {_BOTH.lower()}", "B: mnistLeNet*32 (Adam)"),
    "mnist-mlp-test": _training(f"MLP on MNIST, alpha: {_TEST.lower()}", "A: MNISTTest", "test"),
    "mnist-mlp-train": _training(f"MLP on MNIST, alpha: {_TRAIN.lower()}", "A: MNISTTrainNoBatch", "train"),
    "mnist-dropout": Drawing(
        f"MLP on MNIST, dropout and alpha: {_TEST.lower()}", "A: MNISTDropout", train.accuracy_by_dropout
    ),
    "cifar-vgg-alpha-test": _training(f"VGG11 on CIFAR-10, alpha: {_TEST.lower()}", "A: cifarVGGTest", "test"),
    "cifar-vgg-alpha-train": _training(
        f"VGG11 on CIFAR-10, alpha: {_TRAIN.lower()}", "A: cifarVGGTrain, cifarVGGTrainBatchNorm", "train"
    ),
    "cifar-vgg-alpha-adam": _training(
        f"VGG11 on CIFAR-10, alpha, Adam: {_BOTH.lower()}", "A: CifarVGGAdamTest, CifarVGGAdamTrainNoBatch"
    ),
    "cifar-vgg-beta-test": _training(f"VGG11 on CIFAR-10, beta: {_TEST.lower()}", "B: cifarVGGTest16/32", "test"),
    "cifar-vgg-beta-train": _training(f"VGG11 on CIFAR-10, beta: {_TRAIN.lower()}", "B: cifarVGGTrain16/32", "train"),
    "cifar-vgg-beta-adam": _training(f"VGG11 on CIFAR-10, beta, Adam: {_BOTH.lower()}", "B: cifarVGG*32 (Adam)"),
    "cifar-resnet-alpha": _training(
        f"ResNet18 on CIFAR-10, alpha: {_BOTH.lower()}", "A: cifarResTest, cifarResTrain, cifarResTrainBatch"
    ),
    "cifar-resnet-beta": _training(
        f"ResNet18 on CIFAR-10, beta: {_BOTH.lower()}", "B: cifarResnetTest16/32, cifarResnetTrain16/32"
    ),
    "cifar-densenet-beta": _training(f"DenseNet121 on CIFAR-10, beta: {_BOTH.lower()}", "B: a table"),
    "svhn-vgg-alpha": _training(
        f"VGG11 on SVHN, alpha, Adam: {_BOTH.lower()}", "A: SVHNVGGTest, SVHNVGGTrain, SVHNVGGTrainBatchNorm"
    ),
    "svhn-vgg-beta": _training(f"VGG11 on SVHN, beta: {_BOTH.lower()}", "B: svhnVGGTest16/32, svhnVGGTrain16/32"),
    "volume-mnist": Drawing(
        "Share of parameter vectors with a ReLU'(0)-dependent gradient, MNIST: images met, neurons, layers, batch size",
        "A: volumeMNIST",
        volume.volume_mnist,
    ),
    "cifar-volume": Drawing(
        "The same by images met, VGG11 and ResNet18 on CIFAR-10",
        "A: cifarVGGVolNoBatch, cifarVGGVolBatch, cifarResVolNoBatch, cifarResVolBatch",
        volume.volume_curves,
    ),
    "svhn-volume": Drawing("The same by images met, VGG11 on SVHN", "A: SVHNVGGVolNoBatch", volume.volume_curves),
    "impact-factors": Drawing(
        "Share of mini-batches on which beta = 0 and 1 give other gradients: VGG depth, batch size, batch norm",
        "B: impactfactors",
        volume.impact_factors,
    ),
    "threshold-histograms": Drawing(
        "Norm of the gradient difference by decade",
        "B: deterministic_threshold_16/32/64",
        partial(
            volume.norms_by_decade, published={bits: f"deterministic_threshold_{bits} bits" for bits in (16, 32, 64)}
        ),
    ),
    "normpool": Drawing(
        "Norm of the gradient difference by decade, NormPool",
        "B: normpool_16",
        partial(volume.norms_by_decade, published={16: "normpool_16 bits"}),
    ),
    "weight-difference": Drawing(
        "Networks trained in lock-step under several beta: distance of the weights, accuracy",
        "B: diff_16/32/64bits, accuracy_32bits",
        twins.weight_difference,
    ),
    "intro-weight-difference": Drawing(
        "Two networks that differ in ReLU'(0) alone: distance of the weights, step by step",
        "A: diffRelu32bits, diffRelu64bits",
        twins.weight_difference,
    ),
    "intro-min-activation": Drawing(
        "How close ReLU inputs come to the kink, step by step",
        "A: minActivation32, minActivation64",
        twins.closest_inputs,
    ),
    "zeros": Drawing(
        "Exact zeros at ReLU inputs while training, by architecture",
        "A: proportionZeroCall",
        twins.zeros_by_architecture,
    ),
    "pool-ties": Drawing(
        "Ties of 2x2 max pooling in the first training image",
        "B: introduction",
        standalone.pool_ties,
        needs_results=False,
    ),
    "intro-examples": Drawing(
        "The smallest programs whose derivative is not that of the function they compute",
        "B: introduction notebook",
        standalone.small_programs,
        needs_results=False,
    ),
    "imagenet": Drawing(
        "Published ImageNet curves of ResNet-50 by beta", "B: imagenetResNetTrain24", standalone.imagenet_curves,
        needs_results=False,
    ),
}  # fmt: skip


def find(name: str) -> Drawing:
    """A figure by its name.

    Args:
        name: A key of :data:`FIGURES`.

    Returns:
        The figure.

    Raises:
        ValueError: If no figure has that name.
    """
    if name in FIGURES:
        return FIGURES[name]
    raise ValueError(
        f"there is no figure {name!r}{did_you_mean(name, FIGURES)} "
        f"`nslightning figure --list` tells all: {', '.join(FIGURES)}"
    )


@lru_cache
def _packaged() -> dict[str, dict[str, Any]]:
    """The content of the packaged experiments' files, by name."""
    import yaml

    from nslightning import configs

    folder = Path(configs.__file__).parent / "experiments"
    return {file.stem: yaml.safe_load(file.read_text()) for file in sorted(folder.glob("*.yaml"))}


def feeding(name: str) -> list[str]:
    """The packaged experiments that a figure is drawn from.

    Args:
        name: A key of :data:`FIGURES`.

    Returns:
        Their names.

    Example:
        >>> feeding("fig3")
        ['cifar10_vgg_alpha', 'cifar10_vgg_beta']
    """
    drawing = find(name)

    def feeds(content: dict[str, Any]) -> bool:
        grids = content.get("grids") or [content.get("vary") or {}]
        of_kind = content["kind"] == drawing.kind and any(drawing.varies in grid for grid in grids)
        return of_kind or name in (content.get("figures") or ())

    return [experiment for experiment, content in _packaged().items() if feeds(content)]


def make(name: str, rows: pd.DataFrame) -> Figure:
    """Make a figure in the common style, without writing it.

    Args:
        name: A key of :data:`FIGURES`.
        rows: Results from :func:`read`.

    Returns:
        The figure.

    Raises:
        ValueError: If no figure has that name, or the rows are of another kind than it draws.
    """
    import matplotlib as mpl

    drawing = find(name)
    if drawing.needs_results and rows.empty:
        raise ValueError(f"{name} is drawn from results: give --from with those of {' or '.join(feeding(name))}")
    fitting = feeding(name)
    wrong = [e for e in dict.fromkeys(rows["experiment"]) if e in _packaged() and e not in fitting]  # own files may fit
    if wrong:
        raise ValueError(f"{name} is not drawn from {wrong[0]}, but from {', '.join(fitting) or 'no results'}")
    with mpl.rc_context(_STYLE):
        figure = drawing.make(rows)
        _mark_smoke(figure, rows)
    return figure


def _mark_smoke(figure: Figure, rows: pd.DataFrame) -> None:
    """Write across a figure that it was drawn from a check, and from which data: it is no result."""
    smoke = rows[rows["scale"] == "smoke"]
    if len(smoke):
        data = ", ".join(dict.fromkeys(smoke["data"].dropna().astype(str)))
        text = figure.text(0.5, 0.5, f"SMOKE\n{data}", size=34, color="#b3261e", alpha=0.28, rotation=18,
                           ha="center", va="center", weight="bold", zorder=10, gid="smoke")  # fmt: skip
        text.set_in_layout(False)


def draw(name: str, results: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Draw a figure as PDF and PNG.

    Args:
        name: A key of :data:`FIGURES`.
        results: Folders of results, or their ``results.csv``.
        out: The folder to write to.

    Returns:
        The files.

    Raises:
        ValueError: If there is no such figure, or the results are not what it is drawn from; nothing is written then.
    """
    import matplotlib as mpl

    find(name)
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it frets over the date of matplotlib's own font
    figure = make(name, read(results))
    files = [Path(out) / f"{name}.{ending}" for ending in ("pdf", "png")]
    with mpl.rc_context(_STYLE):
        for file in files:
            dated = {"CreationDate": None} if file.suffix == ".pdf" else {}  # the same results give the same bytes
            with replacing(file) as partial_file:
                figure.savefig(partial_file, metadata=dated)
    return files
