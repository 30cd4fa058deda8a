"""How much is at stake: the largest difference that any choice inside the Clarke Jacobians makes to a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import CheckpointError

from nslightning.jacobians import Jacobians
from nslightning.ops.autograd.nodes import gradients_under, selection_of
from nslightning.ops.registry import Call, Operation
from nslightning.probes.gradients import gradients, wanted
from nslightning.probes.graph import operation_nodes
from nslightning.probes.propagation import refuse_compiled
from nslightning.probes.replay import Replay
from nslightning.probes.ties import observing
from nslightning.surgery import using

__all__ = ["Worst", "worst_choice"]

# Elements of each operation's Clarke Jacobian: at a kink its two ends, of a pooling window some of its corners.
_ELEMENTS: dict[str, tuple[dict[str, Any], ...]] = {
    "relu": ({"relu": 0.0}, {"relu": 1.0}),
    "relu6": ({"relu6": (0.0, 0.0)}, {"relu6": (1.0, 1.0)}),
    "leaky_relu": ({"leaky_relu": None}, {"leaky_relu": 1.0}),
    "hardtanh": ({"hardtanh": (0.0, 0.0)}, {"hardtanh": (1.0, 1.0)}),
    "hardswish": ({"hardswish": (-0.5, 1.0)}, {"hardswish": (0.0, 1.5)}),
    "hardsigmoid": ({"hardsigmoid": (0.0, 0.0)}, {"hardsigmoid": (1 / 6, 1 / 6)}),
    "softshrink": ({"softshrink": (0.0, 0.0)}, {"softshrink": (1.0, 1.0)}),
    "elu": ({"elu": None}, {"elu": 1.0}),
    "selu": ({"selu": None}, {"selu": 1.0507009873554805}),
    "abs": ({"abs": -1.0}, {"abs": 1.0}),
    "max_pool": ({"max_pool": "first"}, {"max_pool": "last"}, *({"max_pool": "random"},) * 4),
}


@dataclass(frozen=True)
class Worst:
    """The largest divergence found, and where it arises.

    Args:
        value: ``||g_choice - g_reference||`` for the choice found, over all parameters: it is reached, and so is a
            lower bound of the largest.
        relative: ``value / ||g_reference||``.
        sites: Per site that was varied, what its own ties would make if all others kept the reference.
        unvaried: Sites with an operation whose Clarke Jacobian is not searched; they keep the reference.
    """

    value: float
    relative: float
    sites: Mapping[str, float] = field(default_factory=dict)
    unvaried: tuple[str, ...] = ()


def worst_choice(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    inputs: Any,
    reference: Jacobians = Jacobians(),  # noqa: B008 # frozen
    *,
    starts: int = 4,
    rounds: int = 10,
) -> Worst:
    r"""The largest difference to the gradient that choices inside the Clarke Jacobians can make, tie by tie.

    Every tied entry of a pointwise operation may take any derivative between its one-sided ones, every tied pooling
    window any sharing among its tied entries, each tie on its own: a far larger set than what one number for all ties
    can name. The gradient G is an affine function of each tie's choice m alone, so
    :math:`\lVert G(m) - G_{ref} \rVert^2` is convex along each, and the largest value lies in a corner. Corners are
    searched as by the power iteration for a norm over a box: from a corner, differentiate the squared norm for all
    choices at once (one double backward), go to the corner to which that slope points, until it points nowhere else.
    The search starts where all ties take the same element, and from random corners. What it finds is a local maximum:
    against all corners of networks small enough to try them it was the largest value, with rare exceptions.

    For pooling windows the corners tried are the first and the last tied entry and four random draws.

    Args:
        model: A patched model, or one that contains patched ones, in eager mode.
        loss_fn: Takes the model's output and returns a 0-d loss.
        inputs: The model's input, a tuple of positional or a dict of keyword arguments.
        reference: The choice to compare with; stock PyTorch's by default.
        starts: The number of random corners to start from.
        rounds: The most steps from each start.

    Returns:
        The value reached and where it arises; 0 where no tie matters.

    Raises:
        ValueError: If the model is not patched or compiled, no parameter requires gradients, the reference has the
            published rule, or the operations of a checkpointed part would be varied.

    Example:
        >>> import nslightning
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
        >>> _ = model[2].weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> report = nslightning.patch(model, Jacobians())
        >>> worst_choice(model, torch.sum, torch.zeros(1, 1))
        Worst(value=5.0, relative=5.0, sites={'1': 5.0}, unvaried=())
    """
    refuse_compiled(model)
    if reference.rule != "exact":
        raise ValueError("the published rule's constants lie in no Clarke Jacobian: compare with an exact reference")
    met: list[tuple[Any, str, str]] = []

    def note(site: str, operation: Operation, call: Call) -> None:
        if call.x.requires_grad:
            edge = get_gradient_edge(call.x)
            met.append(((edge.node, edge.output_nr), site, operation.name))

    def work(loss: Tensor) -> Worst:
        return _search(model, loss, reference, met, starts, rounds)

    try:
        with using(model, reference), observing(model, note):
            return Replay(model, loss_fn, inputs).at(None, work)
    except CheckpointError as error:
        raise ValueError("an operation inside torch.utils.checkpoint cannot be varied: run without it") from error


def _search(
    model: nn.Module, loss: Tensor, reference: Jacobians, met: list[tuple[Any, str, str]], starts: int, rounds: int
) -> Worst:
    """Climb from several corners."""
    nodes: dict[Any, tuple[str, str]] = {}
    unvaried = []
    for node in operation_nodes(loss):
        # Between the site's input and the operation there may be a reshaping or a copy.
        below = [node.next_functions[0], *node.next_functions[0][0].next_functions[:1]]
        site, name = next(((s, n) for edge in below for seen, s, n in met if seen == edge), ("?", "?"))
        if name in _ELEMENTS:
            nodes[node] = (site, name)
        else:
            unvaried.append(site)
    tensors = list(wanted(model).values())
    (base,) = gradients(loss, model, {"": reference}, retain_graph=True).values()
    size = math.sqrt(sum(float(g.double().square().sum()) for g in base.values()))

    def taken(mixture: _Mixture, graph: bool) -> Tensor:
        """The squared norm of the difference."""
        with mixture.imposed():
            values = torch.autograd.grad(
                loss, tensors, retain_graph=True, create_graph=graph, allow_unused=True, materialize_grads=True
            )
        squares = [(g - b).double().square().sum() for g, b in zip(values, base.values(), strict=True)]
        return torch.stack([s.to(squares[0].device) for s in squares]).sum()

    best: float = 0.0
    corner: dict[Any, Tensor] = {}
    uniform = max((len(_ELEMENTS[name]) for _, name in nodes.values()), default=0)
    for start in range(-starts, uniform) if nodes else ():
        mixture = _Mixture(nodes, start)
        for _ in range(rounds):
            square = taken(mixture, graph=True)
            if float(square.detach()) > best:
                best, corner = float(square.detach()), dict(mixture.weights)
            if not square.requires_grad or not mixture.climb(square):
                break
    sites: dict[str, float] = {}
    for node, weight in corner.items():
        alone = float(taken(_Mixture({node: nodes[node]}, 0, {node: weight}), graph=False))
        site = nodes[node][0]
        sites[site] = math.hypot(sites.get(site, 0.0), math.sqrt(alone))
    value = math.sqrt(best)
    return Worst(value, value / size if size else (math.inf if value else 0.0), sites, tuple(dict.fromkeys(unvaried)))


class _Mixture:
    """For every tie its own mixture of Jacobians: weights of the output's shape, one set per element, that sum to 1."""

    def __init__(
        self, nodes: Mapping[Any, tuple[str, str]], start: int, weights: dict[Any, Tensor] | None = None
    ) -> None:
        self.nodes, self.start, self.weights = nodes, start, weights or {}

    @contextmanager
    def imposed(self) -> Iterator[None]:
        """Every backward inside the block takes the mixture."""
        handles = [node.register_hook(self._hook(node)) for node in self.nodes]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def climb(self, square: Tensor) -> bool:
        """Go to the corner to which the slope points; whether that is another one."""
        weights = list(self.weights.values())
        slopes = torch.autograd.grad(square, weights, allow_unused=True, materialize_grads=True)
        before = self.weights
        self.weights = {
            node: _corner(slope.argmax(0), len(slope)).to(slope).requires_grad_()
            if slope.any()
            else before[node].detach().requires_grad_()
            for node, slope in zip(before, slopes, strict=True)
        }
        return any(not torch.equal(w, before[node]) for node, w in self.weights.items())

    def _hook(self, node: Any) -> Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...] | None]:
        elements, selection = _ELEMENTS[self.nodes[node][1]], selection_of(node)
        assert selection is not None  # it is a node of an operation with elements

        def mixed(below: tuple[Any, ...], above: tuple[Any, ...]) -> tuple[Any, ...] | None:
            g, *rest = above
            if g is None:
                return None
            if node not in self.weights:
                if self.start < 0:
                    generator = torch.Generator().manual_seed(1000 * -self.start + len(self.weights))
                    index = torch.randint(len(elements), g.shape, generator=generator)
                else:
                    index = torch.full(g.shape, min(self.start, len(elements) - 1))
                self.weights[node] = _corner(index, len(elements)).to(g.detach()).requires_grad_()
            total: Any = 0
            for k, element in enumerate(elements):
                with selection.other_streams(k):
                    total = total + gradients_under(node, Jacobians(**element), self.weights[node][k] * g, *rest)[0]
            return (total, *below[1:])

        return mixed


def _corner(index: Tensor, elements: int) -> Tensor:
    """Weight 1 for the element of each index."""
    return torch.stack([index == k for k in range(elements)])
