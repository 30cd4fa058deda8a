"""Nonsmooth operations whose backward takes a chosen element of the generalised Jacobian at ties."""

from nslightning.ops.max_pool import max_pool2d
from nslightning.ops.maximum import amax, amin, aminmax, fmax, fmin, max, maximum, min, minimum
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
    "amax",
    "amin",
    "aminmax",
    "elu",
    "fmax",
    "fmin",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "max",
    "max_pool2d",
    "maximum",
    "min",
    "minimum",
    "relu",
    "relu6",
    "selu",
    "softshrink",
    "threshold",
]
