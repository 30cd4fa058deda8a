"""The backward nodes of PyTorch's that choose where the derivative is not unique.

The table follows the derivative formulas that PyTorch is built from. A test reads the formulas of the installed
version. It fails if a formula that compares, selects or takes a norm is neither in this table nor on the test's list of
exceptions, which gives a reason for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

__all__ = ["KINKS", "LEFT", "kink"]


def _always(node: Any) -> bool:
    return True


def _saved(name: str, *values: Any) -> Callable[[Any], bool]:
    """Return whether a node saved one of the values under a name; true where it saved nothing under that name."""
    return lambda node: getattr(node, f"_saved_{name}", values[0]) in values


def _wanted(position: int) -> Callable[[Any], bool]:
    """Return whether a gradient goes to an input."""
    return lambda node: node.next_functions[position][0] is not None


def _bilinear(node: Any) -> bool:
    """Return whether a gradient goes to the grid, where the samples have kinks: of cubics they are smooth."""
    return _wanted(1)(node) and _saved("interpolation_mode", 0)(node)


# By the operation in ATen, in CamelCase, which the node's name contains. The function says if a node has a kink.
KINKS: dict[str, Callable[[Any], bool]] = {
    # pointwise
    "Abs": _always, "Clamp": _always, "ClampMin": _always, "ClampMax": _always, "Relu": _always, "Prelu": _always,
    "PreluKernel": _always, "LeakyRelu": _always, "RreluWithNoise": _always, "RreluWithNoiseFunctional": _always,
    "Threshold": _always,
    "Hardtanh": _always, "Hardsigmoid": _always, "Hardswish": _always, "Hardshrink": _always, "Softshrink": _always,
    "Elu": lambda node: abs(getattr(node, "_saved_alpha", 0) * getattr(node, "_saved_input_scale", 1) - 1) > 1e-12,
    "Logit": lambda node: getattr(node, "_saved_eps", 0.0) is not None, "Hypot": _always, "SpecialI0E": _always,
    "Copysign": _wanted(0),  # it is |x| with another sign
    # maxima and order
    "Max": _always, "Min": _always, "Amax": _always, "Amin": _always, "Aminmax": _always, "Maximum": _always,
    "Minimum": _always, "Fmax": _always, "Fmin": _always, "Median": _always, "Nanmedian": _always, "Mode": _always,
    "Kthvalue": _always, "Topk": _always, "Sort": _always, "Cummax": _always, "Cummin": _always,
    # poolings
    "MaxPool2D": _always, "MaxPool2DWithIndices": _always, "MaxPool3DWithIndices": _always,
    "AdaptiveMaxPool2D": _always, "AdaptiveMaxPool3D": _always, "FractionalMaxPool2D": _always,
    "FractionalMaxPool3D": _always, "MkldnnMaxPool2D": _always, "MkldnnMaxPool3D": _always,
    # maxima over what an index puts together
    "ScatterReduce": _saved("reduce", "amax", "amin"), "IndexReduce": _saved("reduce", "amax", "amin"),
    "SegmentReduce": _saved("reduce", "max", "min"), "SparseMmReduceImpl": _saved("reduce", "amax", "amin"),
    "EmbeddingBag": _saved("mode", 2),
    # norms, distances, singular values and eigenvalues
    "Norm": _always, "LinalgVectorNorm": _always, "Dist": _always, "Cdist": _always, "EuclideanDist": _always,
    "Pdist": _always, "Renorm": _always, "Std": _always, "StdMean": _always,
    "LinalgSvd": _always, "LinalgEigh": _always, "LinalgEig": _always,
    # losses of one kernel
    "MultiMarginLoss": _saved("p", 1), "MultilabelMarginLoss": _always, "SmoothL1Loss": _saved("beta", 0.0),
    # bilinear samples have a kink at each pixel, in the grid
    "GridSampler2D": _bilinear, "GridSampler3D": _bilinear, "GridSampler2DCpuFallback": _bilinear,
    "CudnnGridSampler": _bilinear,
    # recurrent kernels that apply a relu inside
    "CudnnRnn": _saved("mode", 0), "MiopenRnn": _saved("mode", 0),
}  # fmt: skip

_BASIS = (
    "where singular values or eigenvalues are equal, or 0, its derivative is that of the basis which the decomposition "
    "happens to return"
)
#: Kinks without a choice, and the reason. The report names them; they raise no error.
LEFT: dict[str, str] = {
    **dict.fromkeys(
        ("Std", "StdMean"),
        "where all entries are equal, 0 is the only derivative that treats them alike, and PyTorch takes it",
    ),
    **dict.fromkeys(("LinalgSvd", "LinalgEigh", "LinalgEig"), _BASIS),
}

_NODE = re.compile(r"(?:Foreach)?(\w+?)(?:Forward)?Backward\d*(?:Scalar|ScalarList|List|Tensor)?")


def kink(node: Any) -> str | None:
    """The operation of a backward node of PyTorch's, if its derivative is not unique somewhere.

    Args:
        node: A ``grad_fn``.

    Returns:
        The operation in ATen, as ``"LinalgVectorNorm"``; None for a smooth one, and for nodes that are not PyTorch's.
    """
    name = node.name()
    if (match := _NODE.fullmatch(name)) is None:
        return None
    operation = match[1]
    has_kink = KINKS.get(operation)
    return operation if has_kink is not None and has_kink(node) else None
