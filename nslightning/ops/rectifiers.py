"""ReLU and its relatives: the identity above 0, and 0 or a slope below."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.ops.autograd.layouts import autocasts, stored
from nslightning.ops.autograd.pointwise import pointwise, pointwise_operation
from nslightning.ops.autograd.selection import fixed
from nslightning.ops.module_base import ChosenModule
from nslightning.ops.record import Call, Kernels, Kink, Rule, number, only, register, spelled
from nslightning.ops.recurrent import RECURRENT, Recurrence

__all__ = [
    "LeakyReLU",
    "PReLU",
    "RReLU",
    "ReLU",
    "ReLU6",
    "leaky_relu",
    "prelu",
    "relu",
    "relu6",
    "rrelu",
]

aten = torch.ops.aten
_BERTOIN = "Bertoin, Bolte, Gerchinovitz, Pauwels, Numerical influence of ReLU'(0) on backpropagation, NeurIPS 2021"
_ZEROS = (
    "A ReLU meets exact zeros behind dead channels, another ReLU, a batch norm whose weight and bias are 0 "
    "(residual branches often start so, and leave it in the first steps: audit trained weights too), zero padding, "
    "and underflow. Look at these layers' weights, keep alpha = 0 (stock) and record it; SiLU or GELU have no ties."
)
_WIDER = "Compute what enters these sites in float32, or keep alpha = 0 (stock) and record it."


# ------------------------------------------------------------------------------------------------------------ ReLU
register(
    pointwise_operation(
        "relu",
        (Kink("x = 0", lambda: 0.0, lambda: (0.0, 1.0)),),
        Kernels(
            forward=aten.relu.default,
            forward_=aten.relu_.default,
            backward=lambda g, y: aten.threshold_backward.default(g, y, 0),
            saves="output",
            published=True,
        ),
        apply=lambda selection, call: (
            pointwise("relu", call.x, selection, inplace=call.inplace)
            if call.within is None
            else call.within(selection, call.x)
        ),
        ties=lambda call: (
            call.within.ties(call.x)
            if isinstance(call.within, Recurrence)
            else (torch.count_nonzero(stored(call.x) == 0), stored(call.x).numel())
        ),
        formula="max(x, 0)",
        choice=(
            "ReLU'(0) = alpha; the gradient at a tie is ``alpha * g`` (Bertoin et al. 2021, section 2). Values in "
            '[0, 1] lie in the Clarke Jacobian, others do not and are allowed. ``"random"`` draws alpha from [0, 1] '
            "for each tie, afresh at each backward pass."
        ),
        modules={nn.ReLU: lambda m, x: Call(x, inplace=m.inplace)},
        functions={F.relu: lambda x, inplace=False: Call(x, inplace=inplace)}
        | spelled(lambda x: Call(x), torch.relu, Tensor.relu, aten.relu)
        | spelled(lambda x: Call(x, inplace=True), torch.relu_, Tensor.relu_, aten.relu_)
        | RECURRENT,
        names=("random",),
        default=0.0,
        remedy=_ZEROS,
        rounding_remedy=_WIDER,
        references=_BERTOIN,
        example=F.relu,
    )
)


def relu(
    x: Tensor,
    at_zero: float | Literal["random"] = 0.0,
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
    return pointwise("relu", x, fixed("relu", at_zero, rule, seed), inplace=inplace)


class ReLU(ChosenModule, nn.ReLU, choice="at_zero"):
    """:func:`~nslightning.ops.relu` as a module."""


# ----------------------------------------------------------------------------------------------------------- ReLU6
def _relu6_call(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Call | None:
    return Call(x, inplace=inplace) if (min_val, max_val) == (0, 6) else None


register(
    pointwise_operation(
        "relu6",
        (Kink("x = 0", lambda: 0.0, lambda: (0.0, 1.0)), Kink("x = 6", lambda: 6.0, lambda: (1.0, 0.0))),
        Kernels(
            forward=lambda x: aten.hardtanh.default(x, 0, 6),
            forward_=lambda x: aten.hardtanh_.default(x, 0, 6),
            backward=lambda g, y: aten.hardtanh_backward.default(g, y, 0, 6),
            published=True,
        ),
        formula="min(max(x, 0), 6)",
        choice="The derivatives of ReLU6 at 0 and at 6.",
        modules={
            nn.ReLU6: lambda m, x: Call(x, inplace=m.inplace),
            nn.Hardtanh: only(
                lambda m: (m.min_val, m.max_val) == (0, 6), lambda m, x: _relu6_call(x, m.min_val, m.max_val, m.inplace)
            ),
        },
        functions={F.relu6: lambda x, inplace=False: Call(x, inplace=inplace)}
        | spelled(_relu6_call, F.hardtanh, aten.hardtanh)
        | spelled(
            lambda x, min_val=-1.0, max_val=1.0: _relu6_call(x, min_val, max_val, True), F.hardtanh_, aten.hardtanh_
        ),
        default=(0.0, 0.0),
        remedy=_ZEROS.replace("A ReLU meets exact zeros", "A ReLU6 meets its kinks 0 and 6"),
        rounding_remedy=_WIDER,
        references=_BERTOIN,
        example=F.relu6,
    )
)


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
    return pointwise("relu6", x, fixed("relu6", at_kinks, rule), inplace=inplace)


class ReLU6(ChosenModule, nn.ReLU6, choice="at_kinks"):
    """:func:`~nslightning.ops.relu6` as a module."""


# ------------------------------------------------------------------------------------------------------- LeakyReLU
register(
    pointwise_operation(
        "leaky_relu",
        (Kink("x = 0", lambda slope: 0.0, lambda slope: (slope, 1.0), clarke="between slope and 1", stock="slope"),),
        Kernels(
            forward=aten.leaky_relu.default,
            forward_=aten.leaky_relu_.default,
            # In place the output stands for the input: its sign is the same, the slope being >= 0 there.
            backward=lambda g, x, slope: aten.leaky_relu_backward.default(g, x, slope, False),
            backward_=lambda g, y, slope: aten.leaky_relu_backward.default(g, y, slope, True),
        ),
        at=(0.2,),
        formula="x where x > 0, slope x elsewhere",
        choice="The derivative of LeakyReLU at 0; the native choice is its negative slope.",
        modules={nn.LeakyReLU: lambda m, x: Call(x, (m.negative_slope,), m.inplace)},
        functions=spelled(
            lambda x, negative_slope=0.01, inplace=False: Call(x, (negative_slope,), inplace),
            F.leaky_relu,
            aten.leaky_relu,
        )
        | spelled(lambda x, negative_slope=0.01: Call(x, (negative_slope,), True), F.leaky_relu_, aten.leaky_relu_),
        jax=1.0,
        example=lambda x: F.leaky_relu(x, 0.2),
    )
)


def leaky_relu(x: Tensor, negative_slope: float = 0.01, at_zero: float | None = None, inplace: bool = False) -> Tensor:
    r"""LeakyReLU with a chosen derivative at 0.

    .. math:: y = x\,[x > 0] + s\,x\,[x \le 0].

    The Clarke Jacobian at 0 is the interval between the slope s and 1. PyTorch and TensorFlow return s, JAX 1.

    Args:
        x: Input, any shape, floating dtype.
        negative_slope: The slope s left of 0.
        at_zero: The derivative at 0; ``None`` is the native choice, s.
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
    return pointwise("leaky_relu", x, fixed("leaky_relu", at_zero), negative_slope, inplace=inplace)


class LeakyReLU(ChosenModule, nn.LeakyReLU, choice="at_zero"):
    """:func:`~nslightning.ops.leaky_relu` as a module."""


# ----------------------------------------------------------------------------------------------------------- PReLU
def _along_channels(x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor]]:
    """Do the work of ``F.prelu`` before its kernel: autocast's dtype, the errors, the slopes along dimension 1."""
    if autocasts(x):
        dtype = F.prelu(x.detach().flatten()[:1], weight.detach().flatten()[:1]).dtype
        x, weight = x.to(dtype), weight.to(dtype)
    channels = x.shape[1] if x.dim() > 1 else 1
    if x.dtype != weight.dtype or weight.dim() > 1 or weight.numel() not in ((1,) if x.dim() == 0 else (1, channels)):
        F.prelu(x, weight)  # raises
    shape = (1, weight.numel(), *(1,) * (x.dim() - 2)) if x.dim() > 1 else (1,) * x.dim()
    return x, (weight.reshape(shape),)


register(
    pointwise_operation(
        "prelu",
        (Kink("x = 0", lambda weight: 0.0, lambda weight: (weight, 1.0), clarke="between a and 1", stock="a"),),
        Kernels(
            forward=aten._prelu_kernel.default,
            backward=aten._prelu_kernel_backward.default,
            prepare=_along_channels,
        ),
        at=(torch.tensor([0.25], dtype=torch.float64, device="cpu"),),
        formula="x where x > 0, a x elsewhere, a learned",
        choice="The derivative of PReLU at 0; the native choice is its slope.",
        modules={nn.PReLU: lambda m, x: Call(x, (m.weight,))},
        functions=spelled(lambda x, weight: Call(x, (weight,)), F.prelu, torch.prelu, Tensor.prelu, aten.prelu),
        jax=1.0,
        tensorflow=0.0,
        note="The gradient of the learned slope is unique.",
        example=lambda x: F.prelu(x, torch.tensor([0.25], dtype=x.dtype)),
    )
)


def prelu(x: Tensor, weight: Tensor, at_zero: float | None = None) -> Tensor:
    r"""PReLU, LeakyReLU with learned slopes, with a chosen derivative at 0.

    .. math:: y = x\,[x > 0] + a\,x\,[x \le 0].

    The Clarke Jacobian in x at 0 is the interval between the slope a and 1; the derivative in a is min(x, 0), 0 there
    and unique. PyTorch returns a, flax's ``PReLU`` 1, Keras's 0.

    Args:
        x: Input, any shape, floating dtype.
        weight: The slopes, shape ``()``, ``(1,)`` or one per channel (dimension 1 of ``x``); of ``x``'s dtype.
        at_zero: The derivative in x at 0; ``None`` is the native choice, the slope.

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
    return pointwise("prelu", x, fixed("prelu", at_zero), weight)


class PReLU(ChosenModule, nn.PReLU, choice="at_zero"):
    """:func:`~nslightning.ops.prelu` as a module."""


# ----------------------------------------------------------------------------------------------------------- RReLU
def _room_for_slopes(x: Tensor, lower: float, upper: float, training: bool) -> tuple[Tensor, tuple[Any, ...]]:
    """Memory for the slopes, which the forward draws; laid out as ``F.rrelu`` lays it out."""
    noise = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x, (noise, number(lower), number(upper), training)


def _slope(*parameters: Any) -> float | None:
    """The slope on the left; in training it is drawn for each entry."""
    lower, upper, training = parameters[-3:]
    return None if training else (lower + upper) / 2


def _rrelu_call(
    x: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
    generator: torch.Generator | None = None,
) -> Call | None:
    return Call(x, (lower, upper, training), inplace) if generator is None else None


register(
    pointwise_operation(
        "rrelu",
        (
            Kink(
                "x = 0",
                lambda *parameters: 0.0,
                lambda *parameters: (_slope(*parameters), 1.0),
                clarke="between r and 1",
                stock="r",
            ),
        ),
        Kernels(
            forward=aten.rrelu_with_noise.default,
            forward_=aten.rrelu_with_noise_.default,
            backward=lambda g, x, *slopes: aten.rrelu_with_noise_backward.default(g, x, *slopes, False),
            backward_=lambda g, y, *slopes: aten.rrelu_with_noise_backward.default(g, y, *slopes, True),
            prepare=_room_for_slopes,
        ),
        at=(0.3, 0.3, False),
        formula="x where x > 0, r x elsewhere, r drawn from [lower, upper]",
        choice="The derivative of RReLU at 0; the native choice is the slope drawn.",
        modules={nn.RReLU: lambda m, x: _rrelu_call(x, m.lower, m.upper, m.training, m.inplace)},
        functions={F.rrelu: _rrelu_call}
        | spelled(
            lambda x, lower=1 / 8, upper=1 / 3, training=False, generator=None: _rrelu_call(
                x, lower, upper, training, generator=generator
            ),
            torch.rrelu,
            aten.rrelu,
        )
        | spelled(
            lambda x, lower=1 / 8, upper=1 / 3, training=False, generator=None: _rrelu_call(
                x, lower, upper, training, True, generator
            ),
            F.rrelu_,
            torch.rrelu_,
            aten.rrelu_,
        ),
        note="In evaluation mode r is (lower + upper) / 2.",
        example=lambda x: F.rrelu(x, 0.3, 0.3),
    )
)


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
        at_zero: The derivative at 0; ``None`` is the native choice, r.
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
    return pointwise("rrelu", x, fixed("rrelu", at_zero), lower, upper, training, inplace=inplace)


class RReLU(ChosenModule, nn.RReLU, choice="at_zero"):
    """:func:`~nslightning.ops.rrelu` as a module."""
