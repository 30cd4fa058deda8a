"""The difference between two choices' gradients, carried down from the ties instead of subtracted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from nslightning._torch import is_compiled
from nslightning.jacobians import Jacobians
from nslightning.ops.autograd.selection import Selection
from nslightning.probes.gradients import gradients, wanted
from nslightning.probes.graph import agree, freeing, operation_nodes, reachable, refuse_hidden
from nslightning.surgery import Plan, selections, using

__all__ = [
    "Recording",
    "differences",
    "recording",
    "refuse_compiled",
    "refuse_computed",
    "refuse_random",
]

Starts = list[tuple[GradientEdge, Tensor]]
_Gradients = Tensor | tuple[Tensor | None, ...]

# Backward nodes of one input and one output, where a difference may die: autograd's and the operations' own.
_GATES = frozenset({"ReluBackward0", "ThresholdBackward0", "HardtanhBackward0", "_KinkedBackward", "_ReLUBackward"})


@dataclass(eq=False)
class _Met:
    """One backward of an operation that may have met ties.

    Args:
        node: The operation's backward node.
        in_use: The choice under which the backward ran.
        vjp: What its gradients would be under any choice.
        difference: What those under one choice add to those under another, if the operation knows a way of its own.
    """

    node: Any
    in_use: Jacobians
    vjp: Callable[[Selection], _Gradients]
    difference: Callable[[Selection, Selection], Tensor] | None = None

    def starts(self, choice: Jacobians) -> Starts:
        """The difference that the operation makes by itself, below the ReLUs that it meets first."""
        pair = Selection(choice), Selection(self.in_use)
        changes: list[Tensor | None]
        if self.difference is not None:
            changes = [self.difference(*pair)]
        else:
            both = zip(*(_several(self.vjp(one)) for one in pair), strict=True)
            changes = [None if a is None or b is None else a - b for a, b in both]
        found: Starts = []
        for (node, output), d in zip(self.node.next_functions, changes, strict=False):
            if node is not None and d is not None:
                found += _through_gates(GradientEdge(node, output), d)
        return found


@dataclass(eq=False)
class Recording:
    """What one backward met at its ties, from which the difference to any other choice can be carried down.

    Args:
        model: The patched model that ran.
        records: One per backward of an operation.
    """

    model: nn.Module
    records: list[_Met] = field(default_factory=list)

    def backward(self, loss: Tensor, *given: Any, **settings: Any) -> None:
        """``loss.backward()``, of whose graph only the part is kept that differences are carried through.

        What lies above the highest operation that met ties is freed while the backward runs, as without
        ``retain_graph``.

        Args:
            loss: A tensor computed by an eager forward of the model.
            *given: What ``loss.backward`` takes.
            **settings: The same, but for ``retain_graph``.
        """
        kept = set(reachable(operation_nodes(loss)))
        with freeing([node for node in reachable([loss.grad_fn]) if node not in kept] if kept else []):
            loss.backward(*given, **settings | {"retain_graph": bool(kept)})

    def meet(self, loss: Tensor, among: Iterable[Jacobians] = ()) -> None:
        """Run the backward only as far as to the operations that met ties: no parameter gets a gradient.

        Args:
            loss: A tensor computed by an eager forward of the model.
            among: The choices of interest: no further than to where they may say different things.
        """
        nodes = operation_nodes(loss, among)
        below = [
            GradientEdge(node, output) for tied in nodes for node, output in tied.next_functions if node is not None
        ]
        # What PyTorch does in place on a view cannot be asked for the gradient of a place.
        parts = any(node.name().endswith("::CopySlices") for node in reachable([loss.grad_fn]))
        goals = list(wanted(self.model).values()) if parts else below
        if below:
            torch.autograd.grad(loss, goals, retain_graph=True, allow_unused=True)

    def starts(self, choice: Jacobians) -> Starts:
        """The differences that each tied operation makes by itself, and where they enter the graph below it.

        Args:
            choice: The choice to compare with the one in use.

        Returns:
            Only what is not identically zero: at an operation, or below the ReLUs that directly follow it.

        Raises:
            ValueError: If the choice is random, which is another one at each evaluation.
        """
        refuse_random(choice)
        met = [one for one in self.records if not agree(one.node, choice, one.in_use)]
        if not met:
            return []
        with torch.no_grad(), using(self.model, _linear_part(choice)):
            return [start for one in met for start in one.starts(choice)]

    def carry(
        self, starts: Starts, choice: Jacobians, tensors: Sequence[Tensor], *, retain_graph: bool = True
    ) -> tuple[Tensor, ...]:
        """Carry differences down to the tensors that are differentiated for.

        Args:
            starts: What :meth:`starts` returned, or multiples of it: the carrying is linear.
            choice: The choice for which it did.
            tensors: Parameters or inputs.
            retain_graph: Keep the graph for another pass.

        Returns:
            The difference for each tensor. Where nothing arrives it is one zero, expanded to the tensor's shape: it
            takes no memory, and no backward runs for it.
        """
        values: tuple[Tensor | None, ...] = (None,) * len(tensors)
        if starts:
            with using(self.model, _linear_part(choice)):
                values = torch.autograd.grad(
                    [edge for edge, _ in starts],
                    list(tensors),
                    [d for _, d in starts],
                    retain_graph=retain_graph,
                    allow_unused=True,
                )
        return tuple(t.new_zeros(()).expand_as(t) if d is None else d for t, d in zip(tensors, values, strict=True))

    def carried(
        self, choices: Mapping[str, Jacobians], named: Mapping[str, Tensor], *, retain_graph: bool = True
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What each of several choices adds to the gradients, one choice at a time.

        Args:
            choices: The choices by name.
            named: Parameters or inputs by name.
            retain_graph: Keep the graph after the last choice.

        Yields:
            A choice's name and ``{name: difference}``, as :meth:`carry` returns them; one and the same dictionary for
            all choices that make no difference.
        """
        tensors = list(named.values())
        nothing = dict(zip(named, self.carry([], Jacobians(), tensors), strict=True))
        for i, (choice, jacobians) in enumerate(choices.items(), 1):
            starts = self.starts(jacobians)
            if starts:
                values = self.carry(starts, jacobians, tensors, retain_graph=retain_graph or i < len(choices))
                yield choice, dict(zip(named, values, strict=True))
            else:
                yield choice, nothing


@contextmanager
def recording(model: nn.Module) -> Iterator[Recording]:
    """Record what the backwards inside the block meet at ties.

    The backward may be any: that of a training step serves, by ``loss.backward(retain_graph=True)`` or cheaper by
    :meth:`Recording.backward`, and spares the one that :func:`differences` runs for the reference.

    Args:
        model: A patched model, or one that contains patched ones, in eager mode.

    Yields:
        The recording, filled as backwards run; it holds the gradients that came to the ties.

    Raises:
        ValueError: If the model is compiled.

    Example:
        >>> import nslightning
        >>> model = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
        >>> _ = nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
        >>> report = nslightning.patch(model, Jacobians())
        >>> with recording(model) as met:
        ...     met.backward(model(torch.ones(1, 2)).sum())
        >>> choice = Jacobians(relu=0.5)
        >>> met.carry(met.starts(choice), choice, list(model.parameters()))
        (tensor([[0.5000, 0.5000]]), tensor([0.5000]))
    """
    refuse_compiled(model)
    recorded = Recording(model)

    def recorder(selection: Selection) -> Callable[..., None]:
        def record(node: Any, *given: Any) -> None:
            recorded.records.append(_Met(node, selection.jacobians, *given))

        return record

    found = selections(model).values()
    for selection in found:
        selection.recorder = recorder(selection)
    try:
        yield recorded
    finally:
        for selection in found:
            selection.recorder = None


def differences(
    loss: Tensor,
    model: nn.Module,
    choices: Mapping[str, Jacobians],
    reference: Jacobians = Jacobians(),  # noqa: B008 # frozen
    *,
    inputs: Mapping[str, Tensor] | None = None,
    retain_graph: bool = True,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    r"""The reference gradients, and for each choice what its gradients add to them.

    Backpropagation is linear in the incoming gradient. Let operation i receive g_i under the reference and
    g_i + d_i under the choice; below it the difference is

    .. math:: J_{choice}^T d_i + (J_{choice} - J_{reference})^T g_i,

    and everywhere else it is backpropagated like a gradient. The second term, nothing but for ties, is formed at each
    operation from the g_i of one reference backward; one backward under the choice, started at all these places at
    once, carries both terms down. What lies above the highest tie is never visited, and where no tie matters nothing
    is: the differences are then exactly 0. A pooling window of zeros behind a ReLU ties always and matters never: the
    difference is taken through the ReLUs right below its start before anything else runs.

    Args:
        loss: A 0-d tensor computed by an eager forward of the patched ``model``, its graph not yet freed.
        model: A patched model, or one that contains patched ones.
        choices: The choices by name.
        reference: The choice to compare with; stock PyTorch's by default.
        inputs: Further tensors to differentiate for, by name, such as the model's input; leaves of the graph.
        retain_graph: Keep the graph after the last backward, for whatever comes next on the same loss.

    Returns:
        ``({parameter: gradient}, {choice: {parameter: difference}})``; only parameters that require gradients appear.

    Raises:
        ValueError: If the model is not patched, no parameter requires gradients, the model is compiled, an
            operation ran under ``torch.vmap``, or an input was computed.
    """
    refuse_computed(inputs)
    refuse_hidden(loss)
    named = wanted(model, inputs)
    with recording(model) as met:
        (base,) = gradients(loss, model, {"": reference}, inputs=inputs, retain_graph=True).values()
    return base, {name: dict(d) for name, d in met.carried(choices, named, retain_graph=retain_graph)}


def refuse_compiled(model: nn.Module) -> None:
    """Raise if a model's operations do not report their ties.

    Args:
        model: Any module.

    Raises:
        ValueError: If the model or a part of it is compiled.
    """
    if any(map(is_compiled, model.modules())):
        raise ValueError("a compiled model's ties cannot be recorded: use method='subtract', or the eager model")


def refuse_computed(inputs: Mapping[str, Tensor] | None) -> None:
    """Raise if a tensor lies inside the graph, where a difference may be known to end before it reaches one.

    Args:
        inputs: Tensors by name.

    Raises:
        ValueError: If one is not a leaf.
    """
    for name, tensor in (inputs or {}).items():
        if not tensor.is_leaf:
            raise ValueError(
                f"input {name!r} was computed: a difference is propagated to leaves of the graph only; use "
                f"method='subtract', or nslightning.probes.gradients"
            )


def refuse_random(*choices: Jacobians | Plan) -> None:
    """Raise if a choice is another one each time it is evaluated, so that no difference between two can be told.

    Args:
        *choices: Choices.

    Raises:
        ValueError: If one is random, or a plan with a choice for each site.
    """
    for choice in choices:
        if isinstance(choice, Plan):
            raise ValueError(f"{choice!r} has a choice for each site: only method='subtract' takes it")
        if "random" in choice.to_dict().values():
            raise ValueError(f"{choice!r} is another choice at each backward: only method='subtract' takes it")


def _through_gates(edge: GradientEdge, d: Tensor) -> Starts:
    """The start of a difference, moved below the ReLUs that it meets first; none if nothing of it is left."""
    while torch.count_nonzero(d):
        node = edge.node
        below, output = next(iter(node.next_functions), (None, 0))
        if node.name() not in _GATES or below is None or below.name() == "torch::autograd::AccumulateGrad":
            return [(edge, d)]
        lower = GradientEdge(below, output)
        (d,) = torch.autograd.grad([edge], [lower], [d], retain_graph=True)
        edge = lower
    return []


def _several(values: _Gradients) -> tuple[Tensor | None, ...]:
    return values if isinstance(values, tuple) else (values,)


def _linear_part(jacobians: Jacobians) -> Jacobians:
    """What a choice does to an incoming difference: the constants that the published rule adds are no part of it."""
    if jacobians.rule == "exact":
        return jacobians
    return replace(jacobians, rule="exact", relu=0.0, relu6=(0.0, 0.0))
