"""Measures how far the gradients of two Jacobian choices are apart."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from nslightning.jacobians import Jacobians
from nslightning.probes.gradients import gradients_in_turn, wanted
from nslightning.probes.graph import UnseenError, check_loss, opaque_nodes, operation_nodes
from nslightning.probes.propagation import agrees, recording, refuse_computed, refuse_random, refuse_unseen
from nslightning.probes.shards import totals
from nslightning.probes.sums import LARGEST, dense, is_nothing, rows, squares, waits
from nslightning.surgery import AnyChoice, Plan, selections, to_choice, to_choices
from nslightning.text_table import aligned

__all__ = [
    "NORMS",
    "SAME",
    "Divergence",
    "Method",
    "MethodWarning",
    "divergence",
    "measure",
    "measure_difference",
    "measure_differences",
]

_SHOWN = 5  # parameters of a printed divergence
_CONTROL = "control"

NORMS = ("l1", "l2", "linf", "relative", "cosine")

#: How a difference is found: between two sets of gradients, or carried down from the ties.
Method = Literal["subtract", "propagate"]


class MethodWarning(UserWarning):
    """Gradients were subtracted where their difference was to be carried down; the message says why."""


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
        method: The way to the difference, ``"propagate"`` or ``"subtract"``; it plays no part in comparisons.
    """

    l1: float
    l2: float
    linf: float
    relative: float
    cosine: float
    per_layer: Mapping[str, Divergence] = field(default_factory=dict, repr=False)  # printed with a dictionary of them
    method: Method = field(default="subtract", compare=False)

    def __str__(self) -> str:
        """The five figures, in total and of the parameters that differ most."""
        parts = sorted(self.per_layer.items(), key=lambda item: -item[1].l2)
        differing = [(name, part) for name, part in parts if part.l2]
        shown = differing[:_SHOWN]
        rows = [
            [name, *(f"{value:.3g}" for value in part.norms().values())] for name, part in (("(all)", self), *shown)
        ]
        lines = aligned([["parameter", *NORMS], *rows])
        less, equal = len(differing) - len(shown), len(parts) - len(differing)
        rest = [f"{less} more that differ less"] * (less > 0) + [f"{equal} that do not differ"] * (equal > 0)
        lines += [f"of {len(parts)} parameters, {' and '.join(rest)}"] if rest else []
        if any(math.isinf(part.relative) for part in (self, *(part for _, part in shown))):
            lines.append("relative is inf where the reference's gradient is 0")
        return "\n".join(lines)

    def norms(self) -> dict[str, float]:
        """The five figures by name.

        Returns:
            ``{"l1": ..., "l2": ..., "linf": ..., "relative": ..., "cosine": ...}``.
        """
        return {name: getattr(self, name) for name in NORMS}


#: The divergence of equal gradients.
SAME = Divergence(0.0, 0.0, 0.0, 0.0, 1.0)


def divergence(
    loss: Tensor,
    model: nn.Module,
    choices: Mapping[str, AnyChoice],
    reference: AnyChoice = Jacobians(),  # noqa: B008 # frozen
    *,
    method: Method = "subtract",
    inputs: Mapping[str, Tensor] | None = None,
    retain_graph: bool = True,
    control: bool = False,
) -> dict[str, Divergence]:
    """Measure how far each choice's parameter gradients are from the reference's, on one loss and one forward.

    Args:
        loss: A 0-d tensor computed by a forward of the patched ``model``, its graph not yet freed.
        model: A patched model, or one that contains patched ones.
        choices: The choices by name; to subtract, one may be a plan with a choice for each site, like the reference.
        reference: The choice to compare with; stock PyTorch's by default.
        method: ``"subtract"`` takes both gradients and subtracts them, which leaves rounding where they agree.
            ``"propagate"`` carries the difference itself down from the ties (:func:`nslightning.probes.differences`):
            exact zeros where no tie matters, elsewhere the rounding of the difference's own terms only, and the cost
            of the graph below the ties; no backward at all where no tie was met, so that a gradient that is not finite
            goes unnoticed there if the loss is finite. Not for random choices. The loss's own graph decides whether it
            can be done: where operations hide from it (in compiled parts, reentrant checkpoints, ``torch.vmap``, custom
            functions that run patched parts), or where a difference does not add up as gradients do (one subtraction
            checks it: hooks that clip, custom backwards), gradients are subtracted, with a :class:`MethodWarning`.
        inputs: Further tensors to differentiate for, by name, such as the model's input; they count in the totals.
            Leaves of the graph, if the difference is to be propagated.
        retain_graph: Keep the graph after the last backward, for whatever comes next on the same loss.
        control: Compare the reference with itself, too, as the choice ``"control"``: a second whole backward of it.
            Its divergence is the noise floor of the arithmetic: a divergence that is no larger says nothing. It is
            exactly 0 where sums repeat themselves, and not under :class:`~nslightning.arithmetic.RandomRounding` or
            with kernels that add up in no fixed order. A difference that is propagated was not subtracted: its control
            is 0.

    Returns:
        One :class:`Divergence` per choice, with ``per_layer`` by parameter name, and the ``method`` that was taken.

    Raises:
        ValueError: If the model is not patched, no parameter requires gradients, no choice is given, a choice is called
            ``"control"`` where one is asked for, or the difference of a random choice or for an input that was computed
            is to be propagated.

    Warns:
        MethodWarning: If gradients were subtracted, though their difference was to be propagated.

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
    if control and _CONTROL in choices:
        raise ValueError(f"the name {_CONTROL!r} is the reference's second gradient: give that choice another name")
    check_loss(loss, model)
    by_name, base_choice = to_choices(choices), to_choice(reference)
    named = wanted(model, inputs)
    if method == "propagate":
        refuse_computed(inputs)
        refuse_random(*by_name.values())
        try:
            carried = _propagated(loss, model, by_name, base_choice, named, retain_graph)
            return carried | ({_CONTROL: _nothing(named, "propagate")} if control else {})
        except UnseenError as reason:
            doing = "gradients are subtracted, which leaves rounding where they agree"
            warnings.warn(f"{doing}: {reason.cause}", MethodWarning, stacklevel=2)
    every = [base_choice, *by_name.values()]
    turns = gradients_in_turn(loss, model, every, named, retain_graph=retain_graph or control)
    base = next(turns)  # two sets of gradients in memory, however many choices
    measured = {name: measure(other, base) for name, other in zip(by_name, turns, strict=True)}
    if control:  # by itself: beside other choices a backward may start below the loss
        (again,) = gradients_in_turn(loss, model, [base_choice], named, retain_graph=retain_graph)
        measured[_CONTROL] = measure(again, base)
    return measured


def _nothing(named: Mapping[str, Tensor], method: Method) -> Divergence:
    return replace(SAME, per_layer=dict.fromkeys(named, SAME), method=method)


def _propagated(
    loss: Tensor,
    model: nn.Module,
    choices: Mapping[str, Jacobians | Plan],
    reference: Jacobians | Plan,
    named: Mapping[str, Tensor],
    retain_graph: bool,
) -> dict[str, Divergence]:
    """The divergences as they are carried down from the ties.

    Raises:
        UnseenError: If the differences cannot be carried.
    """
    refuse_unseen(loss, named)
    alike = {name: choice for name, choice in choices.items() if isinstance(choice, Jacobians)}
    if not any(operation_nodes(loss)) and not any(opaque_nodes(loss)) and selections(model) and loss.isfinite():
        return dict.fromkeys(choices, _nothing(named, "propagate"))
    with recording(model) as met:
        (base,) = gradients_in_turn(loss, model, [reference], named)
    met.refuse_strangers(loss)
    divergences = measure_differences(met.carried(alike, named), base)
    largest = max(divergences, key=lambda name: divergences[name].l2 if math.isfinite(divergences[name].l2) else 0.0)
    if divergences[largest].l2:
        (carried,) = (d for _, d in met.carried({largest: alike[largest]}, named))
        (other,) = gradients_in_turn(loss, model, [alike[largest]], named, retain_graph=retain_graph)
        agrees(loss, other, base, carried)
    return {name: replace(d, method="propagate") for name, d in divergences.items()}


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
    known = _Reference(reference)
    return known.divergences({"": known.rows(choice, carried=False)})[""]


def measure_difference(difference: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Divergence:
    """The divergence of two sets of gradients of which one and the difference are known.

    Args:
        difference: The choice's gradients less the reference's, by parameter name.
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

    The reference's norms are computed once for all choices. For parameters that no difference reaches
    only the squares are computed.

    Args:
        differences: For each choice its name, and its gradients less the reference's by parameter name: one after
            the other, so that one at a time is in memory if they come from
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
    known = _Reference(reference)
    return known.divergences({name: known.rows(difference, carried=True) for name, difference in differences})


class _Reference:
    """The values of the reference gradients that divergences need, each computed when it is first needed."""

    def __init__(self, gradients: Mapping[str, Tensor]) -> None:
        self.names, self.raw = list(gradients), list(gradients.values())
        self.gradients = [dense(g) for g in self.raw]
        self.waits = any(waits(g.device) for g in self.gradients)

    @cached_property
    def finite(self) -> bool:
        """Return whether all entries are, by one transfer from the device."""
        sums = [g.sum() for g in self.gradients]
        return not sums or bool(torch.stack([v.to(sums[0].device) for v in sums]).isfinite().all())

    @cached_property
    def squares(self) -> list[Tensor]:
        """The squared length of each."""
        return squares(self.gradients)

    def same(self, i: int) -> Tensor:
        """The row of a gradient that is equal; NaN where it is not finite, since no difference is defined there."""
        square = self.squares[i]
        zero = square - square
        return torch.stack([zero, zero, zero, square, square, square])

    def rows(self, other: Mapping[str, Tensor], *, carried: bool) -> Tensor | None:
        """Return the sums that the norms need, a row a gradient; None if nothing differs and no value had to be read.

        Args:
            other: A choice's gradients, or what it adds to the reference's if that was carried.
            carried: Whether the gradients are such differences.
        """
        values = [dense(other[name]) for name in self.names]
        if carried:
            equal = [is_nothing(d) for d in values]
            if all(equal) and (self.waits or self.finite):
                return None
        else:
            equal = [other[name] is b for name, b in zip(self.names, self.raw, strict=True)]
        differing = [i for i, same in enumerate(equal) if not same]
        table = [self.same(i) if same else self.squares[i] for i, same in enumerate(equal)]
        parts = [[tensors[i] for i in differing] for tensors in (values, self.gradients, self.squares)]
        for i, row in zip(differing, rows(*parts, carried=carried), strict=True):
            # A carried difference to a reference that is not finite is NaN.
            table[i] = row + (table[i] - table[i]).to(row.device) if carried else row
        return totals(torch.stack([row.to(table[0].device) for row in table]), self.raw, LARGEST) if table else None

    def divergences(self, tables: Mapping[str, Tensor | None]) -> dict[str, Divergence]:
        """The divergences of all sets of gradients, from the tables of :meth:`rows`, by one transfer from a device."""
        if self.waits and any(table is None for table in tables.values()):  # these rows show what is not finite
            equal = torch.stack([row.to(self.squares[0].device) for row in map(self.same, range(len(self.names)))])
            equal = totals(equal, self.raw, LARGEST)
            tables = {name: equal if table is None else table for name, table in tables.items()}
        measured = {name: self._with_total(table) for name, table in tables.items() if table is not None}
        device = next(iter(measured.values())).device if measured else None
        values = torch.stack([table.to(device) for table in measured.values()]).tolist() if measured else []
        known = dict(zip(measured, values, strict=True))
        same = replace(SAME, per_layer=dict.fromkeys(self.names, SAME))
        return {name: self._divergence(known[name]) if name in known else same for name in tables}

    @staticmethod
    def _with_total(table: Tensor) -> Tensor:
        """The rows, and that of all gradients together."""
        total = table.sum(0)
        total[LARGEST] = table[:, LARGEST].amax()
        return torch.cat([table, total.unsqueeze(0)])

    def _divergence(self, rows: list[list[float]]) -> Divergence:
        *parts, total = map(_divergence, rows)
        return replace(total, per_layer=dict(zip(self.names, parts, strict=True)))


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
