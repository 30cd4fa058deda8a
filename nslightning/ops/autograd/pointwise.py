"""The mechanism of pointwise operations with kinks: ReLU and its relatives, the hard activations, the absolute value.

The forward is the stock kernel. The backward is the stock backward kernel, then the entries that sat exactly on a kink
are overwritten with the chosen derivative times the incoming gradient. When the forward met no kink, in eager mode on a
CPU, the operation *is* the stock one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from nslightning._torch import in_forward_mode, in_functorch, is_tracing, is_view, kept_version
from nslightning.ops.autograd import fused, native
from nslightning.ops.autograd.layouts import duplicate, is_dense, overlaps, storage_order, stored
from nslightning.ops.autograd.nodes import NonsmoothFunction, check_changes, of_a_leaf, put_in_place, refuse_changes
from nslightning.ops.autograd.selection import Selection, data_dependent, guarded, replayed
from nslightning.ops.autograd.tie_bits import TieBits, as_mask, chosen_value, find_ties, overwrite
from nslightning.ops.record import OPERATIONS, Call, Count, Kernels, Kink, Operation

__all__ = ["pointwise", "pointwise_operation"]


def pointwise_operation(
    name: str,
    kinks: tuple[Kink, ...],
    kernels: Kernels,
    *,
    at: tuple[Any, ...] = (),
    apply: Callable[[Selection, Call], Any] | None = None,
    ties: Callable[[Call], tuple[Count, Count]] | None = None,
    **facts: Any,
) -> Operation:
    """The record of an operation that acts on each entry by itself.

    Args:
        name: The field of :class:`~nslightning.Jacobians` that chooses its derivatives.
        kinks: Its kinks.
        kernels: Its stock kernels.
        at: Parameters with which it has all its kinks; the stock backward is probed at them.
        apply: Evaluates a call, where that is more than the kernels.
        ties: Counts a call's ties, where that is more than the entries of its input.
        **facts: The other fields of :class:`~nslightning.ops.record.Operation`.

    Returns:
        The record, for :func:`~nslightning.ops.register`.

    Raises:
        ValueError: If the derivative at a kink is not between those on its two sides.
    """

    def evaluate(selection: Selection, call: Call) -> Tensor:
        return pointwise(name, call.x, selection, *call.parameters, inplace=call.inplace)

    def count(call: Call) -> tuple[Count, int]:
        x, positions = stored(call.x), OPERATIONS[name].positions(*call.parameters)
        return sum(torch.count_nonzero(x == position) for position in positions), x.numel()

    record = Operation(
        name=name, kinks=kinks, kernels=kernels, apply=apply or evaluate, ties=ties or count, at=at, **facts
    )
    return replace(record, taken=tuple(_taken(record, kink) for kink in kinks))


def _taken(record: Operation, kink: Kink) -> float:
    """The stock choice at a kink: 0 for the left derivative, 1 for the right, a share for one between them."""
    if kink.position is None or kink.sides is None:
        raise ValueError(
            f"a kink of {record.name} has no position or no derivatives: both are functions of its parameters"
        )
    at_kink = torch.tensor([float(kink.position(*record.at))], dtype=torch.float64, device="cpu")
    (taken,) = record.derivative(at_kink)
    left, right = (float(side) for side in kink.sides(*record.at))
    share = 0.0 if taken == left else 1.0 if taken == right else (taken - left) / (right - left)
    if not 0 <= share <= 1:
        raise ValueError(
            f"{record.name} has the derivative {taken} at {kink.where}, which is not between {left} and {right}"
        )
    return share


class _Kinked(NonsmoothFunction):
    """Stock forward; stock backward with the chosen derivative at the recorded ties."""

    @staticmethod
    def forward(
        x: Tensor,
        operation: str,
        selection: Selection,
        inplace: bool,
        overwritten: bool,
        parameters: tuple[Any, ...],
        order: tuple[int, ...] | None,
        count: int,
        *tensors: Tensor,
    ) -> Tensor:
        kernels = _kernels(operation)
        if inplace:
            with kept_version(x):  # `mark_dirty` counts it
                kernels.overwrite(x, *tensors[:count], *parameters)
            return x
        # As stock works on the memory that it overwrites: a kernel may round by the strides. A compiler has kernels of
        # its own, and that of torch 2.11 returns gradients of 0 where a custom function overwrites a copy.
        if overwritten and not torch.compiler.is_compiling():
            return kernels.overwrite(duplicate(x), *tensors[:count], *parameters)
        return kernels.forward(x, *tensors[:count], *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.operation, ctx.selection, inplace, ctx.overwritten, ctx.parameters, ctx.order, ctx.count, *tensors = (
            inputs
        )
        if inplace:
            ctx.mark_dirty(x)
        kernels = _kernels(ctx.operation)
        from_output = inplace or kernels.saves == "output" or (ctx.overwritten and kernels.backward_ is not None)
        saved = output if from_output else x
        ctx.save_for_backward(saved, *tensors)
        ctx.save_for_forward(saved, *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved, *tensors = ctx.saved_tensors
        check_changes(ctx)
        selection, parameter_tensors = ctx.selection, tensors[: ctx.count]
        vjp = partial(_vjp, ctx, saved, parameter_tensors, tensors[ctx.count :], g)
        if not torch.compiler.is_compiling() and selection.recorder is not None:
            masks = tensors[ctx.count :]
            kept = {} if ctx.order is not None else {"ties": partial(_any_of, masks)}
            selection.recorder(ctx, lambda other: vjp(other)[0], **kept)
        gradient, *others = vjp(selection)
        others = [other.sum_to_size(tensor.shape) for other, tensor in zip(others, parameter_tensors, strict=False)]
        return (gradient, *(None,) * 7, *others, *(None,) * (len(tensors) - len(others)))


class _Transformable(_Kinked):
    """Adds ``torch.func`` and forward-mode differentiation; the compiler takes no function that has them.

    The operation acts on each entry by itself, so its Jacobian is diagonal: the same product maps
    gradients and tangents.
    """

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *tangents: Any) -> Tensor:
        saved, *tensors = ctx.saved_tensors
        parameter_tensors, ties = tensors[: ctx.count], tensors[ctx.count :]
        result = torch.zeros_like(saved)
        if tangent is not None:
            result = _vjp(ctx, saved, parameter_tensors, ties, tangent, ctx.selection, published=False)[0]
        for i, direction in enumerate(tangents[7 : 7 + ctx.count]):
            if direction is not None:  # zeros, for a tensor without a gradient
                result = sum(_stock_vjp(ctx, direction.expand_as(saved), saved, parameter_tensors)[1 + i :][:1], result)
        return result


def _kernels(operation: str) -> Kernels:
    kernels = OPERATIONS[operation].kernels
    assert kernels is not None  # `pointwise` is called for pointwise operations
    return kernels


def _stock_vjp(ctx: Any, g: Tensor, saved: Tensor, parameter_tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The stock gradients with respect to the input, and to tensors among the parameters."""
    kernels = _kernels(ctx.operation)
    backward = kernels.backward if not ctx.overwritten or kernels.backward_ is None else kernels.backward_
    gradients = backward(g, saved, *parameter_tensors, *ctx.parameters)
    return gradients if isinstance(gradients, tuple) else (gradients,)


def _vjp(
    ctx: Any,
    saved: Tensor,
    parameter_tensors: list[Tensor],
    ties: list[Tensor],
    g: Tensor,
    selection: Selection,
    published: bool = True,
) -> tuple[Tensor, ...]:
    """The gradients with respect to the input, and to tensors among the parameters, under a selection.

    ``ties`` holds a mask per kink where the node's ``order`` is None, else the two tensors of a :class:`TieBits`.
    """
    operation, kernels, order = OPERATIONS[ctx.operation], _kernels(ctx.operation), ctx.order
    gradient, *others = _stock_vjp(ctx, g, saved, parameter_tensors)
    if replayed(g):
        masks = ties  # a compiled backward of an eager forward has the packed ties of eager mode
        if order is not None:
            masks = [as_mask(TieBits(*ties[i : i + 2]), g, order) for i in range(0, len(ties), 2)]
        for i, (mask, reference) in enumerate(
            zip(masks, operation.stock(*parameter_tensors, *ctx.parameters), strict=True)
        ):
            chosen = selection.read(operation.name, g)[i]
            rule = selection.read(".published", g) if published and kernels.published else None
            gradient = _choose_when_replayed(chosen, reference, rule, mask, g, gradient)
        return (gradient, *others)
    constant = published and selection.jacobians.rule == "published" and kernels.published
    references = operation.stock(*parameter_tensors, *ctx.parameters)
    for i, (reference, derivative) in enumerate(zip(references, selection.at_kinks(operation.name), strict=True)):
        if derivative is None or (derivative == reference and (derivative == 0 or not constant)):
            continue
        if order is None:
            gradient = torch.where(ties[i], chosen_value(derivative, constant, selection, g, ties[i]), gradient)
        else:
            bits = TieBits(*ties[2 * i : 2 * i + 2])
            gradient = overwrite(gradient, g, bits, order, derivative, constant, selection)
    return (gradient, *others)


def _choose_when_replayed(
    derivative: Tensor, reference: float | None, rule: Tensor | None, mask: Tensor, g: Tensor, gradient: Tensor
) -> Tensor:
    """Overwrite the entries at one kink, with the choice in tensors: one recorded backward serves every choice."""
    value, as_stock = _value_when_replayed(derivative, reference, rule, g)
    # Numbers are compared, and with one that the forward does not know: a compiler would keep a mask of booleans, which
    # its loops write and convert slowly.
    return torch.where(mask.to(g.dtype) > as_stock.to(g.dtype), value, gradient)


def _value_when_replayed(
    derivative: Tensor, reference: float | None, rule: Tensor | None, g: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient that tied entries receive, and whether they keep the stock one instead."""
    value = (g * derivative).to(g.dtype)  # rounded once, as in eager mode
    as_stock = torch.isnan(derivative)
    if reference is not None:
        same = derivative == reference
        as_stock = as_stock | (same if rule is None else same & ((derivative == 0) | ~rule))
    return value if rule is None else torch.where(rule, derivative.to(g.dtype), value), as_stock


class _CompiledReLU(NonsmoothFunction):
    """Keeps one byte per entry, ``side``: whether it lies below 0 (0), at 0 (1) or above (2)."""

    @staticmethod
    def forward(x: Tensor, side: Tensor, selection: Selection) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, side, ctx.selection = inputs
        ctx.operation = "relu"
        ctx.save_for_backward(side)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (side,) = ctx.saved_tensors
        (derivative,), rule = ctx.selection.read("relu", g).unbind(), ctx.selection.read(".published", g)
        value, as_stock = _value_when_replayed(derivative, 0.0, rule, g)
        side, least = side.to(g.dtype), 1.0 + as_stock.to(g.dtype)  # of the entries that receive anything
        return torch.where(side >= least, torch.where(side + least > 2.0, g, value), 0.0), None, None


def _bytes(where: Tensor, number: float, other: Tensor | float) -> Tensor:
    """A small number for each entry: compiled loops write bytes many times as fast as booleans."""
    return torch.where(where, number, other).to(torch.uint8)


class _Saved(NamedTuple):
    """The attributes of a Python node, for a C++ node, which has no such attributes."""

    operation: str
    parameters: tuple[float | None, ...]
    overwritten: bool = False
    order: None = None


def _composed(
    operation: str, parameters: tuple[float, ...], saved: tuple[Tensor], g: Tensor, selection: Selection
) -> Tensor:
    """The gradient from the tensor that a C++ node saved: the input."""
    (x,) = saved
    numbers = _numbers(operation, parameters)
    return _vjp(_Saved(operation, numbers), x, [], _masks(operation, numbers, x), g, selection)[0]


def _numbers(operation: str, parameters: tuple[float, ...]) -> tuple[float | None, ...]:
    """An operation's parameters, of which a C++ node has two, whatever the operation's number of them."""
    if operation == "clamp":
        return tuple(None if math.isnan(bound) else bound for bound in parameters)
    return {"leaky_relu": parameters[:1], "hardtanh": parameters}.get(operation, ())


def _masks(operation: str, numbers: tuple[float | None, ...], x: Tensor) -> list[Tensor]:
    """The ties at each kink."""
    return [x.detach() == position for position in OPERATIONS[operation].positions(*numbers)]


def _any_of(masks: Sequence[Tensor]) -> Tensor:
    """Whether there is a tie, a 0-d tensor."""
    return torch.stack([mask.any() for mask in masks]).any()


for _name in native.OPERATIONS[1:-1]:
    native.composition(
        _name,
        partial(_composed, _name),
        ties=lambda parameters, saved, name=_name: _any_of(_masks(name, _numbers(name, parameters), saved[0])),
    )


def pointwise(operation: str, x: Tensor, selection: Selection, *parameters: Any, inplace: bool = False) -> Tensor:
    """Apply a pointwise operation whose derivative at its kinks is the one ``selection`` names at backward time.

    Args:
        operation: The name of a pointwise operation.
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
    record, kernels = OPERATIONS[operation], _kernels(operation)
    x, parameters = kernels.prepare(x, *parameters)
    selection.meet(x)
    transformed = _transformed(x)
    stock = kernels.overwrite if inplace else kernels.forward
    if not (transformed or _differentiated(x, *parameters)):
        return stock(x, *parameters)
    if inplace and not transformed and of_a_leaf(x):
        return stock(x, *parameters)  # PyTorch refuses before it overwrites
    if not is_dense(x) or (inplace and not transformed and overlaps(x)):
        return guarded(stock(x, *parameters), operation, selection)
    if inplace and operation == "leaky_relu" and parameters[0] < 0:
        raise ValueError(f"leaky_relu in place needs a negative slope >= 0, as in stock PyTorch; given {parameters[0]}")
    if operation == "relu" and not transformed and fused.fits(x):
        return fused.relu(x, selection, inplace)
    positions = record.positions(*parameters)
    order = storage_order(x) if data_dependent(x) and x.is_floating_point() else None
    if operation == "relu" and torch.compiler.is_compiling():
        below_or_above = torch.where(x.detach() <= 0, 0.0, 2.0)
        result = _CompiledReLU.apply(x, _bytes(x.detach() == 0, 1.0, below_or_above), selection)
        return put_in_place(x, result) if inplace else cast(Tensor, result)
    if torch.compiler.is_compiling():
        ties = [_bytes(x.detach() == position, 1.0, 0.0) for position in positions]
    elif order is None:
        ties = [x.detach() == position for position in positions]
    else:
        ties = [part for tie in find_ties(x.detach(), positions, order) or () for part in tie]
    if not ties:  # most forwards end here
        return stock(x, *parameters)
    parameter_tensors = [p for p in parameters if isinstance(p, Tensor)]
    settings = tuple(parameters[len(parameter_tensors) :]), order, len(parameter_tensors), *parameter_tensors, *ties
    function = _Transformable if transformed else _Kinked
    # In place on a view, autograd would put the node inside another one, where it cannot be asked for its ties. A trace
    # takes no function that works in place, and the compiler loses one that overwrites an input of compiled code.
    apart = torch.compiler.is_compiling() or is_view(x) or is_tracing()
    stock_keeps_it = kernels.saves == "output" or kernels.backward_ is not None  # the result, for the backward
    if inplace and (transformed or not stock_keeps_it or apart):
        # Inside a transform the derivative is formed from the input, whether it is overwritten or not.
        original = x.clone() if transformed else duplicate(x)
        result = function.apply(original, operation, selection, False, not transformed, *settings)
        written = put_in_place(x, result)
        if stock_keeps_it and not (transformed or torch.compiler.is_compiling()):
            refuse_changes(result.grad_fn, written)
        return written
    return cast(Tensor, function.apply(x, operation, selection, inplace, inplace, *settings))


def _differentiated(*inputs: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def _transformed(x: Tensor) -> bool:
    """Return whether a ``torch.func`` transform or forward-mode differentiation may be active."""
    if torch.compiler.is_compiling():
        return False
    return in_functorch() or in_forward_mode()
