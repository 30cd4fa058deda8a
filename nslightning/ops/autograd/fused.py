"""ReLU and 2-d max pooling through fused kernels; calls that these do not take are composed of PyTorch's operations.

The kernels are C++ on a CPU (:mod:`~nslightning.ops.kernels.cpu`) and Triton on a CUDA device
(:mod:`~nslightning.ops.kernels.triton`). A backward that is differentiated again, draws at
random or is transformed is composed, too, from the same saved tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from nslightning.ops.autograd import native
from nslightning.ops.autograd.layouts import image_layout, storage_order
from nslightning.ops.autograd.nodes import NonsmoothFunction, check_changes, refuse_changes
from nslightning.ops.autograd.selection import (
    Selection,
    concrete,
    pool_coefficients,
    pool_difference_coefficients,
    replayed,
)
from nslightning.ops.autograd.tie_bits import chosen_value
from nslightning.ops.autograd.windows import AT_ONCE, Regular

__all__ = [
    "dtypes_on",
    "fits",
    "kernels_for",
    "max_pool2d",
    "pool_difference",
    "pool_fits",
    "pool_forward",
    "pool_gradient",
    "pool_gradient_of",
    "relu",
]

_PART = 2**19  # entries, that stay in the cache


def fits(x: Tensor) -> bool:
    """Return whether a fused kernel takes this input.

    Args:
        x: An operation's input.

    Returns:
        True in eager mode for a tensor that is dense in memory, on a CPU (where the kernels were compiled) or a CUDA
        device (float16, bfloat16, float32; where Triton is installed).
    """
    if not concrete(x):
        return False
    kernels = kernels_for(x.device.type)
    return kernels is not None and x.dtype in kernels.DTYPES and x.permute(storage_order(x)).is_contiguous()


@cache
def kernels_for(device: str) -> Any:
    """The module that has the kernels for a type of device, if one does.

    Args:
        device: Such as ``"cpu"``.

    Returns:
        :mod:`~nslightning.ops.kernels.cpu` or :mod:`~nslightning.ops.kernels.triton`; None where they cannot be used.
    """
    if device == "cpu":
        from nslightning.ops.kernels import cpu as cpu_kernels

        return cpu_kernels if cpu_kernels.available() else None
    if device == "cuda" and torch.version.hip is None and find_spec("triton") is not None:
        from nslightning.ops.kernels import triton as triton_kernels

        return triton_kernels
    return None


def dtypes_on(device: str) -> tuple[torch.dtype, ...]:
    """The dtypes that the kernels for a type of device take.

    Args:
        device: Such as ``"cpu"``.

    Returns:
        The dtypes; empty for a device without kernels.
    """
    kernels = kernels_for(device)
    return () if kernels is None else kernels.DTYPES


def pool_fits(x: Tensor, geometry: Regular) -> bool:
    """Return whether the pooling kernels take this call.

    Args:
        x: The input.
        geometry: Its windows.

    Returns:
        True where :func:`fits` is, for four dimensions, contiguous or channels_last, and small windows.
    """
    layouts = (torch.contiguous_format, torch.channels_last)
    return (
        x.dim() == 4
        and geometry.dims == 2
        and prod(geometry.kernel) <= AT_ONCE  # which the composition sums up in the same order
        and fits(x)
        and any(x.is_contiguous(memory_format=layout) for layout in layouts)
    )


class _ReLU(NonsmoothFunction):
    """Keeps the output, as stock, and one bit per entry."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, selection: Selection, inplace: bool) -> Tensor:
        y, bits = kernels_for(x.device.type).relu_forward(x, inplace=inplace)
        if inplace:
            ctx.mark_dirty(x)
        ctx.operation, ctx.selection = "relu", selection
        ctx.save_for_backward(y, bits)
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, bits = ctx.saved_tensors
        check_changes(ctx)
        vjp = partial(_relu_vjp, y, bits, g)
        if ctx.selection.recorder is not None:
            ctx.selection.recorder(ctx, vjp, ties=partial(_any_bit, bits))
        return vjp(ctx.selection), None, None


def _relu_vjp(y: Tensor, bits: Tensor, g: Tensor, selection: Selection) -> Tensor:
    if replayed(g) and _final(g):
        alpha, rule = selection.read("relu", g), selection.read(".published", g)
        return cast(Tensor, kernels_for(y.device.type).relu_backward(g, y, bits, alpha, constant=rule))
    (derivative,) = selection.at_kinks("relu")
    constant = selection.jacobians.rule == "published"
    if derivative is None or (derivative == 0 and not constant):
        return cast(Tensor, torch.ops.aten.threshold_backward.default(g, y, 0))
    if isinstance(derivative, str) or not _final(g):
        # In the order of the memory, in which random choices are drawn.
        order = storage_order(y) if isinstance(derivative, str) else tuple(range(y.dim()))
        back = sorted(range(len(order)), key=order.__getitem__)
        tied = _unpacked(bits, y).permute(order)
        value = chosen_value(derivative, constant, selection, g.permute(order), tied).permute(back)
        return torch.where(tied.permute(back), value, torch.ops.aten.threshold_backward.default(g, y, 0))
    return cast(Tensor, kernels_for(y.device.type).relu_backward(g, y, bits, derivative, constant=constant))


def _any_bit(bits: Tensor) -> Tensor:
    """Whether there is a tie, a 0-d tensor."""
    return bits.any().bool()


native.composition(
    "relu",
    lambda _, saved, g, selection: _relu_vjp(saved[0], saved[1], g, selection),
    ties=lambda _, saved: _any_bit(saved[1]),
)


def _final(g: Tensor) -> bool:
    """Return whether a backward is a number's, not one that is transformed or differentiated again."""
    return concrete(g) and not torch.is_grad_enabled()


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
        The stock result, bit for bit; by the stock operation itself where it is known that no entry is tied.
    """
    if not kernels_for(x.device.type).any_zero(x):
        return torch.relu_(x) if inplace else torch.relu(x)
    # On a view autograd would put the node inside another one, where it cannot be asked for its ties.
    if inplace and x._is_view():
        y = _ReLU.apply(x, selection, False)
        written = x.copy_(y)
        refuse_changes(y.grad_fn, written)
        return written
    return cast(Tensor, _ReLU.apply(x, selection, inplace))


@cache
def _stock_relu() -> type:
    """The class of the nodes of PyTorch's own ReLU."""
    return type(native.stock_relu().grad_fn)


class _MaxPool2d(NonsmoothFunction):
    """Keeps the input, as stock, and two bytes per window, where stock keeps an eight-byte index.

    Its node is ``tied`` where a choice may matter.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: Regular, selection: Selection, composed: Any) -> Tensor:
        # The gradient of a window of zeros ends in the ReLU right below. Where that is stock's, no choice applies to
        # its entries, and its derivative is 0 wherever its output is 0.
        dies = type(x.grad_fn) is _stock_relu()
        y, reached, ctx.tied = pool_forward(x, geometry, zeros=not dies)
        ctx.operation, ctx.geometry, ctx.selection, ctx.composed = "max_pool", geometry, selection, composed
        ctx.save_for_backward(x, reached)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, reached = ctx.saved_tensors
        windows = ctx.geometry, ctx.composed
        vjp = partial(pool_gradient, x, reached, g, geometry=ctx.geometry, composed=ctx.composed)
        if ctx.tied and ctx.selection.recorder is not None:
            ctx.selection.recorder(ctx, vjp, partial(pool_difference, (x, reached, g), *windows))
        return vjp(ctx.selection), None, None, None


def pool_forward(x: Tensor, geometry: Regular, *, zeros: bool = True) -> tuple[Tensor, Tensor, bool]:
    """2-d max pooling, and which entries of each window reach its maximum.

    Args:
        x: Input for which :func:`pool_fits`.
        geometry: Its windows.
        zeros: Count a tied window as one even where its maximum is 0.

    Returns:
        The stock result; int16 of its shape; whether a choice may matter.
    """
    size = _size(geometry, *x.shape[1:])
    return cast(
        tuple[Tensor, Tensor, bool],
        kernels_for(x.device.type).pool_forward(x, _numbers(geometry), size, zeros=zeros),
    )


def pool_gradient_of(
    g: Tensor,
    reached: Tensor,
    weights: Tensor,
    geometry: Regular,
    size: tuple[int, int],
    layout: torch.memory_format | None = None,
) -> Tensor:
    """The gradient of 2-d max pooling, under a choice that is a selection's memory on the gradient's device.

    Args:
        g: The incoming gradient, of the output's shape.
        reached: The masks that :func:`pool_forward` returned.
        weights: The memory, shape (4,).
        geometry: The windows.
        size: The input's height and width.
        layout: The input's memory format, which masks of one window an image do not tell; by default theirs.

    Returns:
        The gradient with respect to the input.
    """
    if weights.device.type != "cpu":
        return _pool_gradient_by_memory(g, reached, weights, geometry, size, layout)
    numbers = tuple(weights.tolist())
    kernels = kernels_for(g.device.type)
    return cast(Tensor, kernels.pool_backward(g, reached, _numbers(geometry), size, numbers, layout=layout))


def _pool_gradient_by_memory(
    g: Tensor,
    reached: Tensor,
    weights: Tensor,
    geometry: Regular,
    size: tuple[int, int],
    layout: torch.memory_format | None = None,
) -> Tensor:
    """Form the gradient without a look at the weights, for which the host would wait."""
    share, whole, each, last = weights.unbind()
    table = pool_coefficients.__wrapped__(share, whole, each, torch.float32, g.device)  # no tensors in the cache
    kernels = kernels_for(g.device.type)
    return cast(Tensor, kernels.pool_shares(g, reached, _numbers(geometry), size, table, last, layout=layout))


def pool_gradient(
    x: Tensor,
    reached: Tensor,
    g: Tensor,
    selection: Selection,
    geometry: Regular,
    composed: Callable[[Tensor, Tensor, Selection], Tensor],
) -> Tensor:
    """The gradient of 2-d max pooling with respect to its input.

    Args:
        x: The input, shape (N, C, H, W).
        reached: Mask of the entries that reach each window's maximum, int16 of the output's shape.
        g: The incoming gradient, of the output's shape.
        selection: The choice.
        geometry: The windows.
        composed: The same gradient composed of PyTorch's operations, ``(x, g, selection) -> gradient``.

    Returns:
        The gradient, of ``x``'s shape.
    """
    if not _final(g) or (selection.jacobians.max_pool == "random" and not replayed(g)):
        return composed(x, g, selection)
    kernels, size, layout = kernels_for(x.device.type), (x.shape[2], x.shape[3]), image_layout(x)
    if replayed(g):
        return pool_gradient_of(g, reached, selection.read(".pool", g), geometry, size, layout)
    weights = selection.pool_weights()
    return cast(Tensor, kernels.pool_backward(g, reached, _numbers(geometry), size, weights, layout=layout))


def pool_difference(
    inputs: tuple[Tensor, Tensor, Tensor],
    geometry: Regular,
    composed: Callable[[Tensor, Tensor, Selection], Tensor],
    selection: Selection,
    less: Selection,
) -> Tensor:
    """The gradient under one choice less that under another: in one pass, or by subtraction.

    On a CPU some images are subtracted at a time. To map memory for another tensor as large as the input costs more
    than to fill it.

    Args:
        inputs: The first three arguments of :func:`pool_gradient`.
        geometry: As in :func:`pool_gradient`.
        composed: As in :func:`pool_gradient`.
        selection: The first choice.
        less: The choice whose gradient is subtracted.

    Returns:
        The difference, of the input's shape.
    """
    x, reached, g = inputs
    vjp: Callable[..., Tensor] = partial(pool_gradient, geometry=geometry, composed=composed)
    if _final(g) and "random" not in (selection.jacobians.max_pool, less.jacobians.max_pool):
        wide = torch.float64 if g.dtype == torch.float64 else torch.float32
        shares = pool_difference_coefficients(selection.pool_weights(), less.pool_weights(), wide, g.device)
        if shares is not None:
            kernels, size = kernels_for(x.device.type), (x.shape[2], x.shape[3])
            numbers = _numbers(geometry)
            return cast(Tensor, kernels.pool_shares(g, reached, numbers, size, *shares, layout=image_layout(x)))
    d = torch.empty_like(x)
    images = max(1, _PART // max(1, x[:1].numel())) if x.device.type == "cpu" else len(x)
    for into, *part in zip(*(t.split(images) for t in (d, *inputs)), strict=True):
        torch.sub(vjp(*part, selection), vjp(*part, less), out=into)
    return d


def _numbers(geometry: Regular) -> tuple[tuple[int, int], ...]:
    numbers = (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
    return cast(tuple[tuple[int, int], ...], numbers)


@cache
def _size(geometry: Regular, channels: int, height: int, width: int) -> tuple[int, int]:
    """The output's height and width, as stock finds them, or raises."""
    shape = geometry.forward(torch.empty((1, channels, height, width), device="meta"))[0].shape
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
