"""Max pooling with a chosen way to share the gradient over the tied entries of a window."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nslightning.jacobians import Jacobians, MaxPoolChoice, Rule
from nslightning.ops.pointwise import _fixed
from nslightning.ops.selection import Selection, data_dependent, read_now

__all__ = ["max_pool2d", "pool2d", "tied_windows"]

aten = torch.ops.aten
_Pair = tuple[int, int]


class _Windows:
    """The pooling windows of one call, seen as one strided slice of the input per position in the window."""

    def __init__(
        self, x: Tensor, output: Tensor, kernel: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
    ) -> None:
        rows, columns = (
            [
                _span(i * dilation[d] - padding[d], stride[d], x.shape[d - 2], output.shape[d - 2])
                for i in range(kernel[d])
            ]
            for d in (0, 1)
        )
        # Positions in row-major order, as (slice of the input, slice of the output whose windows reach it).
        self.positions = [
            ((..., row_in, column_in), (..., row_out, column_out))
            for row_in, row_out in rows
            for column_in, column_out in columns
        ]
        # Whether at each position the entry reaches its window's maximum.
        self.reached = [x[entry] == output[window] for entry, window in self.positions]
        # No entry lies in two windows.
        self.disjoint = all(s > d * (k - 1) for s, d, k in zip(stride, dilation, kernel, strict=True))

    def count(self, output: Tensor) -> Tensor:
        """How many entries reach each window's maximum: the output's shape; 0 where the maximum is NaN."""
        count = torch.zeros_like(output, dtype=torch.uint8 if len(self.positions) < 256 else torch.int32)
        for (_, window), reached in zip(self.positions, self.reached, strict=True):
            count[window].add_(reached.view(torch.uint8))
        return count


def _span(offset: int, stride: int, size: int, windows: int) -> tuple[slice, slice]:
    """The entries that lie ``offset`` after a window's start, and the windows for which these exist."""
    first = max(0, -(offset // stride))
    last = min(windows - 1, (size - 1 - offset) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    return slice(first * stride + offset, last * stride + offset + 1, stride), slice(first, last + 1)


class _MaxPool2d(torch.autograd.Function):
    """Stock forward; untied windows go through the stock backward, tied ones are shared as the selection says."""

    @staticmethod
    def forward(
        x: Tensor,
        selection: Selection,
        kernel: _Pair,
        stride: _Pair,
        padding: _Pair,
        dilation: _Pair,
        ceil_mode: bool,
    ) -> tuple[Tensor, Tensor]:
        return cast(
            tuple[Tensor, Tensor],
            aten.max_pool2d_with_indices.default(x, kernel, stride, padding, dilation, ceil_mode),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.selection, *ctx.geometry = inputs
        # As stock, not the output, which the next layer may overwrite: it is read from the input where it is needed.
        ctx.save_for_backward(x, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        x, indices = ctx.saved_tensors
        selection = ctx.selection
        vjp = partial(_share, x, indices, g, geometry=ctx.geometry)
        if not torch.compiler.is_compiling() and selection.recorder is not None:
            selection.recorder(ctx, vjp)
        return (vjp(selection), *(None,) * 6)


def _share(
    x: Tensor,
    indices: Tensor,
    g: Tensor,
    selection: Selection,
    geometry: tuple[_Pair, _Pair, _Pair, _Pair, bool],
) -> Tensor:
    """The gradient with respect to the input under a selection."""
    kernel, stride, padding, dilation, ceil_mode = geometry

    def native(g: Tensor) -> Tensor:
        gradient = aten.max_pool2d_with_indices_backward.default(
            g, x, kernel, stride, padding, dilation, ceil_mode, indices
        )
        return cast(Tensor, gradient)

    compiled = torch.compiler.is_compiling()
    random = not compiled and selection.jacobians.max_pool == "random"
    if not compiled and not random and selection.pool_weights() == (0.0, 1.0, 0.0, 0.0):
        return native(g)
    output = _maxima(x, indices)
    windows = _Windows(x, output, kernel, stride, padding, dilation)
    count = windows.count(output)
    tied = count > 1
    if data_dependent(x) and not tied.any():
        return native(g)

    # Coefficients in float32 at least: fp16 and bf16 cannot hold beta / k + (1 - beta) for a large beta.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = read_now(selection.pool, g) if compiled else selection.pool
    share, whole, each, last = weights.to(wide).unbind()
    k, g_wide = count.to(wide), g.to(wide)
    rest = share / k + each
    g_rest = torch.where(tied, g_wide * rest, 0)  # what each tied entry receives, and the target more
    ranked = compiled or random or selection.pool_weights()[3] > 0  # the target need not be the first tied entry
    target = None
    if ranked:
        target = torch.where(last > 0, count - 1, 0)
        if random:
            draw = torch.rand(count.shape, dtype=wide, device=x.device, generator=selection.generator(x.device))
            target = (draw * k).to(count.dtype)
    if windows.disjoint:  # each entry is written once, its coefficient formed before the product with g
        g_target = torch.where(tied, g_wide * (rest + whole), g_wide)
        if target is None:
            return _overwrite(windows, x, indices, g_target.to(g.dtype), g_rest.to(g.dtype))
        shared = _add_up(windows, x, tied, g_rest, g_target, target)
        return (native(g.masked_fill(tied, 0)).to(wide) + shared).to(g.dtype)
    g_whole = g_wide * whole
    if target is None:
        shared = _add_up(windows, x, tied, g_rest)
    else:
        elsewhere = (last > 0) | random  # the stock kernel cannot place it
        shared = _add_up(windows, x, tied, g_rest, torch.where(elsewhere, g_whole, g_rest), target)
        g_whole = torch.where(elsewhere, 0, g_whole)
    # An entry that no tied window reaches keeps the stock gradient, bit for bit.
    return (native(torch.where(tied, g_whole.to(g.dtype), g)).to(wide) + shared).to(g.dtype)


def _add_up(
    windows: _Windows,
    x: Tensor,
    tied: Tensor,
    g_rest: Tensor,
    g_target: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Add ``g_rest`` to every tied entry, and ``g_target`` instead to the one that ``target`` others come before."""
    shared = torch.zeros_like(x, dtype=g_rest.dtype)
    rank = torch.zeros_like(tied, dtype=torch.int32)
    for (entry, window), reached in zip(windows.positions, windows.reached, strict=True):
        value = g_rest[window]
        if g_target is not None and target is not None:
            value = torch.where(rank[window] == target[window], g_target[window], value)
            reached = reached & tied[window]
            rank[window] += reached
        shared[entry] += torch.where(reached, value, 0)
    return shared


def _overwrite(windows: _Windows, x: Tensor, indices: Tensor, g_target: Tensor, g_rest: Tensor) -> Tensor:
    """Windows without common entries: write every tied entry's share, then the target's over it."""
    nhwc = _channels_last(x)
    gradient = torch.zeros_like(x, memory_format=torch.channels_last if nhwc else torch.contiguous_format)
    zero = gradient.new_zeros(())
    for (entry, window), reached in zip(windows.positions, windows.reached, strict=True):
        gradient[entry] = torch.where(reached, g_rest[window], zero)
    _planes(gradient, nhwc).scatter_(1 if nhwc else -1, _planes(indices, nhwc), _planes(g_target, nhwc))
    return gradient


def _maxima(x: Tensor, indices: Tensor) -> Tensor:
    """The output once more, from the input."""
    nhwc = _channels_last(x)
    flat = _planes(x, nhwc).gather(1 if nhwc else -1, _planes(indices, nhwc))
    if not nhwc:
        return flat.view(indices.shape)
    n, c, h, w = indices.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _planes(t: Tensor, nhwc: bool) -> Tensor:
    """Each channel's plane as one dimension, without a copy where the layout is this one."""
    return t.permute(0, 2, 3, 1).flatten(1, 2) if nhwc else t.flatten(-2)


def pool2d(
    x: Tensor,
    selection: Selection,
    kernel: _Pair,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    ceil_mode: bool,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Max-pool with the choice that ``selection`` names at backward time.

    Args:
        x: Input of shape (N, C, H, W) or (C, H, W), floating dtype.
        selection: The choice, read when the backward runs; the published rule is read here too.
        kernel: Window height and width.
        stride: Steps between windows.
        padding: Implicit -inf padding.
        dilation: Steps between the entries of a window.
        ceil_mode: Round the output's size up.
        return_indices: Also return the flat index of the entry that PyTorch picks.

    Returns:
        The stock result, bit for bit under the exact rule: shape (N, C, H', W') or (C, H', W').
    """
    geometry = (kernel, stride, padding, dilation, ceil_mode)
    if any(p and d > 1 for p, d in zip(padding, dilation, strict=True)):
        _refuse_empty_windows(x, *geometry)
    if not (torch.is_grad_enabled() and x.requires_grad):
        output, indices = aten.max_pool2d_with_indices.default(x, *geometry)
    else:
        output, indices = _MaxPool2d.apply(x, selection, *geometry)
    if selection.jacobians.rule == "published":
        beta = selection.jacobians.max_pool or 0.0
        if isinstance(beta, str):
            raise ValueError(f'the published rule of max pooling takes a number beta; given "{beta}"')
        minimal = _MaxPool2d.apply(x, _fixed(Jacobians(max_pool="minimal")), *geometry)[0]
        native = aten.max_pool2d_with_indices.default(x, *geometry)[0]
        output = beta * minimal + (1 - beta) * native
    return (output, indices) if return_indices else output


def _refuse_empty_windows(
    x: Tensor, kernel: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair, ceil_mode: bool
) -> None:
    """Padding and dilation together can place all entries of a window outside; stock then writes out of bounds."""
    with torch.device("meta"):
        windows = F.max_pool2d(torch.empty(1, *x.shape[-2:]), kernel, stride, padding, dilation, ceil_mode).shape[-2:]
    for size, n, k, s, p, d in zip(x.shape[-2:], windows, kernel, stride, padding, dilation, strict=True):
        if any(all(not 0 <= o * s - p + i * d < size for i in range(k)) for o in range(n)):
            raise ValueError(
                f"max pooling of size {tuple(x.shape[-2:])} with kernel {kernel}, stride {stride}, padding {padding} "
                f"and dilation {dilation} has a window without entries, for which stock PyTorch's backward writes "
                "out of bounds. Use less padding or dilation."
            )


def max_pool2d(
    x: Tensor,
    kernel_size: int | _Pair,
    stride: int | _Pair | None = None,
    padding: int | _Pair = 0,
    dilation: int | _Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    jacobian: float | MaxPoolChoice | None = None,
    rule: Rule = "exact",
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""2-d max pooling with a chosen element of its generalised Jacobian.

    In a window whose maximum is reached by :math:`k > 1` entries the Clarke Jacobian is the convex hull of the unit
    vectors of these entries. PyTorch (and JAX, TensorFlow on a CPU) gives the whole gradient to the first of them in
    row-major order; with a number :math:`\beta`, entry p of a tied window receives

    .. math:: g\,\bigl(\beta / k + (1 - \beta)\,[p \text{ is the first}]\bigr),

    computed in float32 (float64 for float64) and rounded once per entry. Windows without a tie, and windows whose
    maximum is NaN, keep the stock gradient bit for bit, whatever the choice. Boustany, *On the numerical reliability
    of nonsmooth autodiff: a MaxPool case study*, TMLR 2024, section 3.

    Args:
        x: Input of shape (N, C, H, W) or (C, H, W), floating dtype.
        kernel_size: Window height and width.
        stride: Steps between windows; ``None`` is the kernel size.
        padding: Implicit -inf padding, at most half the kernel.
        dilation: Steps between the entries of a window.
        ceil_mode: Round the output's size up.
        return_indices: Also return the flat index, within each channel, of the entry that PyTorch picks.
        jacobian: A number beta, or ``"native"``, ``"first"``, ``"last"``, ``"minimal"``, ``"random"``, ``"sum"``;
            see :class:`~nslightning.Jacobians`. ``None`` is the reference.
        rule: ``"published"`` computes ``beta * a + (1 - beta) * a`` in the working precision, as the released code
            does, forward and backward: for a large beta this is wrong everywhere, tie or not.
        seed: Seeds the private random stream of ``jacobian="random"``; the global streams are never used.

    Returns:
        ``torch.nn.functional.max_pool2d(...)``, bit for bit under the exact rule.

    Raises:
        ValueError: If the choice is unknown, or not a number under the published rule; if padding and dilation leave
            a window without entries.

    Example:
        >>> x = torch.zeros(1, 1, 2, 2, requires_grad=True)
        >>> max_pool2d(x, 2, jacobian="minimal").sum().backward()
        >>> x.grad
        tensor([[[[0.2500, 0.2500],
                  [0.2500, 0.2500]]]])
    """
    jacobians = Jacobians(max_pool=jacobian, rule=rule)
    # A named choice can be shared by all calls; "random" has a stream, so each call starts its own.
    selection = Selection(jacobians, seed) if jacobian == "random" else _fixed(jacobians)
    pair = torch.nn.modules.utils._pair
    kernel = pair(kernel_size)
    return pool2d(
        x,
        selection,
        kernel,
        pair(stride) if stride else kernel,
        pair(padding),
        pair(dilation),
        ceil_mode,
        return_indices,
    )


def tied_windows(x: Tensor, kernel: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair, ceil_mode: bool) -> Tensor:
    """How many entries of each window reach its maximum.

    Args:
        x: Input of shape (N, C, H, W) or (C, H, W), floating dtype.
        kernel: Window height and width.
        stride: Steps between windows.
        padding: Implicit -inf padding.
        dilation: Steps between the entries of a window.
        ceil_mode: Round the output's size up.

    Returns:
        Counts of the output's shape, uint8 or int32; 0 where the maximum is NaN, more than 1 at a tie.
    """
    output = aten.max_pool2d_with_indices.default(x, kernel, stride, padding, dilation, ceil_mode)[0]
    return _Windows(x, output, kernel, stride, padding, dilation).count(output)
