"""The difference between two choices' gradients, carried down from the ties instead of subtracted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from nslightning.jacobians import Jacobians
from nslightning.ops.selection import Selection
from nslightning.surgery import selections, using

__all__ = ["differences"]

_Record = tuple[GradientEdge, Callable[[Selection], Tensor]]


def differences(
    loss: Tensor,
    model: nn.Module,
    choices: Mapping[str, Jacobians],
    reference: Jacobians = Jacobians(),  # noqa: B008 # frozen
    *,
    retain_graph: bool = False,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    r"""The reference gradients, and for each choice what its gradients add to them.

    Backpropagation is linear in the incoming gradient. Let operation i receive g_i under the reference and
    g_i + d_i under the choice; below it the difference is

    .. math:: J_{choice}^T d_i + (J_{choice} - J_{reference})^T g_i,

    and everywhere else it is backpropagated like a gradient. The second term, nothing but for ties, is formed at each
    operation from the g_i of one reference backward; one backward under the choice, started at all these places at
    once, carries both terms down. What lies above the highest tie is never visited, and where no tie matters nothing
    is: the differences are then exactly 0.

    Args:
        loss: A 0-d tensor computed by an eager forward of the patched ``model``, its graph not yet freed.
        model: A patched model, or one that contains patched ones.
        choices: The choices by name.
        reference: The choice to compare with; stock PyTorch's by default.
        retain_graph: Keep the graph after the last backward.

    Returns:
        ``({parameter: gradient}, {choice: {parameter: difference}})``; only parameters that require gradients appear.

    Raises:
        ValueError: If the model is not patched, no parameter requires gradients, or the model is compiled.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(f"no parameter of {type(model).__name__} requires gradients")
    if any(isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None for m in model.modules()):
        raise ValueError("a compiled model's ties cannot be recorded: use method='subtract', or the eager model")
    parameters = list(named.values())
    with using(model, reference), _recording(model) as records:
        base = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    before = Selection(reference)
    found = {}
    for i, (name, jacobians) in enumerate(choices.items()):
        after = Selection(jacobians)
        starts = [(edge, vjp(after) - vjp(before)) for edge, vjp in records]
        starts = [(edge, d) for edge, d in starts if torch.count_nonzero(d)]
        if not starts:
            found[name] = {n: torch.zeros_like(p) for n, p in named.items()}
            continue
        keep = retain_graph or i + 1 < len(choices)
        with using(model, _linear_part(jacobians)):
            values = torch.autograd.grad(
                [edge for edge, _ in starts],
                parameters,
                [d for _, d in starts],
                retain_graph=keep,
                allow_unused=True,
                materialize_grads=True,
            )
        found[name] = dict(zip(named, values, strict=True))
    return dict(zip(named, base, strict=True)), found


def _linear_part(jacobians: Jacobians) -> Jacobians:
    """What a choice does to an incoming difference: the constants that the published rule adds are no part of it."""
    if jacobians.rule == "exact":
        return jacobians
    return replace(jacobians, rule="exact", relu=0.0, relu6=(0.0, 0.0))


@contextmanager
def _recording(model: nn.Module) -> Iterator[list[_Record]]:
    """Collect from every backward at a tied operation where it hands its gradient, and what that would have been."""
    records: list[_Record] = []

    def record(node: Any, vjp: Callable[[Selection], Tensor]) -> None:
        below, output = node.next_functions[0]
        if below is not None:
            records.append((GradientEdge(below, output), vjp))

    found = selections(model).values()
    for selection in found:
        selection.recorder = record
    try:
        yield records
    finally:
        for selection in found:
            selection.recorder = None
