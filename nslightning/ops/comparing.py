"""The registry's entries for what reduces or compares: maxima, norms and losses, in PyTorch's spellings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn._reduction import legacy_get_string

from nslightning.ops.autograd.selection import Selection
from nslightning.ops.losses import HINGES, absolute, hinge, tied_hinges
from nslightning.ops.maxima import pair, reduction, tied_pairs, tied_reductions
from nslightning.ops.norms import chosen_norm, tied_norms, unit
from nslightning.ops.record import Call, Operation, spelled

__all__ = ["ABSOLUTE_FUNCTIONS", "ABSOLUTE_MODULES", "COMPARING"]

aten = torch.ops.aten

_Functions = dict[Callable, Callable[..., Call | None]]


# ----------------------------------------------------------------------------------------------------------- maxima
def _reduced(
    function: str,
    x: Tensor,
    dim: Any = None,
    keepdim: bool = False,
    *,
    axis: Any = None,
    keepdims: bool = False,
    other: Tensor | None = None,
    out: Any = None,
) -> Call | None:
    dim = axis if dim is None else dim
    if isinstance(dim, (str, Tensor)) or other is not None or out is not None:
        return None
    return Call(x, (function, dim, keepdim or keepdims))


def _compared(function: str, x: Tensor, other: Any = None, keepdim: bool = False, *, out: Any = None, **_: Any) -> Any:
    if not isinstance(other, Tensor) or out is not None:
        return None
    return Call(x if x.is_floating_point() else x.to(torch.result_type(x, other)), (function, other))


def _homes(name: str) -> list[Callable]:
    return [found for home in (torch, Tensor, aten) if (found := getattr(home, name, None)) is not None]


def _maxima() -> tuple[_Functions, _Functions]:
    """``max(x)`` and ``max(x, dim)`` are one operation, ``max(x, other)`` is another."""
    reductions: _Functions = {}
    pairs: _Functions = {}
    for name in ("max", "min", "amax", "amin", "aminmax"):
        reductions |= spelled(partial(_reduced, name), *_homes(name))
    for name in ("maximum", "minimum", "fmax", "fmin"):
        pairs |= spelled(partial(_compared, name), *_homes(name))
    for name in ("max", "min"):
        pairs |= spelled(partial(_compared, f"{name}imum"), *_homes(name))
    return reductions, pairs


_REDUCTIONS, _PAIRS = _maxima()


# ------------------------------------------------------------------------------------------------------------ norms
def _norm(x: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None) -> Any:
    p = 2.0 if p in ("fro", None) else p
    if out is not None or not isinstance(p, (int, float)) or not 1 <= p < math.inf or x.is_complex():
        return None
    return x, p, dim, keepdim, dtype, torch.norm


def _linalg_norm(x: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, **rest: Any) -> Any:
    dims = x.dim() if dim is None else 1 if isinstance(dim, int) else len(dim)
    if ord is not None and ord != "fro" and dims != 1:
        return None  # of a matrix: its singular values, or the greatest sum
    given = _norm(x, ord, dim, keepdim, **rest)
    return given and (*given[:-1], torch.linalg.vector_norm)


def _vector_norm(x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, **rest: Any) -> Any:
    given = _norm(x, ord, dim, keepdim, **rest)
    return given and (*given[:-1], torch.linalg.vector_norm)


def _distance(x: Tensor, other: Tensor, p: float = 2) -> Any:
    if torch.is_autocast_enabled(x.device.type):
        return None  # some devices would subtract in another precision
    return _norm(x - other, p)


def _pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    return _norm(x1 - x2 + eps, p, -1, keepdim)


def _euclidean(parse: Callable[..., Any], *args: Any, **kwargs: Any) -> Call | None:
    given = parse(*args, **kwargs)
    return None if given is None or given[1] == 1 else Call(given[0], ("norm", *given[1:]))


def _of_absolutes(parse: Callable[..., Any], *args: Any, **kwargs: Any) -> Call | None:
    given = parse(*args, **kwargs)
    if given is None or given[1] != 1:
        return None
    return Call(given[0], within=lambda selection, x: chosen_norm(x, selection, *given[1:]))


def _normalized(x: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Call | None:
    if out is not None or not 1 <= p < math.inf:
        return None
    return Call(x, ("normalize", p, dim, eps))


_NORMS: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = (
    (_norm, (torch.norm, Tensor.norm)),
    (_linalg_norm, (torch.linalg.norm,)),
    (_vector_norm, (torch.linalg.vector_norm, aten.linalg_vector_norm)),
    (_distance, (torch.dist, Tensor.dist)),
    (_pairwise_distance, (F.pairwise_distance, torch.pairwise_distance)),
)


def _apply_norm(selection: Selection, call: Call) -> Tensor:
    function, *parameters = call.parameters
    return (unit if function == "normalize" else chosen_norm)(call.x, selection, *parameters)


def _norm_ties(call: Call) -> tuple[int, int]:
    function, p, dim = call.parameters[:3]
    if function == "norm":
        return tied_norms(call.x, p, dim)
    norms = torch.linalg.vector_norm(call.x, p, dim)  # a zero vector is divided by eps: no tie
    return int(torch.count_nonzero(norms == call.parameters[3])), norms.numel()


# ----------------------------------------------------------------------------------------------------------- losses
def _reduction(given: dict[str, Any]) -> str:
    """How a loss is reduced, from the arguments that its functions have had over the years."""
    size_average, reduce, how = (given.pop(name, None) for name in ("size_average", "reduce", "reduction"))
    if size_average is not None or reduce is not None:
        return str(legacy_get_string(size_average, reduce))
    return ("none", "mean", "sum")[how] if isinstance(how, int) else how or "mean"


# The functions of torch.nn.functional with their arguments' names and defaults; those of torch have the same ones
# without the legacy of `size_average` and `reduce`.
_ARGUMENTS = {
    name: {("x" if n == "input" else n): p.default for n, p in inspect.signature(getattr(F, name)).parameters.items()}
    for name in (*HINGES, "l1_loss", "smooth_l1_loss")
}
_DEFAULTS = {
    name: {n: default for n, default in arguments.items() if default is not inspect.Parameter.empty}
    for name, arguments in _ARGUMENTS.items()
}
_TENSORS = {"hinge_embedding_loss": 2, "multi_margin_loss": 2}  # three in the others


def _hinged(function: str, names: tuple[str, ...], *args: Any, **kwargs: Any) -> Call | None:
    given = _DEFAULTS[function] | dict(zip(names, args, strict=False)) | kwargs
    how = _reduction(given)
    if given.get("p", 1) != 1 and function == "multi_margin_loss":
        return None  # of squares: smooth
    x, *others = (given.pop(n) for n in names[: _TENSORS.get(function, 3)])
    return Call(x, (function, tuple(others), given | {"reduction": how}))


def _hinge_functions() -> _Functions:
    functions: _Functions = {}
    for name in HINGES:
        names = tuple(_ARGUMENTS[name])
        functions |= spelled(partial(_hinged, name, names), getattr(F, name))
        if hasattr(torch, name):
            short = tuple(n for n in names if n not in ("size_average", "reduce"))
            functions |= spelled(partial(_hinged, name, short), getattr(torch, name))
    return functions


def _hinge_module(function: str, m: nn.Module, *args: Any, **kwargs: Any) -> Call | None:
    names = tuple(_ARGUMENTS[function])
    own = {n: getattr(m, n) for n in names if n in ("margin", "p", "eps", "swap", "weight", "reduction")}
    tensors = dict.fromkeys(names[: _TENSORS.get(function, 3)])  # asked for what it is, a module has no input yet
    return _hinged(function, names, **tensors | dict(zip(names, args, strict=False)) | kwargs | own)


def _apply_hinge(selection: Selection, call: Call) -> Tensor:
    function, others, rest = call.parameters
    return hinge(function, selection, call.x, *others, **rest)


def _hinge_ties(call: Call) -> tuple[int, int]:
    function, others, rest = call.parameters
    return tied_hinges(function, call.x, *others, **{n: v for n, v in rest.items() if n != "reduction"})


def _l1(x: Tensor, target: Tensor | None, how: str, weight: Tensor | None) -> Call:
    if target is None:
        return Call(x)  # asked for what it is, a module has no input yet

    def within(selection: Selection, u: Tensor) -> Tensor:
        return absolute(u, u.new_zeros(()).expand_as(u), selection, how, weight)  # |u - 0| is |u| to the bit

    if target.size() != x.size():
        F.l1_loss(x.detach(), target.detach())  # warns, or raises
    if torch.is_autocast_enabled(x.device.type):  # subtract in the precision that it would
        precision = F.l1_loss(x.new_zeros(()), target.new_zeros(())).dtype
        x, target = x.to(precision), target.to(precision)
    return Call(x - target, within=within)


def _l1_function(function: str, *args: Any, **kwargs: Any) -> Call | None:
    given = dict(zip(_ARGUMENTS[function], args, strict=False)) | kwargs
    if function == "smooth_l1_loss" and given.get("beta", 1.0) != 0:
        return None  # smooth
    return _l1(given["x"], given["target"], _reduction(given), given.get("weight"))


def _pairwise_module(norm: Callable[..., Call | None], m: Any, x1: Tensor, x2: Tensor | None = None) -> Call | None:
    return norm(_pairwise_distance, x1, x1 if x2 is None else x2, m.norm, m.eps, m.keepdim)


#: L1 losses and 1-norms are absolute values inside.
ABSOLUTE_MODULES: dict[type[nn.Module], Callable[..., Call | None]] = {
    nn.L1Loss: lambda m, x, target=None, weight=None: _l1(x, target, m.reduction, weight),
    nn.SmoothL1Loss: lambda m, x, target=None: _l1(x, target, m.reduction, None) if m.beta == 0 else None,
    nn.PairwiseDistance: partial(_pairwise_module, _of_absolutes),
}
ABSOLUTE_FUNCTIONS: _Functions = {
    getattr(F, name): partial(_l1_function, name) for name in ("l1_loss", "smooth_l1_loss")
}
for _parse, _spellings in _NORMS:
    ABSOLUTE_FUNCTIONS |= spelled(partial(_of_absolutes, _parse), *_spellings)


# ---------------------------------------------------------------------------------------------------------- entries
COMPARING = (
    Operation(
        "max",
        lambda selection, call: reduction(call.parameters[0], call.x, selection, *call.parameters[1:]),
        lambda call: tied_reductions(call.parameters[0], call.x, *call.parameters[1:]),
        functions=_REDUCTIONS,
    ),
    Operation(
        "maximum",
        lambda selection, call: pair(call.parameters[0], call.x, call.parameters[1], selection),
        lambda call: tied_pairs(call.x, call.parameters[1]),
        functions=_PAIRS,
    ),
    Operation(
        "norm",
        _apply_norm,
        _norm_ties,
        modules={nn.PairwiseDistance: partial(_pairwise_module, _euclidean)},
        functions={F.normalize: _normalized}
        | {f: call for parse, fs in _NORMS for f, call in spelled(partial(_euclidean, parse), *fs).items()},
    ),
    Operation(
        "hinge",
        _apply_hinge,
        _hinge_ties,
        modules={
            getattr(nn, cls): partial(_hinge_module, function)
            for function, cls in (
                ("hinge_embedding_loss", "HingeEmbeddingLoss"),
                ("margin_ranking_loss", "MarginRankingLoss"),
                ("cosine_embedding_loss", "CosineEmbeddingLoss"),
                ("triplet_margin_loss", "TripletMarginLoss"),
                ("multi_margin_loss", "MultiMarginLoss"),
            )
        },
        functions=_hinge_functions(),
    ),
)
