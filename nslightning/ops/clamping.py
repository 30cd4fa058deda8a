"""Clamping between bounds of either kind: numbers, or tensors that have gradients of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nslightning.ops.autograd.routing import RULES, Rule, around, wide
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.pointwise import POINTWISE, pointwise

__all__ = ["clamped"]

_Bound = float | Tensor | None


def _at_bounds(tensors: tuple[Tensor, ...], parameters: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    x, *bounds = tensors
    at_low, at_high = (x == position for position, _ in POINTWISE["clamp"].kinks(*bounds))
    return at_low | at_high, at_low, at_high


def _divided(
    choice: tuple[Tensor, ...],
    _: Any,
    g: Tensor,
    tensors: tuple[Tensor, ...],
    parameters: tuple[Any, ...],
    tied: Tensor,
    at_low: Tensor,
    at_high: Tensor,
) -> tuple[Tensor, ...]:
    """An entry gets its choice, and its bound the rest."""
    g_wide = g.to(wide(g))
    to_x = torch.where(at_low, g_wide * choice[0], torch.where(at_high, g_wide * choice[1], 0))
    to_low, to_high = (torch.where(at, g_wide * (1 - c), 0) for at, c in zip((at_low, at_high), choice, strict=True))
    return tuple(t.to(g.dtype) for t in (to_x, to_low, to_high))


# What is native here is read in a compiled backward alone, which then puts 0 in its place.
RULES["clamp"] = Rule("clamp", 3, _at_bounds, _divided, native=0.0)


def clamped(x: Tensor, selection: Selection, low: _Bound, high: _Bound, *, inplace: bool = False) -> Tensor:
    """Clamp with the derivatives at the bounds that ``selection`` names at backward time.

    At a tie with a bound that is a tensor, the Clarke Jacobian in (entry, bound) is (t, 1 - t) for t in [0, 1]: the
    choice is t.

    Args:
        x: Input, floating dtype.
        selection: The choice, read when the backward runs.
        low: The lower bound, a number, a tensor that broadcasts with ``x``, or None.
        high: The upper bound, of the same kind, or None.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.clamp(x, low, high)``, bit for bit.
    """
    if not (isinstance(low, Tensor) or isinstance(high, Tensor)):
        return pointwise("clamp", x, selection, low, high, inplace=inplace)
    if inplace:
        return x.copy_(clamped(x.clone(), selection, low, high))
    stock = torch.clamp(x, low, high)  # type: ignore[arg-type] # it wants both of one kind, and says so
    if not stock.is_floating_point():
        return stock
    nan = torch.full((), float("nan"), dtype=stock.dtype, device=stock.device)
    tensors = (nan if t is None else torch.as_tensor(t) for t in (x, low, high))
    return around("clamp", selection, (), *(t.to(stock.dtype).expand(stock.shape) for t in tensors), stock)
