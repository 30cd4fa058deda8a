"""The backward graph of a loss: the nodes at which a choice may matter, and those above them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from nslightning._torch import (
    exchanges_values,
    hides_its_inside,
    is_compiled_function,
    number_of,
    saved_tensor_names,
)
from nslightning.jacobians import Jacobians
from nslightning.ops.autograd.nodes import is_own, kept_ties, operation_of, release, selection_of
from nslightning.surgery import Plan
from nslightning.surgery.graph import is_checkpoint, marked
from nslightning.surgery.patching import surgeries

__all__ = [
    "UnseenError",
    "agree",
    "bottleneck",
    "check_loss",
    "communicates",
    "freeing",
    "opaque_nodes",
    "operation_nodes",
    "reachable",
    "refuse_compiled",
    "reruns_forward",
]

# The spellings of stock's max pooling.
_FIRST = (None, 0.0, "native", "first")


class UnseenError(ValueError):
    """The backward of a loss runs operations that its graph does not show, or that treat a difference otherwise.

    Args:
        cause: The part of the loss, and why no difference can be carried through it.
        way_out: What measures it all the same.

    Attributes:
        cause: The part of the loss, and why no difference can be carried through it.
    """

    def __init__(self, cause: str, way_out: str = "use method='subtract', or nslightning.probes.gradients") -> None:
        super().__init__(f"{cause}: {way_out}" if way_out else cause)
        self.cause, self.way_out = cause, way_out

    def __reduce__(self) -> Any:
        return type(self), (self.cause, self.way_out)


def operation_nodes(loss: Tensor, among: Iterable[Jacobians | Plan] = ()) -> Iterator[Any]:
    """The backward nodes of patched operations at which a choice may matter; nothing is evaluated.

    Args:
        loss: A tensor computed by an eager forward.
        among: The choices of interest; operations at which all of these agree are left out.

    Yields:
        Each node once. If there is no node, no tie was met, and the gradients under all choices, or all of ``among``,
        are the same. Max pooling that looks for its ties in the backward is yielded even if it will find no tie.
    """
    choices = list(among)
    for node in reachable([loss.grad_fn]):
        if operation_of(node) is not None and _matters(node, choices):
            yield node


def opaque_nodes(loss: Tensor) -> Iterator[Any]:
    """The backward nodes that hide their inside: compiled graphs, custom functions, transforms.

    Patched operations may run inside.

    Args:
        loss: A tensor computed by a forward.

    Yields:
        Each node once.
    """
    return (node for node in reachable([loss.grad_fn]) if not is_own(node) and hides_its_inside(node))


def refuse_compiled(loss: Tensor) -> None:
    """Raise if a part of a loss's graph was compiled: its operations do not report their ties.

    Args:
        loss: A tensor computed by a forward.

    Raises:
        UnseenError: If there is one.
    """
    if any(map(is_compiled_function, opaque_nodes(loss))):
        raise UnseenError(
            "a part of the loss was computed by torch.compile, whose backward reports no ties",
            "use method='subtract', or the model as it was before torch.compile",
        )


def check_loss(loss: Tensor, model: nn.Module) -> None:
    """Refuse a loss that has no gradient, or that no choice reaches.

    No choice reaches a graph that was made before the model was patched. Autograd numbers the nodes of each thread, so
    that another thread's may have lower numbers; but there the model notes in the graph what it computed.

    Args:
        loss: The loss.
        model: A patched model, or one that contains patched ones.

    Raises:
        TypeError: If the loss is no tensor, or the model no module.
        ValueError: If the loss is not one real number, has no graph, or its last node is older than the patch.
    """
    if not isinstance(loss, Tensor) or not isinstance(model, nn.Module):
        raise TypeError(
            "the loss comes first, then the model: a tensor and a torch.nn.Module; given "
            f"{type(loss).__name__} and {type(model).__name__}"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"this tensor has shape {tuple(loss.shape)}, and a loss is one number: take its mean or its sum"
        )
    if loss.is_complex():
        raise ValueError("the loss is complex, and only a real number has a gradient: take its real part or its abs()")
    if not loss.requires_grad:
        raise ValueError(
            "the loss has no graph: compute it from the model's output, with gradients enabled and without detach()"
        )
    if loss.grad_fn is None:  # a leaf, which depends on no parameter
        return
    of_model = list(surgeries(model).values())
    if not any(number_of(loss.grad_fn) < surgery.first_node for surgery in of_model):
        return
    own = {id(selection) for surgery in of_model for selection in surgery.selections.values()}
    graph = reachable([loss.grad_fn])
    if not any(id(selection_of(node)) in own or marked(node, of_model) for node in graph):
        raise ValueError(
            "the loss was computed before the model was patched, so that no choice reaches it: patch the model, then "
            "compute the loss again"
        )


def reruns_forward(loss: Tensor) -> bool:
    """Return whether a loss's graph has a checkpoint of ``use_reentrant=True``, which takes no ``torch.autograd.grad``.

    Args:
        loss: A tensor computed by a forward.

    Returns:
        Whether it has.
    """
    return any(map(is_checkpoint, reachable([loss.grad_fn])))


def communicates(loss: Tensor) -> bool:
    """Return whether a loss's backward exchanges values with other processes, as batch norm over processes does.

    All processes have to run such a backward equally often, with or without ties.

    Args:
        loss: A tensor computed by a forward.

    Returns:
        Whether it does.
    """
    return any(map(exchanges_values, reachable([loss.grad_fn])))


def bottleneck(loss: Tensor, goals: Collection[Any]) -> GradientEdge | None:
    """The lowest place that every gradient passes on its way down to some nodes.

    The nodes receive no gradient by another way. So a backward may start at this place, with the gradient that arrived
    there.

    Args:
        loss: A tensor computed by a forward.
        goals: Backward nodes below it.

    Returns:
        The place; None if only the loss itself is such a place.
    """
    if not goals:
        return None
    above: dict[Any, list[Any]] = {loss.grad_fn: []}  # as often as there are edges
    single: dict[Any, bool] = {}  # whether gradients come to a node's first output only
    for node in reachable([loss.grad_fn]):
        for below, output in node.next_functions:
            if below is not None:
                above.setdefault(below, []).append(node)
                single[below] = single.get(below, True) and output == 0
    leading, up = set(), list(goals)
    while up:
        node = up.pop()
        if node not in leading:
            leading.add(node)
            up += above[node]
    # In topological order. Nodes that lead to no goal go first, so that parameters above do not stand in the way. All
    # remaining paths pass a node if no other node is ready and no edge that was met leads to a node that is not ready.
    lowest, open_edges = None, 0
    missing = {node: len(edges) for node, edges in above.items()}
    ready: list[Any] = [loss.grad_fn]
    aside: list[Any] = []
    while ready or aside:
        node = aside.pop() if aside else ready.pop()
        if node in leading and not ready and not open_edges and single.get(node, False):
            lowest = GradientEdge(node, 0)
        if node in goals:
            break
        for below, _ in node.next_functions:
            if below is not None:
                missing[below] -= 1
                open_edges += 1
                if not missing[below]:
                    open_edges -= len(above[below])
                    (ready if below in leading else aside).append(below)
    return lowest


def _matters(node: Any, choices: list[Jacobians | Plan]) -> bool:
    """Return whether the choice may matter at an operation's backward node: among all choices if none is given."""
    return kept_ties(node) and not (choices and all(agree(node, choices[0], one) for one in choices[1:]))


def agree(node: Any, one: Jacobians | Plan, other: Jacobians | Plan) -> bool:
    """Return whether two choices agree on the operation that a backward node belongs to.

    Args:
        node: The backward node of one of the package's operations.
        one: A choice.
        other: Another.

    Returns:
        Whether they do; False where that is not known.
    """
    field = operation_of(node)
    pools = field == "max_pool"
    if field is None or isinstance(one, Plan) or isinstance(other, Plan) or one.rule != other.rule:
        return False
    a, b = getattr(one, field), getattr(other, field)
    if a == "random":  # it changes at each evaluation
        return False
    return a == b or (pools and one.rule == "exact" and a in _FIRST and b in _FIRST)


def reachable(nodes: Iterable[Any]) -> Iterator[Any]:
    """Backward nodes and all that lie below them.

    Args:
        nodes: The nodes to begin at.

    Yields:
        Each node once.
    """
    seen, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [below for below, _ in node.next_functions]


@contextmanager
def freeing(nodes: Iterable[Any]) -> Iterator[None]:
    """Free what nodes saved as soon as a backward inside the block has passed them, though the graph is kept.

    The memory serves the gradients that follow, instead of more being mapped for them.

    Args:
        nodes: Backward nodes.

    Yields:
        Nothing.
    """
    handles = [
        node.register_hook(_release(node)) for node in nodes if saved_tensor_names(node.__class__) or is_own(node)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _release(node: Any) -> Callable[..., None]:
    """Return a hook that drops a node's saved tensors after its backward, though the graph as a whole is kept."""

    def drop(*_: Any) -> None:
        if release(node):
            return
        for name in saved_tensor_names(node.__class__):
            held = getattr(node, name)
            for one in held if isinstance(held, tuple | list) else (held,):
                # The tensor was not saved, or other hooks (a checkpoint's) hold it.
                with suppress(RuntimeError):
                    one.register_hooks(_nothing, _released)

    return drop


def _nothing(saved: Tensor) -> None:
    """Keep nothing of a saved tensor."""


def _released(_: None) -> Tensor:
    raise RuntimeError(
        "of this graph only the part below the operations that met ties was kept, and this backward goes through what "
        "lies above: keep it whole by loss.backward(retain_graph=True) or by retain_graph=True"
    )
