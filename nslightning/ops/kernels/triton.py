"""Fused CUDA kernels, in Triton, for the operations whose ATen composition passes over the memory most often.

Each computes what the composition in :mod:`~nslightning.ops.autograd.pointwise` or
:mod:`~nslightning.ops.autograd.pooling` does, in one pass forward and one backward. For the backward ReLU keeps its
output, as stock, and one bit per entry; max pooling two bytes per window, where stock keeps its input and an eight-byte
index. No atomics and no contraction of products and sums: the same bits on every run, and from every compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nslightning.ops.autograd.layouts import empty_as_stock, filled_as_stock, image_layout, laid_out_as
from nslightning.ops.autograd.selection import pool_coefficients
from nslightning.ops.kernels import cuda

__all__ = [
    "DTYPES",
    "any_zero",
    "pool_backward",
    "pool_forward",
    "pool_shares",
    "relu_backward",
    "relu_forward",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BLOCK = 1024
_NARROW = 2**31 - 2**16  # entries that 32 bits count, with room for the last block


def _launch(kernel: Any, entries: int, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Start a kernel on some entries, on the device of a tensor, which need not be the current one.

    Args:
        kernel: The kernel.
        entries: The number of entries, of which a program takes a block.
        x: The tensor, the kernel's first argument.
        *arguments: The kernel's other arguments.
        **constants: Its constants.
    """
    with cuda.launching(x):
        # Triton contracts by default a product and a sum, which then are rounded once.
        kernel[(triton.cdiv(entries, _BLOCK),)](x, *arguments, **constants, enable_fp_fusion=False)


@triton.jit
def _relu_forward(x, y, bits, n, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    bit = tl.arange(0, 8)
    at = row[:, None] * 8 + bit[None, :]
    inside = at < n
    value = tl.load(x + at, mask=inside, other=1.0).to(tl.float32)
    tl.store(y + at, tl.where(value <= 0, 0.0, value).to(y.dtype.element_ty), mask=inside)  # NaN stays NaN, as stock
    tied = (value == 0).to(tl.int32) << bit[None, :]
    tl.store(bits + row, tl.sum(tied, axis=1).to(tl.uint8), mask=row * 8 < n)


@triton.jit
def _relu_backward(g, y, bits, gradient, n, alpha, constant, MEMORY: tl.constexpr, ROWS: tl.constexpr):
    if MEMORY:  # of a selection, read when a captured launch is replayed
        alpha = tl.load(alpha)
        constant = tl.load(constant).to(tl.int32)
        stock = (alpha != alpha) | ((alpha == 0) & (constant == 0))  # the reference, which writes 0
        alpha = tl.where(stock, 0.0, alpha).to(tl.float32)
        constant = tl.where(stock, 1, constant)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    bit = tl.arange(0, 8)
    at = row[:, None] * 8 + bit[None, :]
    inside = at < n
    incoming = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    output = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    byte = tl.load(bits + row, mask=row * 8 < n, other=0).to(tl.int32)
    tied = ((byte[:, None] >> bit[None, :]) & 1) != 0
    chosen = tl.where(constant != 0, tl.zeros_like(incoming) + alpha, incoming * alpha)
    result = tl.where(output <= 0, tl.where(tied, chosen, 0.0), incoming)
    tl.store(gradient + at, result.to(gradient.dtype.element_ty), mask=inside)


def any_zero(x: Tensor) -> bool:
    """Return whether ReLU may meet a tie.

    Args:
        x: ReLU's input.

    Returns:
        True, since asking the device would mean to wait for it.
    """
    return True


def relu_forward(x: Tensor, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """ReLU, and where its input is 0.

    Args:
        x: Input, any shape, float16, bfloat16 or float32, dense in memory (contiguous in some order of its dimensions).
        inplace: Write the result over it.

    Returns:
        ``torch.relu(x)`` and the ties, eight to a byte in the order of the memory, of shape ``(ceil(numel / 8),)``.
    """
    y = x if inplace else empty_as_stock(x)
    bits = torch.empty(triton.cdiv(x.numel(), 8), dtype=torch.uint8, device=x.device)
    if x.numel():
        _launch(_relu_forward, x.numel(), x, y, bits, x.numel(), ROWS=_BLOCK // 8)
    return y, bits


def relu_backward(
    g: Tensor, y: Tensor, bits: Tensor, alpha: float | Tensor, *, constant: bool | Tensor = False
) -> Tensor:
    """The gradient of ReLU with the derivative ``alpha`` at 0.

    Args:
        g: Incoming gradient, of ``y``'s shape and dtype.
        y: The output of :func:`relu_forward`.
        bits: The ties from there.
        alpha: ReLU'(0), or the selection's memory of it, shape (1,), float64, which is read when the kernel runs.
        constant: Write ``alpha`` itself at ties, the published rule; if ``alpha`` is a tensor, the memory of that,
            0-d, bool.

    Returns:
        The gradient with respect to the input; ``alpha * g`` is formed in float32 and rounded once.
    """
    memory = isinstance(alpha, Tensor)
    numbers = y.numel(), alpha, constant if memory else int(constant)

    def fill(g: Tensor, gradient: Tensor) -> None:
        if y.numel():
            _launch(_relu_backward, y.numel(), g, y, bits, gradient, *numbers, MEMORY=memory, ROWS=_BLOCK // 8)

    return filled_as_stock(g, y, fill)


@triton.jit
def _mine(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The elements of this program, counted in 64 bits where 32 are too few."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    return program * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _place(at, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr):
    """Image and channel, row and column of an element from where it lies in the memory."""
    if LAST:
        channel = at % C
        column = (at // C) % W
        row = (at // (C * W)) % H
        image = at // (C * W * H)
    else:
        column = at % W
        row = (at // W) % H
        channel = (at // (W * H)) % C
        image = at // (W * H * C)
    return image, channel, row, column


@triton.jit
def _where(image, channel, row, column, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr):
    """Return where an element lies in the memory: the inverse of `_place`."""
    if LAST:
        return ((image * H + row) * W + column) * C + channel
    return ((image * C + channel) * H + row) * W + column


@triton.jit
def _pool_forward(
    x, y, mask, n, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = _mine(BLOCK, WIDE)
    image, channel, row, column = _place(at, C, OH, OW, LAST)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    reached = tl.zeros((BLOCK,), tl.int32)
    for q in tl.static_range(KH * KW):
        h = row * SH - PH + (q // KW) * DH
        w = column * SW - PW + (q % KW) * DW
        inside = (at < n) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        value = tl.load(x + _where(image, channel, h, w, C, H, W, LAST), mask=inside, other=float("-inf"))
        value = value.to(tl.float32)
        better = (value > best) | (value != value)  # the last NaN wins, as stock
        reached = tl.where(better, 1 << q, tl.where(inside & (value == best), reached | (1 << q), reached))
        best = tl.where(better, value, best)
    tl.store(y + at, best.to(y.dtype.element_ty), mask=at < n)
    tl.store(mask + at, reached.to(tl.int16), mask=at < n)


@triton.jit
def _ones(m):
    """Return how many of the 16 low bits are set."""
    m = m - ((m >> 1) & 0x5555)
    m = (m & 0x3333) + ((m >> 2) & 0x3333)
    m = (m + (m >> 4)) & 0x0F0F
    return (m + (m >> 8)) & 0x1F


@triton.jit
def _pool_backward(
    g, mask, weights, last_tied, gradient, n,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, LAST: tl.constexpr, MEMORY: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = _mine(BLOCK, WIDE)
    if MEMORY:
        last_tied = tl.load(last_tied)
    image, channel, h, w = _place(at, C, H, W, LAST)
    total = tl.zeros((BLOCK,), tl.float32)
    # The windows that an entry may lie in, in their order in the memory, as the stock kernel adds them up.
    DOWN: tl.constexpr = ((KH - 1) * DH) // SH + 1
    ACROSS: tl.constexpr = ((KW - 1) * DW) // SW + 1
    for r in tl.static_range(DOWN * ACROSS):
        row = (h + PH) // SH - (DOWN - 1 - r // ACROSS)
        column = (w + PW) // SW - (ACROSS - 1 - r % ACROSS)
        i = h + PH - row * SH
        j = w + PW - column * SW
        inside = (at < n) & (row >= 0) & (row < OH) & (i < KH * DH) & (i % DH == 0)
        inside = inside & (column >= 0) & (column < OW) & (j < KW * DW) & (j % DW == 0)
        q = tl.where(inside, (i // DH) * KW + j // DW, 0)
        window = _where(image, channel, row, column, C, OH, OW, LAST)
        reached = tl.load(mask + window, mask=inside, other=0).to(tl.int32) & 0xFFFF
        chosen = tl.where(last_tied != 0, reached >> q == 1, (reached & ((1 << q) - 1)) == 0)
        incoming = tl.load(g + window, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weights + _ones(reached) + tl.where(chosen, 17, 0))
        takes = (((reached >> q) & 1) != 0) & (weight != 0)  # an infinite gradient times 0 is NaN
        total = tl.where(takes, total + incoming * weight, total)
    tl.store(gradient + at, total.to(gradient.dtype.element_ty), mask=at < n)


def pool_forward(
    x: Tensor, geometry: Sequence[tuple[int, int]], size: tuple[int, int], *, zeros: bool = True
) -> tuple[Tensor, Tensor, bool]:
    """2-d max pooling, and which entries of each window reach its maximum.

    Args:
        x: Input of shape (N, C, H, W), float16, bfloat16 or float32, contiguous or channels_last.
        geometry: Kernel, stride, padding and dilation; at most 16 positions in a window.
        size: The output's height and width.
        zeros: Without effect here: see below.

    Returns:
        The stock output; int16 masks of its shape: bit q is set where the window's q-th entry, in row-major order,
        reaches the maximum, and where that is NaN, the entry that PyTorch picks alone; and whether a window may be
        tied: True, since asking the device would mean to wait for it.
    """
    layout = image_layout(x)
    y = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=layout)
    mask = torch.empty_like(y, dtype=torch.int16)
    if y.numel():
        _launch(
            _pool_forward, y.numel(), x, y, mask, y.numel(), *x.shape[1:], *size, *sum(geometry, ()),
            LAST=layout == torch.channels_last, WIDE=max(x.numel(), y.numel()) > _NARROW, BLOCK=_BLOCK,
        )  # fmt: skip
    return y, mask, True


def pool_backward(
    g: Tensor,
    mask: Tensor,
    geometry: Sequence[tuple[int, int]],
    size: tuple[int, int],
    weights: tuple[float, float, float, float],
    *,
    layout: torch.memory_format | None = None,
) -> Tensor:
    """The gradient of 2-d max pooling.

    Args:
        g: Incoming gradient, of the output's shape.
        mask: The masks of :func:`pool_forward`.
        geometry: Kernel, stride, padding and dilation.
        size: The input's height and width.
        weights: ``(share, whole, each, last)`` of :meth:`~nslightning.ops.autograd.selection.Selection.pool_weights`.
        layout: The input's memory format, which masks of one window an image do not tell; by default theirs.

    Returns:
        The gradient with respect to the input; sums are formed in float32 and rounded once.
    """
    share, whole, each, last = weights
    coefficients = pool_coefficients(share, whole, each, torch.float32, g.device)
    return pool_shares(g, mask, geometry, size, coefficients, bool(last), layout=layout)


def pool_shares(
    g: Tensor,
    mask: Tensor,
    geometry: Sequence[tuple[int, int]],
    size: tuple[int, int],
    coefficients: Tensor,
    last: bool | Tensor,
    *,
    layout: torch.memory_format | None = None,
) -> Tensor:
    """Run :func:`pool_backward` with coefficients, such as those of a difference.

    Args:
        g: Incoming gradient, of the output's shape.
        mask: The masks of :func:`pool_forward`.
        geometry: Kernel, stride, padding and dilation.
        size: The input's height and width.
        coefficients: As :func:`~nslightning.ops.autograd.selection.pool_coefficients` has them, on the device, float32.
        last: Whether the target is the last tied entry; or the memory of that, 0-d, float64: not 0 if it is.
        layout: As in :func:`pool_backward`.

    Returns:
        The gradient with respect to the input.
    """
    layout = image_layout(mask) if layout is None else layout
    g = laid_out_as(g, mask)
    gradient = torch.empty((*mask.shape[:2], *size), dtype=g.dtype, device=g.device, memory_format=layout)
    if gradient.numel():
        _launch(
            _pool_backward, gradient.numel(), g, mask, coefficients, last if isinstance(last, Tensor) else int(last),
            gradient, gradient.numel(), mask.shape[1], *size, *mask.shape[2:], *sum(geometry, ()),
            LAST=layout == torch.channels_last, MEMORY=isinstance(last, Tensor),
            WIDE=max(gradient.numel(), g.numel()) > _NARROW, BLOCK=_BLOCK,
        )  # fmt: skip
    return gradient
