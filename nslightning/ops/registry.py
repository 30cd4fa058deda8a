"""Every nonsmooth operation, described once: where PyTorch has it, how it is applied, where its ties are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from nslightning.ops.max_pool import pool2d, tied_windows
from nslightning.ops.pointwise import POINTWISE, pointwise
from nslightning.ops.selection import Selection

__all__ = ["FUNCTIONS", "MODULES", "OPERATIONS", "UNSUPPORTED_FUNCTIONS", "UNSUPPORTED_MODULES", "Call", "Operation"]


class Call(NamedTuple):
    """One evaluation of an operation, whatever spelling it came in."""

    x: Tensor
    parameters: tuple[Any, ...] = ()
    inplace: bool = False
    return_indices: bool = False


@dataclass(frozen=True, eq=False)
class Operation:
    """A nonsmooth operation.

    Args:
        name: The field of :class:`~nslightning.Jacobians` that chooses its Jacobian.
        apply: Evaluates a call under a selection.
        ties: Counts a call's ties: ``(tied evaluations, all evaluations)``.
        modules: The module classes that are this operation, each with what turns ``(module, *args)`` into a call.
        functions: The functions and methods that are, each with what turns its arguments into a call; this returns
            None where the arguments make it another operation.
    """

    name: str
    apply: Callable[[Selection, Call], Any]
    ties: Callable[[Call], tuple[int, int]]
    modules: dict[type[nn.Module], Callable[..., Call | None]] = field(default_factory=dict)
    functions: dict[Callable, Callable[..., Call | None]] = field(default_factory=dict)

    def __reduce__(self) -> Any:
        return _operation, (self.name,)  # one of each kind: pickles and copies name it


def _operation(name: str) -> Operation:
    return OPERATIONS[name]


def _apply_pointwise(name: str) -> Callable[[Selection, Call], Tensor]:
    return lambda selection, call: pointwise(name, call.x, selection, *call.parameters, inplace=call.inplace)


def _pointwise_ties(name: str) -> Callable[[Call], tuple[int, int]]:
    def ties(call: Call) -> tuple[int, int]:
        positions = [position for position, _ in POINTWISE[name].kinks(*call.parameters)]
        return sum(int(torch.count_nonzero(call.x == p)) for p in positions), call.x.numel()

    return ties


def _pool_ties(call: Call) -> tuple[int, int]:
    count = tied_windows(call.x, *call.parameters)
    return int(torch.count_nonzero(count > 1)), count.numel()


def _pool_call(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Call:
    kernel = _pair(kernel_size)
    stride = kernel if stride is None or stride == [] or stride == () else _pair(stride)
    return Call(x, (kernel, stride, _pair(padding), _pair(dilation), ceil_mode), return_indices=return_indices)


def _hardtanh_call(
    x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Call | None:
    return Call(x, inplace=inplace) if (min_val, max_val) == (0, 6) else None


OPERATIONS: dict[str, Operation] = {
    op.name: op
    for op in (
        Operation(
            "relu",
            _apply_pointwise("relu"),
            _pointwise_ties("relu"),
            modules={nn.ReLU: lambda m, x: Call(x, inplace=m.inplace)},
            functions={
                F.relu: lambda x, inplace=False: Call(x, inplace=inplace),
                torch.relu: lambda x: Call(x),
                Tensor.relu: lambda x: Call(x),
                torch.relu_: lambda x: Call(x, inplace=True),
                Tensor.relu_: lambda x: Call(x, inplace=True),
            },
        ),
        Operation(
            "relu6",
            _apply_pointwise("relu6"),
            _pointwise_ties("relu6"),
            modules={
                nn.ReLU6: lambda m, x: Call(x, inplace=m.inplace),
                nn.Hardtanh: lambda m, x: _hardtanh_call(x, m.min_val, m.max_val, m.inplace),
            },
            functions={
                F.relu6: lambda x, inplace=False: Call(x, inplace=inplace),
                F.hardtanh: _hardtanh_call,
                F.hardtanh_: lambda x, min_val=-1.0, max_val=1.0: _hardtanh_call(x, min_val, max_val, True),
            },
        ),
        Operation(
            "leaky_relu",
            _apply_pointwise("leaky_relu"),
            _pointwise_ties("leaky_relu"),
            modules={nn.LeakyReLU: lambda m, x: Call(x, (m.negative_slope,), m.inplace)},
            functions={
                F.leaky_relu: lambda x, negative_slope=0.01, inplace=False: Call(x, (negative_slope,), inplace),
                F.leaky_relu_: lambda x, negative_slope=0.01: Call(x, (negative_slope,), True),
            },
        ),
        Operation(
            "max_pool",
            lambda selection, call: pool2d(call.x, selection, *call.parameters, call.return_indices),
            _pool_ties,
            modules={
                nn.MaxPool2d: lambda m, x: _pool_call(
                    x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
                )
            },
            functions={
                F.max_pool2d: _pool_call,
                torch.max_pool2d: _pool_call,
                F.max_pool2d_with_indices: lambda x, *args, **kwargs: _pool_call(x, *args, **kwargs)._replace(
                    return_indices=True
                ),
            },
        ),
    )
}

MODULES = {cls: op for op in OPERATIONS.values() for cls in op.modules}
FUNCTIONS = {function: op for op in OPERATIONS.values() for function in op.functions}

# Nonsmooth, and not yet with a choice of ours: found and named by the surgery, never passed over in silence.
UNSUPPORTED_MODULES: tuple[type[nn.Module], ...] = (
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink, nn.Threshold, nn.PReLU, nn.RReLU, nn.ELU,
    nn.SELU, nn.MaxPool1d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.L1Loss, nn.SmoothL1Loss, nn.HingeEmbeddingLoss,
    nn.MarginRankingLoss, nn.MultiMarginLoss,
)  # fmt: skip
UNSUPPORTED_FUNCTIONS: frozenset[Callable] = frozenset(
    f
    for name in (
        "hardtanh", "hardtanh_", "hardswish", "hardsigmoid", "hardshrink", "softshrink", "threshold", "threshold_",
        "prelu", "rrelu", "rrelu_", "elu", "elu_", "selu", "selu_", "max_pool1d", "max_pool3d", "adaptive_max_pool1d",
        "adaptive_max_pool2d", "adaptive_max_pool3d", "l1_loss", "smooth_l1_loss", "hinge_embedding_loss",
        "margin_ranking_loss", "multi_margin_loss", "abs", "abs_", "absolute", "absolute_", "clamp", "clamp_",
        "clamp_min", "clamp_min_", "clamp_max", "clamp_max_", "clip", "clip_", "max", "min", "amax", "amin", "maximum",
        "minimum", "fmax", "fmin", "cummax", "cummin", "median", "norm", "dist",
    )
    for home in (F, torch, Tensor)
    if (f := getattr(home, name, None)) is not None
)  # fmt: skip
