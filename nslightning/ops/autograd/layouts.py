"""How tensors lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["image_layout", "laid_out_as", "storage_order"]


def storage_order(x: Tensor) -> tuple[int, ...]:
    """The dimensions from the slowest to the fastest in memory.

    Args:
        x: Any shape and layout.

    Returns:
        A permutation that makes ``x`` contiguous, if one does; else the identity.

    Example:
        >>> storage_order(torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last))
        (0, 2, 3, 1)
    """
    order = tuple(sorted(range(x.dim()), key=x.stride, reverse=True))
    return order if x.permute(order).is_contiguous() else tuple(range(x.dim()))


def image_layout(x: Tensor) -> torch.memory_format:
    """The memory format of a batch of images.

    Args:
        x: Shape (N, C, H, W), contiguous or channels_last.

    Returns:
        Which of the two; where it is both, contiguous.
    """
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """The same values in the memory order of another tensor.

    Args:
        x: Any layout.
        other: Of the same shape, dense in memory.

    Returns:
        ``x``, or a copy where it lies otherwise.
    """
    if x.stride() == other.stride():
        return x
    return torch.empty_like(other, dtype=x.dtype).copy_(x)
