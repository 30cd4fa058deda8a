"""A chosen Jacobian around a stock operation, which keeps its own backward.

The mechanism of the operations that reduce or compare. Their result passes through a node that sees its gradient
first: what belongs to untied evaluations goes on to the stock operation, whatever its version does with it; what
belongs to ties goes past it, straight to the inputs, as the selection says when the backward runs. When the forward
met no tie, in eager mode on a CPU, the operation *is* the stock one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nslightning.jacobians import Jacobians
from nslightning.ops.autograd.nodes import NonsmoothFunction
from nslightning.ops.autograd.selection import Selection, data_dependent, read_now

__all__ = ["RULES", "Rule", "around", "dimensions", "fixed", "own", "restored", "wide"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True, eq=False)
class Rule:
    """How one kind of operation shares the gradients of its ties.

    Args:
        field: The field of :class:`~nslightning.Jacobians` that chooses.
        inputs: How many of the tensors are inputs that take gradients; they come first.
        ties: ``(tensors, parameters) -> (tied, ...)``: the mask of the results that are ties, and whatever else
            ``gradients`` wants to know.
        gradients: ``(choice, uniform, g, tensors, parameters, tied, ...) -> gradients`` of the inputs, 0 away from
            ties. ``choice`` is the chosen derivatives or weights, each 0-d; ``uniform``, for the random choice only,
            draws a number in [0, 1) for each entry of a tensor.
        native: Stock's own choice, for a field that is one derivative; None for one that shares.
        added: One result may sum over ties and others: the gradients are added to the stock ones, which are 0 at
            the ties.
        reduces: The parameters begin with the dimensions that were reduced away, and whether they are kept.
    """

    field: str
    inputs: int
    ties: Callable[..., tuple[Tensor, ...]]
    gradients: Callable[..., tuple[Tensor, ...]]
    native: float | None = None
    added: bool = False
    reduces: bool = False


def _at_zero(field: str, native: float) -> Rule:
    r"""For results that are sums of :math:`s\,f(u)`, f with a kink at 0: the inputs are u, the constants s."""

    def ties(tensors: tuple[Tensor, ...], parameters: tuple[Any, ...]) -> tuple[Tensor]:
        u, scale = tensors
        return ((u == 0) & (scale != 0),)

    def gradients(
        choice: tuple[Tensor, ...], _: Any, g: Tensor, tensors: tuple[Tensor, ...], parameters: Any, tied: Tensor
    ) -> tuple[Tensor]:
        u, scale = tensors
        g = restored(g, *parameters).to(wide(g))
        return (torch.where(tied, g * (choice[0] - native) * scale, 0).to(u.dtype),)

    return Rule(field, 1, ties, gradients, native, added=True, reduces=True)


def _clamp_min_at_bound() -> float:
    """What the installed torch returns for the derivative of ``clamp_min`` at its bound: 1 up to 2.13, 0 in 2.15."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, device="cpu", requires_grad=True)
        return torch.autograd.grad(x.clamp_min(0).sum(), x)[0].item()


_BOUND = _clamp_min_at_bound()
RULES: dict[str, Rule] = {
    "abs": _at_zero("abs", 0.0),
    "clamp_min": _at_zero("clamp", _BOUND),
    "hinge": _at_zero("hinge", _BOUND),
    "multi_margin": _at_zero("hinge", 0.0),  # has a kernel of its own
}


class _Around(NonsmoothFunction):
    """The identity on the last tensor; its gradient is divided between it and the inputs, which come first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rule: str, selection: Selection, parameters: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        # Not a view: the result may be overwritten wherever stock's may, for the version counter is shared.
        return tensors[-1].detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rule, ctx.selection, ctx.parameters, *tensors = inputs
        ctx.operation = RULES[ctx.rule].field
        ctx.save_for_backward(*tensors[:-1])  # not the result: the next layer may overwrite it

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rule, selection, tensors = RULES[ctx.rule], ctx.selection, ctx.saved_tensors
        vjp = partial(_vjp, rule, ctx.parameters, tensors, g)
        if not torch.compiler.is_compiling():
            if selection.recorder is not None:
                selection.recorder(ctx, lambda other: vjp(other)[0])
            if _stock(rule, _choice(rule, selection)):
                return (None, None, None, *(None for _ in tensors), g)
        gradients, rest = vjp(selection)
        return (None, None, None, *gradients, *(None for _ in tensors[rule.inputs :]), rest)


class _AroundBothWays(_Around):
    """The same where tangents may be about: ``torch.compile`` takes no function that has a ``jvp``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Around.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[3:-1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        rule, parameters, last = RULES[ctx.rule], ctx.parameters, cast(Tensor, tangents[-1])
        # The gradients are coefficients times g, and 0 or 1 times g is left to stock: with g = 1 these are the numbers.
        coefficients, left = _vjp(rule, parameters, ctx.saved_tensors, torch.ones_like(last), ctx.selection)
        if _stock(rule, _choice(rule, ctx.selection)):
            return last.clone()
        shape = restored(last, *parameters[:2]).shape if rule.reduces else last.shape
        chosen = [(c * t).sum_to_size(shape) for c, t in zip(coefficients, tangents[3:], strict=False) if t is not None]
        return left * last + sum(chosen, torch.zeros_like(last).view(shape)).view(last.shape)


def _vjp(
    rule: Rule, parameters: tuple[Any, ...], tensors: tuple[Tensor, ...], g: Tensor, selection: Selection
) -> tuple[tuple[Tensor, ...], Tensor]:
    """What ties send to the inputs under a selection, and what is left for the stock operation."""
    compiled = torch.compiler.is_compiling()
    choice = _choice(rule, selection)
    if compiled:
        choice = read_now(choice, g)
    stock = _stock(rule, choice)
    if rule.native is not None:
        choice = torch.where(stock, rule.native, choice)
    uniform: Callable[[Tensor], Tensor] | None = None
    if not compiled and getattr(selection.jacobians, rule.field) == "random":
        uniform = partial(torch.rand_like, dtype=wide(g), generator=selection.generator(g.device))
    tied, *known = rule.ties(tensors, parameters)
    gradients = rule.gradients(choice.to(wide(g)).unbind(), uniform, g, tensors, parameters, tied, *known)
    if compiled:  # one graph serves every choice, stock's own among them
        gradients = tuple(torch.where(stock, 0, gradient) for gradient in gradients)
        tied = tied & ~stock
    return gradients, g if rule.added else g.masked_fill(tied, 0)


def _choice(rule: Rule, selection: Selection) -> Tensor:
    return (selection.shares if rule.native is None else selection.kinks)[rule.field]


def _stock(rule: Rule, choice: Tensor) -> Tensor:
    """Whether a choice is to leave everything to the stock operation."""
    return choice[0] == 1 if rule.native is None else choice[0].isnan()


def around(rule: str, selection: Selection, parameters: tuple[Any, ...], *tensors: Tensor) -> Tensor:
    """Give a stock operation's result the Jacobian that a selection chooses at ties.

    Args:
        rule: A key of :data:`RULES`.
        selection: The choice, read when the backward runs.
        parameters: What the rule wants to know of the operation.
        *tensors: The rule's inputs and constants; at last the stock operation's result.

    Returns:
        The result, in the same memory.
    """
    result = tensors[-1]
    eager = not torch.compiler.is_compiling()
    tangents = eager and forward_ad._current_level >= 0
    # Inside a `torch.func` transform a tensor does not always tell that a derivative is asked for.
    asked = tangents or (eager and torch._C._functorch.peek_interpreter_stack() is not None)
    if not (asked or (torch.is_grad_enabled() and result.requires_grad)) or result.numel() == 0:
        return result
    given = tuple(tensor.detach() for tensor in tensors[:-1])
    if data_dependent(result) and not RULES[rule].ties(given, parameters)[0].any():
        return result
    node = _AroundBothWays if tangents else _Around
    return cast(Tensor, node.apply(rule, selection, parameters, *tensors))


def own(operation: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make an operation's calls its own: a patch of the model around it does not see what it is made of.

    Args:
        operation: A function that calls stock operations.

    Returns:
        The same.
    """

    @wraps(operation)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch._C.DisableTorchFunction():
            return operation(*args, **kwargs)

    return run


def wide(t: Tensor) -> torch.dtype:
    """Where coefficients are formed: float64 for float64, else float32, for fp16 and bf16 hold too few digits."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def dimensions(x: Tensor, dim: Any) -> tuple[int, ...]:
    """Which dimensions a reduction takes away.

    Args:
        x: Its input.
        dim: As given to it: a number, several, or none, which is all.

    Returns:
        Numbers >= 0.
    """
    if dim is None or dim == () or dim == []:
        return tuple(range(x.dim()))
    return tuple(d % x.dim() if x.dim() else 0 for d in ((dim,) if isinstance(dim, int) else dim))


def restored(t: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """A reduction's result, or its gradient, with the dimensions that were taken away.

    Args:
        t: The result.
        dims: What :func:`dimensions` returned.
        keepdim: Whether they are there.

    Returns:
        The same with a size of 1 in each of them.
    """
    for d in () if keepdim else sorted(dims):
        t = t.unsqueeze(d)
    return t


@lru_cache(maxsize=1024)
def _kept(jacobians: Jacobians) -> Selection:
    return Selection(jacobians)


def fixed(jacobians: Jacobians, seed: int = 0) -> Selection:
    """A selection that nobody changes, for calls that name their choice.

    Args:
        jacobians: The choice.
        seed: Seeds a random choice: then each call starts a stream of its own.

    Returns:
        The selection.
    """
    return Selection(jacobians, seed) if "random" in jacobians.to_dict().values() else _kept(jacobians)
