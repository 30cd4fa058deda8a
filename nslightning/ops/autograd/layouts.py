"""The layouts of tensors in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nslightning._torch import is_view

__all__ = [
    "autocasts",
    "duplicate",
    "empty_as_stock",
    "filled_as_stock",
    "image_layout",
    "is_dense",
    "laid_out_as",
    "overlaps",
    "storage_order",
    "stored",
]


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


def empty_as_stock(x: Tensor) -> Tensor:
    """Memory for a result, laid out as a stock operation of one operand lays it out.

    Where a dimension has one entry, several strides describe the same memory, and the next kernel may choose its way,
    and its rounding, by them.

    Args:
        x: The operand, dense in memory.

    Returns:
        A tensor of the same shape and dtype.

    Example:
        >>> x = torch.empty(2, 6, 1, 1).to(memory_format=torch.channels_last)
        >>> empty_as_stock(x).stride() == torch.relu(x).stride()
        True
    """
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return torch.empty_like(x)


def filled_as_stock(g: Tensor, y: Tensor, fill: Callable[[Tensor, Tensor], object]) -> Tensor:
    """The gradient of ReLU in the memory that the stock backward would allocate for it.

    Args:
        g: The incoming gradient, any layout.
        y: The operation's result, of the same shape, dense in memory.
        fill: Takes ``g`` and memory for the gradient, both in the memory order of ``y``, and fills the second.

    Returns:
        The gradient.
    """
    if g.stride() == y.stride():
        gradient = empty_as_stock(y)
        fill(g, gradient)
        return gradient
    ordered = torch.empty_like(y)
    fill(laid_out_as(g, y), ordered)
    shapes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (g, y)]
    strides = torch.ops.aten.threshold_backward.default(*shapes, 0).stride()
    if strides == ordered.stride():
        return ordered
    return torch.empty_strided(y.shape, strides, dtype=y.dtype, device=y.device).copy_(ordered)


def autocasts(x: Tensor) -> bool:
    """Return whether autocast is in force on a tensor's device.

    Args:
        x: Any tensor.

    Returns:
        False too for devices that have no autocast, such as meta.
    """
    device = x.device.type
    # The compiler of torch 2.11 does not follow the question; of these devices the answer is known.
    available = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def duplicate(x: Tensor) -> Tensor:
    """A copy that lies in memory as the original does, gaps between the entries included.

    A kernel takes another way through memory with gaps, and its exponentials round otherwise there.

    Args:
        x: Any tensor, dense or a view with gaps.

    Returns:
        A tensor with the same strides, of which gradients go to ``x``.

    Example:
        >>> duplicate(torch.zeros(3, 4)[:, :2]).stride()
        (4, 1)
    """
    copy = x.clone()
    if copy.stride() == x.stride():
        return copy
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """The same values in the memory order of another tensor.

    Args:
        x: Any layout.
        other: A tensor of the same shape, dense in memory.

    Returns:
        ``x``, or a copy where it lies otherwise.
    """
    if x.stride() == other.stride():
        return x
    return torch.empty_like(other, dtype=x.dtype).copy_(x)


def is_dense(x: Tensor) -> bool:
    """Return whether a tensor is one block of numbers with strides.

    Args:
        x: Any tensor.

    Returns:
        False for sparse, nested and MKL-DNN tensors.
    """
    return x.layout == torch.strided and not x.is_nested


def overlaps(x: Tensor) -> bool:
    """Return whether entries of a strided view may share memory, as those of windows do.

    Args:
        x: A dense tensor.

    Returns:
        True where the strides do not rule it out; False while a compiler reads, which writes in its own order.

    Example:
        >>> overlaps(torch.zeros(5).unfold(0, 3, 2)), overlaps(torch.zeros(5, 5)[::2].mT)
        (True, False)
    """
    if torch.compiler.is_compiling() or not is_view(x):
        return False
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return x.numel() > 0
            reach += stride * (size - 1)
    return False


def stored(x: Tensor) -> Tensor:
    """The entries that a tensor stores, whatever its layout.

    Args:
        x: Any tensor.

    Returns:
        ``x`` itself where it is dense; of a sparse or nested tensor its values, of an MKL-DNN tensor a copy.
    """
    if is_dense(x):
        return x
    if x.is_mkldnn:
        return x.to_dense()
    if x.is_nested:
        return torch.cat([part.reshape(-1) for part in x.unbind()])
    return x.detach().coalesce().values() if x.layout == torch.sparse_coo else x.detach().values()
