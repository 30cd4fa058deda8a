"""Stock PyTorch with another Jacobian choice: a reference that shares no code with the package.

Operations are observed below autograd, by a `TorchDispatchMode`, whatever spelling a model calls them in. The nodes of
the stock graph that belong to them then return what the choice says at ties, written here entry by entry, and what
PyTorch's formula says everywhere else. All other nodes, and the order of every sum, are PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nslightning import Jacobians

# Every choice that differs from the reference and is exact in each dtype, so that products with it are, too. The
# oracle cannot tell a hinge from a clamp, nor a normalisation's bound from either: these take the same number.
OTHER = Jacobians(
    relu=1.0, relu6=(1.0, 0.5), leaky_relu=1.0, prelu=0.5, rrelu=0.5, hardtanh=(0.5, 1.0), clamp=(0.5, 0.25),
    hardswish=(-0.5, 0.5), hardsigmoid=(0.5, 0.25), hardshrink=(1.0, 0.5), softshrink=(0.5, 1.0), threshold=0.5,
    elu=2.0, selu=0.5, abs=0.5, norm=0.5, max_pool="last", max="last", maximum="first", hinge=0.5,
)  # fmt: skip


class Evaluation(NamedTuple):
    """One evaluation of an operation of ATen's, as it was before it overwrote anything."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: tuple[Any, ...]
    view: tuple[Any, ...] | None  # the input's geometry in its base, where it is a view that is overwritten


# Nodes of operations for which OTHER takes the reference: they stay as they are.
AS_STOCK = ("ScatterReduce", "IndexReduce", "SegmentReduce", "EmbeddingBag")
Gradients = tuple[Tensor | None, ...]
Formula = Callable[[Jacobians, Evaluation, Gradients, list[Tensor | None]], list[Tensor | None]]
FORMULAS: dict[str, Formula] = {}


def of(*names: str) -> Callable[[Formula], Formula]:
    """Register the formula of some ATen operations."""

    def register(formula: Formula) -> Formula:
        FORMULAS.update(dict.fromkeys(names, formula))
        return formula

    return register


def node_of(name: str) -> str:
    """The beginning of the name of an operation's node."""
    words = name.strip("_").replace("2d", "2D").replace("3d", "3D").split("_")
    return "".join(word[0].upper() + word[1:] for word in words) + "Backward"


# ------------------------------------------------------------------------------------------------------- pointwise
def pointwise(*names: str) -> Callable[[Callable[..., Iterable[tuple[Any, float | None]]]], None]:
    """Register an operation whose derivative at some points is a number."""

    def register(kinks: Callable[..., Iterable[tuple[Any, float | None]]]) -> None:
        @of(*names)
        def formula(choice: Jacobians, e: Evaluation, g: Gradients, stock: list[Tensor | None]) -> list[Tensor | None]:
            x, (incoming, *_), (gradient, *others) = e.args[0], g, stock
            if incoming is None or gradient is None:
                return stock
            for position, derivative in kinks(choice, *e.args[1:], **e.kwargs):
                if derivative is not None:
                    gradient = torch.where(x == position, (incoming * derivative).to(gradient.dtype), gradient)
            return [gradient, *others]

    return register


@pointwise("relu", "relu_")
def _(choice):
    return [(0, choice.relu)]


@pointwise("hardtanh", "hardtanh_")
def _(choice, low=-1.0, high=1.0):
    return zip((low, high), choice.relu6 if (low, high) == (0, 6) else choice.hardtanh, strict=True)


@pointwise("leaky_relu", "leaky_relu_")
def _(choice, slope=0.01):
    return [(0, choice.leaky_relu)]


@pointwise("_prelu_kernel")
def _(choice, weight):
    return [(0, choice.prelu)]


@pointwise("rrelu_with_noise", "rrelu_with_noise_")
def _(choice, *others, **more):
    return [(0, choice.rrelu)]


@pointwise("hardswish", "hardswish_")
def _(choice):
    return zip((-3, 3), choice.hardswish, strict=True)


@pointwise("hardsigmoid", "hardsigmoid_")
def _(choice):
    return zip((-3, 3), choice.hardsigmoid, strict=True)


@pointwise("hardshrink")
def _(choice, bound=0.5):
    return zip((-bound, bound), choice.hardshrink, strict=True)


@pointwise("softshrink")
def _(choice, bound=0.5):
    return zip((-bound, bound), choice.softshrink, strict=True)


@pointwise("threshold", "threshold_")
def _(choice, at, value):
    return [(at, choice.threshold)]


@pointwise("elu", "elu_")
def _(choice, alpha=1.0, scale=1.0, input_scale=1.0):
    if math.isclose(scale, 1.0507009873554805) and math.isclose(alpha, 1.6732632423543772):
        return [(0, choice.selu)]
    smooth = abs(alpha * input_scale - 1) < 1e-12
    return [] if smooth else [(0, choice.elu)]


@pointwise("abs", "abs_")
def _(choice):
    return [(0, choice.abs)]


@of("clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_")
def _(choice, e, g, stock):
    """Bounds that are tensors receive what the clamped input does not."""
    names = {"clamp": ("min", "max"), "clamp_min": ("min",), "clamp_max": ("max",)}[e.name.removesuffix("_")]
    bounds = dict(zip(names, e.args[1:], strict=False)) | e.kwargs
    x = e.args[0]
    if g[0] is None:
        return stock
    whole = torch.ones_like(g[0])  # what the clamped input receives of the gradient
    parts = []
    for name in names:
        if (bound := bounds.get(name)) is None:
            parts.append(None)
            continue
        beyond = x < bound if name == "min" else x > bound
        whole = torch.where(beyond, 0.0, whole)
        whole = torch.where(x == bound, choice.clamp[name == "max"], whole)
        parts.append(beyond * 1.0 + (x == bound) * (1 - choice.clamp[name == "max"]))
    return [
        None if gradient is None else (g[0] * share.to(g[0].dtype)).to(gradient.dtype).sum_to_size(gradient.shape)
        for gradient, share in zip(stock, (whole, *parts), strict=False)
    ]


# ---------------------------------------------------------------------------------------------------------- maxima
def shares(tied: Tensor, dims: tuple[int, ...], choice: str, dtype: torch.dtype) -> Tensor:
    """The share of a gradient for each tied entry; the entries that tie together lie along some dimensions."""
    order = [d for d in range(tied.dim()) if d not in dims] + sorted(dims)
    flat = tied.permute(order).flatten(tied.dim() - len(dims))
    rank, count = flat.long().cumsum(-1), flat.sum(-1, keepdim=True)
    if choice == "minimal":
        part = flat.to(dtype) / count
    else:
        part = (flat & (rank == (1 if choice == "first" else count))).to(dtype)
    return part.view(tied.permute(order).shape).permute([order.index(d) for d in range(tied.dim())])


def along(x: Tensor, dims: Any) -> tuple[int, ...]:
    if x.dim() == 0:
        return ()
    dims = range(x.dim()) if dims is None or dims in ([], ()) else [dims] if isinstance(dims, int) else dims
    return tuple(d % x.dim() for d in dims)


def kept(y: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    for d in () if keepdim else sorted(dims):
        y = y.unsqueeze(d)
    return y


@of("max", "min")  # over all entries, or values and indices along a dimension
@of("amax", "amin")
@of("aminmax")
def _(choice, e, g, stock):
    x = e.args[0]
    if x.dim() == 0 or stock[0] is None:
        return stock
    named = dict(zip(("dim", "keepdim"), e.args[1:], strict=False)) | e.kwargs
    dims, keepdim = along(x, named.get("dim")), bool(named.get("keepdim"))
    ends = [0] if e.name != "aminmax" else [0, 1]
    gradient = torch.zeros_like(stock[0])
    for end in ends:
        if g[end] is None:
            continue
        tied = x == kept(e.result[end], dims, keepdim)
        gradient = gradient + kept(g[end], dims, keepdim) * shares(tied, dims, choice.max, x.dtype)
    return [gradient, *stock[1:]]


@of("maximum", "minimum", "fmax", "fmin")
def _(choice, e, g, stock):
    x, y = e.args[:2]
    if g[0] is None:
        return stock
    first = 1.0 if choice.maximum == "first" else 0.0
    shares = (torch.where(x == y, part, (e.result[0] == own) * 1.0) for own, part in ((x, first), (y, 1 - first)))
    return [
        None if gradient is None else (g[0] * share.to(g[0].dtype)).to(gradient.dtype).sum_to_size(gradient.shape)
        for gradient, share in zip(stock, shares, strict=True)
    ]


# -------------------------------------------------------------------------------------------------------- poolings
def windows(size: int, outputs: int, place: Callable[[int], Iterable[int]]) -> tuple[Tensor, Tensor]:
    """Of each window along one dimension the places, and which of these lie inside the image."""
    lists = [[p if 0 <= p < size else -1 for p in place(o)] for o in range(outputs)]
    most = max(map(len, lists))
    places = torch.tensor([one + [-1] * (most - len(one)) for one in lists])
    return places.clamp(min=0), places >= 0


def pooled(choice: str, x: Tensor, y: Tensor, g: Tensor, each: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The gradient of a pooling: the places of each dimension's windows are combined."""
    n = len(each)
    index, inside = torch.zeros((), dtype=torch.long), torch.ones((), dtype=torch.bool)
    for d, (places, valid) in enumerate(each):  # index: (outputs of 1, entries of 1, outputs of 2, ...)
        shape = [1] * (2 * n)
        shape[2 * d], shape[2 * d + 1] = places.shape
        index = index * x.shape[d - n] + places.view(shape)
        inside = inside & valid.view(shape)
    order = [*range(0, 2 * n, 2), *range(1, 2 * n, 2)]
    index, inside = (t.permute(order).flatten(0, n - 1).flatten(1) for t in (index, inside))  # (windows, entries)
    flat = x.reshape(-1, math.prod(x.shape[-n:]))
    tied = inside & (flat[:, index] == y.reshape(flat.shape[0], -1, 1))
    part = g.reshape(flat.shape[0], -1, 1) * shares(tied, (2,), choice, x.dtype)
    gradient = torch.zeros_like(flat).index_add_(1, index.flatten(), part.flatten(1))
    return gradient.view(x.shape)


@of("max_pool2d_with_indices", "max_pool3d_with_indices")
def _(choice, e, g, stock):
    n = 2 if "2d" in e.name else 3
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    bound = dict(zip(names, e.args[1:], strict=False)) | e.kwargs
    x, y = e.args[0], e.result[0]
    if g[0] is None or stock[0] is None or not x.numel():
        return stock
    kernel, stride, padding, dilation = (
        list(bound.get(name) or default) * (n if len(bound.get(name) or default) == 1 else 1)
        for name, default in zip(names[:4], ([1], bound.get("stride") or bound["kernel_size"], [0], [1]), strict=True)
    )
    each = [
        windows(
            x.shape[d - n],
            y.shape[d - n],
            lambda o, d=d: [o * stride[d] - padding[d] + k * dilation[d] for k in range(kernel[d])],
        )
        for d in range(n)
    ]
    return [pooled(choice.max_pool, x, y, g[0], each), *stock[1:]]


@of("adaptive_max_pool2d", "adaptive_max_pool3d")
def _(choice, e, g, stock):
    n = 2 if "2d" in e.name else 3
    x, y = e.args[0], e.result[0]
    if g[0] is None or stock[0] is None or not x.numel():
        return stock
    each = []
    for d in range(n):
        size, outputs = x.shape[d - n], y.shape[d - n]
        each.append(windows(size, outputs, lambda o, i=size, n=outputs: range(o * i // n, -(-(o + 1) * i // n))))
    return [pooled(choice.max_pool, x, y, g[0], each), *stock[1:]]


# ----------------------------------------------------------------------------------------------------------- norms
def normed(choice, x, norms, p, dims, keepdim, g, stock):
    """The gradient of a p-norm; None for an exponent without a choice."""
    g, norms = kept(g, dims, keepdim), kept(norms, dims, keepdim)
    if p == 1:
        return torch.where(x == 0, (g * choice.abs).to(stock.dtype), stock)
    return torch.where(norms == 0, (g * choice.norm).to(stock.dtype), stock)


@of("linalg_vector_norm")
def _(choice, e, g, stock):
    bound = dict(zip(("ord", "dim", "keepdim"), e.args[1:], strict=False)) | e.kwargs
    x, p = e.args[0], bound.get("ord", 2)
    if stock[0] is None or g[0] is None:
        return stock
    dims, keepdim = along(x, bound.get("dim")), bool(bound.get("keepdim"))
    return [normed(choice, x, e.result[0], p, dims, keepdim, g[0], stock[0]), *stock[1:]]


@of("norm")
def _(choice, e, g, stock):
    bound = dict(zip(("p", "dim", "keepdim"), e.args[1:], strict=False)) | e.kwargs
    x, p = e.args[0], bound.get("p", 2)
    p = 2 if p is None else p
    dims, keepdim = along(x, bound.get("dim")), bool(bound.get("keepdim"))
    if stock[0] is None or g[0] is None:
        return stock
    return [normed(choice, x, e.result[0], p, dims, keepdim, g[0], stock[0]), *stock[1:]]


@of("dist")
def _(choice, e, g, stock):
    x, y, p = (*e.args, 2)[:3]
    between = x - y
    at, c = (between == 0, choice.abs) if p == 1 else (e.result[0] == 0, choice.norm)
    return [
        None if gradient is None else torch.where(at, (g[0] * part).to(gradient.dtype), gradient)
        for gradient, part in zip(stock, (c, -c), strict=True)
    ]


def has_choice(e: Evaluation) -> bool:
    """Whether the package offers a choice for an evaluation, and this module a formula.

    It has none for bounds that are tensors where a view is overwritten, and where the lower one is above the upper one.
    """
    if e.name.startswith("abs") and e.args[0].is_complex():
        return False  # the package names it
    low, high = (*e.args[1:], None, None)[:2]
    if e.name.startswith("clamp") and isinstance(low, Tensor) and isinstance(high, Tensor) and bool((low > high).any()):
        return False
    if e.view is not None and (
        e.view[0] is None or any(isinstance(a, Tensor) for a in (*e.args[1:], *e.kwargs.values()))
    ):
        return False
    if (at := {"linalg_vector_norm": "ord", "norm": "p", "dist": "p"}.get(e.name)) is None:
        return True
    place = 2 if e.name == "dist" else 1
    p = e.args[place] if len(e.args) > place else e.kwargs.get(at, 2)
    return p is None or 1 <= p < math.inf


# ------------------------------------------------------------------------------------------------------------ mode
class Oracle(TorchDispatchMode):
    """Runs stock PyTorch, and notes the operations that have a choice.

    Example::

        with Oracle(OTHER) as oracle:
            y = model(x)
            unexplained = oracle.attach(y)  # kinks of the graph that have no formula here
        gradient = torch.autograd.grad(y.sum(), x)  # under the choice
    """

    def __init__(self, choice: Jacobians = OTHER) -> None:
        super().__init__()
        self.choice = choice
        self.seen: dict[int, list[Evaluation]] = {}
        self.undefined = False  # whether a NaN was met, of which the formulas here know nothing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name not in FORMULAS or torch._C._current_autograd_node() is not None:
            return func(*args, **kwargs)
        number = torch.autograd._get_sequence_nr()
        x = args[0]
        view = None
        if name.endswith("_") and x._base is not None:
            base = x._base  # a view of another dtype, of a complex number's parts, has no geometry in it
            size = base.size() if base.dtype == x.dtype else None
            view = (size, base.stride(), x.size(), x.stride(), x.storage_offset() - base.storage_offset())
        before = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, (args, kwargs))
        result = func(*args, **kwargs)
        after = tuple(
            t.detach().clone() if isinstance(t, Tensor) else t
            for t in (result if isinstance(result, tuple) else (result,))
        )
        self.undefined |= any(isinstance(t, Tensor) and bool(t.isnan().any()) for t in after)
        self.seen.setdefault(number, []).append(Evaluation(name, *before, after, view))
        return result

    def attach(self, outputs: Any) -> list[Any]:
        """Let the graph below tensors take the choice.

        Args:
            outputs: Tensors, in any container.

        Returns:
            The nodes with a kink for which there is no formula here.
        """
        unexplained = []
        for node in nodes(outputs):
            e = self._evaluation(node)
            if e is not None and has_choice(e):
                node.register_hook(self._hook(e))
            elif not node.name().startswith(AS_STOCK) and (e is not None or kinky(node)):
                unexplained.append(node)
        return unexplained

    def _evaluation(self, node: Any) -> Evaluation | None:
        """The evaluation that a node differentiates: it is noted with the number after the node's."""
        name, number = node.name(), node._sequence_nr()
        if name.endswith("CopySlices"):  # made right after the operation, around its own node
            return next((e for e in self.seen.get(number, ()) if e.view is not None), None)
        # Nodes may be made between: of a copy to keep, of views whose base was overwritten.
        candidates = (e for later in range(1, 5) for e in self.seen.get(number + later, ()))
        return next((e for e in candidates if name.startswith(node_of(e.name))), None)

    def _hook(self, e: Evaluation) -> Callable[..., Any]:
        formula = FORMULAS[e.name]

        def replace(stock: Gradients, incoming: Gradients) -> Any:
            with torch.no_grad():
                if e.view is None:
                    changed = formula(self.choice, e, incoming, list(stock))
                else:
                    changed = list(stock)
                    if stock[0] is not None:
                        changed[0] = _inside(formula, self.choice, e, incoming, stock[0])
            return tuple(changed)

        return replace


def _inside(formula: Formula, choice: Jacobians, e: Evaluation, incoming: Gradients, stock: Tensor) -> Tensor:
    """The gradient of a base of which a view was overwritten."""
    size, stride, *view = e.view
    whole = torch.empty_strided(size, stride, dtype=stock.dtype).copy_(stock)
    arriving = torch.empty_strided(size, stride, dtype=stock.dtype).copy_(incoming[0])
    part = whole.as_strided(*view)
    part.copy_(formula(choice, e, (arriving.as_strided(*view),), [part.clone()])[0])
    return whole


def nodes(outputs: Any) -> Iterator[Any]:
    """The autograd nodes below tensors, each once."""
    todo = [x.grad_fn for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        below = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= below
        todo += below


def kinky(node: Any) -> bool:
    """Whether a stock node's derivative is not unique somewhere."""
    from nslightning.surgery.kinks import kink

    return kink(node) is not None
