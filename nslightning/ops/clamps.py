"""Clamping to an interval, and what is made of it: hardtanh, clamp, hardswish, hardsigmoid."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.ops.autograd.layouts import overlaps
from nslightning.ops.autograd.nodes import of_a_leaf, put_in_place
from nslightning.ops.autograd.pointwise import pointwise, pointwise_operation
from nslightning.ops.autograd.routing import ROUTES, Route, around, at_zero, wide
from nslightning.ops.autograd.selection import Selection, fixed, guarded
from nslightning.ops.module_base import ChosenFunction, ChosenModule
from nslightning.ops.record import Call, Kernels, Kink, only, plain, register, spelled

__all__ = [
    "Clamp",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "clamp",
    "clamp_max",
    "clamp_min",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
]

aten = torch.ops.aten
_Bound = float | Tensor | None


# -------------------------------------------------------------------------------------------------------- hardtanh
def _hardtanh_call(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Call | None:
    return Call(x, (min_val, max_val), inplace) if (min_val, max_val) != (0, 6) else None


register(
    pointwise_operation(
        "hardtanh",
        (
            Kink("x = low", lambda low, high: low, lambda low, high: (0.0, 1.0)),
            Kink("x = high", lambda low, high: high, lambda low, high: (1.0, 0.0)),
        ),
        Kernels(
            forward=aten.hardtanh.default,
            forward_=aten.hardtanh_.default,
            backward=lambda g, x, low, high: aten.hardtanh_backward.default(g, x, low, high),
        ),
        at=(-1.0, 1.0),
        formula="min(max(x, low), high)",
        choice="The derivatives of Hardtanh at its lower and its upper bound (bounds 0 and 6 are ``relu6``).",
        modules={
            nn.Hardtanh: only(
                lambda m: (m.min_val, m.max_val) != (0, 6),
                lambda m, x: _hardtanh_call(x, m.min_val, m.max_val, m.inplace),
            )
        },
        functions=spelled(_hardtanh_call, F.hardtanh, aten.hardtanh)
        | spelled(
            lambda x, min_val=-1.0, max_val=1.0: _hardtanh_call(x, min_val, max_val, True), F.hardtanh_, aten.hardtanh_
        ),
        jax=(1.0, 1.0),
        tensorflow=(1.0, 1.0),
        note="Between 0 and 6 it is relu6.",
        example=F.hardtanh,
    )
)


def hardtanh(
    x: Tensor,
    min_val: float = -1.0,
    max_val: float = 1.0,
    at_kinks: tuple[float, float] | None = None,
    inplace: bool = False,
) -> Tensor:
    r"""Hardtanh, the clamping to an interval, with chosen derivatives at its bounds.

    .. math:: y = \min(\max(x, l), u).

    The Clarke Jacobian is [0, 1] at both bounds. PyTorch returns 0 at both; JAX and Keras 1.

    Args:
        x: Input, any shape, floating dtype.
        min_val: The lower bound l.
        max_val: The upper bound u.
        at_kinks: The derivatives at the two bounds; ``None`` is the native choice.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.nn.functional.hardtanh(x, min_val, max_val)``, bit for bit.

    Raises:
        ValueError: If a derivative is not a finite number.

    Example:
        >>> import torch
        >>> x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
        >>> hardtanh(x, at_kinks=(0.25, 0.75)).sum().backward()
        >>> x.grad
        tensor([0.2500, 1.0000, 0.7500])
    """
    selection = fixed("hardtanh", at_kinks)
    return pointwise("hardtanh", x, selection, min_val, max_val, inplace=inplace)


class Hardtanh(ChosenModule, nn.Hardtanh, choice="at_kinks"):
    """:func:`~nslightning.ops.hardtanh` as a module."""


# ----------------------------------------------------------------------------------------------------------- clamp
def _bounds(low: _Bound, high: _Bound) -> tuple[Any, Any]:
    """The bounds where the function has kinks, else NaN: not where the interval is empty or a point."""
    low, high = (float("nan") if bound is None else bound for bound in (low, high))
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        constant = torch.as_tensor(low >= high)
        low, high = (torch.where(constant, float("nan"), bound) for bound in (low, high))
    elif low >= high:
        low = high = float("nan")
    return low, high


def _stock_at_bounds() -> tuple[float, float]:
    """The derivatives that the installed PyTorch returns at the two bounds: they depend on its version."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.tensor([-1.0, 1.0], device="cpu", requires_grad=True)
        (g,) = torch.autograd.grad(x.clamp(-1, 1).sum(), x)
    at_lower, at_upper = g.tolist()
    return at_lower, at_upper


_AT_LOWER, _AT_UPPER = _stock_at_bounds()


def _clamp_backward(g: Tensor, x: Tensor, low: float | None, high: float | None) -> Tensor:
    """Stock's backward, which is no operator; the same operations give the result the same strides."""
    above = None if low is None else x >= low if _AT_LOWER else x > low
    below = None if high is None else x <= high if _AT_UPPER else x < high
    inside = above if below is None else below if above is None else above.logical_and_(below)
    return torch.where(cast(Tensor, inside), g, torch.zeros((), dtype=g.dtype, device=g.device))


def _clamp_call(
    x: Tensor, min: Any = None, max: Any = None, *, inplace: bool = False, out: Tensor | None = None
) -> Call | None:
    return Call(x, (min, max), inplace) if (min, max) != (None, None) and out is None else None


_VERSIONS = "1 up to torch 2.13, 0 in 2.15"
CLAMP = register(
    pointwise_operation(
        "clamp",
        (
            Kink("x = low", lambda low, high: _bounds(low, high)[0], lambda low, high: (0.0, 1.0), stock=_VERSIONS),
            Kink("x = high", lambda low, high: _bounds(low, high)[1], lambda low, high: (1.0, 0.0), stock=_VERSIONS),
        ),
        Kernels(forward=aten.clamp.default, forward_=aten.clamp_.default, backward=_clamp_backward),
        at=(-1.0, 1.0),
        apply=lambda selection, call: clamped(call.x, selection, *call.parameters, inplace=call.inplace),
        formula="min(max(x, low), high)",
        choice=(
            "The derivatives of ``clamp`` at its lower and its upper bound; the native choice depends on the "
            "version of torch (1 up to 2.13, 0 in 2.15)."
        ),
        functions=spelled(_clamp_call, torch.clamp, torch.clip, Tensor.clamp, Tensor.clip, aten.clamp, aten.clip)
        | spelled(
            partial(_clamp_call, inplace=True),
            torch.clamp_,
            torch.clip_,
            Tensor.clamp_,
            Tensor.clip_,
            aten.clamp_,
            aten.clip_,
        )
        | spelled(lambda x, min, **k: _clamp_call(x, min, **k), torch.clamp_min, Tensor.clamp_min, aten.clamp_min)
        | spelled(
            lambda x, min: _clamp_call(x, min, inplace=True), torch.clamp_min_, Tensor.clamp_min_, aten.clamp_min_
        )
        | spelled(lambda x, max, **k: _clamp_call(x, None, max, **k), torch.clamp_max, Tensor.clamp_max, aten.clamp_max)
        | spelled(
            lambda x, max: _clamp_call(x, None, max, inplace=True), torch.clamp_max_, Tensor.clamp_max_, aten.clamp_max_
        ),
        jax=(0.5, 0.5),
        tensorflow=(1.0, 1.0),
        note="clamp_min and clamp_max have one bound. Bounds may be tensors: at a tie the bound receives the rest.",
        example=lambda x: x.clamp(-1, 1),
    )
)


def _at_bounds(tensors: tuple[Tensor, ...], parameters: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    x, *bounds = tensors
    at_low, at_high = (x == position for position in CLAMP.positions(*bounds))
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


# Only a compiled backward reads the native value, and then puts 0 in its place.
ROUTES["clamp"] = Route("clamp", 3, _at_bounds, _divided, native=0.0)
# The divisor of a normalisation is a norm clamped from below.
ROUTES["clamp_min"] = at_zero("clamp", _AT_LOWER)


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
        if torch.is_grad_enabled() and (of_a_leaf(x) or overlaps(x)):
            return guarded(x.clamp_(low, high), "clamp", selection)  # type: ignore[arg-type] # as above
        return put_in_place(x, clamped(x.clone(), selection, low, high))
    stock = torch.clamp(x, low, high)  # type: ignore[arg-type] # it wants both of one kind, and says so
    if not stock.is_floating_point():
        return stock
    nan = torch.full((), float("nan"), dtype=stock.dtype, device=stock.device)
    tensors = (nan if t is None else torch.as_tensor(t) for t in (x, low, high))
    return around("clamp", selection, (), *(t.to(stock.dtype).expand(stock.shape) for t in tensors), stock)


def clamp(
    x: Tensor,
    min: float | Tensor | None = None,
    max: float | Tensor | None = None,
    at_bounds: tuple[float, float] | None = None,
    inplace: bool = False,
) -> Tensor:
    r"""The clamping to an interval with chosen derivatives at its bounds.

    .. math:: y = \min(\max(x, l), u).

    The Clarke Jacobian is [0, 1] at both bounds where l < u; elsewhere the function is constant and no choice is taken.
    PyTorch returns 1 up to version 2.13 and 0 in 2.15, JAX 1/2, TensorFlow 1. A NaN input passes 0, as stock; so it is
    not :func:`hardtanh`, where it passes the gradient. At a tie with a bound that is a tensor the Clarke Jacobian in
    (entry, bound) is (t, 1 - t) for t in [0, 1], the choice is t, and PyTorch 2.15 returns halves.

    Args:
        x: Input, any shape, floating dtype.
        min: The lower bound l, a number or a tensor that broadcasts with ``x``; ``None`` for none.
        max: The upper bound u, of the same kind; ``None`` for none.
        at_bounds: The derivatives at the two bounds; ``None`` is the native choice.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.clamp(x, min, max)``, bit for bit.

    Raises:
        ValueError: If a derivative is not a finite number.
        RuntimeError: If neither bound is given, as in PyTorch.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
        >>> clamp(x, 0, 1, at_bounds=(0.25, 0.75)).sum().backward()
        >>> x.grad
        tensor([0.2500, 1.0000, 0.7500])
    """
    return clamped(x, fixed("clamp", at_bounds), min, max, inplace=inplace)


def clamp_min(x: Tensor, min: float | Tensor, at_bound: float | None = None, inplace: bool = False) -> Tensor:
    """:func:`clamp` with a lower bound alone.

    Args:
        x: Input, any shape, floating dtype.
        min: The lower bound.
        at_bound: The derivative there; ``None`` is the native choice.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.clamp_min(x, min)``, bit for bit.

    Raises:
        ValueError: If ``at_bound`` is neither None nor a finite number.
    """
    return clamp(x, min, None, None if at_bound is None else (at_bound, 0.0), inplace)


def clamp_max(x: Tensor, max: float | Tensor, at_bound: float | None = None, inplace: bool = False) -> Tensor:
    """:func:`clamp` with an upper bound alone.

    Args:
        x: Input, any shape, floating dtype.
        max: The upper bound.
        at_bound: The derivative there; ``None`` is the native choice.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.clamp_max(x, max)``, bit for bit.

    Raises:
        ValueError: If ``at_bound`` is neither None nor a finite number.
    """
    return clamp(x, None, max, None if at_bound is None else (0.0, at_bound), inplace)


class Clamp(ChosenFunction):
    """:func:`~nslightning.ops.clamp` as a module."""

    fields = ("clamp",)

    def __init__(
        self,
        min: float | None = None,
        max: float | None = None,
        inplace: bool = False,
        *,
        at_bounds: tuple[float, float] | None = None,
    ) -> None:
        if min is None and max is None:
            raise ValueError("Clamp takes at least one bound: min=..., max=..., or both")
        super().__init__(at_bounds, min=min, max=max, inplace=inplace, at_bounds=at_bounds)

    def forward(self, x: Tensor) -> Tensor:
        """Clamp a tensor of any shape."""
        low, high, inplace, _ = self.arguments.values()
        return pointwise("clamp", x, self.selection, low, high, inplace=inplace)


# ------------------------------------------------------------------------------------------------------- hardswish
register(
    pointwise_operation(
        "hardswish",
        (
            Kink("x = -3", lambda: -3.0, lambda: (0.0, -0.5)),
            Kink("x = 3", lambda: 3.0, lambda: (1.5, 1.0)),
        ),
        Kernels(
            forward=aten.hardswish.default,
            forward_=aten.hardswish_.default,
            backward=aten.hardswish_backward.default,
        ),
        formula="x min(max(x + 3, 0), 6) / 6",
        choice="The derivatives of Hardswish at -3 and at 3.",
        modules={nn.Hardswish: lambda m, x: Call(x, inplace=m.inplace)},
        functions=plain("hardswish"),
        example=F.hardswish,
    )
)


def hardswish(x: Tensor, at_kinks: tuple[float, float] | None = None, inplace: bool = False) -> Tensor:
    r"""Hardswish with chosen derivatives at -3 and at 3.

    .. math:: y = x \min(\max(x + 3, 0), 6) / 6.

    The Clarke Jacobian is [-1/2, 0] at -3 and [1, 3/2] at 3. PyTorch, JAX and Keras return 0 and 1.

    Args:
        x: Input, any shape, floating dtype.
        at_kinks: The derivatives at -3 and at 3; ``None`` is the native choice.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.nn.functional.hardswish(x)``, bit for bit.

    Raises:
        ValueError: If a derivative is not a finite number.
    """
    return pointwise("hardswish", x, fixed("hardswish", at_kinks), inplace=inplace)


class Hardswish(ChosenModule, nn.Hardswish, choice="at_kinks"):
    """:func:`~nslightning.ops.hardswish` as a module."""


# ----------------------------------------------------------------------------------------------------- hardsigmoid
register(
    pointwise_operation(
        "hardsigmoid",
        (
            Kink("x = -3", lambda: -3.0, lambda: (0.0, 1 / 6)),
            Kink("x = 3", lambda: 3.0, lambda: (1 / 6, 0.0)),
        ),
        Kernels(
            forward=aten.hardsigmoid.default,
            forward_=aten.hardsigmoid_.default,
            backward=aten.hardsigmoid_backward.default,
        ),
        formula="min(max(x + 3, 0), 6) / 6",
        choice="The derivatives of Hardsigmoid at -3 and at 3.",
        modules={nn.Hardsigmoid: lambda m, x: Call(x, inplace=m.inplace)},
        functions=plain("hardsigmoid"),
        example=F.hardsigmoid,
    )
)


def hardsigmoid(x: Tensor, at_kinks: tuple[float, float] | None = None, inplace: bool = False) -> Tensor:
    r"""Hardsigmoid with chosen derivatives at -3 and at 3.

    .. math:: y = \min(\max(x + 3, 0), 6) / 6.

    The Clarke Jacobian is [0, 1/6] at both. PyTorch, JAX and Keras return 0.

    Args:
        x: Input, any shape, floating dtype.
        at_kinks: The derivatives at -3 and at 3; ``None`` is the native choice.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.nn.functional.hardsigmoid(x)``, bit for bit.

    Raises:
        ValueError: If a derivative is not a finite number.
    """
    return pointwise("hardsigmoid", x, fixed("hardsigmoid", at_kinks), inplace=inplace)


class Hardsigmoid(ChosenModule, nn.Hardsigmoid, choice="at_kinks"):
    """:func:`~nslightning.ops.hardsigmoid` as a module."""
