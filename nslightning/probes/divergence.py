"""How far the gradients of two Jacobian choices are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from nslightning.jacobians import Jacobians
from nslightning.probes.gradients import gradients, wanted
from nslightning.probes.propagation import differences, operation_nodes, refuse_compiled
from nslightning.surgery import selections

__all__ = ["NORMS", "SAME", "Divergence", "divergence", "measure", "measure_difference"]

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


_BLOCK = 1 << 16

#: The divergence of equal gradients.
SAME = Divergence(0.0, 0.0, 0.0, 0.0, 1.0)


def divergence(
    loss: Tensor,
    model: nn.Module,
    choices: Mapping[str, Jacobians],
    reference: Jacobians = Jacobians(),  # noqa: B008 # frozen
    *,
    method: Literal["subtract", "propagate"] = "subtract",
    inputs: Mapping[str, Tensor] | None = None,
    retain_graph: bool = True,
) -> dict[str, Divergence]:
    """How far each choice's parameter gradients are from the reference's, on one loss and one forward.

    Args:
        loss: A 0-d tensor computed by a forward of the patched ``model``, its graph not yet freed.
        model: A patched model, or one that contains patched ones.
        choices: The choices by name.
        reference: The choice to compare with; stock PyTorch's by default.
        method: ``"subtract"`` takes both gradients and subtracts them, which leaves rounding where they agree.
            ``"propagate"`` carries the difference itself down from the ties (:func:`differences`): exact zeros where no
            tie matters, elsewhere the rounding of the difference's own terms only, and the cost of the graph below the
            ties; no backward at all where no tie was met, so that a gradient that is not finite goes unnoticed there if
            the loss is finite. Not for compiled models nor for random choices.
        inputs: Further tensors to differentiate for, by name, such as the model's input; they count in the totals.
        retain_graph: Keep the graph after the last backward, for whatever comes next on the same loss.

    Returns:
        One :class:`Divergence` per choice, with ``per_layer`` by parameter name.

    Raises:
        ValueError: If the model is not patched, no parameter requires gradients, no choice is given, or the difference
            of a compiled model or of a random choice is to be propagated.

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
        if not any(operation_nodes(loss)) and selections(model) and loss.isfinite():
            return dict.fromkeys(choices, replace(SAME, per_layer=dict.fromkeys(wanted(model, inputs), SAME)))
        base, changes = differences(loss, model, choices, reference, inputs=inputs, retain_graph=retain_graph)
        return {name: measure_difference(change, base) for name, change in changes.items()}
    (base,) = gradients(loss, model, {"": reference}, inputs=inputs, retain_graph=True).values()
    found = {}
    for i, (name, jacobians) in enumerate(choices.items()):  # one at a time: two sets of gradients in memory
        keep = retain_graph or i + 1 < len(choices)
        (other,) = gradients(loss, model, {name: jacobians}, inputs=inputs, retain_graph=keep).values()
        found[name] = measure(other, base)
    return found


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
    return _divergences({name: _sums(choice[name], b) for name, b in reference.items()})


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
    if all(map(_is_nothing, difference.values())) and all(g.sum().isfinite() for g in reference.values()):
        return replace(SAME, per_layer=dict.fromkeys(reference, SAME))
    return _divergences({name: _sums(None, g, difference[name]) for name, g in reference.items()})


def _is_nothing(difference: Tensor) -> bool:
    """Whether a difference is the expanded zero by which :meth:`Recording.carry` says that nothing arrived."""
    return difference.numel() > 0 and not any(difference.stride()) and not difference[(0,) * difference.dim()].any()


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


def _sums(a: Tensor | None, b: Tensor, difference: Tensor | None = None) -> Tensor:
    """The sums that the norms are made of, in float64: of a and b, or of b and a - b."""
    given = [t.detach().flatten() for t in (a, b, difference) if t is not None]
    # On a CPU in blocks that stay in its cache: the copies in float64 would cost more than the sums.
    blocks = zip(*(t.split(_BLOCK) if t.device.type == "cpu" else [t] for t in given), strict=True)
    total = torch.zeros(6, dtype=torch.float64, device=b.device)
    for block in blocks:
        x, y = (t.double() for t in block)
        a, b, d = (x, y, x - y) if difference is None else (x + y, x, y)
        size = d.abs()
        largest = torch.maximum(total[2], size.max()) if len(size) else total[2]
        total = total + torch.stack([size.sum(), d.dot(d), torch.zeros_like(largest), a.dot(a), b.dot(b), a.dot(b)])
        total[2] = largest
    return total


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
