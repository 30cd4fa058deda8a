"""The difference between two choices' gradients, carried down from the ties instead of subtracted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from nslightning._torch import gradient_dtypes, is_compiled
from nslightning.choices import Choice, named_choices
from nslightning.jacobians import Jacobians
from nslightning.ops.autograd.nodes import operation_of
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.record import OPERATIONS
from nslightning.probes.gradients import gradients, wanted
from nslightning.probes.graph import (
    UnseenError,
    agree,
    check_loss,
    communicates,
    freeing,
    operation_nodes,
    reachable,
    refuse_compiled,
    reruns_forward,
)
from nslightning.probes.shards import is_shard
from nslightning.probes.sums import dense, nothing, numbers, waits, wide
from nslightning.surgery import Plan, selections, using

__all__ = [
    "Recording",
    "agrees",
    "differences",
    "recording",
    "refuse_computed",
    "refuse_eager_only",
    "refuse_random",
    "refuse_unseen",
]

Starts = list[tuple[GradientEdge, Tensor]]
_Mattering = set[tuple[int, int | None]]  # the numbers of records and of their outputs, None for all of them
_Gradients = Tensor | tuple[Tensor | None, ...]

# The largest gap between a carried difference and the subtraction that checks it, in units of rounding of the
# gradients' norm.
_ROUNDINGS = 256


@dataclass(eq=False)
class _Met:
    """One backward of an operation that may have met ties.

    Args:
        node: The operation's backward node.
        in_use: The choice under which the backward ran.
        vjp: Returns the gradients of its operands under a choice.
        difference: Returns the gradient under one choice less that under another, if the operation forms it directly.
        ties: Returns whether it met a tie, a 0-d tensor, if that takes much less than to form a difference.
    """

    node: Any
    in_use: Jacobians
    vjp: Callable[[Selection], _Gradients]
    difference: Callable[[Selection, Selection], Tensor] | None = None
    ties: Callable[[], Tensor] | None = None

    def changes(self, choice: Jacobians) -> Starts:
        """The differences that the operation makes by itself, where they leave it."""
        pair = Selection(choice), Selection(self.in_use)
        values: list[Tensor | None]
        if self.difference is not None:
            values = [self.difference(*pair)]
        else:
            both = zip(*(_several(self.vjp(one)) for one in pair), strict=True)
            values = [None if a is None or b is None else a - b for a, b in both]
        edges = [GradientEdge(node, output) for node, output in self.node.next_functions]
        return [(e, d) for e, d in zip(edges, values, strict=False) if e.node is not None and d is not None]


@dataclass(eq=False)
class Recording:
    """Records of one backward at its ties. The difference to any other choice is carried down from them.

    Args:
        model: The patched model that ran.
        records: One per backward of an operation.
        whole: Let :meth:`backward` keep the whole graph.
    """

    model: nn.Module
    records: list[_Met] = field(default_factory=list)
    whole: bool = False

    def backward(self, loss: Tensor, *args: Any, **settings: Any) -> None:
        """Run ``loss.backward()`` and keep only the part of its graph that differences are carried through.

        The graph above the highest operation that met ties is freed while the backward runs, as without
        ``retain_graph``, unless ``whole`` is set.

        Args:
            loss: A tensor computed by an eager forward of the model.
            *args: The positional arguments of ``loss.backward``.
            **settings: Its keyword arguments; ``retain_graph`` is set here.
        """
        if self.whole:
            loss.backward(*args, **settings | {"retain_graph": True})
            return
        kept = set(reachable(operation_nodes(loss)))
        with freeing([node for node in reachable([loss.grad_fn]) if node not in kept] if kept else []):
            loss.backward(*args, **settings | {"retain_graph": bool(kept)})

    def meet(self, loss: Tensor, among: Iterable[Jacobians] = ()) -> None:
        """Run the backward only as far as to the operations that met ties: no parameter gets a gradient.

        Args:
            loss: A tensor computed by an eager forward of the model.
            among: The choices of interest; the backward stops where these may differ.
        """
        nodes = operation_nodes(loss, among)
        below = [
            GradientEdge(node, output) for tied in nodes for node, output in tied.next_functions if node is not None
        ]
        # PyTorch gives no gradient at a node of its own in-place operations on views.
        parts = any(node.name().endswith("::CopySlices") for node in reachable([loss.grad_fn]))
        goals = list(wanted(self.model).values()) if parts else below
        if below:
            torch.autograd.grad(loss, goals, retain_graph=True, allow_unused=True)

    def starts(self, choice: Jacobians) -> Starts:
        """The differences that each tied operation makes by itself, and where they enter the graph below it.

        Args:
            choice: The choice to compare with the one in use.

        Returns:
            The differences that are not identically zero: at an operation, or below the ReLUs that directly follow it.

        Raises:
            ValueError: If the choice, or the one in use, is random: it changes from one evaluation to the next.
        """
        (mattering,) = self._mattering([choice])
        return self._starts(choice, mattering)

    def _starts(self, choice: Jacobians, mattering: _Mattering | None) -> Starts:
        """The starts that matter. If ``mattering`` is None, each difference is looked at to decide."""
        starts: Starts = []
        with torch.no_grad(), using(self.model, _linear_part(choice)):
            for i, met in self._differing(choice):
                if mattering is None or any(record == i for record, _ in mattering):
                    for j, (edge, d) in enumerate(met.changes(choice)):
                        if mattering is None:
                            starts += _through_gates(edge, d, look=True)
                        elif (i, j) in mattering or (i, None) in mattering:
                            starts += _through_gates(edge, d, look=False)
        return starts

    def _differing(self, choice: Jacobians) -> Iterator[tuple[int, _Met]]:
        """The records of operations at which a choice may differ from the one in use."""
        return ((i, one) for i, one in enumerate(self.records) if not agree(one.node, choice, one.in_use))

    def _mattering(self, choices: Sequence[Jacobians]) -> list[_Mattering | None]:
        """Return, for each choice, the differences of records that may be other than zero below the ReLUs they meet.

        On a device one transfer reads the flags of all records and choices. Where an operation kept its ties, their
        flag serves every choice, and no difference is formed where there is none. The differences of the others are
        formed without waiting; those that matter are formed again later, so that memory holds the differences of one
        choice only. On a CPU each is looked at where it is formed; there the result is None, which means not known yet.
        """
        refuse_random(*choices, *{id(one.in_use): one.in_use for one in self.records}.values())
        flags: list[Tensor] = []
        places: list[tuple[int, int, int | None, int]] = []  # choice, record, output, flag
        tied: dict[int, int] = {}  # the flags of records that tell whether they met a tie
        if not any(waits(p.device) for p in self.model.parameters()):
            return [None] * len(choices)
        for c, choice in enumerate(choices):
            with torch.no_grad(), using(self.model, _linear_part(choice)):
                for i, met in self._differing(choice):
                    if met.ties is not None:
                        if i not in tied:
                            tied[i] = len(flags)
                            flags.append(met.ties())
                        places.append((c, i, None, tied[i]))
                        continue
                    for j, start in enumerate(met.changes(choice)):
                        ((_, d),) = _through_gates(*start, look=False)
                        places.append((c, i, j, len(flags)))
                        flags.append((d != 0).any())
        mattering: list[_Mattering] = [set() for _ in choices]
        if flags:
            values = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
            for c, i, output, flag in places:
                if values[flag]:
                    mattering[c].add((i, output))
        return [*mattering]

    def refuse_strangers(self, loss: Tensor) -> None:
        """Raise if a loss's backward passed operations that are not in its graph: they ran inside something else.

        Args:
            loss: The tensor whose backward was recorded, by an eager forward of the model.

        Raises:
            UnseenError: If there was one.
        """
        graph = set(reachable([loss.grad_fn]))
        for one in self.records:
            if one.node not in graph:
                name = operation_of(one.node) or "an operation"
                raise UnseenError(
                    f"its backward runs {name} inside a function of its own (a reentrant checkpoint, torch.vmap, a "
                    "custom autograd function), where a difference cannot start"
                )

    def carry(
        self, starts: Starts, choice: Jacobians, tensors: Sequence[Tensor], *, retain_graph: bool = True
    ) -> tuple[Tensor, ...]:
        """Carry differences down to the tensors that are differentiated for.

        Args:
            starts: The list that :meth:`starts` returned, or multiples of its differences: the carrying is linear.
            choice: The choice that :meth:`starts` took.
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
        return tuple(nothing(t) if d is None else d for t, d in zip(tensors, values, strict=True))

    def carried(
        self, choices: Mapping[str, Jacobians], named: Mapping[str, Tensor], *, retain_graph: bool = True
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield the difference that each choice makes to the gradients, one choice at a time.

        Args:
            choices: The choices by name.
            named: Parameters or inputs by name.
            retain_graph: Keep the graph after the last choice.

        Yields:
            A choice's name and ``{name: difference}``, as :meth:`carry` returns them; one and the same dictionary for
            all choices that make no difference.
        """
        tensors = list(named.values())
        none = {name: nothing(t) for name, t in named.items()}
        mattering = self._mattering(list(choices.values()))
        for i, (choice, jacobians) in enumerate(choices.items(), 1):
            starts = self._starts(jacobians, mattering[i - 1])
            if starts:
                values = self.carry(starts, jacobians, tensors, retain_graph=retain_graph or i < len(choices))
                yield choice, dict(zip(named, values, strict=True))
            else:
                yield choice, none


@contextmanager
def recording(model: nn.Module) -> Iterator[Recording]:
    """Record what the backwards inside the block meet at ties.

    Compiled code reports nothing, and operations inside a custom function are reported without being in the loss's
    graph: :meth:`Recording.refuse_strangers` raises on those.

    The backward may be any: that of a training step serves, by ``loss.backward(retain_graph=True)`` or cheaper by
    :meth:`Recording.backward`, and spares the one that :func:`differences` runs for the reference.

    Args:
        model: A patched model, or one that contains patched ones.

    Yields:
        The recording, filled as backwards run; it holds the gradients that came to the ties.

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
    recorded = Recording(model)

    def recorder(selection: Selection) -> Callable[..., None]:
        def record(node: Any, *functions: Any, **more: Any) -> None:
            recorded.records.append(_Met(node, selection.jacobians, *functions, **more))

        return record

    watched = selections(model).values()
    for selection in watched:
        selection.recorder = recorder(selection)
    try:
        yield recorded
    finally:
        for selection in watched:
            selection.recorder = None


def differences(
    loss: Tensor,
    model: nn.Module,
    choices: Mapping[str, Choice],
    reference: Choice = Jacobians(),  # noqa: B008 # frozen
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
    once, carries both terms down. The graph above the highest tie is never visited. Where no tie matters, no backward
    runs and the differences are exactly 0. A pooling window of zeros behind a ReLU ties always and matters never: the
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
        UnseenError: If the backward runs operations that the loss's graph does not show: in compiled parts, reentrant
            checkpoints, ``torch.vmap``, custom functions; or if a hook or a custom backward on the way is not linear;
            a ``ValueError``.
        ValueError: If the model is not patched, no parameter requires gradients, or an input was computed.
    """
    check_loss(loss, model)
    by_name = named_choices(choices)
    refuse_computed(inputs)
    named = wanted(model, inputs)
    refuse_unseen(loss, named)
    with recording(model) as met:
        (base,) = gradients(loss, model, {"": reference}, inputs=inputs).values()
    met.refuse_strangers(loss)
    changes = {name: dict(d) for name, d in met.carried(by_name, named)}
    sizes = {name: math.hypot(*numbers([dense(t).norm() for t in d.values()])) for name, d in changes.items()}
    if any(sizes.values()):  # one subtraction checks that differences add up as gradients do
        largest = max(sizes, key=lambda name: sizes[name] if math.isfinite(sizes[name]) else 0.0)
        one = {largest: by_name[largest]}
        (other,) = gradients(loss, model, one, inputs=inputs, retain_graph=retain_graph).values()
        agrees(loss, other, base, changes[largest])
    return base, changes


def agrees(
    loss: Tensor, gradients: Mapping[str, Tensor], reference: Mapping[str, Tensor], carried: Mapping[str, Tensor]
) -> None:
    """Raise if a carried difference and the subtraction of the two gradients are further apart than rounding explains.

    They agree where everything that gradients pass on their way is linear; hooks and custom backwards need not be.

    Args:
        loss: The loss of both gradients. Under autocast parts of its graph have fewer digits than the parameters, and
            round more.
        gradients: A choice's.
        reference: The other choice's.
        carried: The first less the second, as :meth:`Recording.carried` formed it.

    Raises:
        UnseenError: If the two are further apart than rounding makes them.
    """
    gaps, sizes = [], []
    for name, b in reference.items():
        a, d = gradients[name], carried[name]
        if a is b and d.numel() and not any(d.stride()):
            continue
        a, b, d = (t.detach().to(wide(t.dtype)) for t in map(dense, (a, b, d)))
        gaps.append((a - b - d).norm())
        sizes += [a.norm(), b.norm(), d.norm()]
    lengths = numbers(gaps + sizes)
    gap, size = math.hypot(*lengths[: len(gaps)]), math.hypot(*lengths[len(gaps) :])
    passed = {dtype for node in reachable([loss.grad_fn]) for dtype in gradient_dtypes(node)}
    dtypes = passed | {t.dtype for t in reference.values()}
    eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point or dtype.is_complex), default=0.0)
    if math.isfinite(gap) and gap > _ROUNDINGS * eps * size:
        raise UnseenError(
            "the difference carried down is not that of the two gradients. Either large parts of the gradients cancel, "
            "so that rounding is as large as the difference, or a hook or a custom backward on the way is not linear "
            "(it clips, say)"
        )


def refuse_unseen(loss: Tensor, named: Mapping[str, Tensor]) -> None:
    """Raise if a loss's graph does not show the operations that its backward runs, as far as the graph shows.

    Args:
        loss: A tensor computed by a forward.
        named: The tensors to differentiate for, by name.

    Raises:
        UnseenError: If a part was compiled or is computed again by a checkpoint of ``use_reentrant=True``, if
            parameters are distributed over processes, or if the backward exchanges values between them.
    """
    refuse_compiled(loss)
    if reruns_forward(loss):
        raise UnseenError(
            "a part of the loss ran in torch.utils.checkpoint with use_reentrant=True, whose operations its graph does "
            "not show",
            "checkpoint with use_reentrant=False, or use method='subtract'",
        )
    if any(map(is_shard, named.values())):
        raise UnseenError("parameters are distributed over processes (FSDP2)", "use method='subtract'")
    if communicates(loss):
        raise UnseenError(
            "the backward exchanges values between processes (SyncBatchNorm, say), each of which has its own ties",
            "use method='subtract'",
        )


def refuse_eager_only(model: nn.Module) -> None:
    """Raise if a model is compiled, where what it computes has to be watched.

    Args:
        model: Any module.

    Raises:
        ValueError: If the model or a part of it is compiled.
    """
    if any(map(is_compiled, model.modules())):
        raise ValueError(
            "a compiled model cannot be watched: give the model as it was before torch.compile, or measure by "
            "divergence(..., method='subtract')"
        )


def refuse_computed(inputs: Mapping[str, Tensor] | None) -> None:
    """Raise if a tensor lies inside the graph: the carrying of a difference may stop above it.

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
    """Raise if a choice changes from one evaluation to the next: two gradients of it have no fixed difference.

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


def _through_gates(edge: GradientEdge, d: Tensor, *, look: bool) -> Starts:
    """The start of a difference, moved below the ReLUs that it meets first.

    Args:
        edge: The edge by which the difference leaves its operation.
        d: The difference.
        look: Stop where the difference is 0 everywhere, and return no start then.
    """
    while not look or _any(d):
        lower = _below_gate(edge.node)
        if lower is None:
            return [(edge, d)]
        (d,) = torch.autograd.grad([edge], [lower], [d], retain_graph=True)
        edge = lower
    return []


def _any(d: Tensor) -> bool:
    return bool(torch.count_nonzero(d))


def _below_gate(node: Any) -> GradientEdge | None:
    """Return the edge below a node at which a difference may die: a pointwise operation with one input."""
    record = OPERATIONS.get(operation_of(node) or "")
    if (record is None or record.kernels is None) and type(node) not in _stock_gates():
        return None
    inputs = [(below, output) for below, output in node.next_functions if below is not None]
    if len(inputs) != 1 or hasattr(inputs[0][0], "variable"):  # a leaf's gradient is accumulated there
        return None
    return GradientEdge(*inputs[0])


@cache
def _stock_gates() -> frozenset[type]:
    """The classes of PyTorch's nodes for ReLU and its relatives."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, device="cpu", requires_grad=True)
        return frozenset(
            type(f(x).grad_fn) for f in (torch.relu, F.hardtanh, partial(F.threshold, threshold=0, value=0))
        )


def _several(values: _Gradients) -> tuple[Tensor | None, ...]:
    return values if isinstance(values, tuple) else (values,)


def _linear_part(jacobians: Jacobians) -> Jacobians:
    """The part of a choice that acts on an incoming difference: without the constants that the published rule adds."""
    if jacobians.rule == "exact":
        return jacobians
    constants = [op.name for op in OPERATIONS.values() if op.kernels is not None and op.kernels.published]
    return replace(jacobians, rule="exact", **dict.fromkeys(constants))
