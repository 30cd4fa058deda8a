"""Maxima and minima over groups of entries: of scattered entries, of segments, of bags of embeddings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.ops.autograd.layouts import overlaps
from nslightning.ops.autograd.nodes import of_a_leaf, put_in_place, refuse_changes_of_a_copy
from nslightning.ops.autograd.routing import ROUTES, Route, around, own, wide
from nslightning.ops.autograd.selection import Selection, fixed, guarded, replayed
from nslightning.ops.module_base import ChosenFunction, ChosenModule
from nslightning.ops.record import Call, Count, Kink, Operation, ShareName, only, register, spelled

__all__ = [
    "EmbeddingBag",
    "IndexReduce",
    "ScatterReduce",
    "SegmentReduce",
    "embedding_bag",
    "index_reduce",
    "scatter_reduce",
    "segment_reduce",
]

aten = torch.ops.aten
_NAN = float("nan")


# ------------------------------------------------------------------------------------------------------- mechanism
# An index of the entries' shape says for each entry to which result along one dimension it belongs. A result may have
# one more member, the base: the value that its place held before.
def _count(at: Tensor, dim: int, index: Tensor, results: Tensor) -> Tensor:
    return torch.zeros_like(results, dtype=torch.int64).scatter_add(dim, index, at.to(torch.int64))


def _reached(tensors: tuple[Tensor, ...], parameters: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return which results are tied, which entries reach theirs, and how many of a result's entries do."""
    x, index, results = tensors
    (dim,) = parameters
    at = x == results.gather(dim, index)
    count = _count(at, dim, index, results)
    return count > 1, at, count


def _reached_with_base(tensors: tuple[Tensor, ...], parameters: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return what :func:`_reached` does, of a reduction that the base may take part in.

    Stock counts a base that is equal even where it takes no part.
    """
    x, base, index, results = tensors
    dim, included = parameters
    at = x == results.gather(dim, index)
    count, equal = _count(at, dim, index, results), base == results
    members = count + equal if included else count
    return count + equal > 1, at, members, equal & included, count + equal


def _one(at: Tensor, dim: int, index: Tensor, results: Tensor, end: Literal["amin", "amax"]) -> Tensor:
    """The first, or the last, of the entries of each result that are marked."""
    shape = [1] * at.dim()
    shape[dim] = at.shape[dim]
    place = torch.arange(at.shape[dim], device=at.device).view(shape).expand(at.shape)
    none = at.shape[dim] if end == "amin" else -1
    places = torch.full_like(results, none, dtype=torch.int64)
    best = places.scatter_reduce(dim, index, torch.where(at, place, none), end)
    return at & (place == best.gather(dim, index))


def _times(g: Tensor, coefficient: Tensor, where: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(where & (coefficient != 0), g * coefficient, 0).to(dtype)


def _share(
    choice: tuple[Tensor, ...],
    uniform: Callable[[Tensor], Tensor] | None,
    g: Tensor,
    x: Tensor,
    dim: int,
    index: Tensor,
    results: Tensor,
    known: tuple[Tensor, ...],
    native: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the entries of tied results, and of their bases.

    Args:
        choice: The five weights.
        uniform: Draws numbers, for the random choice.
        g: The gradient of the results.
        x: The entries.
        dim: The dimension that groups them.
        index: The result to which each entry belongs.
        results: The results.
        known: Which results are tied, which entries reach theirs, how many members of a result do, and whether the base
            is one of them.
        native: The number by which stock divides the gradient that each entry receives; None where it gives all to
            the first entry.
    """
    whole, share, each, first, last = choice
    tied, at, members, base = known
    number = wide(g)
    if native is None:
        first, whole = first + whole, torch.zeros_like(whole)
        native = members
    equal = (whole / native + share / members + each).to(number)
    chosen, to_base = torch.zeros_like(x, dtype=number), torch.zeros_like(results, dtype=number)
    if uniform is not None:
        equal = torch.zeros_like(equal)
        draw, base_draw = torch.where(at, uniform(x), -1.0), torch.where(base, uniform(results), -1.0)
        top = torch.full_like(base_draw, -1.0).scatter_reduce(dim, index, draw, "amax")
        winner = _one(at & (draw == top.gather(dim, index)), dim, index, results, "amin")
        to_base = (base_draw > top).to(number)
        chosen = torch.where(winner, 1 - to_base.gather(dim, index), 0)
    elif replayed(g) or first + last != 0:
        to_base = torch.where(base, first + last * (members == 1), 0).to(number)
        ahead = base.gather(dim, index)
        chosen = first * (_one(at, dim, index, results, "amin") & ~ahead)
        chosen = (chosen + last * _one(at, dim, index, results, "amax")).to(number)
    g = g.to(number)
    entries = _times(g.gather(dim, index), equal.gather(dim, index) + chosen, at & tied.gather(dim, index), x.dtype)
    return entries, _times(g, torch.where(base, equal, 0) + to_base, base & tied, results.dtype)


def _shared(first: bool, choice: Any, uniform: Any, g: Tensor, tensors: Any, parameters: Any, *known: Tensor) -> Any:
    (x, index, results), (tied, at, count) = tensors, known
    # Stock divides an entry's gradient by the number of tied entries only where the gradient is positive.
    native = None if first else torch.where(g > 0, count, 1)
    none = torch.zeros_like(tied)
    return _share(choice, uniform, g, x, parameters[0], index, results, (tied, at, count, none), native)[:1]


def _shared_with_base(choice: Any, uniform: Any, g: Tensor, tensors: Any, parameters: Any, *known: Tensor) -> Any:
    x, _, index, results = tensors
    *known_without, stock = known
    return _share(choice, uniform, g, x, parameters[0], index, results, tuple(known_without), stock)


ROUTES["scatter_max"] = Route("scatter_max", 2, _reached_with_base, _shared_with_base)
ROUTES["segment_max"] = Route("segment_max", 1, _reached, partial(_shared, False))
ROUTES["bag_max"] = Route("bag_max", 1, _reached, partial(_shared, True))


# ------------------------------------------------------------------------------------------------ scattered entries
_SCATTER: dict[str, Callable[..., Tensor]] = {"scatter": torch.scatter_reduce, "index": torch.index_reduce}
_SCATTER_: dict[str, Callable[..., Tensor]] = {
    "scatter": Tensor.scatter_reduce_,
    "index": Tensor.index_reduce_,
}


def _entries(base: Tensor, kind: str, dim: int, index: Tensor, src: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
    """The base, the dimension, the index and the entries that take part, of one shape and with a dimension."""
    base, index, src = (t.reshape(1) if t.dim() == 0 else t for t in (base, index, src))
    dim %= base.dim()
    if kind == "index":
        index = index.view(*(-1 if d == dim else 1 for d in range(src.dim()))).expand(src.shape)
    return base, dim, index, src[tuple(slice(0, n) for n in index.shape)]


@own
def scattered(selection: Selection, call: Call) -> Tensor:
    """Scatter entries into maxima or minima with the choice that ``selection`` names at backward time.

    Args:
        selection: The choice, read when the backward runs.
        call: Of ``x``, the base, and ``(kind, dim, index, src, reduce, included)``: ``kind`` is ``"scatter"`` or
            ``"index"``.

    Returns:
        The stock function's result, bit for bit.
    """
    base, (kind, dim, index, src, reduce, included) = call.x, call.parameters
    if call.inplace:
        # PyTorch refuses to overwrite a leaf before it computes anything.
        if of_a_leaf(base) or not (torch.is_grad_enabled() and (base.requires_grad or src.requires_grad)):
            return _SCATTER_[kind](base, dim, index, src, reduce, include_self=included)
        if overlaps(base):
            written = _SCATTER_[kind](base, dim, index, src, reduce, include_self=included)
            return guarded(written, "scatter_max", selection)
        # As stock, whose backward keeps a copy of the overwritten memory.
        result = scattered(selection, call._replace(x=base.clone(), inplace=False))
        written = put_in_place(base, result)
        refuse_changes_of_a_copy(result, written)
        return written
    stock = _SCATTER[kind](base, dim, index, src, reduce, include_self=included)
    if stock.numel() == 0 or index.numel() == 0:
        return stock
    base, dim, index, src = _entries(base, kind, dim, index, src)
    results = stock if stock.dim() else stock.reshape(1)  # a reshape to the same shape would be a view
    parts = src.to(stock.dtype), base.to(stock.dtype), index, results.detach(), results
    chosen = around("scatter_max", selection, (dim, included), *parts)
    if stock.dim():
        return chosen
    number: Tensor = aten._unsafe_view(chosen, ())  # stock's result is no view
    refuse_changes_of_a_copy(chosen, number)
    return number


def _scatter_ties(call: Call) -> tuple[Count, int]:
    base, (kind, dim, index, src, reduce, included) = call.x, call.parameters
    results = _SCATTER[kind](base, dim, index, src, reduce, include_self=included)
    if results.numel() == 0 or index.numel() == 0:
        return 0, results.numel()
    base, dim, index, src = _entries(base, kind, dim, index, src)
    parts = src.to(results.dtype), base.to(results.dtype), index, results.reshape(base.shape)
    tied = _reached_with_base(parts, (dim, included))[0]
    return torch.count_nonzero(tied), tied.numel()


def _scatter_call(kind: str, inplace: bool, *args: Any, **kwargs: Any) -> Call | None:
    names = ("x", "dim", "index", "src", "reduce")
    arguments = dict(zip(names, args, strict=False)) | {"src" if k == "source" else k: v for k, v in kwargs.items()}
    wanted = arguments.get("reduce") in ("amax", "amin") and isinstance(arguments.get("src"), Tensor)
    if not wanted or arguments.get("out") is not None or not isinstance(arguments.get("dim"), int):
        return None
    parts = (
        kind,
        arguments["dim"],
        arguments["index"],
        arguments["src"],
        arguments["reduce"],
        arguments.get("include_self", True),
    )
    return Call(arguments["x"], parts, inplace)


_SCATTER_SPELLINGS = {
    function: call
    for kind, homes, homes_ in (
        ("scatter", (torch.scatter_reduce, Tensor.scatter_reduce, aten.scatter_reduce),
         (Tensor.scatter_reduce_, aten.scatter_reduce_)),
        ("index", (torch.index_reduce, Tensor.index_reduce, aten.index_reduce),
         (Tensor.index_reduce_, aten.index_reduce_)),
    )
    for inplace, functions in ((False, homes), (True, homes_))
    for function, call in spelled(partial(_scatter_call, kind, inplace), *functions).items()
}  # fmt: skip
_HULL = "the convex hull of the unit vectors of the tied entries"
_CORNERS = ("first", "last", *("random",) * 4)
register(
    Operation(
        name="scatter_max",
        formula="the maximum, or the minimum, of the entries that an index sends to one place",
        kinks=(
            Kink(
                "k > 1 entries reach the maximum",
                clarke=_HULL,
                stock="equal shares; the former value of the place counts, also with include_self=False",
            ),
        ),
        choice=(
            "As ``max_pool``, for ``scatter_reduce`` and ``index_reduce`` with ``amax`` and ``amin``. The first entry "
            "is the former value of the place, if it takes part; then they come in the order of the index. The native "
            "choice is equal shares."
        ),
        apply=scattered,
        ties=_scatter_ties,
        functions=_SCATTER_SPELLINGS,
        shares=True,
        corners=lambda *parameters: _CORNERS,
        note=(
            "With `include_self=False` PyTorch gives nothing to the former value of the place, and yet counts it if it "
            "is equal. So a single maximum of 0 over zeros, as PyTorch Geometric's `max` aggregation forms it behind a "
            "ReLU, gets half of its gradient. Such a result counts as tied. Every choice but the native one, and "
            "numbers other than 1 in proportion, gives the whole gradient to the entries that take part."
        ),
        example=lambda x: x.new_full((1,), -torch.inf).scatter_reduce(0, torch.zeros_like(x).long(), x, "amax"),
        at=(1.0,),
    )
)


# -------------------------------------------------------------------------------------------------------- segments
def _belongs(ends: Tensor, entries: int, groups: int) -> tuple[Tensor, Tensor]:
    """Return the number of the group that each entry belongs to, by the groups' ends, and whether it belongs to one."""
    place = torch.arange(entries, device=ends.device, dtype=ends.dtype).expand(*ends.shape[:-1], entries).contiguous()
    index = torch.searchsorted(ends.contiguous(), place, right=True)
    return index.clamp(max=groups - 1), index < groups


def _segments(call: Call) -> tuple[Tensor, Tensor, int]:
    """The entries (NaN where one belongs to no segment), the index, and the dimension."""
    x, (_, lengths, offsets, axis) = call.x, call.parameters[:4]
    axis %= x.dim()
    ends = lengths.cumsum(-1) if offsets is None else offsets[..., 1:]
    index, inside = _belongs(ends, x.shape[axis], ends.shape[-1])
    if offsets is not None:
        inside = inside & (torch.arange(x.shape[axis], device=x.device) >= offsets[..., :1])
    shape = (*index.shape, *(1,) * (x.dim() - index.dim()))
    return torch.where(inside.view(shape), x, _NAN), index.view(shape).expand(x.shape), axis


def _segment_stock(call: Call) -> Tensor:
    reduce, lengths, offsets, axis, unsafe = call.parameters
    return torch.segment_reduce(call.x, reduce, lengths=lengths, offsets=offsets, axis=axis, unsafe=unsafe)


@own
def segmented(selection: Selection, call: Call) -> Tensor:
    """Reduce segments to maxima or minima with the choice that ``selection`` names at backward time.

    Args:
        selection: The choice, read when the backward runs.
        call: Of ``x`` and ``(reduce, lengths, offsets, axis, unsafe)``.

    Returns:
        ``torch.segment_reduce(...)``, bit for bit.
    """
    stock = _segment_stock(call)
    if stock.numel() == 0 or call.x.numel() == 0 or not stock.requires_grad:
        return stock
    entries, index, axis = _segments(call)
    return around("segment_max", selection, (axis,), entries, index, stock.detach(), stock)


def _segment_ties(call: Call) -> tuple[Count, int]:
    results = _segment_stock(call)
    if results.numel() == 0 or call.x.numel() == 0:
        return 0, results.numel()
    entries, index, axis = _segments(call)
    tied = _reached((entries, index, results), (axis,))[0]
    return torch.count_nonzero(tied), tied.numel()


#: PyTorch itself calls the dimension of this function `axis`, the name that is read as `dim` elsewhere.
_SEGMENTED = {"data": "x", "dim": "axis"}


def _segment_call(
    x: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: float | None = None,
    out: Any = None,
) -> Call | None:
    one_of_two = (lengths is None) != (offsets is None)
    if reduce not in ("max", "min") or not one_of_two or any(x is not None for x in (indices, initial, out)):
        return None
    return Call(x, (reduce, lengths, offsets, axis, unsafe))


register(
    Operation(
        name="segment_max",
        formula="the maximum, or the minimum, of each segment",
        kinks=(
            Kink(
                "k > 1 entries reach the maximum",
                clarke=_HULL,
                stock="equal shares of a positive gradient; of a negative one each receives the whole",
            ),
        ),
        choice=(
            "As ``max_pool``, for ``segment_reduce`` with ``max`` and ``min``, without ``initial``. The native choice "
            "is equal shares, but each entry receives the whole of a negative gradient."
        ),
        apply=segmented,
        ties=_segment_ties,
        functions=spelled(
            lambda *args, **kwargs: _segment_call(*args, **{_SEGMENTED.get(k, k): v for k, v in kwargs.items()}),
            torch.segment_reduce,
        ),
        shares=True,
        corners=lambda *parameters: _CORNERS,
        note=(
            "PyTorch's kernel divides a gradient by the number of tied entries only where it is positive; `minimal` "
            "shares every gradient equally. With `initial` a constant is among the entries: such a call is named, and "
            "has no choice."
        ),
        example=lambda x: torch.segment_reduce(x, "max", lengths=torch.tensor([len(x)])),
        at=(1.0,),
    )
)


# ------------------------------------------------------------------------------------------------ bags of embeddings
def _bags(call: Call) -> tuple[Tensor, Tensor]:
    """The rows that are looked up (NaN where one belongs to no bag), and to which bag each belongs."""
    weight, (indices, options) = call.x, call.parameters
    rows = indices.reshape(-1).long()
    if indices.dim() == 2:
        bag = torch.arange(indices.shape[0], device=rows.device).repeat_interleave(indices.shape[1])
        inside = torch.ones_like(bag, dtype=torch.bool)
    else:
        offsets = options["offsets"].long()
        last = bool(options.get("include_last_offset"))
        bag, inside = _belongs(offsets[1:], len(rows), len(offsets) - last)
    if (padding := options.get("padding_idx")) is not None:
        inside = inside & (rows != padding % len(weight))
    return torch.where(inside.unsqueeze(1), weight[rows], _NAN), bag.unsqueeze(1).expand(-1, weight.shape[1])


def _bag_stock(call: Call) -> Tensor:
    indices, options = call.parameters
    return F.embedding_bag(indices, call.x, mode="max", **options)


@own
def bagged(selection: Selection, call: Call) -> Tensor:
    """Reduce bags of embeddings to their maxima with the choice that ``selection`` names at backward time.

    Args:
        selection: The choice, read when the backward runs.
        call: Of ``x``, the embeddings, and ``(indices, options)``, the options of ``embedding_bag``.

    Returns:
        ``torch.nn.functional.embedding_bag(indices, x, mode="max", ...)``, bit for bit.
    """
    stock = _bag_stock(call)
    if stock.numel() == 0 or call.parameters[0].numel() == 0 or not stock.requires_grad:
        return stock
    entries, index = _bags(call)
    return around("bag_max", selection, (0,), entries, index, stock.detach(), stock)


def _bag_ties(call: Call) -> tuple[Count, int]:
    results = _bag_stock(call)
    if results.numel() == 0 or call.parameters[0].numel() == 0:
        return 0, results.numel()
    tied = _reached((*_bags(call), results), (0,))[0]
    return torch.count_nonzero(tied), tied.numel()


_BAG = ("indices", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
        "per_sample_weights", "include_last_offset", "padding_idx")  # fmt: skip


def _bag_call(*args: Any, **kwargs: Any) -> Call | None:
    arguments = dict(zip(_BAG, args, strict=False)) | {"indices" if k == "x" else k: v for k, v in kwargs.items()}
    indices, weight = arguments.pop("indices"), arguments.pop("weight")
    if arguments.pop("mode", "mean") != "max" or weight.dtype == torch.long:
        return None
    return Call(weight, (indices, arguments))


def _bag_module(m: Any, x: Tensor, offsets: Tensor | None = None, per_sample_weights: Any = None) -> Call:
    options = {name: getattr(m, name) for name in (*_BAG[3:6], "sparse", "include_last_offset", "padding_idx")}
    return Call(m.weight, (x, options | {"offsets": offsets, "per_sample_weights": per_sample_weights}))


register(
    Operation(
        name="bag_max",
        formula="the maximum of each bag of embeddings, entry by entry",
        kinks=(Kink("k > 1 rows reach the maximum", clarke=_HULL, stock="all to the first"),),
        choice="As ``max_pool``, for ``embedding_bag`` with ``mode='max'``; the rows come in the order of the indices.",
        apply=bagged,
        ties=_bag_ties,
        modules={nn.EmbeddingBag: only(lambda m: m.mode == "max", _bag_module)},
        functions=spelled(_bag_call, F.embedding_bag),
        shares=True,
        corners=lambda *parameters: _CORNERS,
        note="A row that stands twice in a bag ties with itself. Under most choices it receives the same.",
        example=lambda x: F.embedding_bag(torch.arange(len(x)).unsqueeze(0), x.unsqueeze(1), mode="max").squeeze(),
        at=(1.0,),
    )
)


# ---------------------------------------------------------------------------------------------------------- members
class Members(NamedTuple):
    """The entries that a call compares, and how they are grouped.

    Args:
        entries: The entries, NaN where one belongs to no group.
        group: The group to which each entry belongs.
        dim: The dimension that groups them.
        shape: The results' shape.
        base: The former values of the results' places, where they take part; else None.
        greatest: True for the maximum, False for the minimum.
        memory: The memory that the entries stand in.
    """

    entries: Tensor
    group: Tensor
    dim: int
    shape: torch.Size
    base: Tensor | None
    greatest: bool
    memory: Tensor


def _scatter_members(call: Call) -> Members:
    base, (kind, dim, index, src, reduce, included) = call.x, call.parameters
    base, dim, index, src = _entries(base, kind, dim, index, src)
    return Members(src, index, dim, base.shape, base if included else None, reduce == "amax", src)


def _segment_members(call: Call) -> Members:
    entries, index, axis = _segments(call)
    return Members(entries, index, axis, _segment_stock(call).shape, None, call.parameters[0] == "max", call.x)


#: By operation, the function that returns the members of a call; for operations whose entries are no parameters.
MEMBERS: dict[str, Callable[[Call], Members]] = {"scatter_max": _scatter_members, "segment_max": _segment_members}


# --------------------------------------------------------------------------------------------------------- public
def scatter_reduce(
    x: Tensor,
    dim: int,
    index: Tensor,
    src: Tensor,
    reduce: Literal["amax", "amin"],
    *,
    include_self: bool = True,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Tensor:
    r"""The maximum, or the minimum, of the entries that an index sends to one place.

    Where :math:`k > 1` entries reach it, the Clarke Jacobian is the convex hull of their unit vectors. PyTorch shares
    equally. With ``include_self=False`` it counts the value in ``x`` too, but gives it no gradient.

    Args:
        x: The former values of the places, floating dtype.
        dim: The dimension along which entries are sent.
        index: For each entry its place.
        src: The entries, of ``x``'s dtype and at least the shape of ``index``.
        reduce: ``"amax"`` or ``"amin"``.
        include_self: Whether the former values take part.
        jacobian: A number beta or a name; see :class:`~nslightning.Jacobians`. None is the native choice.
        seed: Seeds ``jacobian="random"``.

    Returns:
        ``torch.scatter_reduce(...)``, bit for bit.

    Raises:
        ValueError: If the choice or the reduction is unknown.

    Example:
        >>> src = torch.tensor([2.0, 2.0, 1.0], requires_grad=True)
        >>> places = torch.zeros(2)
        >>> scatter_reduce(places, 0, torch.tensor([0, 0, 1]), src, "amax", jacobian="last").sum().backward()
        >>> src.grad
        tensor([0., 1., 1.])
    """
    return _scattered("scatter", x, dim, index, src, reduce, include_self, fixed("scatter_max", jacobian, seed=seed))


def index_reduce(
    x: Tensor,
    dim: int,
    index: Tensor,
    src: Tensor,
    reduce: Literal["amax", "amin"],
    *,
    include_self: bool = True,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Tensor:
    """The maximum, or the minimum, of the slices that an index sends to one place; see :func:`scatter_reduce`.

    Args:
        x: The former values of the places, floating dtype.
        dim: The dimension of the slices.
        index: For each slice its place, a vector.
        src: The slices, of ``x``'s dtype.
        reduce: ``"amax"`` or ``"amin"``.
        include_self: Whether the former values take part.
        jacobian: A number beta or a name; see :class:`~nslightning.Jacobians`. None is the native choice.
        seed: Seeds ``jacobian="random"``.

    Returns:
        ``torch.index_reduce(...)``, bit for bit.

    Raises:
        ValueError: If the choice or the reduction is unknown.
    """
    return _scattered("index", x, dim, index, src, reduce, include_self, fixed("scatter_max", jacobian, seed=seed))


def _scattered(
    kind: str, x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, included: bool, selection: Selection
) -> Tensor:
    if reduce not in ("amax", "amin"):
        raise ValueError(f'a reduction with a kink is "amax" or "amin"; given {reduce!r}')
    return scattered(selection, Call(x, (kind, dim, index, src, reduce, included)))


def segment_reduce(
    x: Tensor,
    reduce: Literal["max", "min"],
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    unsafe: bool = False,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Tensor:
    r"""The maximum, or the minimum, of each segment.

    Where :math:`k > 1` entries reach it, the Clarke Jacobian is the convex hull of their unit vectors. PyTorch shares a
    positive gradient equally, and gives a negative one whole to each.

    Args:
        x: The entries, floating dtype.
        reduce: ``"max"`` or ``"min"``.
        lengths: The lengths of the segments.
        offsets: Their beginnings and the last one's end, instead.
        axis: The dimension that the segments divide.
        unsafe: Do not check that the lengths add up.
        jacobian: A number beta or a name; see :class:`~nslightning.Jacobians`. None is the native choice.
        seed: Seeds ``jacobian="random"``.

    Returns:
        ``torch.segment_reduce(...)``, bit for bit.

    Raises:
        ValueError: If the choice or the reduction is unknown, or not just one of lengths and offsets is given.

    Example:
        >>> x = torch.tensor([2.0, 2.0, 1.0], requires_grad=True)
        >>> segment_reduce(x, "max", lengths=torch.tensor([2, 1]), jacobian="first").sum().backward()
        >>> x.grad
        tensor([1., 0., 1.])
    """
    call = _segment_call(x, reduce, lengths=lengths, offsets=offsets, axis=axis, unsafe=unsafe)
    if call is None:
        raise ValueError(f'segment_reduce takes "max" or "min", and lengths or offsets; given {reduce!r}')
    return segmented(fixed("segment_max", jacobian, seed=seed), call)


def embedding_bag(
    indices: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    *,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Tensor:
    r"""The maximum of each bag of embeddings, entry by entry.

    Where :math:`k > 1` rows reach it, the Clarke Jacobian is the convex hull of their unit vectors. PyTorch gives the
    whole gradient to the first of them.

    Args:
        indices: The rows of the bags: (bags, rows), or a vector with ``offsets``.
        weight: The embeddings, floating dtype.
        offsets: The positions where the bags begin.
        include_last_offset: Whether ``offsets`` ends with the end of the last bag.
        padding_idx: A row that takes no part.
        jacobian: A number beta or a name; see :class:`~nslightning.Jacobians`. None is the native choice.
        seed: Seeds ``jacobian="random"``.

    Returns:
        ``torch.nn.functional.embedding_bag(indices, weight, offsets, mode="max", ...)``, bit for bit.

    Raises:
        ValueError: If the choice is unknown.

    Example:
        >>> weight = torch.tensor([[2.0], [2.0], [1.0]], requires_grad=True)
        >>> embedding_bag(torch.tensor([[0, 1, 2]]), weight, jacobian="minimal").sum().backward()
        >>> weight.grad.flatten()
        tensor([0.5000, 0.5000, 0.0000])
    """
    options = {"offsets": offsets, "include_last_offset": include_last_offset, "padding_idx": padding_idx}
    return bagged(fixed("bag_max", jacobian, seed=seed), Call(weight, (indices, options)))


class ScatterReduce(ChosenFunction):
    """:func:`~nslightning.ops.scatter_reduce` as a module."""

    fields = ("scatter_max",)
    _kind = "scatter"

    def __init__(
        self,
        dim: int,
        reduce: Literal["amax", "amin"],
        *,
        include_self: bool = True,
        jacobian: float | ShareName | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(jacobian, seed, dim=dim, reduce=reduce, include_self=include_self, jacobian=jacobian)

    def forward(self, x: Tensor, index: Tensor, src: Tensor) -> Tensor:
        """Send entries to places."""
        g = self.arguments
        return _scattered(self._kind, x, g["dim"], index, src, g["reduce"], g["include_self"], self.selection)


class IndexReduce(ScatterReduce):
    """:func:`~nslightning.ops.index_reduce` as a module."""

    _kind = "index"


class SegmentReduce(ChosenFunction):
    """:func:`~nslightning.ops.segment_reduce` as a module."""

    fields = ("segment_max",)

    def __init__(
        self,
        reduce: Literal["max", "min"],
        *,
        axis: int = 0,
        jacobian: float | ShareName | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(jacobian, seed, reduce=reduce, axis=axis, jacobian=jacobian)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Reduce the segments of these lengths."""
        return segmented(
            self.selection, Call(x, (self.arguments["reduce"], lengths, None, self.arguments["axis"], False))
        )


class EmbeddingBag(ChosenModule, nn.EmbeddingBag, choice="jacobian"):
    """:func:`~nslightning.ops.embedding_bag` as a module; it chooses where its mode is ``"max"``."""
