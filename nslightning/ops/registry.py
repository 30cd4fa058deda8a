"""Every nonsmooth operation, described once: where PyTorch has it, how it is applied, where its ties are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.ops.autograd.selection import Selection
from nslightning.ops.clamping import clamped
from nslightning.ops.comparing import ABSOLUTE_FUNCTIONS, ABSOLUTE_MODULES, COMPARING
from nslightning.ops.fractional import Fractional, pool_fractional, tied_fractional
from nslightning.ops.max_pool import adaptive, pool, regular, tied_windows
from nslightning.ops.pointwise import POINTWISE, pointwise
from nslightning.ops.record import Call, Operation, positional, spelled
from nslightning.ops.recurrent import RECURRENT, Recurrence

__all__ = [
    "FUNCTIONS",
    "MODULES",
    "OPERATIONS",
    "UNREACHED",
    "UNSUPPORTED_FUNCTIONS",
    "UNSUPPORTED_MODULES",
    "Call",
    "Operation",
    "positional",
]

aten = torch.ops.aten


def _apply_pointwise(name: str) -> Callable[[Selection, Call], Tensor]:
    return lambda selection, call: pointwise(name, call.x, selection, *call.parameters, inplace=call.inplace)


def _pointwise_ties(name: str) -> Callable[[Call], tuple[int, int]]:
    def ties(call: Call) -> tuple[int, int]:
        positions = [position for position, _ in POINTWISE[name].kinks(*call.parameters)]
        return sum(int(torch.count_nonzero(call.x == p)) for p in positions), call.x.numel()

    return ties


def _apply_pool(selection: Selection, call: Call) -> Tensor | tuple[Tensor, Tensor]:
    (geometry,) = call.parameters
    pooled = pool_fractional if isinstance(geometry, Fractional) else pool
    return cast(Tensor, pooled(call.x, selection, geometry, call.return_indices))


def _pool_ties(call: Call) -> tuple[int, int]:
    (geometry,) = call.parameters
    if isinstance(geometry, Fractional):
        return tied_fractional(call.x, geometry)
    count = tied_windows(call.x, geometry)
    return int(torch.count_nonzero(count > 1)), count.numel()


def _regular_pool(
    dims: int,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Call:
    geometry = regular(dims, kernel_size, stride, padding, dilation, ceil_mode)
    return Call(x, (geometry,), return_indices=return_indices)


def _adaptive_pool(dims: int, x: Tensor, output_size: Any, return_indices: bool = False) -> Call:
    return Call(x, (adaptive(dims, x, output_size),), return_indices=return_indices)


def _fractional_pool(
    dims: int,
    x: Tensor,
    kernel_size: Any,
    output_size: Any = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Call:
    windows = Fractional(dims, x, kernel_size, output_size, output_ratio, _random_samples)
    return Call(x, (windows,), return_indices=return_indices)


def _fractional_kernel(dims: int, x: Tensor, kernel_size: Any, output_size: Any, random_samples: Tensor) -> Call:
    return _fractional_pool(dims, x, kernel_size, output_size, None, True, random_samples)


def _pool_modules() -> dict[type[nn.Module], Callable[..., Call | None]]:
    """Max pooling of every dimension, adaptive and fractional."""
    modules: dict[type[nn.Module], Callable[..., Call | None]] = {}
    for dims in (1, 2, 3):
        modules[getattr(nn, f"MaxPool{dims}d")] = lambda m, x, dims=dims: _regular_pool(
            dims, x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
        )
        modules[getattr(nn, f"AdaptiveMaxPool{dims}d")] = lambda m, x, dims=dims: _adaptive_pool(
            dims, x, m.output_size, m.return_indices
        )
    for dims in (2, 3):
        modules[getattr(nn, f"FractionalMaxPool{dims}d")] = lambda m, x, dims=dims: _fractional_pool(
            dims, x, m.kernel_size, m.output_size, m.output_ratio, m.return_indices, m._random_samples
        )
    return modules


def _pool_functions() -> dict[Callable, Callable[..., Call | None]]:
    """The same in torch's homes and ATen; those that return indices do so whatever an argument says."""
    functions: dict[Callable, Callable[..., Call | None]] = {}
    for dims in (1, 2, 3):
        for name, call in ((f"max_pool{dims}d", _regular_pool), (f"adaptive_max_pool{dims}d", _adaptive_pool)):
            plain = partial(call, dims)
            indexed = lambda *args, plain=plain, **kwargs: plain(*args, **kwargs)._replace(return_indices=True)  # noqa: E731 # one for each name
            homes = [home for home in (torch, aten) if hasattr(home, name)]
            functions |= spelled(plain, getattr(F, name))
            functions |= spelled(plain if call is _regular_pool else indexed, *(getattr(home, name) for home in homes))
            with_indices = f"{name}_with_indices"
            homes = [home for home in (F, torch, aten) if hasattr(home, with_indices)]
            functions |= spelled(indexed, *(getattr(home, with_indices) for home in homes))
    for dims in (2, 3):
        name, plain = f"fractional_max_pool{dims}d", partial(_fractional_pool, dims)
        indexed = lambda *args, plain=plain, **kwargs: plain(*args, **kwargs)._replace(return_indices=True)  # noqa: E731 # one for each dimension
        functions |= spelled(plain, getattr(F, name)) | spelled(indexed, getattr(F, f"{name}_with_indices"))
        functions |= spelled(partial(_fractional_kernel, dims), getattr(torch._C._nn, name), getattr(aten, name))
    return functions


def _relu6_call(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Call | None:
    return Call(x, inplace=inplace) if (min_val, max_val) == (0, 6) else None


def _hardtanh_call(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Call | None:
    return Call(x, (min_val, max_val), inplace) if (min_val, max_val) != (0, 6) else None


def _clamp_call(
    x: Tensor, min: Any = None, max: Any = None, *, inplace: bool = False, out: Tensor | None = None
) -> Call | None:
    return Call(x, (min, max), inplace) if (min, max) != (None, None) and out is None else None


def _rrelu_call(
    x: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
    generator: torch.Generator | None = None,
) -> Call | None:
    return Call(x, (lower, upper, training), inplace) if generator is None else None


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
    return spelled(lambda x, inplace=False: Call(x, inplace=inplace), *found) | spelled(
        lambda x: Call(x, inplace=True), *found_
    )


OPERATIONS: dict[str, Operation] = {
    op.name: op
    for op in (
        Operation(
            "relu",
            lambda selection, call: (
                _apply_pointwise("relu")(selection, call) if call.within is None else call.within(selection, call.x)
            ),
            lambda call: (
                call.within.ties(call.x) if isinstance(call.within, Recurrence) else _pointwise_ties("relu")(call)
            ),
            modules={nn.ReLU: lambda m, x: Call(x, inplace=m.inplace)},
            functions={F.relu: lambda x, inplace=False: Call(x, inplace=inplace)}
            | spelled(lambda x: Call(x), torch.relu, Tensor.relu, aten.relu)
            | spelled(lambda x: Call(x, inplace=True), torch.relu_, Tensor.relu_, aten.relu_)
            | RECURRENT,
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
            | spelled(_relu6_call, F.hardtanh, aten.hardtanh)
            | spelled(
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
            functions=spelled(_hardtanh_call, F.hardtanh, aten.hardtanh)
            | spelled(
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
            "clamp",
            lambda selection, call: clamped(call.x, selection, *call.parameters, inplace=call.inplace),
            _pointwise_ties("clamp"),
            functions=spelled(_clamp_call, torch.clamp, torch.clip, Tensor.clamp, Tensor.clip, aten.clamp, aten.clip)
            | spelled(
                partial(_clamp_call, inplace=True),
                torch.clamp_,
                torch.clip_,
                Tensor.clamp_,
                Tensor.clip_,
                aten.clamp_,
                aten.clip_,
            )
            | spelled(lambda x, min, **k: _clamp_call(x, min, **k), torch.clamp_min, Tensor.clamp_min, aten.clamp_min)
            | spelled(
                lambda x, min: _clamp_call(x, min, inplace=True), torch.clamp_min_, Tensor.clamp_min_, aten.clamp_min_
            )
            | spelled(
                lambda x, max, **k: _clamp_call(x, None, max, **k), torch.clamp_max, Tensor.clamp_max, aten.clamp_max
            )
            | spelled(
                lambda x, max: _clamp_call(x, None, max, inplace=True),
                torch.clamp_max_,
                Tensor.clamp_max_,
                aten.clamp_max_,
            ),
        ),
        Operation(
            "prelu",
            _apply_pointwise("prelu"),
            _pointwise_ties("prelu"),
            modules={nn.PReLU: lambda m, x: Call(x, (m.weight,))},
            functions=spelled(lambda x, weight: Call(x, (weight,)), F.prelu, torch.prelu, Tensor.prelu, aten.prelu),
        ),
        Operation(
            "rrelu",
            _apply_pointwise("rrelu"),
            _pointwise_ties("rrelu"),
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
        ),
        Operation(
            "hardshrink",
            _apply_pointwise("hardshrink"),
            _pointwise_ties("hardshrink"),
            modules={nn.Hardshrink: lambda m, x: Call(x, (m.lambd,))},
            functions=spelled(
                lambda x, lambd=0.5: Call(x, (lambd,)),
                F.hardshrink,
                torch.hardshrink,
                Tensor.hardshrink,
                aten.hardshrink,
            ),
        ),
        Operation(
            "softshrink",
            _apply_pointwise("softshrink"),
            _pointwise_ties("softshrink"),
            modules={nn.Softshrink: lambda m, x: Call(x, (m.lambd,))},
            functions=spelled(lambda x, lambd=0.5: Call(x, (lambd,)), F.softshrink, aten.softshrink),
        ),
        Operation(
            "threshold",
            _apply_pointwise("threshold"),
            _pointwise_ties("threshold"),
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
        ),
        Operation(
            "elu",
            _apply_pointwise("elu"),
            _pointwise_ties("elu"),
            modules={nn.ELU: lambda m, x: _elu_call(x, m.alpha, inplace=m.inplace)},
            functions={F.elu: lambda x, alpha=1.0, inplace=False: _elu_call(x, alpha, inplace=inplace)}
            | spelled(_elu_call, aten.elu)
            | spelled(
                lambda x, alpha=1.0, scale=1.0, input_scale=1.0: _elu_call(x, alpha, scale, input_scale, True),
                F.elu_,
                aten.elu_,
            ),
        ),
        Operation(
            "abs",
            lambda selection, call: (
                _apply_pointwise("abs")(selection, call) if call.within is None else call.within(selection, call.x)
            ),
            _pointwise_ties("abs"),
            modules=ABSOLUTE_MODULES,
            functions=_plain("abs")
            | _plain("absolute")
            | spelled(lambda x: Call(x), Tensor.__abs__)
            | ABSOLUTE_FUNCTIONS,
        ),
        Operation(
            "leaky_relu",
            _apply_pointwise("leaky_relu"),
            _pointwise_ties("leaky_relu"),
            modules={nn.LeakyReLU: lambda m, x: Call(x, (m.negative_slope,), m.inplace)},
            functions=spelled(
                lambda x, negative_slope=0.01, inplace=False: Call(x, (negative_slope,), inplace),
                F.leaky_relu,
                aten.leaky_relu,
            )
            | spelled(
                lambda x, negative_slope=0.01: Call(x, (negative_slope,), True),
                F.leaky_relu_,
                aten.leaky_relu_,
            ),
        ),
        Operation(
            "max_pool",
            _apply_pool,
            _pool_ties,
            modules=_pool_modules(),
            functions=_pool_functions(),
        ),
        *COMPARING,
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

# Nonsmooth, and without a choice of ours: found and named by the surgery, never passed over in silence.
_RANKED = "no choice yet: equal entries are told apart by rank, and the result names the index of the one taken"
_ROOT = "PyTorch composes it of a root, whose derivative at 0 is infinite; ops.norm_pool2d is its p = 2 with a choice"
UNREACHED: dict[str, str] = {
    **dict.fromkeys(("median", "nanmedian", "kthvalue", "topk", "quantile", "nanquantile"), _RANKED),
    **dict.fromkeys(("cummax", "cummin"), "no choice yet: each result is a maximum of its own"),
    **dict.fromkeys(("lp_pool1d", "lp_pool2d", "lp_pool3d"), _ROOT),
    "norm": "p-norms are reached for 1 <= p < inf; with p = inf two kinks meet, and a matrix norm is a singular value",
    "normalize": "reached for 1 <= p < inf",
    "dist": "reached for 1 <= p < inf without autocast",
    "pairwise_distance": "reached for 1 <= p < inf",
    "cdist": "its norms are taken inside one kernel",
    "multilabel_margin_loss": "its hinges, one for each pair of classes, are formed inside one kernel",
    "triplet_margin_with_distance_loss": "its distances are functions of the caller's",
}
_NAMES = {"vector_norm": "norm", "linalg_norm": "norm"}
UNSUPPORTED_MODULES: dict[type[nn.Module], str] = {
    nn.LPPool1d: "lp_pool1d", nn.LPPool2d: "lp_pool2d", nn.LPPool3d: "lp_pool3d",
    nn.MultiLabelMarginLoss: "multilabel_margin_loss", nn.PairwiseDistance: "pairwise_distance",
    nn.TripletMarginWithDistanceLoss: "triplet_margin_with_distance_loss",
}  # fmt: skip
UNSUPPORTED_FUNCTIONS: dict[Callable, str] = {
    f: _NAMES.get(name, name)
    for name in (
        *UNREACHED, *UNSUPPORTED_MODULES.values(), "vector_norm",
    )
    for home in (F, torch, Tensor, torch.linalg)
    for spelling in (name, f"{name}_")
    if (f := getattr(home, spelling, None)) is not None
}  # fmt: skip
