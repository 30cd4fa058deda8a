"""Nonsmooth operations whose backward takes a chosen element of the generalised Jacobian at ties."""

from nslightning.ops.max_pool import max_pool2d
from nslightning.ops.pointwise import (
    abs,
    elu,
    hardsigmoid,
    hardswish,
    hardtanh,
    leaky_relu,
    relu,
    relu6,
    selu,
    softshrink,
    threshold,
)

__all__ = [
    "abs",
    "elu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "max_pool2d",
    "relu",
    "relu6",
    "selu",
    "softshrink",
    "threshold",
]
