"""Shrinking activations: hardshrink, softshrink, threshold."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.ops.autograd.pointwise import pointwise, pointwise_operation
from nslightning.ops.autograd.selection import fixed
from nslightning.ops.module_base import ChosenModule
from nslightning.ops.record import Call, Kernels, Kink, register, spelled

__all__ = ["Hardshrink", "Softshrink", "Threshold", "hardshrink", "softshrink", "threshold"]

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------------------ hardshrink
register(
    pointwise_operation(
        "hardshrink",
        (
            Kink("x = -lambda", lambda width: -width, lambda width: (1.0, 0.0), jumps=lambda width: width != 0),
            Kink("x = lambda", lambda width: width, lambda width: (0.0, 1.0), jumps=lambda width: width != 0),
        ),
        Kernels(forward=aten.hardshrink.default, backward=aten.hardshrink_backward.default),
        at=(0.5,),
        formula="x where |x| > lambda, 0 elsewhere",
        choice="The derivatives of Hardshrink at minus lambda and at lambda, where it jumps.",
        modules={nn.Hardshrink: lambda m, x: Call(x, (m.lambd,))},
        functions=spelled(
            lambda x, lambd=0.5: Call(x, (lambd,)), F.hardshrink, torch.hardshrink, Tensor.hardshrink, aten.hardshrink
        ),
        note="It jumps where it kinks; 0 and 1 are the derivatives on the two sides.",
        example=F.hardshrink,
    )
)


def hardshrink(x: Tensor, lambd: float = 0.5, at_kinks: tuple[float, float] | None = None) -> Tensor:
    r"""Hardshrink with chosen derivatives at minus lambda and at lambda, where it jumps.

    .. math:: y = x\,[|x| > \lambda].

    There is no Clarke Jacobian at a jump; the derivatives on the two sides are 0 and 1. PyTorch and Keras return 0.

    Args:
        x: Input, any shape, floating dtype.
        lambd: The width lambda.
        at_kinks: The derivatives at -lambda and at lambda; ``None`` is the native choice.

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
    return pointwise("hardshrink", x, fixed("hardshrink", at_kinks), lambd)


class Hardshrink(ChosenModule, nn.Hardshrink, choice="at_kinks"):
    """:func:`~nslightning.ops.hardshrink` as a module."""


# ------------------------------------------------------------------------------------------------------ softshrink
register(
    pointwise_operation(
        "softshrink",
        (
            Kink("x = -lambda", lambda width: -width, lambda width: (1.0, 0.0)),
            Kink("x = lambda", lambda width: width, lambda width: (0.0, 1.0)),
        ),
        Kernels(forward=aten.softshrink.default, backward=aten.softshrink_backward.default),
        at=(0.5,),
        formula="sign(x) max(|x| - lambda, 0)",
        choice="The derivatives of Softshrink at minus lambda and at lambda.",
        modules={nn.Softshrink: lambda m, x: Call(x, (m.lambd,))},
        functions=spelled(lambda x, lambd=0.5: Call(x, (lambd,)), F.softshrink, aten.softshrink),
        example=F.softshrink,
    )
)


def softshrink(x: Tensor, lambd: float = 0.5, at_kinks: tuple[float, float] | None = None) -> Tensor:
    r"""Softshrink with chosen derivatives at minus lambda and at lambda.

    .. math:: y = \mathrm{sign}(x) \max(|x| - \lambda, 0).

    The Clarke Jacobian is [0, 1] at both. PyTorch and Keras return 0.

    Args:
        x: Input, any shape, floating dtype.
        lambd: The width lambda.
        at_kinks: The derivatives at -lambda and at lambda; ``None`` is the native choice.

    Returns:
        ``torch.nn.functional.softshrink(x, lambd)``, bit for bit.

    Raises:
        ValueError: If a derivative is not a finite number.
    """
    return pointwise("softshrink", x, fixed("softshrink", at_kinks), lambd)


class Softshrink(ChosenModule, nn.Softshrink, choice="at_kinks"):
    """:func:`~nslightning.ops.softshrink` as a module."""


# ------------------------------------------------------------------------------------------------------- threshold
register(
    pointwise_operation(
        "threshold",
        (
            Kink(
                "x = threshold",
                lambda at, value: at,
                lambda at, value: (0.0, 1.0),
                jumps=lambda at, value: value != at,
                clarke="[0, 1] where value = threshold, else none: a jump",
            ),
        ),
        Kernels(
            forward=aten.threshold.default,
            forward_=aten.threshold_.default,
            backward=lambda g, x, at, value: aten.threshold_backward.default(g, x, at),
        ),
        at=(0.5, 0.5),
        formula="x where x > threshold, value elsewhere",
        choice="The derivative of Threshold at its threshold.",
        modules={nn.Threshold: lambda m, x: Call(x, (m.threshold, m.value), m.inplace)},
        functions=spelled(
            lambda x, threshold, value, inplace=False: Call(x, (threshold, value), inplace),
            F.threshold,
            torch.threshold,
            aten.threshold,
        )
        | spelled(
            lambda x, threshold, value: Call(x, (threshold, value), True),
            F.threshold_,  # type: ignore[attr-defined] # torch's stubs lack it
            torch.threshold_,
            aten.threshold_,
        ),
        example=lambda x: F.threshold(x, 0.5, 0.5),
    )
)


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
        at_threshold: The derivative at t; ``None`` is the native choice.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.nn.functional.threshold(x, threshold, value)``, bit for bit.

    Raises:
        ValueError: If ``at_threshold`` is not a finite number.
    """
    return pointwise("threshold", x, fixed("threshold", at_threshold), threshold, value, inplace=inplace)


class Threshold(ChosenModule, nn.Threshold, choice="at_threshold"):
    """:func:`~nslightning.ops.threshold` as a module."""
