"""Every nonsmooth operation, described once: where PyTorch has it, how it is applied, where its ties are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.ops.max_pool import pool2d, tied_windows
from nslightning.ops.pointwise import POINTWISE, pointwise
from nslightning.ops.selection import Selection

__all__ = [
    "FUNCTIONS",
    "MODULES",
    "OPERATIONS",
    "UNSUPPORTED_FUNCTIONS",
    "UNSUPPORTED_MODULES",
    "Call",
    "Operation",
    "positional",
]

aten = torch.ops.aten


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
        modules: The module classes that are this operation, each with what turns ``(module, *args)`` into a
            call.
        functions: The functions and methods that are, each with what turns its arguments into a call; this
            returns None where the arguments make it another operation.
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


def _apply_pool(selection: Selection, call: Call) -> Tensor | tuple[Tensor, Tensor]:
    kernel, stride, padding, dilation, ceil_mode = call.parameters
    return pool2d(call.x, selection, kernel, stride, padding, dilation, ceil_mode, call.return_indices)


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
    kernel = _two(kernel_size)
    stride = kernel if stride is None or stride == [] or stride == () else _two(stride)
    return Call(x, (kernel, stride, _two(padding), _two(dilation), ceil_mode), return_indices=return_indices)


def _two(given: Any) -> tuple[int, int]:
    """One number for both dimensions, alone or in a list, or two."""
    return (int(given[0]), int(given[-1])) if isinstance(given, Sequence) else (int(given), int(given))


def _relu6_call(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Call | None:
    return Call(x, inplace=inplace) if (min_val, max_val) == (0, 6) else None


def _hardtanh_call(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Call | None:
    return Call(x, (min_val, max_val), inplace) if (min_val, max_val) != (0, 6) else None


def _elu_call(
    x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0, inplace: bool = False
) -> Call | None:
    # Smooth for alpha = 1; scaled only inside SELU's own kernel.
    return Call(x, (alpha,), inplace) if alpha != 1 and scale == 1 and input_scale == 1 else None


def _plain(name: str) -> dict[Callable, Callable[..., Call | None]]:
    """The spellings of an operation without parameters of its own, in torch's three homes and ATen."""
    homes = (F, torch, Tensor, aten)
    found = [f for home in homes if (f := getattr(home, name, None)) is not None]
    found_ = [f for home in homes if (f := getattr(home, f"{name}_", None)) is not None]
    return _spelled(lambda x, inplace=False: Call(x, inplace=inplace), *found) | _spelled(
        lambda x: Call(x, inplace=True), *found_
    )


def positional(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments as the registry takes them: PyTorch's functions and modules call the input ``input``.

    Args:
        kwargs: As given to a function or a module.

    Returns:
        The same under our name for the input.
    """
    return {("x" if k in ("input", "self") else k): v for k, v in kwargs.items()}


def _spelled(call: Callable[..., Call | None], *functions: Callable) -> dict[Callable, Callable[..., Call | None]]:
    """Functions that take the same arguments; an ATen operator also by its overload, as graphs call it."""
    overloads = [f.default for f in functions if isinstance(f, torch._ops.OpOverloadPacket)]
    return dict.fromkeys((*functions, *overloads), call)


OPERATIONS: dict[str, Operation] = {
    op.name: op
    for op in (
        Operation(
            "relu",
            _apply_pointwise("relu"),
            _pointwise_ties("relu"),
            modules={nn.ReLU: lambda m, x: Call(x, inplace=m.inplace)},
            functions={F.relu: lambda x, inplace=False: Call(x, inplace=inplace)}
            | _spelled(lambda x: Call(x), torch.relu, Tensor.relu, aten.relu)
            | _spelled(lambda x: Call(x, inplace=True), torch.relu_, Tensor.relu_, aten.relu_),
        ),
        Operation(
            "relu6",
            _apply_pointwise("relu6"),
            _pointwise_ties("relu6"),
            modules={
                nn.ReLU6: lambda m, x: Call(x, inplace=m.inplace),
                nn.Hardtanh: lambda m, x: _relu6_call(x, m.min_val, m.max_val, m.inplace),
            },
            functions={F.relu6: lambda x, inplace=False: Call(x, inplace=inplace)}
            | _spelled(_relu6_call, F.hardtanh, aten.hardtanh)
            | _spelled(
                lambda x, min_val=-1.0, max_val=1.0: _relu6_call(x, min_val, max_val, True),
                F.hardtanh_,
                aten.hardtanh_,
            ),
        ),
        Operation(
            "hardtanh",
            _apply_pointwise("hardtanh"),
            _pointwise_ties("hardtanh"),
            modules={nn.Hardtanh: lambda m, x: _hardtanh_call(x, m.min_val, m.max_val, m.inplace)},
            functions=_spelled(_hardtanh_call, F.hardtanh, aten.hardtanh)
            | _spelled(
                lambda x, min_val=-1.0, max_val=1.0: _hardtanh_call(x, min_val, max_val, True),
                F.hardtanh_,
                aten.hardtanh_,
            ),
        ),
        *(
            Operation(
                name,
                _apply_pointwise(name),
                _pointwise_ties(name),
                modules={module: lambda m, x: Call(x, inplace=m.inplace)},
                functions=_plain(name),
            )
            for name, module in (("hardswish", nn.Hardswish), ("hardsigmoid", nn.Hardsigmoid), ("selu", nn.SELU))
        ),
        Operation(
            "softshrink",
            _apply_pointwise("softshrink"),
            _pointwise_ties("softshrink"),
            modules={nn.Softshrink: lambda m, x: Call(x, (m.lambd,))},
            functions=_spelled(lambda x, lambd=0.5: Call(x, (lambd,)), F.softshrink, aten.softshrink),
        ),
        Operation(
            "threshold",
            _apply_pointwise("threshold"),
            _pointwise_ties("threshold"),
            modules={nn.Threshold: lambda m, x: Call(x, (m.threshold, m.value), m.inplace)},
            functions=_spelled(
                lambda x, threshold, value, inplace=False: Call(x, (threshold, value), inplace),
                F.threshold,
                torch.threshold,
                aten.threshold,
            )
            | _spelled(
                lambda x, threshold, value: Call(x, (threshold, value), True),
                F.threshold_,  # type: ignore[attr-defined] # torch's stubs lack it
                torch.threshold_,
                aten.threshold_,
            ),
        ),
        Operation(
            "elu",
            _apply_pointwise("elu"),
            _pointwise_ties("elu"),
            modules={nn.ELU: lambda m, x: _elu_call(x, m.alpha, inplace=m.inplace)},
            functions={F.elu: lambda x, alpha=1.0, inplace=False: _elu_call(x, alpha, inplace=inplace)}
            | _spelled(_elu_call, aten.elu)
            | _spelled(
                lambda x, alpha=1.0, scale=1.0, input_scale=1.0: _elu_call(x, alpha, scale, input_scale, True),
                F.elu_,
                aten.elu_,
            ),
        ),
        Operation(
            "abs",
            _apply_pointwise("abs"),
            _pointwise_ties("abs"),
            functions=_plain("abs") | _plain("absolute") | _spelled(lambda x: Call(x), Tensor.__abs__),
        ),
        Operation(
            "leaky_relu",
            _apply_pointwise("leaky_relu"),
            _pointwise_ties("leaky_relu"),
            modules={nn.LeakyReLU: lambda m, x: Call(x, (m.negative_slope,), m.inplace)},
            functions=_spelled(
                lambda x, negative_slope=0.01, inplace=False: Call(x, (negative_slope,), inplace),
                F.leaky_relu,
                aten.leaky_relu,
            )
            | _spelled(
                lambda x, negative_slope=0.01: Call(x, (negative_slope,), True),
                F.leaky_relu_,
                aten.leaky_relu_,
            ),
        ),
        Operation(
            "max_pool",
            _apply_pool,
            _pool_ties,
            modules={
                nn.MaxPool2d: lambda m, x: _pool_call(
                    x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
                )
            },
            functions=_spelled(_pool_call, F.max_pool2d, torch.max_pool2d, aten.max_pool2d)
            | _spelled(
                # The function form takes `return_indices` too, and returns them whatever it says.
                lambda x, *args, **kwargs: _pool_call(x, *args, **kwargs)._replace(return_indices=True),
                F.max_pool2d_with_indices,
                aten.max_pool2d_with_indices,
            ),
        ),
    )
}

# What a class or a function may be: Hardtanh is ReLU6 between 0 and 6.
MODULES = {
    cls: tuple(op for op in OPERATIONS.values() if cls in op.modules)
    for cls in dict.fromkeys(c for op in OPERATIONS.values() for c in op.modules)
}
FUNCTIONS = {
    function: tuple(op for op in OPERATIONS.values() if function in op.functions)
    for function in dict.fromkeys(f for op in OPERATIONS.values() for f in op.functions)
}

# Nonsmooth, and not yet with a choice of ours: found and named by the surgery, never passed over in silence.
UNSUPPORTED_MODULES: dict[type[nn.Module], str] = {
    nn.Hardshrink: "hardshrink", nn.PReLU: "prelu", nn.RReLU: "rrelu", nn.MaxPool1d: "max_pool1d",
    nn.MaxPool3d: "max_pool3d",
    nn.AdaptiveMaxPool1d: "adaptive_max_pool1d", nn.AdaptiveMaxPool2d: "adaptive_max_pool2d",
    nn.AdaptiveMaxPool3d: "adaptive_max_pool3d", nn.FractionalMaxPool2d: "fractional_max_pool2d",
    nn.FractionalMaxPool3d: "fractional_max_pool3d", nn.LPPool1d: "lp_pool1d", nn.LPPool2d: "lp_pool2d",
    nn.LPPool3d: "lp_pool3d", nn.L1Loss: "l1_loss", nn.SmoothL1Loss: "smooth_l1_loss",
    nn.HingeEmbeddingLoss: "hinge_embedding_loss", nn.CosineEmbeddingLoss: "cosine_embedding_loss",
    nn.MarginRankingLoss: "margin_ranking_loss", nn.MultiMarginLoss: "multi_margin_loss",
    nn.MultiLabelMarginLoss: "multilabel_margin_loss", nn.TripletMarginLoss: "triplet_margin_loss",
}  # fmt: skip
_SAME = {"clip": "clamp"}
UNSUPPORTED_FUNCTIONS: dict[Callable, str] = {
    f: _SAME.get(name, name.removesuffix("_with_indices"))
    for name in (
        *UNSUPPORTED_MODULES.values(), "clamp", "clamp_min", "clamp_max",
        "clip", "max", "min", "amax", "amin", "aminmax", "maximum", "minimum", "fmax", "fmin",
        "cummax", "cummin", "median", "nanmedian", "kthvalue", "topk", "norm", "vector_norm", "dist", "normalize",
        *(f"{pool}_with_indices" for pool in UNSUPPORTED_MODULES.values() if "max_pool" in pool),
    )
    for home in (F, torch, Tensor, torch.linalg)
    for spelled in (name, f"{name}_")
    if (f := getattr(home, spelled, None)) is not None
}  # fmt: skip
UNSUPPORTED_FUNCTIONS[torch.linalg.norm] = "norm"
