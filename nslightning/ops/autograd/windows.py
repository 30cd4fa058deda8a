"""Pooling windows: which entries they hold, how many reach the maximum, and sums over these.

The entries at one place in their windows are a strided slice of the input, so all is done place by place. A window is
a product of ranges, and where it has many places, one dimension follows the other: the maximum of a window is the
maximum over its rows of the rows' maxima, it is reached as often as the sum over the tied rows of how often these reach
theirs, and a gradient goes first to the tied rows, then to their tied entries: 13 x 13 entries in 13 + 13 steps.

Masks are floats of the input's dtype, and values are selected by ``threshold_backward``: on a CPU these are the
vectorised kernels; ``torch.where`` and boolean comparisons are not, and cost about twenty times as much. Products with
0 would spoil infinite gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import gcd, prod
from typing import Any, cast

import torch
from torch import Tensor

from nslightning.ops.autograd.selection import data_dependent

__all__ = ["AT_ONCE", "Adaptive", "Regular", "Span", "Windows", "select"]

aten = torch.ops.aten
Span = tuple[slice, slice]  # of the entries, and of the windows that hold them
AT_ONCE = 12  # places that cost less at once than one dimension after the other


@dataclass(frozen=True)
class Regular:
    """Windows of one size at equal steps: ``max_pool2d`` and ``max_pool3d``, by their number of dimensions.

    Args:
        kernel: The window's size, one number per dimension, as all that follow.
        stride: Steps between windows.
        padding: Implicit -inf padding.
        dilation: Steps between the entries of a window.
        ceil_mode: Round the output's size up.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False

    @property
    def dims(self) -> int:
        """The number of spatial dimensions."""
        return len(self.kernel)

    def of_a_row(self) -> Regular:
        """One-dimensional windows as two-dimensional ones of height 1."""
        ahead = ((1, *self.kernel), (1, *self.stride), (0, *self.padding), (1, *self.dilation))
        return Regular(*ahead, self.ceil_mode)

    def disjoint(self, sizes: Sequence[int]) -> bool:
        """Return whether no entry lies in two windows, whatever the input's spatial sizes."""
        return all(s > d * (k - 1) for s, d, k in zip(self.stride, self.dilation, self.kernel, strict=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stock kernel: maxima and flat indices, within each channel, of the entries that PyTorch picks."""
        stock = aten.max_pool2d_with_indices if self.dims == 2 else aten.max_pool3d_with_indices
        return cast(
            tuple[Tensor, Tensor],
            stock.default(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode),
        )

    def backward(self, g: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        """The stock kernel: each window's gradient to the entry at its index."""
        stock = aten.max_pool2d_with_indices_backward if self.dims == 2 else aten.max_pool3d_with_indices_backward
        return cast(
            Tensor,
            stock.default(g, x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode, indices),
        )

    def spans(self, sizes: Sequence[int], windows: Sequence[int]) -> list[list[Span]]:
        """Per dimension, one pair of slices for each place in a window.

        Args:
            sizes: The input's spatial sizes.
            windows: The output's.

        Returns:
            For each dimension its spans, in the order of the places.
        """
        per_dimension = zip(self.kernel, self.stride, self.padding, self.dilation, sizes, windows, strict=True)
        return [[_span(i * d - p, s, size, n) for i in range(k)] for k, s, p, d, size, n in per_dimension]


@dataclass(frozen=True)
class Adaptive:
    """Windows that cover the input evenly: ``adaptive_max_pool2d`` and ``adaptive_max_pool3d``.

    Window i of n over ``size`` entries goes from ``floor(i size / n)`` to ``ceil((i + 1) size / n)``. Every
    ``n / gcd(size, n)``-th window has the same size and they lie at equal steps.

    Args:
        output: The number of windows, one number per dimension.
    """

    output: tuple[int, ...]

    @property
    def dims(self) -> int:
        """The number of spatial dimensions."""
        return len(self.output)

    def of_a_row(self) -> Adaptive:
        """One-dimensional windows as two-dimensional ones of height 1."""
        return Adaptive((1, *self.output))

    def disjoint(self, sizes: Sequence[int]) -> bool:
        """Return whether no entry lies in two windows, for the input's spatial sizes."""
        return all(size % n == 0 for size, n in zip(sizes, self.output, strict=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stock kernel: maxima and flat indices, within each channel, of the entries that PyTorch picks."""
        stock = aten.adaptive_max_pool2d if self.dims == 2 else aten.adaptive_max_pool3d
        return cast(tuple[Tensor, Tensor], stock.default(x, self.output))

    def backward(self, g: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        """The stock kernel: each window's gradient to the entry at its index."""
        if self.dims == 2:
            return cast(Tensor, aten.adaptive_max_pool2d_backward.default(g, x, indices))
        # The kernel takes its own contiguous indices for granted, and reads others wrong.
        return cast(Tensor, aten.adaptive_max_pool3d_backward.default(g, x, indices.contiguous()))

    def spans(self, sizes: Sequence[int], windows: Sequence[int]) -> list[list[Span]]:
        """Per dimension, one pair of slices for each place in each kind of window.

        Args:
            sizes: The input's spatial sizes.
            windows: The output's.

        Returns:
            For each dimension its spans; those of one window are in the order of the places.
        """
        spans = []
        for size, n in zip(sizes, windows, strict=True):
            kinds, stride = n // gcd(size, n), size // gcd(size, n)
            spans.append(
                [
                    (slice(at, None, stride), slice(kind, None, kinds))
                    for kind in range(kinds)
                    for at in range(kind * size // n, -((kind + 1) * -size // n))
                ]
            )
        return spans


def _span(offset: int, stride: int, size: int, windows: int) -> Span:
    """The entries that lie ``offset`` after a window's start, and the windows for which these exist."""
    first = max(0, -(offset // stride))
    last = min(windows - 1, (size - 1 - offset) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    return slice(first * stride + offset, last * stride + offset + 1, stride), slice(first, last + 1)


@dataclass(frozen=True, eq=False)
class _Plan:
    """Some dimensions, reduced together.

    ``places`` are the subscripts of the entries at one place in their windows, and of the windows that hold them;
    None stands for all windows.
    """

    axes: tuple[int, ...]
    places: list[tuple[Any, Any]]  # the last first: so each entry's windows come in order, as in the stock kernels
    start: int | None  # a place that all windows have


@dataclass(frozen=True, eq=False)
class _Stage:
    """One plan's entries at each place, and the maxima over them."""

    plan: _Plan
    entries: list[Tensor]
    maxima: Tensor
    shape: torch.Size  # before

    def masks(self) -> Iterator[tuple[Any, Any, Tensor]]:
        """Each place with the mask of its entries that reach the maximum: formed at each call, in the cache."""
        for (entry, window), values in zip(self.plan.places, self.entries, strict=True):
            yield entry, window, _equal(values, _part(self.maxima, window))


def _plan(geometry: Regular | Adaptive, sizes: Sequence[int], windows: Sequence[int]) -> list[_Plan]:
    """Return how to reduce windows: small ones at once, large ones one dimension after the other."""
    spans = geometry.spans(sizes, windows)
    axes = [axis for axis, (across, n) in enumerate(zip(spans, sizes, strict=True), 1) if across != [_whole(n)]]
    at_once = prod([len(spans[axis - 1]) for axis in axes]) <= AT_ONCE
    plans = []
    for group in [axes] if at_once and axes else [[axis] for axis in axes]:
        places = []
        for chosen in product(*[spans[axis - 1] for axis in group]):
            entry, window = [slice(None)] * (group[-1] + 1), [slice(None)] * (group[-1] + 1)
            for axis, (reads, writes) in zip(group, chosen, strict=True):
                entry[axis], window[axis] = reads, writes
            full = all(window[axis] == slice(0, windows[axis - 1]) for axis in group)
            places.append((tuple(entry), None if full else tuple(window)))
        places.reverse()
        start = next((i for i, (_, window) in enumerate(places) if window is None), None)
        plans.append(_Plan(tuple(group), places, start))
    return plans


_planned = lru_cache(maxsize=256)(_plan)


class Windows:
    """The windows of one input.

    Args:
        x: Input of shape (B, *spatial, I), float32 or float64.
        geometry: The windows.
        windows: The output's spatial sizes.

    Attributes:
        count: Number of entries that reach each window's maximum, shape (B, *windows, I), dtype of ``x``; 0 where the
            maximum is NaN, more than 1 at a tie.
    """

    def __init__(self, x: Tensor, geometry: Regular | Adaptive, windows: Sequence[int]) -> None:
        self.x, self.sizes, self.windows, self.geometry = x, x.shape[1:-1], windows, geometry
        self.stages: list[_Stage] = []
        count: Tensor | None = None
        plans = _plan if torch.compiler.is_compiling() else _planned
        for planned in plans(geometry, tuple(self.sizes), tuple(windows)):
            # Kernels are fast along contiguous entries: those of a row with a stride are drawn together once.
            strided = x.shape[-1] == 1 and planned.axes[-1] == x.dim() - 2
            entries = [x[entry].contiguous() if strided else x[entry] for entry, _ in planned.places]
            if planned.start is None:
                shape = [windows[d - 1] if d in planned.axes else n for d, n in enumerate(x.shape)]
                top = x.new_full(shape, -torch.inf)
            else:
                top = entries[planned.start].clone(memory_format=torch.contiguous_format)
            for i, ((_, window), values) in enumerate(zip(planned.places, entries, strict=True)):
                if i != planned.start:
                    _part(top, window).clamp_(min=values)  # NaN wins, as in the stock kernels
            stage = _Stage(planned, entries, top, x.shape)
            counted: Tensor | None = None
            for entry, window, reached in stage.masks():
                if counted is None and window is None:
                    counted = reached if count is None else reached.mul_(count[entry])
                    continue
                counted = torch.zeros_like(top) if counted is None else counted
                if count is None:
                    _part(counted, window).add_(reached)
                else:
                    _part(counted, window).addcmul_(count[entry], reached)
            self.stages.append(stage)
            x, count = top, counted
        self.maxima = x
        self.count = _equal(x, x) if count is None else count

    def give(self, v: Tensor) -> Tensor:
        """Add each window's value to all its entries that reach the maximum; the transpose of :meth:`take`.

        Args:
            v: One value per window, the shape of ``count``.

        Returns:
            The shape of the input. An entry's windows are added one after the other where these are few enough to
            be taken at once, as in the stock kernels; else dimension by dimension.
        """
        # A product takes one pass less than a selection, and has the same result where all entries are finite.
        finite = data_dependent(v) and bool(v.sum().isfinite())
        for stage in reversed(self.stages):
            entries = v.new_zeros(stage.shape)
            for entry, window, reached in stage.masks():
                if finite:
                    entries[entry].addcmul_(_part(v, window), reached)
                else:
                    entries[entry].add_(select(_part(v, window), reached))
            v = entries
        return v if self.stages else select(v, self.count)

    def take(self, v: Tensor) -> Tensor:
        """Sum over the entries that reach each window's maximum.

        Args:
            v: One value per entry, the shape of the input.

        Returns:
            The shape of ``count``.
        """
        for stage in self.stages:
            windows = torch.zeros_like(stage.maxima, dtype=v.dtype)
            for entry, window, reached in stage.masks():
                _part(windows, window).add_(select(v[entry], reached))
            v = windows
        return v if self.stages else select(v, self.count)

    def last(self) -> Tensor:
        """The flat index of the last entry that reaches each window's maximum.

        Returns:
            int64, the shape of ``count``; arbitrary where ``count`` is 0.
        """
        wide = self.x.dtype if prod(self.sizes) <= 2**24 else torch.float64  # float32 holds no larger index
        stages = {stage.plan.axes[-1]: stage for stage in self.stages}
        flat: Tensor | None = None
        for axis, size in enumerate(self.sizes, 1):
            place = torch.arange(size, dtype=wide, device=self.x.device)
            place = place.view(*(size if d == axis else 1 for d in range(self.x.dim())))
            flat = place if flat is None else flat * size + place
            if (stage := stages.get(axis)) is not None:
                after = torch.zeros_like(stage.maxima, dtype=wide)
                for entry, window, reached in stage.masks():
                    _part(after, window).clamp_(min=reached * flat[entry])
                flat = after
        assert flat is not None
        return flat.expand(self.count.shape).long()

    def nth(self, rank: Tensor) -> Tensor:
        """The flat index of an entry that reaches its window's maximum, by its rank among these.

        Args:
            rank: Ranks from 0, in row-major order; the shape and dtype of ``count``.

        Returns:
            int64, the shape of ``count``; 0 where no such entry exists.
        """
        # The one question that cannot be asked dimension by dimension: a row's tied entries may lie in two windows.
        flat = torch.arange(prod(self.sizes), device=self.x.device).view(1, *self.sizes, 1)
        seen, indices = (
            torch.zeros(self.count.shape, dtype=t, device=flat.device) for t in (self.count.dtype, torch.long)
        )
        for place in product(*self.geometry.spans(self.sizes, self.windows)):
            entry = (slice(None), *(e for e, _ in place))
            window = (slice(None), *(w for _, w in place))
            reached = self.x[entry] == self.maxima[window]
            indices[window].add_(flat[entry] * (reached & (seen[window] == rank[window])))
            seen[window].add_(reached)
        return indices


def _whole(n: int) -> Span:
    """Windows of one entry each."""
    return slice(0, n, 1), slice(0, n)


def _part(t: Tensor, subscript: Any) -> Tensor:
    return t if subscript is None else t[subscript]


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """Return where two tensors are equal: 1 and 0 in their dtype."""
    if torch.compiler.is_compiling():
        return (a == b).to(a.dtype)
    return torch.eq(a, b, out=torch.empty_like(a, memory_format=torch.contiguous_format))


def select(v: Tensor, mask: Tensor) -> Tensor:
    """The values where a mask of 0 and 1 is 1, else 0; infinite and NaN values included.

    Args:
        v: Values.
        mask: A mask of the same shape and dtype.

    Returns:
        A tensor like ``v``.
    """
    return cast(Tensor, aten.threshold_backward.default(v, mask, 0.5))
