"""The arguments of PyTorch's losses, in every spelling that PyTorch accepts."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F

from nslightning._torch import legacy_reduction

__all__ = ["arguments", "defaults", "reduction"]


def arguments(function: str) -> dict[str, Any]:
    """The arguments of a function of ``torch.nn.functional``; functions of ``torch`` lack the legacy ones.

    Args:
        function: Its name.

    Returns:
        The defaults by name, in order. The input is called ``x``, as everywhere in the package.
    """
    parameters = inspect.signature(getattr(F, function)).parameters
    return {("x" if name == "input" else name): parameter.default for name, parameter in parameters.items()}


def defaults(function: str) -> dict[str, Any]:
    """The arguments of a function that have a default.

    Args:
        function: The name of a function of ``torch.nn.functional``.

    Returns:
        The defaults by name.
    """
    return {name: value for name, value in arguments(function).items() if value is not inspect.Parameter.empty}


def reduction(by_name: dict[str, Any]) -> str:
    """Return how a loss is reduced, from the arguments that its functions have had over the years.

    Args:
        by_name: The arguments by name; those about the reduction are removed.

    Returns:
        ``"mean"``, ``"sum"`` or ``"none"``.
    """
    size_average, reduce, how = (by_name.pop(name, None) for name in ("size_average", "reduce", "reduction"))
    if size_average is not None or reduce is not None:
        return legacy_reduction(size_average, reduce)
    return ("none", "mean", "sum")[how] if isinstance(how, int) else how or "mean"
