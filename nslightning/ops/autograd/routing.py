"""A chosen Jacobian around a stock operation, which keeps its own backward.

The operations that reduce or compare work this way. Their result passes through a node that sees its gradient first.
The node passes the gradients of untied evaluations on to the stock operation. It sends the gradients of ties straight
to the inputs, as the selection says when the backward runs. Where the forward met no tie, in eager mode on a CPU, the
node is left out and the stock operation runs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from nslightning._torch import disable_function_modes, in_forward_mode, in_functorch, sequence_number
from nslightning.ops.autograd.layouts import is_dense
from nslightning.ops.autograd.nodes import NonsmoothFunction
from nslightning.ops.autograd.selection import Selection, data_dependent, guarded, replayed

__all__ = ["ROUTES", "Route", "around", "at_zero", "dimensions", "own", "restored", "watchers", "wide"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
#: Each is called with the range of autograd nodes that an operation's own call made; empty unless a graph is examined.
watchers: list[Callable[[int, int], None]] = []


@dataclass(frozen=True, eq=False)
class Route:
    """The way that the gradients of one kind of operation take around the stock operation at ties.

    Args:
        field: The field of :class:`~nslightning.Jacobians` that chooses.
        inputs: Number of the tensors that are inputs that take gradients; they come first.
        ties: ``(tensors, parameters) -> (tied, ...)``: the mask of the results that are ties, and the further
            tensors that ``gradients`` reads.
        gradients: ``(choice, uniform, g, tensors, parameters, tied, ...) -> gradients`` of the inputs, 0 away from
            ties. ``choice`` is the chosen derivatives or weights, each 0-d; ``uniform``, for the random choice only,
            draws a number in [0, 1) for each entry of a tensor.
        native: Stock's own choice, for a field that is one derivative; None for one that shares.
        added: One result may sum over ties and others: the gradients are added to the stock ones, which are 0 at
            the ties.
        reduces: The parameters begin with the dimensions that were reduced away, and whether they are kept.
        remember: ``(tensors, parameters) -> tensors``: replaces the tensors after the forward, where stock does not
            keep the input and the next layer may overwrite it. ``ties`` and ``gradients`` then receive these.
    """

    field: str
    inputs: int
    ties: Callable[..., tuple[Tensor, ...]]
    gradients: Callable[..., tuple[Tensor, ...]]
    native: float | None = None
    added: bool = False
    reduces: bool = False
    remember: Callable[..., tuple[Tensor, ...]] | None = None


#: The routes by name; an operation may have several.
ROUTES: dict[str, Route] = {}


def at_zero(field: str, native: float) -> Route:
    r"""A route for results that are sums of :math:`s\,f(u)`, f with a kink at 0: the inputs are u, the constants s.

    Args:
        field: The field that chooses f's derivative at 0.
        native: Stock's.

    Returns:
        The route.
    """

    def ties(tensors: tuple[Tensor, ...], parameters: tuple[Any, ...]) -> tuple[Tensor]:
        u, scale = tensors
        return ((u == 0) & (scale != 0),)

    def gradients(
        choice: tuple[Tensor, ...], _: Any, g: Tensor, tensors: tuple[Tensor, ...], parameters: Any, tied: Tensor
    ) -> tuple[Tensor]:
        u, scale = tensors
        g = restored(g, *parameters).to(wide(g))
        return (torch.where(tied, g * (choice[0] - native) * scale, 0).to(u.dtype),)

    return Route(field, 1, ties, gradients, native, added=True, reduces=True)


class _Around(NonsmoothFunction):
    """The identity on the last tensor; its gradient is divided between it and the inputs, which come first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(route: str, kept: int, selection: Selection, parameters: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        # Not a view: the result may be overwritten wherever stock's may, for the version counter is shared.
        return tensors[-1].detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.route, kept, ctx.selection, ctx.parameters, *tensors = inputs
        ctx.operation, ctx.tensors = ROUTES[ctx.route].field, len(tensors)
        ctx.save_for_backward(*tensors[kept:-1])  # not the result: the next layer may overwrite it

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        route, selection, tensors = ROUTES[ctx.route], ctx.selection, ctx.saved_tensors
        vjp = partial(_vjp, route, ctx.parameters, tensors, g)
        if not torch.compiler.is_compiling() and selection.recorder is not None:
            selection.recorder(ctx, lambda other: vjp(other)[0])
        if not replayed(g) and _stock(route, _choice(route, selection)):
            return (*[None] * (3 + ctx.tensors), g)
        gradients, rest = vjp(selection)
        none: list[None] = [None] * (ctx.tensors - 1 - route.inputs)
        return (*(None,) * 4, *gradients, *none, rest)


class _AroundBothWays(_Around):
    """Adds forward-mode differentiation; ``torch.compile`` takes no function with a ``jvp``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Around.setup_context(ctx, inputs, output)
        kept, tensors = inputs[1], inputs[4:]
        ctx.save_for_forward(*tensors[kept:-1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        route, parameters, last = ROUTES[ctx.route], ctx.parameters, cast(Tensor, tangents[-1])
        # The gradients are coefficients times g, and 0 or 1 times g is left to stock: with g = 1 these are the numbers.
        coefficients, left = _vjp(route, parameters, ctx.saved_tensors, torch.ones_like(last), ctx.selection)
        if _stock(route, _choice(route, ctx.selection)):
            return last.clone()
        shape = restored(last, *parameters[:2]).shape if route.reduces else last.shape
        chosen = [(c * t).sum_to_size(shape) for c, t in zip(coefficients, tangents[4:], strict=False) if t is not None]
        return left * last + sum(chosen, torch.zeros_like(last).view(shape)).view(last.shape)


def _vjp(
    route: Route, parameters: tuple[Any, ...], tensors: tuple[Tensor, ...], g: Tensor, selection: Selection
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The gradients of the inputs at ties under a selection, and the gradient left for the stock operation."""
    recorded = replayed(g)
    choice = selection.read(route.field, g) if recorded else _choice(route, selection)
    stock = _stock(route, choice)
    if route.native is not None:
        choice = torch.where(stock, route.native, choice)
    uniform: Callable[[Tensor], Tensor] | None = None
    if not recorded and getattr(selection.jacobians, route.field) == "random":
        uniform = partial(torch.rand_like, dtype=wide(g), generator=selection.generator(g.device))
    tied, *known = route.ties(tensors, parameters)
    gradients = route.gradients(choice.to(wide(g)).unbind(), uniform, g, tensors, parameters, tied, *known)
    if recorded:  # one graph serves every choice, stock's own among them
        gradients = tuple(torch.where(stock, 0, gradient) for gradient in gradients)
        tied = tied & ~stock
    return gradients, g if route.added else g.masked_fill(tied, 0)


def _choice(route: Route, selection: Selection) -> Tensor:
    return (selection.shares if route.native is None else selection.kinks)[route.field]


def _stock(route: Route, choice: Tensor) -> Tensor:
    """Return whether a choice leaves the whole gradient to the stock operation."""
    return choice[0] == 1 if route.native is None else choice[0].isnan()


def around(route: str, selection: Selection, parameters: tuple[Any, ...], *tensors: Tensor) -> Tensor:
    """Give a stock operation's result the Jacobian that a selection chooses at ties.

    Args:
        route: A key of :data:`ROUTES`.
        selection: The choice, read when the backward runs.
        parameters: The operation's parameters that the route reads.
        *tensors: The route's inputs and constants; at last the stock operation's result.

    Returns:
        The result, in the same memory.
    """
    result, way = tensors[-1], ROUTES[route]
    selection.meet(result)
    eager = not torch.compiler.is_compiling()
    tangents = eager and in_forward_mode()
    # Inside a `torch.func` transform a tensor does not always tell that a derivative is asked for.
    asked = tangents or (eager and in_functorch())
    if not (asked or (torch.is_grad_enabled() and result.requires_grad)):
        return result
    if not all(map(is_dense, tensors)):
        return guarded(result, way.field, selection)
    if result.numel() == 0:
        return result
    known = tuple(tensor.detach() for tensor in tensors[:-1])
    kept = 0  # how many tensors are not saved for the backward
    if way.remember is not None:
        known, kept = way.remember(known, parameters), way.inputs
        tensors = (*tensors[: way.inputs], *known, result)
    if data_dependent(result) and not way.ties(known, parameters)[0].any():
        return result
    node = _AroundBothWays if tangents else _Around
    return cast(Tensor, node.apply(route, kept, selection, parameters, *tensors))


def own(operation: Callable[_P, _R]) -> Callable[_P, _R]:
    """Hide the calls inside an operation from a patch of the model around it.

    Args:
        operation: A function that calls stock operations.

    Returns:
        The function, with its stock operations hidden.
    """

    @wraps(operation)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with disable_function_modes():
            if torch.compiler.is_compiling() or not watchers:
                return operation(*args, **kwargs)
            start = sequence_number()
            result = operation(*args, **kwargs)
            for watcher in tuple(watchers):
                watcher(start, sequence_number())
            return result

    return run


def wide(t: Tensor) -> torch.dtype:
    """The dtype of coefficients: float64 for float64, else float32, since fp16 and bf16 hold too few digits."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def dimensions(x: Tensor, dim: Any) -> tuple[int, ...]:
    """Return which dimensions a reduction takes away.

    Args:
        x: Its input.
        dim: The reduction's argument: a number, several, or None for all.

    Returns:
        Numbers >= 0.
    """
    dims = dim if isinstance(dim, (list, tuple)) else () if dim is None else (dim,)
    if not (dims and x.dim()):  # a 0-d tensor has no dimension to remove
        return tuple(range(x.dim()))
    return tuple(int(d) % x.dim() for d in dims)


def restored(t: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """A reduction's result, or its gradient, with the dimensions that were taken away.

    Args:
        t: The result.
        dims: The result of :func:`dimensions`.
        keepdim: Whether the result still has them.

    Returns:
        The tensor with a size of 1 in each of them.
    """
    for d in () if keepdim else sorted(dims):
        t = t.unsqueeze(d)
    return t
