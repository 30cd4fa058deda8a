"""How far the gradients of two Jacobian choices are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from nslightning.jacobians import Jacobians
from nslightning.ops.autograd.selection import concrete
from nslightning.ops.kernels import cpu as cpu_kernels
from nslightning.probes.gradients import gradients, gradients_in_turn, wanted
from nslightning.probes.graph import operation_nodes, refuse_hidden
from nslightning.probes.propagation import recording, refuse_compiled, refuse_computed, refuse_random
from nslightning.surgery import Plan, selections

__all__ = ["NORMS", "SAME", "Divergence", "dense", "divergence", "measure", "measure_difference", "measure_differences"]

NORMS = ("l1", "l2", "linf", "relative", "cosine")


@dataclass(frozen=True)
class Divergence:
    """The difference between the gradients of a choice and of the reference, ``d = g_choice - g_reference``.

    Args:
        l1: Sum of ``|d|``.
        l2: Euclidean norm of ``d``.
        linf: Largest ``|d|``.
        relative: ``l2 / ||g_reference||``; 0 when both gradients are 0, infinite when only the reference is.
        cosine: Cosine of the angle between the two gradients; 1 when they are equal, also when both are 0,
            0 when one is 0, NaN when an entry is not finite.
        per_layer: The same per parameter, by name; empty in the entries themselves.
    """

    l1: float
    l2: float
    linf: float
    relative: float
    cosine: float
    per_layer: Mapping[str, Divergence] = field(default_factory=dict)

    def norms(self) -> dict[str, float]:
        """The five figures by name.

        Returns:
            ``{"l1": ..., "l2": ..., "linf": ..., "relative": ..., "cosine": ...}``.
        """
        return {name: getattr(self, name) for name in NORMS}


_BLOCK = 1 << 18

#: The divergence of equal gradients.
SAME = Divergence(0.0, 0.0, 0.0, 0.0, 1.0)


def divergence(
    loss: Tensor,
    model: nn.Module,
    choices: Mapping[str, Jacobians | Plan],
    reference: Jacobians | Plan = Jacobians(),  # noqa: B008 # frozen
    *,
    method: Literal["subtract", "propagate"] = "subtract",
    inputs: Mapping[str, Tensor] | None = None,
    retain_graph: bool = True,
) -> dict[str, Divergence]:
    """How far each choice's parameter gradients are from the reference's, on one loss and one forward.

    Args:
        loss: A 0-d tensor computed by a forward of the patched ``model``, its graph not yet freed.
        model: A patched model, or one that contains patched ones.
        choices: The choices by name; to subtract, one may be a plan with a choice for each site, like the reference.
        reference: The choice to compare with; stock PyTorch's by default.
        method: ``"subtract"`` takes both gradients and subtracts them, which leaves rounding where they agree.
            ``"propagate"`` carries the difference itself down from the ties (:func:`nslightning.probes.differences`):
            exact zeros where no tie matters, elsewhere the rounding of the difference's own terms only, and the cost
            of the graph below the ties; no backward at all where no tie was met, so that a gradient that is not finite
            goes unnoticed there if the loss is finite. Not for compiled models nor for random choices.
        inputs: Further tensors to differentiate for, by name, such as the model's input; they count in the totals.
            Leaves of the graph, if the difference is to be propagated.
        retain_graph: Keep the graph after the last backward, for whatever comes next on the same loss.

    Returns:
        One :class:`Divergence` per choice, with ``per_layer`` by parameter name.

    Raises:
        ValueError: If the model is not patched, no parameter requires gradients, no choice is given, or the difference
            of a compiled model, of operations under ``torch.vmap``, of a random choice or for an input that was
            computed is to be propagated.

    Example:
        >>> import nslightning
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> _ = nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
        >>> report = nslightning.patch(model, Jacobians())
        >>> loss = model(torch.ones(1, 2)).sum()
        >>> divergence(loss, model, {"relu1": Jacobians(relu=1.0)})["relu1"].l1
        6.0
    """
    if not choices:
        raise ValueError("divergence takes at least one choice, such as {'relu1': Jacobians(relu=1.0)}")
    if method == "propagate":
        refuse_compiled(model)
        refuse_computed(inputs)
        refuse_hidden(loss)
        refuse_random(*choices.values())
        alike = {name: choice for name, choice in choices.items() if isinstance(choice, Jacobians)}
        if not any(operation_nodes(loss)) and selections(model) and loss.isfinite():
            return dict.fromkeys(choices, replace(SAME, per_layer=dict.fromkeys(wanted(model, inputs), SAME)))
        with recording(model) as met:
            (base,) = gradients(loss, model, {"": reference}, inputs=inputs, retain_graph=True).values()
        return measure_differences(met.carried(alike, wanted(model, inputs), retain_graph=retain_graph), base)
    every = [reference, *choices.values()]
    turns = gradients_in_turn(loss, model, every, wanted(model, inputs), retain_graph=retain_graph)
    base = next(turns)  # two sets of gradients in memory, however many choices
    return {name: measure(other, base) for name, other in zip(choices, turns, strict=True)}


def measure(choice: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Divergence:
    """The divergence of two sets of gradients.

    Differences and sums are formed in float64, whatever the gradients' precision.

    Args:
        choice: Gradients by parameter name.
        reference: Gradients of the same names and shapes.

    Returns:
        The divergence in total and per parameter.

    Raises:
        ValueError: If the names or the shapes differ.

    Example:
        >>> measure({"w": torch.tensor([3.0, 4.0])}, {"w": torch.zeros(2)}).l2
        5.0
    """
    if choice.keys() != reference.keys():
        raise ValueError(f"gradients of different parameters: {sorted(choice.keys() ^ reference.keys())}")
    for name, b in reference.items():
        if choice[name].shape != b.shape:
            raise ValueError(f"gradients of {name} have shapes {tuple(choice[name].shape)} and {tuple(b.shape)}")
    rows = {}
    for name, b in reference.items():
        square = _square(dense(b))
        same = choice[name] is b
        rows[name] = _row_of_same(square) if same else _row(_sums(dense(choice[name]), dense(b)), square)
    return _divergences(rows)


def measure_difference(difference: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Divergence:
    """The divergence of two sets of gradients of which one and the difference are known.

    Args:
        difference: What the choice adds to the reference's gradients, by parameter name.
        reference: Gradients of the same names and shapes.

    Returns:
        The divergence in total and per parameter.

    Example:
        >>> measure_difference({"w": torch.tensor([1e-30])}, {"w": torch.ones(1)}).linf
        1.0000000031710769e-30
    """
    return measure_differences([("", difference)], reference)[""]


def measure_differences(
    differences: Iterable[tuple[str, Mapping[str, Tensor]]], reference: Mapping[str, Tensor]
) -> dict[str, Divergence]:
    """The divergence of each of several sets of gradients from one reference, of which the differences are known.

    What the norms need of the reference is found once for all, and of parameters that no difference reaches nothing
    but the squares.

    Args:
        differences: What each choice adds to the reference's gradients, by parameter name, with the choice's name:
            one after the other, so that one at a time is in memory if they come from
            :meth:`nslightning.probes.Recording.carried`.
        reference: Gradients of the same names and shapes.

    Returns:
        The divergences by the choices' names. Where the reference is not finite, neither is any difference to it.

    Example:
        >>> reference = {"w": torch.tensor([3.0, 4.0])}
        >>> pairs = [("none", {"w": torch.zeros(2)}), ("double", reference)]
        >>> [d.relative for d in measure_differences(pairs, reference).values()]
        [0.0, 1.0]
    """
    known, found = _Reference(reference), {}
    nothing: Mapping[str, Tensor] | None = None  # one for all choices that make no difference, if carried
    for name, difference in differences:
        found[name] = known.same if difference is nothing else known.divergence(difference)
        if found[name] is known.same:
            nothing = difference
    return found


class _Reference:
    """What divergences from one set of gradients need of it, found when the first one does."""

    def __init__(self, gradients: Mapping[str, Tensor]) -> None:
        self.gradients = {name: dense(g) for name, g in gradients.items()}

    @cached_property
    def finite(self) -> bool:
        """Whether all entries are."""
        return _finite([g.sum() for g in self.gradients.values()])

    @cached_property
    def same(self) -> Divergence:
        """That of gradients which are equal to them."""
        return replace(SAME, per_layer=dict.fromkeys(self.gradients, SAME))

    @cached_property
    def squares(self) -> dict[str, Tensor]:
        """The squared length of each."""
        return {name: _square(g) for name, g in self.gradients.items()}

    def divergence(self, difference: Mapping[str, Tensor]) -> Divergence:
        """That of gradients which differ by so much."""
        nothing = {name: _is_nothing(d) for name, d in difference.items()}
        if all(nothing.values()) and self.finite:
            return self.same
        # In nearly all cases the squares tell it as well.
        finite = _finite(list(self.squares.values())) or self.finite
        rows = {}
        for name, g in self.gradients.items():
            b = self.squares[name]
            if nothing[name]:
                rows[name] = _row_of_same(b)
            else:
                rows[name] = _row(_sums(dense(difference[name]), g, carried=True), b)
                if not finite:
                    rows[name] += b - b
        return _divergences(rows)


def _finite(values: list[Tensor]) -> bool:
    """Whether all of some 0-d tensors are, by one transfer from the device."""
    return not values or bool(torch.stack([v.to(values[0].device) for v in values]).isfinite().all())


def _is_nothing(difference: Tensor) -> bool:
    """Whether a difference is the expanded zero by which :meth:`Recording.carry` says that nothing arrived."""
    strided = difference.layout == torch.strided
    return (
        strided
        and difference.numel() > 0
        and not any(difference.stride())
        and not difference[(0,) * difference.dim()].any()
    )


def _divergences(sums: Mapping[str, Tensor]) -> Divergence:
    # One transfer from the device: a row of (l1, l2^2, linf, |a|^2, |b|^2, a.b) per parameter.
    values = list(sums.values())
    none = torch.zeros(0, 6, dtype=torch.float64)
    rows = torch.stack([row.to(values[0].device) for row in values]).cpu() if values else none
    per_layer = {name: _divergence(row.tolist()) for name, row in zip(sums, rows, strict=True)}
    total = rows.sum(0)
    if len(rows):
        total[2] = rows[:, 2].max()
    return Divergence(**_divergence(total.tolist()).norms(), per_layer=per_layer)


def dense(gradient: Tensor) -> Tensor:
    """A gradient with all its entries: those of embeddings may be sparse.

    Args:
        gradient: Any layout.

    Returns:
        The same, strided.
    """
    return gradient.to_dense() if gradient.layout != torch.strided else gradient


def _row_of_same(square: Tensor) -> Tensor:
    """That of gradients which are equal: NaN where the square is not finite, and nothing can be told."""
    nothing = square - square
    return torch.stack([nothing, nothing, nothing, square, square, square])


def _row(sums: Tensor, square: Tensor) -> Tensor:
    return torch.cat([sums[:4], square.view(1), sums[4:]])


def _sums(given: Tensor, reference: Tensor, *, carried: bool = False) -> Tensor:
    """(l1, l2^2, linf, |a|^2, a.b) of a choice's gradient a = b + d; given is a, or d if it was carried."""
    pair = given, reference
    dense = all(concrete(t) and t.device.type == "cpu" and t.is_contiguous() for t in pair)
    if dense and given.dtype == reference.dtype in cpu_kernels.DTYPES and cpu_kernels.available():
        return cpu_kernels.sums(given.detach(), reference.detach(), carried=carried)
    total = torch.zeros(5, dtype=torch.float64, device=reference.device)
    for one, b, other in _blocks(given, reference, given):
        a, d = (other.add_(b), one) if carried else (one, other.sub_(b))
        squares = [d.dot(d), a.dot(a), a.dot(b)]
        size = d.abs_()
        largest = torch.maximum(total[2], size.aminmax().max)
        total = total + torch.stack([size.sum(), squares[0], torch.zeros_like(largest), *squares[1:]])
        total[2] = largest
    return total


def _square(g: Tensor) -> Tensor:
    """The squared length, 0-d float64."""
    total = torch.zeros((), dtype=torch.float64, device=g.device)
    for (block,) in _blocks(g):
        total += block.dot(block)
    return total


def _blocks(*given: Tensor) -> Iterator[list[Tensor]]:
    """Copies of tensors of one size in float64; on a CPU in blocks that stay in its cache, each in the last's place."""
    flat = [t.detach().flatten() for t in given]
    size = min(_BLOCK, len(flat[0])) if flat[0].device.type == "cpu" else len(flat[0])
    if not size:
        return
    memory = [torch.empty(size, dtype=torch.float64, device=t.device) for t in flat]
    for blocks in zip(*(t.split(size) for t in flat), strict=True):
        yield [into[: len(block)].copy_(block) for into, block in zip(memory, blocks, strict=True)]


def _divergence(sums: list[float]) -> Divergence:
    l1, squares, linf, aa, bb, ab = sums
    l2 = math.sqrt(squares)
    relative = l2 / math.sqrt(bb) if bb else (l2 * math.inf if l2 else 0.0)
    lengths = math.sqrt(aa) * math.sqrt(bb)
    if math.isnan(l1) or not math.isfinite(lengths):
        cosine = math.nan
    elif l2 == 0:
        cosine = 1.0
    else:
        cosine = max(-1.0, min(1.0, ab / lengths)) if lengths else 0.0
    return Divergence(l1, l2, linf, relative, cosine)
