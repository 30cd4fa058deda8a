"""Pointwise operations with kinks: ReLU and its relatives, the hard and shrinking activations, the absolute value.

All share one mechanism. The forward is the stock kernel. The backward is the stock backward kernel, then the entries
that sat exactly on a kink are overwritten with the chosen derivative times the incoming gradient. When the forward
met no kink, in eager mode on a CPU, the operation *is* the stock one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from nslightning.jacobians import Jacobians, Rule
from nslightning.ops.selection import Selection, data_dependent, read_now
from nslightning.ops.tie_bits import TieBits, find_ties, mask_of, overwrite, storage_order

__all__ = [
    "POINTWISE",
    "Pointwise",
    "abs",
    "elu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "pointwise",
    "relu",
    "relu6",
    "selu",
    "softshrink",
    "threshold",
]

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
        kinks: The kinks as ``(position, reference derivative)``, from the parameters.
        constant_when_published: Whether the published rule drops the incoming gradient at ties.
    """

    name: str
    forward: Callable[..., Tensor]
    forward_: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    saves: Literal["output", "input", "either"]
    kinks: Callable[..., tuple[tuple[float, float], ...]]
    constant_when_published: bool


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
            constant_when_published=False,
        ),
        Pointwise(
            name="hardtanh",
            forward=aten.hardtanh.default,
            forward_=aten.hardtanh_.default,
            backward=lambda g, y, low, high: aten.hardtanh_backward.default(g, y, low, high),
            saves="either",
            kinks=lambda low, high: ((low, 0.0), (high, 0.0)),
            constant_when_published=False,
        ),
        Pointwise(
            name="hardswish",
            forward=aten.hardswish.default,
            forward_=aten.hardswish_.default,
            backward=aten.hardswish_backward.default,
            saves="input",
            kinks=lambda: ((-3.0, 0.0), (3.0, 1.0)),
            constant_when_published=False,
        ),
        Pointwise(
            name="hardsigmoid",
            forward=aten.hardsigmoid.default,
            forward_=aten.hardsigmoid_.default,
            backward=aten.hardsigmoid_backward.default,
            saves="input",
            kinks=lambda: ((-3.0, 0.0), (3.0, 0.0)),
            constant_when_published=False,
        ),
        Pointwise(
            name="softshrink",
            forward=aten.softshrink.default,
            forward_=lambda x, width: x.copy_(aten.softshrink.default(x, width)),
            backward=aten.softshrink_backward.default,
            saves="input",
            kinks=lambda width: ((-width, 0.0), (width, 0.0)),
            constant_when_published=False,
        ),
        Pointwise(
            name="threshold",
            forward=aten.threshold.default,
            forward_=aten.threshold_.default,
            backward=lambda g, x, at, value: aten.threshold_backward.default(g, x, at),
            saves="input",
            kinks=lambda at, value: ((at, 0.0),),
            constant_when_published=False,
        ),
        Pointwise(
            name="elu",
            forward=aten.elu.default,
            forward_=aten.elu_.default,
            backward=lambda g, x, alpha: aten.elu_backward.default(g, alpha, 1, 1, False, x),
            saves="input",
            kinks=lambda alpha: ((0.0, alpha),) if alpha != 1 else (),
            constant_when_published=False,
        ),
        Pointwise(
            name="selu",
            forward=lambda x: aten.elu.default(x, _SELU[0], _SELU[1]),
            forward_=lambda x: aten.elu_.default(x, _SELU[0], _SELU[1]),
            backward=lambda g, x: aten.elu_backward.default(g, *_SELU, 1, False, x),
            saves="input",
            kinks=lambda: ((0.0, _SELU[0] * _SELU[1]),),
            constant_when_published=False,
        ),
        Pointwise(
            name="abs",
            forward=aten.abs.default,
            forward_=aten.abs_.default,
            backward=lambda g, x: g * x.sgn(),
            saves="input",
            kinks=lambda: ((0.0, 0.0),),
            constant_when_published=False,
        ),
    )
}


class _Kinked(torch.autograd.Function):
    """Stock forward; stock backward with the chosen derivative at the recorded ties."""

    @staticmethod
    def forward(
        x: Tensor,
        operation: str,
        selection: Selection,
        inplace: bool,
        parameters: tuple[float, ...],
        order: tuple[int, ...] | None,
        *ties: Tensor,
    ) -> Tensor:
        if inplace:
            POINTWISE[operation].forward_(x, *parameters)
            return x
        return POINTWISE[operation].forward(x, *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.operation, ctx.selection, inplace, ctx.parameters, ctx.order, *ties = inputs
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(output if inplace or POINTWISE[ctx.operation].saves == "output" else x, *ties)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved, *ties = ctx.saved_tensors
        selection = ctx.selection
        vjp = partial(_vjp, POINTWISE[ctx.operation], ctx.parameters, ctx.order, saved, ties, g)
        if not torch.compiler.is_compiling() and selection.recorder is not None:
            selection.recorder(ctx, vjp)
        return (vjp(selection), None, None, None, None, None, *(None for _ in ties))


def _vjp(
    op: Pointwise,
    parameters: tuple[float, ...],
    order: tuple[int, ...] | None,
    saved: Tensor,
    ties: list[Tensor],
    g: Tensor,
    selection: Selection,
) -> Tensor:
    """The gradient with respect to the input under a selection.

    ``ties`` holds a mask per kink where ``order`` is None, else the two tensors of a :class:`TieBits`.
    """
    gradient = op.backward(g, saved, *parameters)
    if torch.compiler.is_compiling():
        for i, mask in enumerate(ties):
            gradient = _choose_compiled(op, selection, i, mask, g, gradient)
        return gradient
    constant = selection.jacobians.rule == "published" and op.constant_when_published
    found = ties if order is None else map(TieBits, ties[::2], ties[1::2])
    for tie, (_, reference), derivative in zip(
        found, op.kinks(*parameters), selection.at_kinks(op.name), strict=True
    ):
        if derivative is None or (derivative == reference and (derivative == 0 or not constant)):
            continue
        value = partial(_value, derivative, constant)
        if order is not None and not torch.is_grad_enabled():
            gradient = overwrite(gradient, g, tie, order, value)
            continue
        mask = tie if order is None else mask_of(tie, g, order)
        gradient = torch.where(mask, value(g, mask), gradient)
    return gradient


def _value(derivative: float, constant: bool, g: Tensor, tied: Tensor) -> Tensor:
    """What tied entries receive."""
    return torch.full_like(g, derivative) if constant else g * derivative


def _choose_compiled(op: Pointwise, selection: Selection, i: int, mask: Tensor, g: Tensor, gradient: Tensor) -> Tensor:
    """Overwrite the entries at one kink, reading the choice as tensors: one compiled backward serves every choice."""
    derivative = read_now(selection.kinks[op.name], g)[i].to(g.dtype)
    value = g * derivative
    if op.constant_when_published:
        value = torch.where(read_now(selection.published, g), derivative, value)
    return torch.where(mask & ~torch.isnan(derivative), value, gradient)


def pointwise(operation: str, x: Tensor, selection: Selection, *parameters: float, inplace: bool = False) -> Tensor:
    """Apply a pointwise operation whose derivative at its kinks is the one ``selection`` names at backward time.

    Args:
        operation: A key of :data:`POINTWISE`.
        x: Input, any shape, floating dtype.
        selection: The choice, read when the backward runs.
        *parameters: The operation's own parameters, such as LeakyReLU's slope.
        inplace: Overwrite ``x``.

    Returns:
        The stock operation's result, bit for bit.
    """
    op = POINTWISE[operation]
    if not (torch.is_grad_enabled() and x.requires_grad):
        return (op.forward_ if inplace else op.forward)(x, *parameters)
    if inplace and operation == "leaky_relu" and parameters[0] < 0:
        raise ValueError(f"leaky_relu in place needs a negative slope >= 0, as in stock PyTorch; given {parameters[0]}")
    positions = [position for position, _ in op.kinks(*parameters)]
    order = storage_order(x) if data_dependent(x) and x.is_floating_point() else None
    if order is None:
        ties = [x.detach() == position for position in positions]
    else:
        found = find_ties(x.detach(), positions, order)
        if not any(tie.blocks.numel() for tie in found):  # most forwards end here
            return (op.forward_ if inplace else op.forward)(x, *parameters)
        ties = [part for tie in found for part in tie]
    if inplace and op.saves == "input":
        return x.copy_(_Kinked.apply(x.clone(), operation, selection, False, parameters, order, *ties))
    return cast(Tensor, _Kinked.apply(x, operation, selection, inplace, parameters, order, *ties))


@lru_cache(maxsize=1024)
def _fixed(jacobians: Jacobians) -> Selection:
    """A selection that nobody changes, for calls that name their choice."""
    return Selection(jacobians)


def relu(x: Tensor, at_zero: float = 0.0, inplace: bool = False, rule: Rule = "exact") -> Tensor:
    r"""ReLU with a chosen derivative at 0.

    .. math:: y = \max(x, 0), \qquad \bar x = \bar y\,[x > 0] + \alpha\,\bar y\,[x = 0].

    The Clarke Jacobian at 0 is [0, 1]. PyTorch, TensorFlow and JAX (``jax.nn.relu``) return 0 there.
    Bertoin, Bolte, Gerchinovitz, Pauwels, *Numerical influence of ReLU'(0) on backpropagation*, NeurIPS 2021.

    Args:
        x: Input, any shape, floating dtype. ``-0.0`` counts as 0; a NaN input lets the gradient through, as stock.
        at_zero: ReLU'(0) = alpha.
        inplace: Overwrite ``x``.
        rule: ``"published"`` writes alpha itself, not alpha times the incoming gradient, as the released code does.

    Returns:
        ``torch.relu(x)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is not a finite number or the rule is unknown.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> relu(x, at_zero=0.5).sum().backward()
        >>> x.grad
        tensor([0.0000, 0.5000, 1.0000])
    """
    return pointwise("relu", x, _fixed(Jacobians(relu=at_zero, rule=rule)), inplace=inplace)


def relu6(x: Tensor, at_kinks: tuple[float, float] = (0.0, 0.0), inplace: bool = False, rule: Rule = "exact") -> Tensor:
    r"""ReLU6 with chosen derivatives at 0 and at 6.

    .. math:: y = \min(\max(x, 0), 6).

    The Clarke Jacobian is [0, 1] at both kinks. PyTorch returns 0 at both.

    Args:
        x: Input, any shape, floating dtype.
        at_kinks: The derivatives at 0 and at 6.
        inplace: Overwrite ``x``.
        rule: ``"published"`` writes the derivatives without the incoming gradient, as the released code does.

    Returns:
        ``torch.nn.functional.relu6(x)``, bit for bit.

    Raises:
        ValueError: If a derivative is not a finite number or the rule is unknown.

    Example:
        >>> x = torch.tensor([0.0, 3.0, 6.0], requires_grad=True)
        >>> relu6(x, at_kinks=(0.25, 0.75)).sum().backward()
        >>> x.grad
        tensor([0.2500, 1.0000, 0.7500])
    """
    return pointwise("relu6", x, _fixed(Jacobians(relu6=at_kinks, rule=rule)), inplace=inplace)


def leaky_relu(x: Tensor, negative_slope: float = 0.01, at_zero: float | None = None, inplace: bool = False) -> Tensor:
    r"""LeakyReLU with a chosen derivative at 0.

    .. math:: y = x\,[x > 0] + s\,x\,[x \le 0].

    The Clarke Jacobian at 0 is the interval between the slope s and 1. PyTorch and TensorFlow return s, JAX 1.

    Args:
        x: Input, any shape, floating dtype.
        negative_slope: The slope s left of 0.
        at_zero: The derivative at 0; ``None`` is the reference, s.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.nn.functional.leaky_relu(x, negative_slope)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is neither None nor a finite number.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> leaky_relu(x, 0.25, at_zero=0.5).sum().backward()
        >>> x.grad
        tensor([0.2500, 0.5000, 1.0000])
    """
    return pointwise("leaky_relu", x, _fixed(Jacobians(leaky_relu=at_zero)), negative_slope, inplace=inplace)


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
        at_kinks: The derivatives at the two bounds; ``None`` is the reference.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.nn.functional.hardtanh(x, min_val, max_val)``, bit for bit.

    Raises:
        ValueError: If a derivative is not a finite number.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
        >>> hardtanh(x, at_kinks=(0.25, 0.75)).sum().backward()
        >>> x.grad
        tensor([0.2500, 1.0000, 0.7500])
    """
    selection = _fixed(Jacobians(hardtanh=at_kinks))
    return pointwise("hardtanh", x, selection, min_val, max_val, inplace=inplace)


def hardswish(x: Tensor, at_kinks: tuple[float, float] | None = None, inplace: bool = False) -> Tensor:
    r"""Hardswish with chosen derivatives at -3 and at 3.

    .. math:: y = x \min(\max(x + 3, 0), 6) / 6.

    The Clarke Jacobian is [-1/2, 0] at -3 and [1, 3/2] at 3. PyTorch, JAX and Keras return 0 and 1.

    Args:
        x: Input, any shape, floating dtype.
        at_kinks: The derivatives at -3 and at 3; ``None`` is the reference.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.nn.functional.hardswish(x)``, bit for bit.

    Raises:
        ValueError: If a derivative is not a finite number.
    """
    return pointwise("hardswish", x, _fixed(Jacobians(hardswish=at_kinks)), inplace=inplace)


def hardsigmoid(x: Tensor, at_kinks: tuple[float, float] | None = None, inplace: bool = False) -> Tensor:
    r"""Hardsigmoid with chosen derivatives at -3 and at 3.

    .. math:: y = \min(\max(x + 3, 0), 6) / 6.

    The Clarke Jacobian is [0, 1/6] at both. PyTorch, JAX and Keras return 0.

    Args:
        x: Input, any shape, floating dtype.
        at_kinks: The derivatives at -3 and at 3; ``None`` is the reference.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.nn.functional.hardsigmoid(x)``, bit for bit.

    Raises:
        ValueError: If a derivative is not a finite number.
    """
    return pointwise("hardsigmoid", x, _fixed(Jacobians(hardsigmoid=at_kinks)), inplace=inplace)


def softshrink(x: Tensor, lambd: float = 0.5, at_kinks: tuple[float, float] | None = None) -> Tensor:
    r"""Softshrink with chosen derivatives at minus lambda and at lambda.

    .. math:: y = \mathrm{sign}(x) \max(|x| - \lambda, 0).

    The Clarke Jacobian is [0, 1] at both. PyTorch and Keras return 0.

    Args:
        x: Input, any shape, floating dtype.
        lambd: The width lambda.
        at_kinks: The derivatives at -lambda and at lambda; ``None`` is the reference.

    Returns:
        ``torch.nn.functional.softshrink(x, lambd)``, bit for bit.

    Raises:
        ValueError: If a derivative is not a finite number.
    """
    return pointwise("softshrink", x, _fixed(Jacobians(softshrink=at_kinks)), lambd)


def threshold(
    x: Tensor, threshold: float, value: float, at_threshold: float | None = None, inplace: bool = False
) -> Tensor:
    r"""Threshold with a chosen derivative at the threshold t.

    .. math:: y = x\,[x > t] + v\,[x \le t].

    For v = t the Clarke Jacobian there is [0, 1]; otherwise the function jumps and has none. PyTorch and Keras
    return 0.

    Args:
        x: Input, any shape, floating dtype.
        threshold: The threshold t.
        value: The value v at and below it.
        at_threshold: The derivative at t; ``None`` is the reference.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.nn.functional.threshold(x, threshold, value)``, bit for bit.

    Raises:
        ValueError: If ``at_threshold`` is not a finite number.
    """
    return pointwise("threshold", x, _fixed(Jacobians(threshold=at_threshold)), threshold, value, inplace=inplace)


def elu(x: Tensor, alpha: float = 1.0, at_zero: float | None = None, inplace: bool = False) -> Tensor:
    r"""ELU with a chosen derivative at 0, where its alpha makes that a kink.

    .. math:: y = x\,[x > 0] + \alpha (e^x - 1)\,[x \le 0].

    The Clarke Jacobian at 0 is the interval between alpha and 1; for alpha = 1 the function is smooth there and no
    choice is taken. PyTorch and JAX return alpha.

    Args:
        x: Input, any shape, floating dtype.
        alpha: Minus the limit on the left.
        at_zero: The derivative at 0; ``None`` is the reference.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.nn.functional.elu(x, alpha)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is not a finite number.
    """
    return pointwise("elu", x, _fixed(Jacobians(elu=at_zero)), alpha, inplace=inplace)


def selu(x: Tensor, at_zero: float | None = None, inplace: bool = False) -> Tensor:
    r"""SELU with a chosen derivative at 0.

    .. math:: y = s\,(x\,[x > 0] + \alpha (e^x - 1)\,[x \le 0]), \quad \alpha \approx 1.6733,\ s \approx 1.0507.

    The Clarke Jacobian at 0 is [s, s alpha]. PyTorch and JAX return s alpha, TensorFlow s.

    Args:
        x: Input, any shape, floating dtype.
        at_zero: The derivative at 0; ``None`` is the reference.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.nn.functional.selu(x)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is not a finite number.
    """
    return pointwise("selu", x, _fixed(Jacobians(selu=at_zero)), inplace=inplace)


def abs(x: Tensor, at_zero: float | None = None, inplace: bool = False) -> Tensor:
    r"""The absolute value with a chosen derivative at 0.

    The Clarke Jacobian at 0 is [-1, 1]. PyTorch and TensorFlow return 0, JAX 1.

    Args:
        x: Input, any shape, floating dtype.
        at_zero: The derivative at 0; ``None`` is the reference.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.abs(x)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is not a finite number.

    Example:
        >>> x = torch.zeros(1, requires_grad=True)
        >>> abs(x, at_zero=1.0).sum().backward()
        >>> x.grad
        tensor([1.])
    """
    return pointwise("abs", x, _fixed(Jacobians(abs=at_zero)), inplace=inplace)
