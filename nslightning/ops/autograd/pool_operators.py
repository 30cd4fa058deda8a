"""Max pooling as operators that a compiler takes whole.

A compiler makes several loops of pooling that is composed of PyTorch's operations, each slower than stock's. These
operators run eager mode's kernels inside a compiled graph. They take the incoming gradient and read the choice from its
memory when they run, so that one graph serves every choice with eager mode's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from nslightning._torch import is_exporting, while_compiling
from nslightning.ops.autograd import fused
from nslightning.ops.autograd.layouts import image_layout
from nslightning.ops.autograd.nodes import NonsmoothFunction
from nslightning.ops.autograd.selection import LIBRARY, Selection, refuse_random
from nslightning.ops.autograd.windows import AT_ONCE, Regular

__all__ = ["fits", "max_pool2d", "numbers_of", "operator", "refuse_second_derivative", "wanted"]


def operator(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], devices: Iterable[str] = ("CPU", "CUDA")
) -> Any:
    """Make an operator that a compiler takes whole.

    Args:
        schema: Its name and signature.
        run: The function that computes it. Its tensors may have other strides than the traced ones, so that no copy
            is made.
        fake: Returns a result of the right shape, dtype and layout for tensors without values.
        devices: Kinds of devices on which it runs.

    Returns:
        The operator.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
    for device in devices:
        LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"nslightning::{name}", fake)
    return getattr(torch.ops.nslightning, name).default


def wanted() -> bool:
    """Return whether to use the operators: while a compiler traces, but not for an export, which runs without them."""
    return torch.compiler.is_compiling() and not is_exporting()


def refuse_second_derivative(g: Tensor) -> None:
    """Raise where the result of an operator would be differentiated: the operator has no derivative.

    Args:
        g: The incoming gradient.

    Raises:
        RuntimeError: If gradients are recorded and ``g`` has any.
    """
    if torch.is_grad_enabled() and g.requires_grad:
        raise RuntimeError(
            "the gradient of a compiled max pooling cannot be differentiated again. Run the model in eager mode for "
            "second derivatives."
        )


def numbers_of(geometry: Regular) -> list[int]:
    """Windows as an operator takes them.

    Args:
        geometry: The windows.

    Returns:
        Kernel, stride, padding and dilation, one number per dimension each; 1 where sizes are rounded up, else 0.
    """
    return [*geometry.kernel, *geometry.stride, *geometry.padding, *geometry.dilation, int(geometry.ceil_mode)]


# ------------------------------------------------------------------------------------- 2-d, small windows: the kernels
def _in_order(x: Tensor) -> Tensor:
    """Images in a layout that the kernels take."""
    return x if x.is_contiguous(memory_format=image_layout(x)) else x.contiguous()


def _windows(numbers: Sequence[int]) -> Regular:
    kernel, stride, padding, dilation = (tuple(numbers[i : i + 2]) for i in range(0, 8, 2))
    return Regular(kernel, stride, padding, dilation, bool(numbers[8]))


def _forward(x: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    y, reached, _ = fused.pool_forward(_in_order(x), _windows(numbers))
    return y, reached


def _fake_forward(x: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    shape = _windows(numbers).forward(x)[0].shape
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=image_layout(_in_order(x)))
    return y, torch.empty_like(y, dtype=torch.int16)


def _backward(g: Tensor, reached: Tensor, weights: Tensor, numbers: Sequence[int], size: Sequence[int]) -> Tensor:
    refuse_second_derivative(g)
    refuse_random(weights)
    height, width = size
    return fused.pool_gradient_of(g, reached, weights, _windows(numbers), (height, width))


def _fake_backward(g: Tensor, reached: Tensor, weights: Tensor, numbers: Sequence[int], size: Sequence[int]) -> Tensor:
    shape, layout = (*reached.shape[:2], *size), image_layout(reached)
    return torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=layout)


_pool_forward = operator("pool_forward(Tensor x, int[] windows) -> (Tensor, Tensor)", _forward, _fake_forward)
_pool_backward = operator(
    "pool_backward(Tensor g, Tensor reached, Tensor weights, int[] windows, SymInt[] size) -> Tensor",
    _backward,
    _fake_backward,
)


class _MaxPool2d(NonsmoothFunction):
    """Keeps two bytes per window."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: Regular, selection: Selection) -> Tensor:
        ctx.operation, ctx.selection = "max_pool", selection
        ctx.windows, ctx.size = numbers_of(geometry), x.shape[2:]
        y, reached = _pool_forward(x, ctx.windows)
        ctx.save_for_backward(reached)
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (reached,) = ctx.saved_tensors
        weights = ctx.selection.on(g.device)[".pool"]
        return _pool_backward(g, reached, weights, ctx.windows, ctx.size), None, None


@while_compiling
def _cpu_dtypes() -> tuple[torch.dtype, ...]:
    return fused.dtypes_on("cpu")


@while_compiling
def _cuda_dtypes() -> tuple[torch.dtype, ...]:
    return fused.dtypes_on("cuda")


def fits(x: Tensor, geometry: Regular) -> bool:
    """Return whether :func:`max_pool2d` takes a call that is traced.

    Args:
        x: The input.
        geometry: Its windows.

    Returns:
        True where :func:`~nslightning.ops.autograd.fused.pool_fits` is for the same tensor in eager mode.
    """
    if x.dim() != 4 or geometry.dims != 2 or prod(geometry.kernel) > AT_ONCE:
        return False
    device = x.device.type
    dtypes = _cpu_dtypes() if device == "cpu" else _cuda_dtypes() if device == "cuda" else ()
    layouts = (torch.contiguous_format, torch.channels_last)
    return x.dtype in dtypes and any(x.is_contiguous(memory_format=layout) for layout in layouts)


def max_pool2d(x: Tensor, geometry: Regular, selection: Selection) -> Tensor:
    """2-d max pooling while a compiler traces.

    Args:
        x: Input that :func:`fits`.
        geometry: Its windows.
        selection: The choice, read when the backward runs.

    Returns:
        The stock result, bit for bit.
    """
    return cast(Tensor, _MaxPool2d.apply(x, geometry, selection))
