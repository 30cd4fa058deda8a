r"""The pointwise operations as functions: ReLU and its relatives, clamping, shrinking, the absolute value.

CELU, :math:`\max(x, 0) + \min(0, \alpha (e^{x/\alpha} - 1))`, is not here: its derivative at 0 is 1 from both sides for
every alpha, so there is nothing to choose.
"""

from __future__ import annotations

from torch import Tensor

from nslightning.jacobians import Jacobians, ReluChoice, Rule
from nslightning.ops.autograd.routing import fixed
from nslightning.ops.clamping import clamped
from nslightning.ops.pointwise import pointwise

__all__ = [
    "abs",
    "clamp",
    "clamp_max",
    "clamp_min",
    "elu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "prelu",
    "relu",
    "relu6",
    "rrelu",
    "selu",
    "softshrink",
    "threshold",
]


def relu(
    x: Tensor,
    at_zero: float | ReluChoice = 0.0,
    inplace: bool = False,
    rule: Rule = "exact",
    seed: int = 0,
) -> Tensor:
    r"""ReLU with a chosen derivative at 0.

    .. math:: y = \max(x, 0), \qquad \bar x = \bar y\,[x > 0] + \alpha\,\bar y\,[x = 0].

    The Clarke Jacobian at 0 is [0, 1]. PyTorch, TensorFlow and JAX (``jax.nn.relu``) return 0 there.
    Bertoin, Bolte, Gerchinovitz, Pauwels, *Numerical influence of ReLU'(0) on backpropagation*, NeurIPS 2021.

    Args:
        x: Input, any shape, floating dtype. ``-0.0`` counts as 0; a NaN input lets the gradient through, as stock.
        at_zero: ReLU'(0) = alpha; ``"random"`` draws it from [0, 1] for each tie, afresh at each backward pass.
        inplace: Overwrite ``x``.
        rule: ``"published"`` writes alpha itself, not alpha times the incoming gradient, as the released code does.
        seed: Seeds the private random stream of ``at_zero="random"``; the global streams are never used.

    Returns:
        ``torch.relu(x)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is neither a finite number nor ``"random"``, or the rule is unknown.

    Example:
        >>> import torch
        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> relu(x, at_zero=0.5).sum().backward()
        >>> x.grad
        tensor([0.0000, 0.5000, 1.0000])
    """
    return pointwise("relu", x, fixed(Jacobians(relu=at_zero, rule=rule), seed), inplace=inplace)


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
        >>> import torch
        >>> x = torch.tensor([0.0, 3.0, 6.0], requires_grad=True)
        >>> relu6(x, at_kinks=(0.25, 0.75)).sum().backward()
        >>> x.grad
        tensor([0.2500, 1.0000, 0.7500])
    """
    return pointwise("relu6", x, fixed(Jacobians(relu6=at_kinks, rule=rule)), inplace=inplace)


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
        >>> import torch
        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> leaky_relu(x, 0.25, at_zero=0.5).sum().backward()
        >>> x.grad
        tensor([0.2500, 0.5000, 1.0000])
    """
    return pointwise("leaky_relu", x, fixed(Jacobians(leaky_relu=at_zero)), negative_slope, inplace=inplace)


def prelu(x: Tensor, weight: Tensor, at_zero: float | None = None) -> Tensor:
    r"""PReLU, LeakyReLU with learned slopes, with a chosen derivative at 0.

    .. math:: y = x\,[x > 0] + a\,x\,[x \le 0].

    The Clarke Jacobian in x at 0 is the interval between the slope a and 1; the derivative in a is min(x, 0), 0 there
    and unique. PyTorch returns a, flax's ``PReLU`` 1, Keras's 0.

    Args:
        x: Input, any shape, floating dtype.
        weight: The slopes, shape ``()``, ``(1,)`` or one per channel (dimension 1 of ``x``); of ``x``'s dtype.
        at_zero: The derivative in x at 0; ``None`` is the reference, the slope.

    Returns:
        ``torch.nn.functional.prelu(x, weight)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is neither None nor a finite number.
        RuntimeError: If the weight does not fit the input, as in PyTorch.

    Example:
        >>> import torch
        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> prelu(x, torch.tensor([0.25]), at_zero=0.5).sum().backward()
        >>> x.grad
        tensor([0.2500, 0.5000, 1.0000])
    """
    return pointwise("prelu", x, fixed(Jacobians(prelu=at_zero)), weight)


def rrelu(
    x: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    at_zero: float | None = None,
    inplace: bool = False,
) -> Tensor:
    r"""RReLU, LeakyReLU with random slopes, with a chosen derivative at 0.

    .. math:: y = x\,[x > 0] + r\,x\,[x \le 0], \quad r \sim U(l, u), \text{ or } r = (l + u) / 2 \text{ in evaluation}.

    The Clarke Jacobian at 0 is the interval between r and 1. PyTorch returns r; JAX and TensorFlow have no such
    function. The slopes come from the global random stream, in the order in which stock draws them.

    Args:
        x: Input, any shape, floating dtype.
        lower: The lower end l of the slopes.
        upper: The upper end u.
        training: Draw the slopes.
        at_zero: The derivative at 0; ``None`` is the reference, r.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.nn.functional.rrelu(x, lower, upper, training)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is neither None nor a finite number.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.0, 2.0], requires_grad=True)
        >>> rrelu(x, training=True, at_zero=0.5).sum().backward()
        >>> x.grad
        tensor([0.5000, 1.0000])
    """
    return pointwise("rrelu", x, fixed(Jacobians(rrelu=at_zero)), lower, upper, training, inplace=inplace)


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
        >>> import torch
        >>> x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
        >>> hardtanh(x, at_kinks=(0.25, 0.75)).sum().backward()
        >>> x.grad
        tensor([0.2500, 1.0000, 0.7500])
    """
    selection = fixed(Jacobians(hardtanh=at_kinks))
    return pointwise("hardtanh", x, selection, min_val, max_val, inplace=inplace)


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
        at_bounds: The derivatives at the two bounds; ``None`` is the reference.
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
    return clamped(x, fixed(Jacobians(clamp=at_bounds)), min, max, inplace=inplace)


def clamp_min(x: Tensor, min: float | Tensor, at_bound: float | None = None, inplace: bool = False) -> Tensor:
    """:func:`clamp` with a lower bound alone.

    Args:
        x: Input, any shape, floating dtype.
        min: The lower bound.
        at_bound: The derivative there; ``None`` is the reference.
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
        at_bound: The derivative there; ``None`` is the reference.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.clamp_max(x, max)``, bit for bit.

    Raises:
        ValueError: If ``at_bound`` is neither None nor a finite number.
    """
    return clamp(x, None, max, None if at_bound is None else (0.0, at_bound), inplace)


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
    return pointwise("hardswish", x, fixed(Jacobians(hardswish=at_kinks)), inplace=inplace)


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
    return pointwise("hardsigmoid", x, fixed(Jacobians(hardsigmoid=at_kinks)), inplace=inplace)


def hardshrink(x: Tensor, lambd: float = 0.5, at_kinks: tuple[float, float] | None = None) -> Tensor:
    r"""Hardshrink with chosen derivatives at minus lambda and at lambda, where it jumps.

    .. math:: y = x\,[|x| > \lambda].

    There is no Clarke Jacobian at a jump; the derivatives on the two sides are 0 and 1. PyTorch and Keras return 0.

    Args:
        x: Input, any shape, floating dtype.
        lambd: The width lambda.
        at_kinks: The derivatives at -lambda and at lambda; ``None`` is the reference.

    Returns:
        ``torch.nn.functional.hardshrink(x, lambd)``, bit for bit.

    Raises:
        ValueError: If a derivative is not a finite number.

    Example:
        >>> import torch
        >>> x = torch.tensor([-0.5, 0.25, 0.5], requires_grad=True)
        >>> hardshrink(x, at_kinks=(0.25, 0.75)).sum().backward()
        >>> x.grad
        tensor([0.2500, 0.0000, 0.7500])
    """
    return pointwise("hardshrink", x, fixed(Jacobians(hardshrink=at_kinks)), lambd)


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
    return pointwise("softshrink", x, fixed(Jacobians(softshrink=at_kinks)), lambd)


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
    return pointwise("threshold", x, fixed(Jacobians(threshold=at_threshold)), threshold, value, inplace=inplace)


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
    return pointwise("elu", x, fixed(Jacobians(elu=at_zero)), alpha, inplace=inplace)


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
    return pointwise("selu", x, fixed(Jacobians(selu=at_zero)), inplace=inplace)


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
        >>> import torch
        >>> x = torch.zeros(1, requires_grad=True)
        >>> abs(x, at_zero=1.0).sum().backward()
        >>> x.grad
        tensor([1.])
    """
    return pointwise("abs", x, fixed(Jacobians(abs=at_zero)), inplace=inplace)
