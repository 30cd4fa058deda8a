r"""Exponential activations: ELU and SELU.

CELU, :math:`\max(x, 0) + \min(0, \alpha (e^{x/\alpha} - 1))`, is not here: its derivative at 0 is 1 from both sides for
every alpha, so there is nothing to choose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.ops.autograd.pointwise import pointwise, pointwise_operation
from nslightning.ops.autograd.selection import fixed
from nslightning.ops.module_base import ChosenModule
from nslightning.ops.record import Call, Kernels, Kink, only, plain, register, spelled

__all__ = ["ELU", "SELU", "elu", "selu"]

aten = torch.ops.aten
_ALPHA, _SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946  # SELU's, as in PyTorch


# ------------------------------------------------------------------------------------------------------------- ELU
def _elu_call(
    x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0, inplace: bool = False
) -> Call | None:
    # Smooth for alpha = 1; scaled only inside SELU's own kernel.
    return Call(x, (alpha,), inplace) if alpha != 1 and scale == 1 and input_scale == 1 else None


register(
    pointwise_operation(
        "elu",
        (
            Kink(
                "x = 0",
                lambda alpha: 0.0 if alpha != 1 else float("nan"),
                lambda alpha: (alpha, 1.0),
                clarke="between alpha and 1",
                stock="alpha",
            ),
        ),
        Kernels(
            forward=aten.elu.default,
            forward_=aten.elu_.default,
            backward=lambda g, x, alpha: aten.elu_backward.default(g, alpha, 1, 1, False, x),
            backward_=lambda g, y, alpha: aten.elu_backward.default(g, alpha, 1, 1, True, y),
        ),
        at=(0.5,),
        formula="x where x > 0, alpha (exp(x) - 1) elsewhere",
        choice="The derivative of ELU at 0, where its alpha is not 1; the native choice is that alpha.",
        modules={
            nn.ELU: only(lambda m: m.alpha != 1, lambda m, x: _elu_call(x, m.alpha, inplace=m.inplace)),
        },
        functions={F.elu: lambda x, alpha=1.0, inplace=False: _elu_call(x, alpha, inplace=inplace)}
        | spelled(_elu_call, aten.elu)
        | spelled(
            lambda x, alpha=1.0, scale=1.0, input_scale=1.0: _elu_call(x, alpha, scale, input_scale, True),
            F.elu_,
            aten.elu_,
        ),
        note="Smooth for alpha = 1; CELU is smooth for every alpha.",
        example=lambda x: F.elu(x, 0.5),
    )
)


def elu(x: Tensor, alpha: float = 1.0, at_zero: float | None = None, inplace: bool = False) -> Tensor:
    r"""ELU with a chosen derivative at 0, where its alpha makes that a kink.

    .. math:: y = x\,[x > 0] + \alpha (e^x - 1)\,[x \le 0].

    The Clarke Jacobian at 0 is the interval between alpha and 1; for alpha = 1 the function is smooth there and no
    choice is taken. PyTorch and JAX return alpha.

    Args:
        x: Input, any shape, floating dtype.
        alpha: Minus the limit on the left.
        at_zero: The derivative at 0; ``None`` is the native choice.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.nn.functional.elu(x, alpha)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is not a finite number.
    """
    return pointwise("elu", x, fixed("elu", at_zero), alpha, inplace=inplace)


class ELU(ChosenModule, nn.ELU, choice="at_zero"):
    """:func:`~nslightning.ops.elu` as a module."""


# ------------------------------------------------------------------------------------------------------------ SELU
register(
    pointwise_operation(
        "selu",
        (Kink("x = 0", lambda: 0.0, lambda: (_SCALE * _ALPHA, _SCALE)),),
        Kernels(
            forward=lambda x: aten.elu.default(x, _ALPHA, _SCALE),
            forward_=lambda x: aten.elu_.default(x, _ALPHA, _SCALE),
            backward=lambda g, x: aten.elu_backward.default(g, _ALPHA, _SCALE, 1, False, x),
            backward_=lambda g, y: aten.elu_backward.default(g, _ALPHA, _SCALE, 1, True, y),
        ),
        formula="scale x where x > 0, scale alpha (exp(x) - 1) elsewhere",
        choice="The derivative of SELU at 0; the native choice is the left one, about 1.758.",
        modules={nn.SELU: lambda m, x: Call(x, inplace=m.inplace)},
        functions=plain("selu"),
        tensorflow=_SCALE,
        example=F.selu,
    )
)


def selu(x: Tensor, at_zero: float | None = None, inplace: bool = False) -> Tensor:
    r"""SELU with a chosen derivative at 0.

    .. math:: y = s\,(x\,[x > 0] + \alpha (e^x - 1)\,[x \le 0]), \quad \alpha \approx 1.6733,\ s \approx 1.0507.

    The Clarke Jacobian at 0 is [s, s alpha]. PyTorch and JAX return s alpha, TensorFlow s.

    Args:
        x: Input, any shape, floating dtype.
        at_zero: The derivative at 0; ``None`` is the native choice.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.nn.functional.selu(x)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is not a finite number.
    """
    return pointwise("selu", x, fixed("selu", at_zero), inplace=inplace)


class SELU(ChosenModule, nn.SELU, choice="at_zero"):
    """:func:`~nslightning.ops.selu` as a module."""
