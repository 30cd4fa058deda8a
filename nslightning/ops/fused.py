"""ReLU and 2-d max pooling on CUDA devices through fused kernels; all else, and all that they do not fit, is composed.

A kernel runs where it computes the same bits as the composition it stands for. What differentiates the backward again,
draws at random or is transformed goes the composed way, from the same saved tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nslightning.ops.selection import Selection
from nslightning.ops.tie_bits import storage_order

if TYPE_CHECKING:
    from nslightning.ops.windows import Regular

__all__ = ["fits", "max_pool2d", "pool_fits", "relu"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_POSITIONS = 16  # of a window, at most: the bits of an int16


def fits(x: Tensor) -> bool:
    """Whether a fused kernel takes this input.

    Args:
        x: An operation's input.

    Returns:
        True in eager mode for a dense float16, bfloat16 or float32 tensor on a CUDA device, where Triton is installed.
    """
    return (
        not torch.compiler.is_compiling()
        and _has_kernels(x.device)
        and x.dtype in _DTYPES
        and x.permute(storage_order(x)).is_contiguous()
    )


@cache
def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and find_spec("triton") is not None


def pool_fits(x: Tensor, geometry: Regular) -> bool:
    """Whether the pooling kernels take this call.

    Args:
        x: The input.
        geometry: Its windows.

    Returns:
        True where :func:`fits` is, for four dimensions, contiguous or channels_last, and windows of up to 16 entries.
    """
    layouts = (torch.contiguous_format, torch.channels_last)
    return (
        x.dim() == 4
        and geometry.dims == 2
        and geometry.kernel[0] * geometry.kernel[1] <= _POSITIONS
        and fits(x)
        and any(x.is_contiguous(memory_format=layout) for layout in layouts)
    )


class _ReLU(torch.autograd.Function):
    """Keeps the output, as stock, and one bit per entry."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, selection: Selection, inplace: bool) -> Tensor:
        from nslightning.ops.triton_kernels import relu_forward

        y, bits = relu_forward(x, inplace=inplace)
        if inplace:
            ctx.mark_dirty(x)
        ctx.selection = selection
        ctx.save_for_backward(y, bits)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, bits = ctx.saved_tensors
        vjp = partial(_relu_vjp, y, bits, g)
        if ctx.selection.recorder is not None:
            ctx.selection.recorder(ctx, vjp)
        return vjp(ctx.selection), None, None


def _relu_vjp(y: Tensor, bits: Tensor, g: Tensor, selection: Selection) -> Tensor:
    from nslightning.ops.pointwise import chosen_value
    from nslightning.ops.triton_kernels import relu_backward

    (derivative,) = selection.at_kinks("relu")
    constant = selection.jacobians.rule == "published"
    if derivative is None or (derivative == 0 and not constant):
        return cast(Tensor, torch.ops.aten.threshold_backward.default(g, y, 0))
    transformed = torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None
    if isinstance(derivative, str) or transformed:
        tied = _unpacked(bits, y)
        value = chosen_value(derivative, constant, selection, g, tied)
        return torch.where(tied, value, torch.ops.aten.threshold_backward.default(g, y, 0))
    return relu_backward(g, y, bits, derivative, constant=constant)


def _unpacked(bits: Tensor, y: Tensor) -> Tensor:
    """The ties as a mask of the output's shape and layout."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = bits.unsqueeze(1).bitwise_right_shift(shifts).bitwise_and_(1).view(-1)[: y.numel()].bool()
    return flat.as_strided(y.shape, y.stride())


def relu(x: Tensor, selection: Selection, inplace: bool = False) -> Tensor:
    """ReLU whose derivative at 0 is the one that the selection names at backward time.

    Args:
        x: Input that :func:`fits`.
        selection: The choice, read when the backward runs.
        inplace: Overwrite ``x``.

    Returns:
        The stock result, bit for bit.
    """
    return cast(Tensor, _ReLU.apply(x, selection, inplace))


class _MaxPool2d(torch.autograd.Function):
    """Keeps the input, as stock, and two bytes per window, where stock keeps an eight-byte index."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: Regular, selection: Selection, composed: Any) -> Tensor:
        from nslightning.ops.triton_kernels import pool_forward

        y, reached = pool_forward(x, _numbers(geometry), _size(x, geometry))
        ctx.geometry, ctx.selection, ctx.composed = geometry, selection, composed
        ctx.save_for_backward(x, reached)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, reached = ctx.saved_tensors
        vjp = partial(_pool_vjp, x, reached, g, ctx.geometry, ctx.composed)
        if ctx.selection.recorder is not None:
            ctx.selection.recorder(ctx, vjp)
        return vjp(ctx.selection), None, None, None


def _pool_vjp(
    x: Tensor,
    reached: Tensor,
    g: Tensor,
    geometry: Regular,
    composed: Callable[[Tensor, Tensor, Selection], Tensor],
    selection: Selection,
) -> Tensor:
    from nslightning.ops.triton_kernels import pool_backward

    transformed = torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None
    if transformed or selection.jacobians.max_pool == "random":
        return composed(x, g, selection)
    return pool_backward(g, reached, _numbers(geometry), (x.shape[2], x.shape[3]), selection.pool_weights())


def _numbers(geometry: Regular) -> tuple[tuple[int, int], ...]:
    found = (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
    return cast(tuple[tuple[int, int], ...], found)


def _size(x: Tensor, geometry: Regular) -> tuple[int, int]:
    """The output's height and width, as stock finds them."""
    shape = geometry.forward(x.new_empty((1, 1, *x.shape[2:]), device="meta"))[0].shape
    return shape[2], shape[3]


def max_pool2d(
    x: Tensor, geometry: Regular, selection: Selection, composed: Callable[[Tensor, Tensor, Selection], Tensor]
) -> Tensor:
    """2-d max pooling that shares the gradient of tied windows as the selection says at backward time.

    Args:
        x: Input for which :func:`pool_fits`.
        geometry: Its windows.
        selection: The choice, read when the backward runs.
        composed: The same backward composed of PyTorch's operations, ``(x, g, selection) -> gradient``.

    Returns:
        The stock result, bit for bit.
    """
    return cast(Tensor, _MaxPool2d.apply(x, geometry, selection, composed))
