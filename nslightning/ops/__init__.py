"""Nonsmooth operations whose backward takes a chosen element of the generalised Jacobian at ties.

Each family has a file: the records of its operations, its functions and its modules. This package exports the
exports of all families.
"""
# ruff: noqa: F403 # a family's file lists its exports, once

# The order of the fields of Jacobians, and of the tables in the docs:
# isort: off
from nslightning.ops.rectifiers import *
from nslightning.ops.clamps import *
from nslightning.ops.shrinking import *
from nslightning.ops.exponential import *
from nslightning.ops.norms import *
from nslightning.ops.poolings import *
from nslightning.ops.maxima import *
from nslightning.ops.groups import *
from nslightning.ops.losses import *

# isort: on
from nslightning.ops import clamps, exponential, groups, losses, maxima, norms, poolings, rectifiers, shrinking
from nslightning.ops.autograd.pointwise import pointwise_operation
from nslightning.ops.record import Call, Kernels, Kink, Operation, register

__all__ = ["Call", "Kernels", "Kink", "Operation", "pointwise_operation", "register"]
__all__ += rectifiers.__all__
__all__ += clamps.__all__
__all__ += shrinking.__all__
__all__ += exponential.__all__
__all__ += norms.__all__
__all__ += poolings.__all__
__all__ += maxima.__all__
__all__ += groups.__all__
__all__ += losses.__all__
