"""Maxima and minima: over all entries, along dimensions, and of two tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from nslightning.ops.autograd.routing import ROUTES, Route, around, dimensions, own, restored, wide
from nslightning.ops.autograd.selection import Selection, fixed, replayed
from nslightning.ops.module_base import ChosenFunction
from nslightning.ops.record import Call, Count, Kink, Operation, ShareName, register, spelled

__all__ = [
    "Amax",
    "Amin",
    "Aminmax",
    "Fmax",
    "Fmin",
    "Max",
    "Maximum",
    "Min",
    "Minimum",
    "amax",
    "amin",
    "aminmax",
    "fmax",
    "fmin",
    "max",
    "maximum",
    "min",
    "minimum",
]

aten = torch.ops.aten
_Spellings = dict[Callable, Callable[..., Call | None]]
_STOCK: dict[str, Callable[..., Any]] = {
    name: getattr(torch, name)
    for name in ("max", "min", "amax", "amin", "aminmax", "maximum", "minimum", "fmax", "fmin")
}


# ------------------------------------------------------------------------------------------------- along dimensions
def _remember(tensors: tuple[Tensor, ...], parameters: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Return which entries reach their maximum, and which of them has its index."""
    x, picked = tensors
    dims, keepdim = parameters
    picked = restored(picked, dims, keepdim)
    return x == x.gather(dims[0], picked), picked


def _among_remembered(tensors: tuple[Tensor, ...], parameters: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return _counted(tensors[0], *parameters)


def _reached(tensors: tuple[Tensor, ...], parameters: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return which results are tied, which entries reach their maximum, and how many of them do."""
    x, maxima = tensors
    return _counted(x == restored(maxima, *parameters), *parameters)


def _counted(reached: Tensor, dims: tuple[int, ...], keepdim: bool) -> tuple[Tensor, Tensor, Tensor]:
    count = reached.sum(dims, keepdim=True)
    tied = count > 1
    return tied if keepdim else tied.squeeze(dims), reached, count


def _share(
    choice: tuple[Tensor, ...],
    uniform: Callable[[Tensor], Tensor] | None,
    g: Tensor,
    tensors: tuple[Tensor, ...],
    parameters: tuple[Any, ...],
    tied: Tensor,
    reached: Tensor,
    count: Tensor,
    picked: Tensor | None = None,
) -> tuple[Tensor]:
    """The gradients of the entries that reach a maximum together with others."""
    native, share, each, first, last = choice
    dims, keepdim = parameters
    at = each
    if uniform is not None:
        native, share, at = torch.zeros(3, dtype=wide(g)).unbind()
        rank = _rank(reached, dims)
        at = (rank == (uniform(count) * count).floor() + 1).to(wide(g))
    elif replayed(g) or first + last != 0:
        rank = _rank(reached, dims)
        at = each + first * (rank == 1) + last * (rank == count)
    if picked is None:  # stock shares equally
        share = share + native
    else:
        at = at + native * torch.zeros_like(reached).scatter(dims[0], picked, True)
    wide_g = restored(g, dims, keepdim).to(wide(g))
    value = torch.where(share != 0, wide_g * share / count, 0) + torch.where(at != 0, wide_g * at, 0)
    return (torch.where(reached & (count > 1), value, 0).to(g.dtype),)


def _share_with_picked(
    choice: Any, uniform: Any, g: Tensor, tensors: tuple[Tensor, ...], parameters: Any, *known: Tensor
) -> tuple[Tensor]:
    tied, reached, count = known
    return _share(choice, uniform, g, tensors, parameters, tied, reached, count, tensors[1])


def _rank(reached: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Among the tied entries, in row-major order over ``dims``, which one: 1 is the first."""
    order = [*(d for d in range(reached.dim()) if d not in dims), *sorted(dims)]
    moved = reached.permute(order)
    rank = moved.flatten(reached.dim() - len(dims)).cumsum(-1).view(moved.shape)
    return rank.permute([order.index(d) for d in range(reached.dim())])


ROUTES["max"] = Route("max", 1, _reached, _share, reduces=True)
# Stock keeps the index, not the input, which may therefore be overwritten.
ROUTES["max_at_index"] = Route("max", 1, _among_remembered, _share_with_picked, reduces=True, remember=_remember)


@own
def reduction(function: str, x: Tensor, selection: Selection, dim: Any = None, keepdim: bool = False) -> Any:
    """Reduce to the maximum or the minimum with the choice that ``selection`` names at backward time.

    Args:
        function: ``"max"``, ``"min"``, ``"amax"``, ``"amin"`` or ``"aminmax"``.
        x: Input, any shape, floating dtype.
        selection: The choice, read when the backward runs.
        dim: The dimension; several for ``amax`` and ``amin``; None is all.
        keepdim: Keep the reduced dimensions with size 1.

    Returns:
        The stock function's result, bit for bit: a tensor, for ``max`` and ``min`` along a dimension ``(values,
        indices)``, for ``aminmax`` ``(min, max)``.
    """
    stock: Any
    if function == "aminmax":
        stock = torch.aminmax(x, dim=dim, keepdim=keepdim)
    elif function in ("max", "min") and dim is None:
        stock = _STOCK[function](x)
    else:
        stock = _STOCK[function](x, () if dim is None else dim, keepdim)
    if x.dim() == 0:
        return stock
    dims = dimensions(x, dim)
    if isinstance(stock, Tensor):
        return around("max", selection, (dims, keepdim), x, stock.detach(), stock)
    if function == "aminmax":
        chosen = (around("max", selection, (dims, keepdim), x, value.detach(), value) for value in stock)
        return type(stock)(chosen)
    values = around("max_at_index", selection, (dims, keepdim), x, stock[1], stock[0])
    return type(stock)((values, stock[1]))


def tied_reductions(function: str, x: Tensor, dim: Any = None, keepdim: bool = False) -> tuple[Count, int]:
    """Count how many of a reduction's results are reached by several entries.

    Args:
        function: As for :func:`reduction`.
        x: Input, any shape, floating dtype.
        dim: The dimensions; None is all.
        keepdim: Not read: as :func:`reduction` takes it.

    Returns:
        ``(tied results, results)``, the first on the input's device.
    """
    if x.dim() == 0:
        return 0, 1
    dims = dimensions(x, dim)
    ends = {"aminmax": ("amin", "amax"), "max": ("amax",), "min": ("amin",)}.get(function, (function,))
    tied = [_reached((x, _STOCK[end](x, dims, True)), (dims, True))[0] for end in ends]
    return sum(torch.count_nonzero(t) for t in tied), sum(t.numel() for t in tied)


# -------------------------------------------------------------------------------------------------- of two tensors
def _equal(tensors: tuple[Tensor, ...], parameters: tuple[Any, ...]) -> tuple[Tensor]:
    x, y = tensors
    return (x == y,)


def _between_two(
    choice: tuple[Tensor, ...],
    uniform: Callable[[Tensor], Tensor] | None,
    g: Tensor,
    tensors: tuple[Tensor, ...],
    parameters: tuple[Any, ...],
    tied: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of two equal entries; the parameters are stock's share of the first and of the second."""
    native, share, each, first, last = choice
    native_to_x, native_to_y = parameters
    to_x, to_y = native * native_to_x + share / 2 + each + first, native * native_to_y + share / 2 + each + last
    if uniform is not None:
        to_x = (uniform(g) < 0.5).to(wide(g))
        to_y = 1 - to_x
    both = (torch.where(tied & (c != 0), g.to(wide(g)) * c, 0).to(g.dtype) for c in (to_x, to_y))
    return cast(tuple[Tensor, Tensor], tuple(both))


ROUTES["maximum"] = Route("maximum", 2, _equal, _between_two)


def _stock_shares(function: str) -> tuple[float, float]:
    """The shares that the installed PyTorch gives to two equal entries: halves, but fmax of 2.11 gives all to one."""
    with torch.inference_mode(False), torch.enable_grad():
        x, y = torch.zeros(2, dtype=torch.float64, device="cpu", requires_grad=True).unbind()
        to_x, to_y = torch.autograd.grad(_STOCK[function](x, y), (x, y))
    return to_x.item(), to_y.item()


_STOCK_SHARES = {name: _stock_shares(name) for name in ("maximum", "minimum", "fmax", "fmin")}


@own
def pair(function: str, x: Tensor, other: Tensor, selection: Selection) -> Tensor:
    """The greater or smaller of two tensors with the choice that ``selection`` names at backward time.

    Args:
        function: ``"maximum"``, ``"minimum"``, ``"fmax"`` or ``"fmin"``.
        x: First input, floating dtype.
        other: Second input; the shapes broadcast, the dtypes promote.
        selection: The choice, read when the backward runs.

    Returns:
        The stock function's result, bit for bit.
    """
    stock: Tensor = _STOCK[function](x, other)
    if not stock.is_floating_point():
        return stock
    x, other = (t.to(stock.dtype).expand(stock.shape) for t in (x, other))
    return around("maximum", selection, _STOCK_SHARES[function], x, other, stock)


def tied_pairs(x: Tensor, other: Tensor) -> tuple[Tensor, int]:
    """Count how many pairs of entries are equal.

    Args:
        x: First input.
        other: Second input; the shapes broadcast.

    Returns:
        ``(equal pairs, pairs)``, the first on the inputs' device.
    """
    equal = x == other
    return torch.count_nonzero(equal), equal.numel()


# --------------------------------------------------------------------------------------------------------- records
def _reduced(
    function: str,
    x: Tensor,
    dim: Any = None,
    keepdim: bool = False,
    *,
    other: Tensor | None = None,
    out: Any = None,
) -> Call | None:
    if isinstance(dim, (str, Tensor)) or other is not None or out is not None:
        return None
    return Call(x, (function, dim, keepdim))


def _compared(function: str, x: Tensor, other: Any = None, *keepdim: Any, out: Any = None, **_: Any) -> Any:
    if not isinstance(other, Tensor) or keepdim or out is not None:
        return None
    return Call(x if x.is_floating_point() else x.to(torch.result_type(x, other)), (function, other))


def _homes(name: str) -> list[Callable]:
    return [function for home in (torch, Tensor, aten) if (function := getattr(home, name, None)) is not None]


def _maxima() -> tuple[_Spellings, _Spellings]:
    """``max(x)`` and ``max(x, dim)`` are one operation, ``max(x, other)`` is another."""
    reductions: _Spellings = {}
    pairs: _Spellings = {}
    for name in ("max", "min", "amax", "amin", "aminmax"):
        reductions |= spelled(partial(_reduced, name), *_homes(name))
    for name in ("maximum", "minimum", "fmax", "fmin"):
        pairs |= spelled(partial(_compared, name), *_homes(name))
    for name in ("max", "min"):
        pairs |= spelled(partial(_compared, f"{name}imum"), *_homes(name))
    return reductions, pairs


_REDUCTIONS, _PAIRS = _maxima()
register(
    Operation(
        name="max",
        formula="the maximum, or the minimum, over all entries or along dimensions",
        kinks=(
            Kink(
                "k > 1 entries reach the maximum",
                clarke="the convex hull of the unit vectors of the tied entries",
                stock="max(dim), min(dim): all to the entry that the index names; all others: equal shares",
            ),
        ),
        choice=(
            "As ``max_pool``, for ``max``, ``min``, ``amax``, ``amin`` and ``aminmax``, over all entries or along "
            "dimensions. The native choice differs: ``max(dim)`` gives all to the entry that its index names, the "
            "others share equally, so that every number beta means the same for them."
        ),
        apply=lambda selection, call: reduction(call.parameters[0], call.x, selection, *call.parameters[1:]),
        ties=lambda call: tied_reductions(call.parameters[0], call.x, *call.parameters[1:]),
        functions=_REDUCTIONS,
        shares=True,
        corners=lambda *parameters: ("first", "last", *("random",) * 4),
        jax="minimal",
        tensorflow="minimal",
        example=lambda x: x.amax(),
        at=(1.0,),
    )
)
register(
    Operation(
        name="maximum",
        formula="the greater, or the smaller, of two entries",
        kinks=(
            Kink("x = y", clarke="(t, 1 - t) for t in [0, 1]", stock="(1/2, 1/2); fmax, fmin in torch 2.11: (1, 0)"),
        ),
        choice=(
            "As ``max_pool``, for ``maximum``, ``minimum``, ``fmax`` and ``fmin``. The native choice is halves, of "
            "``fmax`` and ``fmin`` in torch 2.11 all to the first. The first entry is the first argument."
        ),
        apply=lambda selection, call: pair(call.parameters[0], call.x, call.parameters[1], selection),
        ties=lambda call: tied_pairs(call.x, call.parameters[1]),
        functions=_PAIRS,
        shares=True,
        corners=lambda *parameters: ("first", "last"),
        tensorflow="first",
        note="Where the native choice is halves, it is the minimal one, and every number beta gives the same.",
        example=lambda x: torch.maximum(x[:1], x[1:]),
        at=(1.0,),
    )
)


# --------------------------------------------------------------------------------------------------------- public
def max(
    x: Tensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Any:
    r"""The maximum over all entries, or values and indices along a dimension.

    Where :math:`k > 1` entries reach the maximum, the Clarke Jacobian is the convex hull of their unit vectors.
    PyTorch gives the whole gradient to the entry whose index it returns, and shares it equally where it reduces
    over all entries; JAX and TensorFlow always share equally.

    Args:
        x: Input, any shape, floating dtype.
        dim: The dimension; None is all.
        keepdim: Keep the reduced dimensions with size 1.
        jacobian: A number beta or a name; see :class:`~nslightning.Jacobians`. None is the native choice.
        seed: Seeds ``jacobian="random"``.

    Returns:
        ``torch.max(...)``, bit for bit: a tensor, or with ``dim`` the named tuple ``(values, indices)``.

    Raises:
        ValueError: If the choice is unknown.

    Example:
        >>> x = torch.tensor([2.0, 2.0, 1.0], requires_grad=True)
        >>> max(x, 0, jacobian="last").values.backward()
        >>> x.grad
        tensor([0., 1., 0.])
    """
    return reduction("max", x, fixed("max", jacobian, seed=seed), dim, keepdim)


def min(
    x: Tensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Any:
    r"""The minimum over all entries, or values and indices along a dimension.

    Where :math:`k > 1` entries reach the minimum, the Clarke Jacobian is the convex hull of their unit vectors.
    PyTorch gives the whole gradient to the entry whose index it returns, and shares it equally where it reduces
    over all entries; JAX and TensorFlow always share equally.

    Args:
        x: Input, any shape, floating dtype.
        dim: The dimension; None is all.
        keepdim: Keep the reduced dimensions with size 1.
        jacobian: A number beta or a name; see :class:`~nslightning.Jacobians`. None is the native choice.
        seed: Seeds ``jacobian="random"``.

    Returns:
        ``torch.min(...)``, bit for bit: a tensor, or with ``dim`` the named tuple ``(values, indices)``.

    Raises:
        ValueError: If the choice is unknown.

    Example:
        >>> x = torch.tensor([1.0, 1.0, 2.0], requires_grad=True)
        >>> min(x, 0, jacobian="last").values.backward()
        >>> x.grad
        tensor([0., 1., 0.])
    """
    return reduction("min", x, fixed("max", jacobian, seed=seed), dim, keepdim)


def amax(
    x: Tensor,
    dim: int | tuple[int, ...] | None = None,
    keepdim: bool = False,
    *,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Tensor:
    r"""The maximum along dimensions.

    Where :math:`k > 1` entries reach the maximum, the Clarke Jacobian is the convex hull of their unit vectors.
    PyTorch, JAX and TensorFlow share the gradient equally, so that each number beta is the same here.

    Args:
        x: Input, any shape, floating dtype.
        dim: The dimensions; None is all.
        keepdim: Keep the reduced dimensions with size 1.
        jacobian: A number beta or a name; see :class:`~nslightning.Jacobians`. None is the native choice.
        seed: Seeds ``jacobian="random"``.

    Returns:
        ``torch.amax(...)``, bit for bit.

    Raises:
        ValueError: If the choice is unknown.

    Example:
        >>> x = torch.tensor([2.0, 2.0, 1.0], requires_grad=True)
        >>> amax(x, jacobian="first").backward()
        >>> x.grad
        tensor([1., 0., 0.])
    """
    return cast(Tensor, reduction("amax", x, fixed("max", jacobian, seed=seed), dim, keepdim))


def amin(
    x: Tensor,
    dim: int | tuple[int, ...] | None = None,
    keepdim: bool = False,
    *,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Tensor:
    r"""The minimum along dimensions.

    Where :math:`k > 1` entries reach the minimum, the Clarke Jacobian is the convex hull of their unit vectors.
    PyTorch, JAX and TensorFlow share the gradient equally, so that each number beta is the same here.

    Args:
        x: Input, any shape, floating dtype.
        dim: The dimensions; None is all.
        keepdim: Keep the reduced dimensions with size 1.
        jacobian: A number beta or a name; see :class:`~nslightning.Jacobians`. None is the native choice.
        seed: Seeds ``jacobian="random"``.

    Returns:
        ``torch.amin(...)``, bit for bit.

    Raises:
        ValueError: If the choice is unknown.

    Example:
        >>> x = torch.tensor([1.0, 1.0, 2.0], requires_grad=True)
        >>> amin(x, jacobian="first").backward()
        >>> x.grad
        tensor([1., 0., 0.])
    """
    return cast(Tensor, reduction("amin", x, fixed("max", jacobian, seed=seed), dim, keepdim))


def aminmax(
    x: Tensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Any:
    r"""The minimum and the maximum at once.

    Where :math:`k > 1` entries reach one of them, the Clarke Jacobian is the convex hull of their unit vectors.
    PyTorch, JAX and TensorFlow share the gradient equally, so that each number beta is the same here.

    Args:
        x: Input, any shape, floating dtype.
        dim: The dimension; None is all.
        keepdim: Keep the reduced dimensions with size 1.
        jacobian: A number beta or a name; see :class:`~nslightning.Jacobians`. None is the native choice.
        seed: Seeds ``jacobian="random"``.

    Returns:
        ``torch.aminmax(...)``, bit for bit: the named tuple ``(min, max)``.

    Raises:
        ValueError: If the choice is unknown.

    Example:
        >>> x = torch.tensor([2.0, 2.0, 1.0], requires_grad=True)
        >>> aminmax(x, jacobian="first").max.backward()
        >>> x.grad
        tensor([1., 0., 0.])
    """
    return reduction("aminmax", x, fixed("max", jacobian, seed=seed), dim, keepdim)


def maximum(x: Tensor, other: Tensor, *, jacobian: float | ShareName | None = None, seed: int = 0) -> Tensor:
    r"""The greater of two entries.

    At x = y the Clarke Jacobian is the segment between (1, 0) and (0, 1). PyTorch and JAX return (1/2, 1/2), which
    is also what each number beta gives; TensorFlow returns (1, 0).

    Args:
        x: First input, floating dtype.
        other: Second input; the shapes broadcast, the dtypes promote.
        jacobian: ``"first"`` is (1, 0), ``"last"`` (0, 1), ``"sum"`` (1, 1), ``"random"`` one of the first two; a
            number, ``"minimal"``, ``"native"`` and None are (1/2, 1/2).
        seed: Seeds ``jacobian="random"``.

    Returns:
        ``torch.maximum(x, other)``, bit for bit.

    Raises:
        ValueError: If the choice is unknown.

    Example:
        >>> x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> maximum(x, y, jacobian="first").sum().backward()
        >>> x.grad, y.grad
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    return pair("maximum", x, other, fixed("maximum", jacobian, seed=seed))


def minimum(x: Tensor, other: Tensor, *, jacobian: float | ShareName | None = None, seed: int = 0) -> Tensor:
    r"""The smaller of two entries.

    At x = y the Clarke Jacobian is the segment between (1, 0) and (0, 1). PyTorch and JAX return (1/2, 1/2), which
    is also what each number beta gives; TensorFlow returns (1, 0).

    Args:
        x: First input, floating dtype.
        other: Second input; the shapes broadcast, the dtypes promote.
        jacobian: ``"first"`` is (1, 0), ``"last"`` (0, 1), ``"sum"`` (1, 1), ``"random"`` one of the first two; a
            number, ``"minimal"``, ``"native"`` and None are (1/2, 1/2).
        seed: Seeds ``jacobian="random"``.

    Returns:
        ``torch.minimum(x, other)``, bit for bit.

    Raises:
        ValueError: If the choice is unknown.

    Example:
        >>> x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> minimum(x, y, jacobian="first").sum().backward()
        >>> x.grad, y.grad
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    return pair("minimum", x, other, fixed("maximum", jacobian, seed=seed))


def fmax(x: Tensor, other: Tensor, *, jacobian: float | ShareName | None = None, seed: int = 0) -> Tensor:
    r"""The greater of two entries, NaN aside.

    At x = y the Clarke Jacobian is the segment between (1, 0) and (0, 1). PyTorch returns (1/2, 1/2), which is also
    what each number beta gives; torch 2.11 returns (1, 0). Where one entry is NaN the other one is taken.

    Args:
        x: First input, floating dtype.
        other: Second input; the shapes broadcast, the dtypes promote.
        jacobian: ``"first"`` is (1, 0), ``"last"`` (0, 1), ``"sum"`` (1, 1), ``"random"`` one of the first two; a
            number, ``"minimal"``, ``"native"`` and None are (1/2, 1/2).
        seed: Seeds ``jacobian="random"``.

    Returns:
        ``torch.fmax(x, other)``, bit for bit.

    Raises:
        ValueError: If the choice is unknown.

    Example:
        >>> x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> fmax(x, y, jacobian="first").sum().backward()
        >>> x.grad, y.grad
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    return pair("fmax", x, other, fixed("maximum", jacobian, seed=seed))


def fmin(x: Tensor, other: Tensor, *, jacobian: float | ShareName | None = None, seed: int = 0) -> Tensor:
    r"""The smaller of two entries, NaN aside.

    At x = y the Clarke Jacobian is the segment between (1, 0) and (0, 1). PyTorch returns (1/2, 1/2), which is also
    what each number beta gives; torch 2.11 returns (1, 0). Where one entry is NaN the other one is taken.

    Args:
        x: First input, floating dtype.
        other: Second input; the shapes broadcast, the dtypes promote.
        jacobian: ``"first"`` is (1, 0), ``"last"`` (0, 1), ``"sum"`` (1, 1), ``"random"`` one of the first two; a
            number, ``"minimal"``, ``"native"`` and None are (1/2, 1/2).
        seed: Seeds ``jacobian="random"``.

    Returns:
        ``torch.fmin(x, other)``, bit for bit.

    Raises:
        ValueError: If the choice is unknown.

    Example:
        >>> x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> fmin(x, y, jacobian="first").sum().backward()
        >>> x.grad, y.grad
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    return pair("fmin", x, other, fixed("maximum", jacobian, seed=seed))


class _Reduction(ChosenFunction):
    fields = ("max",)

    def __init__(
        self,
        dim: int | tuple[int, ...] | None = None,
        keepdim: bool = False,
        *,
        jacobian: float | ShareName | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(jacobian, seed, dim=dim, keepdim=keepdim, jacobian=jacobian)

    def forward(self, x: Tensor) -> Any:
        """Reduce a tensor of any shape."""
        return reduction(
            type(self).__name__.lower(), x, self.selection, self.arguments["dim"], self.arguments["keepdim"]
        )


class _Pair(ChosenFunction):
    fields = ("maximum",)

    def __init__(self, *, jacobian: float | ShareName | None = None, seed: int = 0) -> None:
        super().__init__(jacobian, seed, jacobian=jacobian)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """Compare two tensors whose shapes broadcast."""
        return pair(type(self).__name__.lower(), x, other, self.selection)


class Max(_Reduction):
    """:func:`~nslightning.ops.max` as a module."""


class Min(_Reduction):
    """:func:`~nslightning.ops.min` as a module."""


class Amax(_Reduction):
    """:func:`~nslightning.ops.amax` as a module."""


class Amin(_Reduction):
    """:func:`~nslightning.ops.amin` as a module."""


class Aminmax(_Reduction):
    """:func:`~nslightning.ops.aminmax` as a module."""


class Maximum(_Pair):
    """:func:`~nslightning.ops.maximum` as a module."""


class Minimum(_Pair):
    """:func:`~nslightning.ops.minimum` as a module."""


class Fmax(_Pair):
    """:func:`~nslightning.ops.fmax` as a module."""


class Fmin(_Pair):
    """:func:`~nslightning.ops.fmin` as a module."""
