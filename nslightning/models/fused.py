"""PyTorch's fused optimizer kernels, where nothing else is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

__all__ = ["FUSED", "fused", "takes_fused"]

#: The optimizers of PyTorch that have a fused kernel for CUDA.
FUSED: tuple[type[Optimizer], ...] = (torch.optim.SGD, Adam, AdamW)


def takes_fused(parameters: Iterable[Tensor]) -> bool:
    """Return whether a fused kernel takes all of some parameters.

    Args:
        parameters: The parameters.

    Returns:
        True for dense floating-point tensors on CUDA devices.
    """
    return all(p.is_cuda and p.is_floating_point() and p.layout == torch.strided for p in parameters)


def fused(optimizer: Optimizer) -> Optimizer:
    """Give an optimizer its fused kernel: one launch for all parameters, and no wait for a loss scaler.

    Args:
        optimizer: An optimizer that has taken no step.

    Returns:
        A new one, of the same class with the same groups; the given one where it is of another class than
        :data:`FUSED`, where ``fused``, ``foreach`` or ``differentiable`` was chosen, or its parameters are not on CUDA.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    if type(optimizer) not in FUSED or optimizer.state:
        return optimizer
    if any(g["fused"] is not None or g["foreach"] is not None or g["differentiable"] for g in groups):
        return optimizer
    if not takes_fused(p for group in groups for p in group["params"]):
        return optimizer
    takes = inspect.signature(type(optimizer).__init__).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in takes}
    kept = [{name: value for name, value in group.items() if name != "fused"} for group in groups]
    made: Optimizer = type(optimizer)(kept, **options | {"fused": True})
    return made
