"""Measures the largest difference that any choice inside the Clarke Jacobians makes to a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from nslightning._torch import number_of, sequence_number
from nslightning.choices import Choice, to_jacobians
from nslightning.jacobians import Jacobians
from nslightning.ops.autograd.nodes import gradients_under, operation_of, selection_of
from nslightning.ops.record import OPERATIONS, Call, Operation
from nslightning.probes.gradients import gradients_in_turn, wanted
from nslightning.probes.graph import check_loss, operation_nodes
from nslightning.probes.propagation import recording, refuse_eager_only, refuse_unseen
from nslightning.probes.replay import Replay
from nslightning.probes.sums import dense, wide
from nslightning.probes.ties import observing
from nslightning.surgery import selections, using
from nslightning.surgery.state import this_thread

__all__ = ["Worst", "worst_choice"]

#: How far a search went: every corner was tried; no other choice at one tie alone is larger; or slopes were followed.
Guarantee = Literal["all corners", "single ties", "slopes"]


@dataclass(frozen=True)
class Worst:
    """The largest divergence found, and where it arises.

    Args:
        value: ``||g_choice - g_reference||`` for the choice found, over all parameters: it is reached, and so is a
            lower bound of the largest.
        relative: ``value / ||g_reference||``.
        sites: Per site that was varied, what its own ties would make if all others kept the reference.
        unvaried: Sites with an operation whose Clarke Jacobian is not searched; they keep the reference.
        guarantee: ``"all corners"``: no corner that is searched is larger. ``"single ties"``: no other element at one
            tie alone makes it larger. ``"slopes"``: a larger one may be one tie away.
    """

    value: float
    relative: float
    sites: Mapping[str, float] = field(default_factory=dict)
    unvaried: tuple[str, ...] = ()
    guarantee: Guarantee = "all corners"

    def __str__(self) -> str:
        """The value, how far the search went, and the sites with the most at stake."""
        lines = [f"largest difference found: {self.value:.4g} ({self.relative:.3g} of the gradient; {self.guarantee})"]
        ranked = sorted(self.sites.items(), key=lambda item: -item[1])
        width = max((len(name) for name, _ in ranked[:10]), default=0)
        lines += [f"  {name:<{width}}  {value:.4g}" for name, value in ranked[:10]]
        lines += [f"  and {len(ranked) - 10} more sites"] if len(ranked) > 10 else []
        lines += [f"  not varied: {', '.join(self.unvaried)}"] if self.unvaried else []
        return "\n".join(lines)


def worst_choice(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    inputs: Any,
    reference: Choice = Jacobians(),  # noqa: B008 # frozen
    *,
    starts: int = 4,
    rounds: int = 10,
    evaluations: int = 256,
) -> Worst:
    r"""The largest difference to the gradient that choices inside the Clarke Jacobians can make, tie by tie.

    Every tied entry of a pointwise operation may take any derivative between its one-sided ones, every tied pooling
    window any sharing among its tied entries, each tie on its own: a far larger set than what one number for all ties
    can name. The gradient G is an affine function of each tie's choice m alone, so
    :math:`\lVert G(m) - G_{ref} \rVert^2` is convex along each, and the largest value lies in a corner.

    Where there are no more than ``evaluations`` corners, all are tried, and the value is the largest. Else corners are
    searched as by the power iteration for a norm over a box: from a corner, differentiate the squared norm for all
    choices at once (one double backward), go to the corner to which that slope points, until it points nowhere else.
    The search starts where all ties take the same element, and from random corners. From the best corner found one tie
    after the other tries its other elements, the ones of the steepest slope first, and keeps what is larger, until none
    is or ``evaluations`` are spent. ``guarantee`` says which of these ends was reached.

    For pooling windows the corners tried are the first and the last tied entry and four random draws.

    Args:
        model: A patched model, or one that contains patched ones, in eager mode.
        loss_fn: Takes the model's output and returns a 0-d loss.
        inputs: The model's input, a tuple of positional or a dict of keyword arguments.
        reference: The choice to compare with; stock PyTorch's by default.
        starts: The number of random corners to start from.
        rounds: The most steps from each start.
        evaluations: The most backward passes that are spent on trying corners one by one.

    Returns:
        The value reached and where it arises; 0 where no tie matters.

    Raises:
        ValueError: If the model is not patched, no parameter requires gradients, the reference has the published rule,
            the loss is no real number with a graph, the reference's gradient is not finite, or operations would be
            varied that the loss's graph does not show: in compiled parts, checkpoints, ``torch.vmap``, custom
            functions.

    Example:
        >>> import nslightning
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
        >>> _ = model[2].weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> report = nslightning.patch(model, Jacobians())
        >>> worst = worst_choice(model, torch.sum, torch.zeros(1, 1))
        >>> worst.value, worst.sites, worst.guarantee
        (5.0, {'1': 5.0}, 'all corners')
    """
    refuse_eager_only(model)
    reference = to_jacobians(reference)
    if reference.rule != "exact":
        raise ValueError("the published rule's constants lie in no Clarke Jacobian: compare with an exact reference")
    met: list[_Met] = []

    def note(site: str, operation: Operation, call: Call) -> None:
        elements = tuple(Jacobians(**{operation.name: one}) for one in operation.elements(*call.parameters))
        met.append(_Met(this_thread(), sequence_number(), site, operation.name, elements))

    def work(loss: Tensor) -> Worst:
        return _Search(model, loss, reference, met).run(starts, rounds, evaluations)

    try:
        with using(model, reference), observing(model, note):
            return Replay(model, loss_fn, inputs).at(None, work)
    except CheckpointError as error:
        raise ValueError("an operation inside torch.utils.checkpoint cannot be varied: run without it") from error


class _Met(NamedTuple):
    """An evaluation at a site.

    Args:
        thread: The thread that ran it.
        number: The number of the next autograd node of the thread: the evaluation's own nodes come from it on.
        site: The site's name.
        operation: The operation's name.
        elements: The extreme elements of the operation's Clarke Jacobian.
    """

    thread: object
    number: int
    site: str
    operation: str
    elements: tuple[Jacobians, ...]


def _made(node: Any, met: list[_Met]) -> list[_Met]:
    """The evaluation that made a node: the last one before it. Each thread may have one, since each numbers its own."""
    return list({one.thread: one for one in met if one.number <= number_of(node)}.values())


class _Search:
    """The corners of one loss's ties, and how large they are.

    Args:
        model: The model.
        loss: Its loss.
        reference: The choice to compare with.
        met: The forward's evaluations.
    """

    def __init__(self, model: nn.Module, loss: Tensor, reference: Jacobians, met: list[_Met]) -> None:
        check_loss(loss, model)
        named = wanted(model)
        refuse_unseen(loss, named)
        self.loss, self.tensors = loss, list(named.values())
        with recording(model) as recorded:
            (base,) = gradients_in_turn(loss, model, [reference], named)
        recorded.refuse_strangers(loss)
        self.base = list(base.values())
        self.nodes: dict[Any, _Met] = {}
        unvaried = []
        reached = set(map(id, selections(model).values()))  # a loss may hold operations of other models, too
        for node in operation_nodes(loss):
            if id(selection_of(node)) not in reached:
                continue
            made = _made(node, met)
            if len(made) == 1 and made[0].elements and made[0].operation == operation_of(node):
                self.nodes[node] = made[0]
            else:
                unvaried += [one.site for one in made] or ["?"]
        self.unvaried = tuple(dict.fromkeys(unvaried))
        self.best, self.corner = 0.0, dict[Any, Tensor]()  # a squared norm, and the indices of the elements there

    def run(self, starts: int, rounds: int, evaluations: int) -> Worst:
        """Search, and report how far the search went."""
        size = math.sqrt(sum(_square(g) for g in self.base))
        if not math.isfinite(size):
            raise ValueError("the gradient under the reference is not finite, so that no difference from it is")
        guarantee: Guarantee = "all corners"
        if self.nodes:
            first = _Mixture(self.nodes, {node: torch.zeros((), dtype=torch.long) for node in self.nodes})
            self._difference(first, graph=False)
            shapes = {node: weights.shape[1:] for node, weights in first.weights.items()}
            ties = [(node, place) for node, shape in shapes.items() for place in self._tied(node, shape, first)]
            elements = [len(self.nodes[node].elements) for node, _ in ties]
            if math.prod(elements) <= evaluations:
                self._try_all(shapes, ties, elements)
            else:
                self._follow_slopes(shapes, starts, rounds)
                guarantee = self._ascend(ties, evaluations)
        sites: dict[str, dict[Any, Tensor]] = {}
        for node, index in self.corner.items():
            sites.setdefault(self.nodes[node].site, {})[node] = index
        alone = {site: math.sqrt(self._square(corner)) for site, corner in sites.items()}
        value = math.sqrt(self.best)
        relative = value / size if size else (math.inf if value else 0.0)
        return Worst(value, relative, alone, self.unvaried, guarantee)

    def _tied(self, node: Any, shape: torch.Size, mixture: _Mixture) -> list[int]:
        """The places among a node's weights at which the elements are not all the same."""
        met, (g, *rest) = self.nodes[node], mixture.incoming[node]
        assert g is not None  # it has weights
        if OPERATIONS[met.operation].shares:
            # What a result passes down, as a number: of entries that tie, two may have one weight in half precision.
            every = [[_passed(node, one, g, rest, seed) for one in met.elements] for seed in range(3)]
        else:
            parts = [_parts(node, one, torch.ones_like(g), rest) for one in met.elements]
            every = [list(alike) for alike in zip(*parts, strict=True)]
        different = [a != b for first, *others in every for a, b in ((first, other) for other in others)]
        tied = torch.stack([d.expand(shape) for d in different if d.shape in ((), shape)]).any(0)
        return tied.flatten().nonzero().flatten().tolist()

    def _difference(self, mixture: _Mixture, *, graph: bool) -> Tensor:
        """The squared norm of what a mixture adds to the reference's gradient."""
        with mixture.imposed():
            values = torch.autograd.grad(
                self.loss,
                self.tensors,
                retain_graph=True,
                create_graph=graph,
                allow_unused=True,
                materialize_grads=True,
            )
        pairs = [(dense(g), dense(b)) for g, b in zip(values, self.base, strict=True)]
        squares = [(g.to(wide(g.dtype)) - b.to(wide(b.dtype))).abs().square().sum() for g, b in pairs]
        return torch.stack([s.to(squares[0].device) for s in squares]).sum()

    def _square(self, corner: Mapping[Any, Tensor]) -> float:
        """The squared norm in a corner; nodes that are not in it keep the reference."""
        mixture = _Mixture({node: self.nodes[node] for node in corner}, corner)
        return float(self._difference(mixture, graph=False))

    def _keep(self, square: float, corner: Mapping[Any, Tensor]) -> bool:
        """Keep a corner if it is the best so far, and return whether it is."""
        if not square > self.best:
            return False
        self.best, self.corner = square, {node: index.clone() for node, index in corner.items()}
        return True

    def _try_all(self, shapes: Mapping[Any, torch.Size], ties: list[tuple[Any, int]], elements: list[int]) -> None:
        corner = {node: torch.zeros(shape, dtype=torch.long) for node, shape in shapes.items()}
        for choice in product(*map(range, elements)):
            for (node, place), element in zip(ties, choice, strict=True):
                corner[node].view(-1)[place] = element
            self._keep(self._square(corner), corner)

    def _follow_slopes(self, shapes: Mapping[Any, torch.Size], starts: int, rounds: int) -> None:
        """Climb from several corners, at all ties at once."""
        for start in range(-starts, max(len(m.elements) for m in self.nodes.values())):
            corner = {}
            for number, (node, shape) in enumerate(shapes.items()):
                elements = len(self.nodes[node].elements)
                generator = torch.Generator().manual_seed(1000 * -start + number if start < 0 else 0)
                corner[node] = (
                    torch.randint(elements, shape, generator=generator)
                    if start < 0
                    else torch.full(shape, min(start, elements - 1))
                )
            for _ in range(rounds):
                square, slopes = self._slopes(corner)
                self._keep(square, corner)
                up = {n: corner[n] if not slope.any() else slope.argmax(0).cpu() for n, slope in slopes.items()}
                if all(torch.equal(index, corner[n]) for n, index in up.items()):
                    break
                corner = up

    def _slopes(self, corner: Mapping[Any, Tensor]) -> tuple[float, dict[Any, Tensor]]:
        """The squared norm in a corner, and its derivatives for the weight of each element."""
        mixture = _Mixture({node: self.nodes[node] for node in corner}, corner)
        square = self._difference(mixture, graph=True)
        nodes, weights = list(mixture.weights), list(mixture.weights.values())
        slopes = (
            torch.autograd.grad(square, weights, allow_unused=True, materialize_grads=True)
            if square.requires_grad
            else [torch.zeros_like(w) for w in weights]
        )
        return float(square.detach()), dict(zip(nodes, slopes, strict=True))

    def _ascend(self, ties: list[tuple[Any, int]], evaluations: int) -> Guarantee:
        """Try other elements at one tie after the other, from the best corner, as long as some are larger."""
        while self.corner:
            _, slopes = self._slopes(self.corner)
            gains = []
            for node, place in ties:
                slope, now = slopes[node].flatten(1)[:, place].tolist(), int(self.corner[node].view(-1)[place])
                gains += [(slope[e] - slope[now], node, place, e) for e in range(len(slope)) if e != now]
            gains.sort(key=lambda gain: -gain[0])
            better = False
            for _, node, place, element in gains:
                if not evaluations:
                    return "slopes"
                evaluations -= 1
                corner = {n: index.clone() for n, index in self.corner.items()}
                corner[node].view(-1)[place] = element
                better |= self._keep(self._square(corner), corner)
            if not better:
                return "single ties"
        return "slopes"


def _parts(node: Any, element: Jacobians, g: Tensor, rest: list[Tensor | None]) -> list[Tensor]:
    """The gradients that a node returns under an element; zeros where it returns none."""
    return [torch.zeros_like(g.sum()) if p is None else p for p in gradients_under(node, element, g, *rest)]


def _passed(node: Any, element: Jacobians, g: Tensor, rest: list[Tensor | None], seed: int) -> Tensor:
    """What each result passes to the operands under an element: the sum of random weights of theirs."""
    selection = selection_of(node)
    assert selection is not None  # it is a node of an operation with elements
    with torch.enable_grad(), selection.other_streams(seed):
        g = torch.ones_like(g).requires_grad_()
        sums = []
        for i, part in enumerate(_parts(node, element, g, rest)):
            generator = torch.Generator().manual_seed(100 * seed + i)
            sums.append((part * torch.rand(part.shape, generator=generator).to(part)).sum())
        (passed,) = torch.autograd.grad(torch.stack(sums).sum(), g)
    return passed


def _square(g: Tensor) -> float:
    return float(dense(g).to(wide(g.dtype)).abs().square().sum())


class _Mixture:
    """A mixture of Jacobians at every tie: weights that sum to 1, one set per element.

    They are of the shape of the result where the operation shares a gradient, for a window is one tie, and else of its
    input, or of the first input that takes a gradient.

    Args:
        nodes: The evaluations to vary, by their backward nodes.
        corner: The index of the element of each tie, of the weights' shape or 0-d.
    """

    def __init__(self, nodes: Mapping[Any, _Met], corner: Mapping[Any, Tensor]) -> None:
        self.nodes, self.corner = nodes, corner
        self.weights: dict[Any, Tensor] = {}
        self.incoming: dict[Any, tuple[Tensor | None, ...]] = {}

    @contextmanager
    def imposed(self) -> Iterator[None]:
        """Every backward inside the block takes the mixture."""
        handles = [handle for node in self.nodes for handle in self._hooks(node)]
        selections = {selection: selection.jacobians for node in self.nodes if (selection := selection_of(node))}
        try:
            yield
        finally:
            for selection, jacobians in selections.items():
                selection.set(jacobians)
            for handle in handles:
                handle.remove()

    def _weights(self, node: Any, like: Tensor) -> Tensor:
        if node not in self.weights:
            index = self.corner[node].to(like.device).expand(like.shape)
            elements = len(self.nodes[node].elements)
            corner = torch.stack([index == k for k in range(elements)])  # weight 1 for the element of each index
            self.weights[node] = corner.to(like.detach()).requires_grad_()
        return self.weights[node]

    def _hooks(self, node: Any) -> list[Any]:
        operation, elements, selection = self.nodes[node].operation, self.nodes[node].elements, selection_of(node)
        assert selection is not None  # it is a node of an operation with elements
        of_results = OPERATIONS[operation].shares
        reference = selection.jacobians

        # Stock's choice may return None for an input, and a hook cannot replace None by a gradient.
        numbered = next((e for e in elements if getattr(e, operation) is not None), elements[0])

        def prepare(above: tuple[Any, ...]) -> None:
            selection.set(numbered)

        def mixed(below: tuple[Any, ...], above: tuple[Any, ...]) -> tuple[Any, ...] | None:
            selection.set(reference)
            g, *rest = self.incoming[node] = above
            if g is None:
                return None
            weights = self._weights(node, g) if of_results else None
            every = []
            for k, element in enumerate(elements):
                with selection.other_streams(k):
                    every.append(gradients_under(node, element, g if weights is None else weights[k] * g, *rest))
            total = list(below)
            for i, parts in enumerate(zip(*every, strict=True)):
                several = [part for part in parts if part is not None]
                if of_results and several:
                    total[i] = sum(several[1:], several[0])
                elif several:
                    weights = self._weights(node, several[0])
                    if several[0].shape == weights.shape[1:]:
                        total[i] = sum(w * part for w, part in zip(weights, parts, strict=True) if part is not None)
            return tuple(total)

        return [node.register_prehook(prepare), node.register_hook(mixed)]
