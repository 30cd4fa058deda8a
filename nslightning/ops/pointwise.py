"""Pointwise operations with kinks: ReLU and its relatives, the hard and shrinking activations, the absolute value.

All share one mechanism. The forward is the stock kernel. The backward is the stock backward kernel, then the entries
that sat exactly on a kink are overwritten with the chosen derivative times the incoming gradient. When the forward
met no kink, in eager mode on a CPU, the operation *is* the stock one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from nslightning.ops.autograd import fused, native
from nslightning.ops.autograd.layouts import storage_order
from nslightning.ops.autograd.nodes import NonsmoothFunction
from nslightning.ops.autograd.selection import Selection, data_dependent, read_now
from nslightning.ops.autograd.tie_bits import TieBits, chosen_value, find_ties, overwrite

__all__ = ["POINTWISE", "Pointwise", "pointwise"]

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Pointwise:
    """One pointwise operation with kinks.

    Args:
        name: The field of :class:`~nslightning.Jacobians` that chooses its derivatives.
        forward: The stock kernel, ``(x, *parameters) -> y``.
        forward_: The stock kernel that overwrites ``x``.
        backward: The stock backward kernel, ``(g, saved, *parameters) -> gradient``.
        saves: What the backward reads: the output (shared with the next layer) or the input. In place the output
            stands for the input where it tells the same (``"either"``), else a copy of the input is kept.
        kinks: The kinks as ``(position, reference derivative)``, from the parameters. A bound that was not given is
            NaN, which no entry equals; a derivative that depends on the entry is None.
        constant_when_published: Whether the published rule drops the incoming gradient at ties.
        prepare: What becomes of the input and the parameters before all else. Tensors among the parameters come
            first; where the backward returns a tuple, its other members are their gradients, still of ``x``'s shape.
    """

    name: str
    forward: Callable[..., Tensor]
    forward_: Callable[..., Tensor]
    backward: Callable[..., Tensor | tuple[Tensor, ...]]
    saves: Literal["output", "input", "either"]
    kinks: Callable[..., tuple[tuple[float, float | None], ...]]
    constant_when_published: bool = False
    prepare: Callable[..., tuple[Tensor, tuple[Any, ...]]] = lambda x, *parameters: (x, parameters)


def _prepare_prelu(x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor]]:
    """What ``F.prelu`` does before its kernel: autocast's dtype, its complaints, the slopes along dimension 1."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = F.prelu(x.detach().flatten()[:1], weight.detach().flatten()[:1]).dtype
        x, weight = x.to(dtype), weight.to(dtype)
    channels = x.shape[1] if x.dim() > 1 else 1
    if x.dtype != weight.dtype or weight.dim() > 1 or weight.numel() not in ((1,) if x.dim() == 0 else (1, channels)):
        F.prelu(x, weight)  # raises
    shape = (1, weight.numel(), *(1,) * (x.dim() - 2)) if x.dim() > 1 else (1,) * x.dim()
    return x, (weight.reshape(shape),)


def _prepare_rrelu(x: Tensor, lower: float, upper: float, training: bool) -> tuple[Tensor, tuple[Any, ...]]:
    """Memory for the slopes, which the forward draws; laid out as ``F.rrelu`` lays it out."""
    return x, (torch.empty_like(x, memory_format=torch.contiguous_format), lower, upper, training)


def _clamp_references() -> tuple[float, float]:
    """The derivatives at the lower and at the upper bound in this torch: 1 up to 2.13, 0 in 2.15."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.tensor([-1.0, 1.0], device="cpu", requires_grad=True)
        at_lower, at_upper = torch.autograd.grad(x.clamp(-1, 1).sum(), x)[0].tolist()
    return at_lower, at_upper


_AT_LOWER, _AT_UPPER = _clamp_references()


_Bound = float | Tensor | None


def _clamp_backward(g: Tensor, x: Tensor, low: float | None, high: float | None) -> Tensor:
    """Stock's backward, which is no operator; composed as there, so that the result lies in memory as there."""
    above = None if low is None else x >= low if _AT_LOWER else x > low
    below = None if high is None else x <= high if _AT_UPPER else x < high
    inside = above if below is None else below if above is None else above.logical_and_(below)
    return torch.where(cast(Tensor, inside), g, torch.zeros((), dtype=g.dtype, device=g.device))


def _clamp_kinks(low: _Bound, high: _Bound) -> tuple[tuple[Any, float], tuple[Any, float]]:
    """None where the interval is empty or a point: the function is then constant. Bounds may be tensors."""
    low, high = (float("nan") if bound is None else bound for bound in (low, high))
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        none = torch.as_tensor(low >= high)
        low, high = (torch.where(none, float("nan"), bound) for bound in (low, high))
    elif low >= high:
        low = high = float("nan")
    return (low, _AT_LOWER), (high, _AT_UPPER)


_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)  # alpha, scale

POINTWISE: dict[str, Pointwise] = {
    op.name: op
    for op in (
        Pointwise(
            name="relu",
            forward=aten.relu.default,
            forward_=aten.relu_.default,
            backward=lambda g, y: aten.threshold_backward.default(g, y, 0),
            saves="output",
            kinks=lambda: ((0.0, 0.0),),
            constant_when_published=True,
        ),
        Pointwise(
            name="relu6",
            forward=lambda x: aten.hardtanh.default(x, 0, 6),
            forward_=lambda x: aten.hardtanh_.default(x, 0, 6),
            backward=lambda g, y: aten.hardtanh_backward.default(g, y, 0, 6),
            saves="either",
            kinks=lambda: ((0.0, 0.0), (6.0, 0.0)),
            constant_when_published=True,
        ),
        Pointwise(
            name="leaky_relu",
            forward=aten.leaky_relu.default,
            forward_=aten.leaky_relu_.default,
            # In place the output stands for the input: its sign is the same, the slope being >= 0 there.
            backward=lambda g, x, slope: aten.leaky_relu_backward.default(g, x, slope, False),
            saves="either",
            kinks=lambda slope: ((0.0, slope),),
        ),
        Pointwise(
            name="hardtanh",
            forward=aten.hardtanh.default,
            forward_=aten.hardtanh_.default,
            backward=lambda g, y, low, high: aten.hardtanh_backward.default(g, y, low, high),
            saves="either",
            kinks=lambda low, high: ((low, 0.0), (high, 0.0)),
        ),
        Pointwise(
            name="hardswish",
            forward=aten.hardswish.default,
            forward_=aten.hardswish_.default,
            backward=aten.hardswish_backward.default,
            saves="input",
            kinks=lambda: ((-3.0, 0.0), (3.0, 1.0)),
        ),
        Pointwise(
            name="hardsigmoid",
            forward=aten.hardsigmoid.default,
            forward_=aten.hardsigmoid_.default,
            backward=aten.hardsigmoid_backward.default,
            saves="input",
            kinks=lambda: ((-3.0, 0.0), (3.0, 0.0)),
        ),
        Pointwise(
            name="prelu",
            forward=aten._prelu_kernel.default,
            forward_=lambda x, weight: x.copy_(aten._prelu_kernel.default(x, weight)),
            backward=aten._prelu_kernel_backward.default,
            saves="input",
            kinks=lambda weight: ((0.0, None),),
            prepare=_prepare_prelu,
        ),
        Pointwise(
            name="rrelu",
            forward=aten.rrelu_with_noise.default,
            forward_=aten.rrelu_with_noise_.default,
            backward=lambda g, x, *slopes: aten.rrelu_with_noise_backward.default(g, x, *slopes, False),
            saves="input",
            kinks=lambda *_: ((0.0, None),),
            prepare=_prepare_rrelu,
        ),
        Pointwise(
            name="clamp",
            forward=aten.clamp.default,
            forward_=aten.clamp_.default,
            backward=_clamp_backward,
            saves="input",
            kinks=_clamp_kinks,
        ),
        Pointwise(
            name="hardshrink",
            forward=aten.hardshrink.default,
            forward_=lambda x, width: x.copy_(aten.hardshrink.default(x, width)),
            backward=aten.hardshrink_backward.default,
            saves="input",
            kinks=lambda width: ((-width, 0.0), (width, 0.0)),
        ),
        Pointwise(
            name="softshrink",
            forward=aten.softshrink.default,
            forward_=lambda x, width: x.copy_(aten.softshrink.default(x, width)),
            backward=aten.softshrink_backward.default,
            saves="input",
            kinks=lambda width: ((-width, 0.0), (width, 0.0)),
        ),
        Pointwise(
            name="threshold",
            forward=aten.threshold.default,
            forward_=aten.threshold_.default,
            backward=lambda g, x, at, value: aten.threshold_backward.default(g, x, at),
            saves="input",
            kinks=lambda at, value: ((at, 0.0),),
        ),
        Pointwise(
            name="elu",
            forward=aten.elu.default,
            forward_=aten.elu_.default,
            backward=lambda g, x, alpha: aten.elu_backward.default(g, alpha, 1, 1, False, x),
            saves="input",
            kinks=lambda alpha: ((0.0, alpha),) if alpha != 1 else (),
        ),
        Pointwise(
            name="selu",
            forward=lambda x: aten.elu.default(x, _SELU[0], _SELU[1]),
            forward_=lambda x: aten.elu_.default(x, _SELU[0], _SELU[1]),
            backward=lambda g, x: aten.elu_backward.default(g, *_SELU, 1, False, x),
            saves="input",
            kinks=lambda: ((0.0, _SELU[0] * _SELU[1]),),
        ),
        Pointwise(
            name="abs",
            forward=aten.abs.default,
            forward_=aten.abs_.default,
            backward=lambda g, x: g * x.sgn(),
            saves="input",
            kinks=lambda: ((0.0, 0.0),),
        ),
    )
}


def _composed(
    operation: str, parameters: tuple[float, ...], saved: tuple[Tensor], g: Tensor, selection: Selection
) -> Tensor:
    """The gradient for what a C++ node saved: the input."""
    op, (x,) = POINTWISE[operation], saved
    numbers: tuple[float | None, ...] = {"leaky_relu": parameters[:1], "hardtanh": parameters}.get(operation, ())
    if operation == "clamp":
        numbers = tuple(None if math.isnan(bound) else bound for bound in parameters)
    ties = [x.detach() == position for position, _ in op.kinks(*numbers)]
    return _vjp(op, numbers, None, x, [], ties, g, selection)[0]


for _name in native.OPERATIONS[1:-1]:
    native.composition(_name, partial(_composed, _name))


class _Kinked(NonsmoothFunction):
    """Stock forward; stock backward with the chosen derivative at the recorded ties."""

    @staticmethod
    def forward(
        x: Tensor,
        operation: str,
        selection: Selection,
        inplace: bool,
        parameters: tuple[Any, ...],
        order: tuple[int, ...] | None,
        given: int,
        *tensors: Tensor,
    ) -> Tensor:
        op = POINTWISE[operation]
        if inplace:
            op.forward_(x, *tensors[:given], *parameters)
            return x
        return op.forward(x, *tensors[:given], *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.operation, ctx.selection, inplace, ctx.parameters, ctx.order, ctx.given, *tensors = inputs
        if inplace:
            ctx.mark_dirty(x)
        saved = output if inplace or POINTWISE[ctx.operation].saves == "output" else x
        ctx.save_for_backward(saved, *tensors)
        ctx.save_for_forward(saved, *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved, *tensors = ctx.saved_tensors
        selection, given = ctx.selection, tensors[: ctx.given]
        vjp = partial(_vjp, POINTWISE[ctx.operation], ctx.parameters, ctx.order, saved, given, tensors[ctx.given :], g)
        if not torch.compiler.is_compiling() and selection.recorder is not None:
            selection.recorder(ctx, lambda other: vjp(other)[0])
        gradient, *others = vjp(selection)
        others = [other.sum_to_size(tensor.shape) for other, tensor in zip(others, given, strict=False)]
        return (gradient, *(None,) * 6, *others, *(None,) * (len(tensors) - len(others)))


class _Transformable(_Kinked):
    """The same for ``torch.func`` and forward-mode differentiation, which the compiler does not take.

    The operation acts on each entry by itself, so its Jacobian is diagonal: what carries gradients down carries
    tangents up.
    """

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *tangents: Any) -> Tensor:
        saved, *tensors = ctx.saved_tensors
        given, ties = tensors[: ctx.given], tensors[ctx.given :]
        op = POINTWISE[ctx.operation]
        result = torch.zeros_like(saved)
        if tangent is not None:
            result = _vjp(op, ctx.parameters, ctx.order, saved, given, ties, tangent, ctx.selection, published=False)[0]
        for i, direction in enumerate(tangents[6 : 6 + ctx.given]):
            if direction is not None:
                result = result + op.backward(direction.expand_as(saved), saved, *given, *ctx.parameters)[1 + i]
        return result


def _vjp(
    op: Pointwise,
    parameters: tuple[Any, ...],
    order: tuple[int, ...] | None,
    saved: Tensor,
    given: list[Tensor],
    ties: list[Tensor],
    g: Tensor,
    selection: Selection,
    published: bool = True,
) -> tuple[Tensor, ...]:
    """The gradients with respect to the input, and to tensors among the parameters, under a selection.

    ``ties`` holds a mask per kink where ``order`` is None, else the two tensors of a :class:`TieBits`.
    """
    gradients = op.backward(g, saved, *given, *parameters)
    gradient, *others = gradients if isinstance(gradients, tuple) else (gradients,)
    if torch.compiler.is_compiling():
        for i, mask in enumerate(ties):
            gradient = _choose_compiled(op, selection, i, mask, g, gradient)
        return (gradient, *others)
    constant = published and selection.jacobians.rule == "published" and op.constant_when_published
    kinks = op.kinks(*given, *parameters)
    for i, ((_, reference), derivative) in enumerate(zip(kinks, selection.at_kinks(op.name), strict=True)):
        if derivative is None or (derivative == reference and (derivative == 0 or not constant)):
            continue
        if order is None:
            gradient = torch.where(ties[i], chosen_value(derivative, constant, selection, g, ties[i]), gradient)
        else:
            bits = TieBits(*ties[2 * i : 2 * i + 2])
            gradient = overwrite(gradient, g, bits, order, derivative, constant, selection)
    return (gradient, *others)


def _choose_compiled(op: Pointwise, selection: Selection, i: int, mask: Tensor, g: Tensor, gradient: Tensor) -> Tensor:
    """Overwrite the entries at one kink, reading the choice as tensors: one compiled backward serves every choice."""
    derivative = read_now(selection.kinks[op.name], g)[i]
    value = (g * derivative).to(g.dtype)  # rounded once, as in eager mode
    if op.constant_when_published:
        value = torch.where(read_now(selection.published, g), derivative.to(g.dtype), value)
    return torch.where(mask & ~torch.isnan(derivative), value, gradient)


def pointwise(operation: str, x: Tensor, selection: Selection, *parameters: Any, inplace: bool = False) -> Tensor:
    """Apply a pointwise operation whose derivative at its kinks is the one ``selection`` names at backward time.

    Args:
        operation: A key of :data:`POINTWISE`.
        x: Input, any shape, floating dtype.
        selection: The choice, read when the backward runs.
        *parameters: The operation's own parameters, such as LeakyReLU's slope.
        inplace: Overwrite ``x``.

    Returns:
        The stock operation's result, bit for bit.

    Raises:
        ValueError: If LeakyReLU is to work in place with a negative slope.
    """
    if (result := native.pointwise(operation, x, selection, parameters, inplace)) is not NotImplemented:
        return cast(Tensor, result)
    op = POINTWISE[operation]
    x, parameters = op.prepare(x, *parameters)
    transformed = _transformed(x)
    if not (transformed or _differentiated(x, *parameters)):
        return (op.forward_ if inplace else op.forward)(x, *parameters)
    if inplace and operation == "leaky_relu" and parameters[0] < 0:
        raise ValueError(f"leaky_relu in place needs a negative slope >= 0, as in stock PyTorch; given {parameters[0]}")
    if operation == "relu" and not transformed and fused.fits(x):
        return fused.relu(x, selection, inplace)
    positions = [position for position, _ in op.kinks(*parameters)]
    order = storage_order(x) if data_dependent(x) and x.is_floating_point() else None
    if order is None:
        ties = [x.detach() == position for position in positions]
    else:
        found = find_ties(x.detach(), positions, order)
        ties = [part for tie in found or () for part in tie]
    if not ties:  # most forwards end here
        return (op.forward_ if inplace else op.forward)(x, *parameters)
    given = [p for p in parameters if isinstance(p, Tensor)]
    settings = operation, selection
    rest = tuple(parameters[len(given) :]), order, len(given), *given, *ties
    function = _Transformable if transformed else _Kinked
    # In place on a view, autograd would put the node inside another one, where nobody can ask it for its ties; a trace
    # takes no function that works in place.
    apart = not torch.compiler.is_compiling() and (x._is_view() or torch._C._get_tracing_state() is not None)
    if inplace and (transformed or op.saves == "input" or apart):
        return x.copy_(function.apply(x.clone(), *settings, False, *rest))
    return cast(Tensor, function.apply(x, *settings, inplace, *rest))


def _differentiated(*given: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given)


def _transformed(x: Tensor) -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation may be looking."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return forward_ad._current_level >= 0
