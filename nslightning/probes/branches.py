"""Records the branch that each evaluation of a nonsmooth operation takes, and replays it in another precision.

Branches are imposed, values are not: where a replay's own values lead to the recorded branch they stay as they are, and
elsewhere the entries that decide are moved as little as puts them on it. A branch imposes the order of an operand's
entries (the side of a kink, the entries that reach the maximum), never a value of the lower precision, whose rounding
the replay is there to remove.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from nslightning._torch import in_functorch
from nslightning.jacobians import Jacobians
from nslightning.ops.autograd.routing import dimensions
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.groups import MEMBERS, Members
from nslightning.ops.losses import HINGES
from nslightning.ops.record import Call, Operation
from nslightning.probes.sums import numbers

__all__ = ["Branches"]


@dataclass
class Branches:
    """The inputs of each evaluation of each site, which decide its branch.

    Args:
        seen: By site, the recorded evaluations with copies of their tensors.
        met: By site, the number of evaluations that the replay has come to.
        again: Whether the forward is over: the evaluations from now on belong to a checkpoint that runs again.
        left: For each pooling that was not moved, whether one of its windows is off its branch; None where poolings are
            looked at and moved.
    """

    seen: dict[str, list[Call]] = field(default_factory=dict)
    met: dict[str, int] = field(default_factory=dict)
    again: bool = False
    left: list[Tensor] | None = None

    def begin(self, leave_poolings: bool = False) -> None:
        """Start a replay.

        Args:
            leave_poolings: Move no pooling, and look at the end of the forward whether one should have been. To look
                at each would make the host wait for the device at each, and most are on their branch.
        """
        self.met, self.again, self.left = {}, False, [] if leave_poolings else None

    def holds(self) -> bool:
        """Return whether the forward of this replay took the recorded branches. It waits for a device once.

        Returns:
            False where a pooling that was left as it is should have been moved: the replay is to be made again.
        """
        return not self.left or not any(numbers(self.left))

    def record(self, site: str, operation: Operation, call: Call) -> None:
        """Keep the operands of a site's evaluation.

        Args:
            site: Its name.
            operation: The operation that the site evaluates.
            call: The evaluation.

        Raises:
            ValueError: If it runs inside a ``torch.func`` transform.
        """
        if in_functorch():
            raise ValueError(
                f"{operation.name} at {site or 'the model'} runs under torch.vmap or torch.func, where no branch can "
                "be imposed on it: run without, or measure by divergence(..., method='subtract')"
            )
        copied = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, tuple(call))
        self.seen.setdefault(site, []).append(Call(*copied))

    def impose(self, site: str, operation: Operation, call: Call) -> None:
        """Make a site take the recorded branch: overwrite its operands, as little as needed.

        The values belong to a replay's own tensors. They are overwritten without autograd, which differentiates as
        if rounding had led to the same branch.

        Args:
            site: Its name.
            operation: The operation that the site evaluates.
            call: The evaluation.

        Raises:
            RuntimeError: If there is no record of such an evaluation.
        """
        operands, recorded = _operands(call), self.seen.get(site, [])
        shapes = [t.shape for t in operands]
        if self.again:  # the record that is nearest, where one site was evaluated several times
            fitting = [one for one in recorded if [t.shape for t in _operands(one)] == shapes]
            fitting.sort(key=lambda one: float((one.x - operands[0].detach()).abs().nan_to_num().sum()))
            seen = fitting[0] if fitting else None
        else:
            number = self.met.get(site, 0)
            self.met[site] = number + 1
            seen = recorded[number] if number < len(recorded) else None
        if seen is None or [t.shape for t in _operands(seen)] != shapes:
            raise RuntimeError(f"in another precision the forward evaluates {site or 'the model'} otherwise")
        with torch.no_grad():
            _impose(operation, call, seen, None if self.again else self.left)


def _operands(call: Call) -> list[Tensor]:
    return [t for t in tree_leaves(tuple(call)) if isinstance(t, Tensor) and t.is_floating_point()]


def _impose(operation: Operation, call: Call, seen: Call, left: list[Tensor] | None) -> None:
    """Move the operands of a call, which are detached or not, to the branch of a recorded one.

    Where there is a list of poolings that are left as they are, one is added to it in place of being moved.
    """
    x = call.x.detach()
    if operation.kernels is not None:
        _move(call.x, _beside_kinks(operation.positions, call, seen))
    elif operation.name == "max":
        _move(call.x, _reduced(call, seen))
    elif operation.name in MEMBERS:
        _move_members(MEMBERS[operation.name], call, seen)
    elif operation.name == "max_pool" and left is not None:
        left.append(_off_windows(operation, call, seen)(x).any())
    elif operation.name == "max_pool":
        _move(call.x, _pooled(operation, call, seen))
    elif operation.name == "maximum" and (larger := _larger(call)) is not None:
        move, other, sign = larger
        side = torch.sign(seen.x - seen.parameters[1]) * sign
        _move(move, _beside(move.detach(), other.detach().expand_as(move).to(move.dtype), side))
    elif operation.name == "norm":
        wrong = _off_norms(call, seen)
        _move(call.x, torch.where(wrong, seen.x.to(x.dtype), x))
    elif not _same_branch(operation, call, seen):
        off = _off_hinges(call, seen) if operation.name == "hinge" else None
        for operand, before in zip(_operands(call), _operands(seen), strict=True):
            _move(operand, _where_off(off, before.to(operand.dtype), operand.detach()))


def _move(x: Tensor, to: Tensor) -> None:
    if to is not x:
        x.data.copy_(to)


def _beside(x: Tensor, kink: Tensor, side: Tensor) -> Tensor:
    """``x`` where it lies on the side of the kink that is wanted (-1, 0 or 1), else the nearest number that does."""
    nearest = torch.where(side == 0, kink, torch.nextafter(kink, side * inf))
    on_side = torch.sign(x - kink) == side
    return torch.where(on_side | side.isnan() | kink.isnan(), x, nearest)


def _beside_kinks(positions: Callable[..., list[Any]], call: Call, seen: Call) -> Tensor:
    x = call.x.detach()
    pairs = list(zip(positions(*call.parameters), positions(*seen.parameters), strict=True))
    ties = []
    for kink, before in pairs:
        at = torch.as_tensor(kink, dtype=x.dtype, device=x.device)
        side = ((seen.x > before).to(x.dtype) - (seen.x < before).to(x.dtype)).masked_fill(seen.x.isnan(), float("nan"))
        x = _beside(x, at, side)
        ties.append((side == 0) & (seen.x == before) & ~at.isnan())
    for (kink, _), tied in zip(pairs, ties, strict=True):  # other kinks do not move a tie with this one
        x = torch.where(tied, torch.as_tensor(kink, dtype=x.dtype, device=x.device), x)
    return x


def _reduced(call: Call, seen: Call) -> Tensor:
    """The input of a maximum or minimum, whose recorded winners are equal and above all others."""
    function, dim, *_ = call.parameters
    x = call.x.detach()
    if not x.dim():
        return x
    dims = dimensions(x, dim)
    signs = {"aminmax": (-1, 1), "min": (-1,), "amin": (-1,)}.get(function, (1,))
    for sign in signs:
        low, high = sign * seen.x, sign * x
        reached = low == low.amax(dims, keepdim=True)
        high = _first_and_below(high, reached, dims)
        x = torch.where(seen.x.isnan(), x, sign * high)
    return x


def _first_and_below(x: Tensor, reached: Tensor, dims: tuple[int, ...]) -> Tensor:
    """All entries that reach the maximum get the value of the largest of them, all others stay below it."""
    top = x.masked_fill(~reached, -inf).amax(dims, keepdim=True)
    below = torch.minimum(x, torch.nextafter(top, torch.full_like(top, -inf)))
    return torch.where(reached, top, below)


def _move_members(members: Callable[[Call], Members], call: Call, seen: Call) -> None:
    """Entries that reached the maximum of their group get the value of the largest of them, all others stay below."""
    now, before = members(call), members(seen)
    sign = 1 if now.greatest else -1

    def tops(start: Tensor | None, entries: Tensor, like: Tensor) -> Tensor:
        lowest = torch.full(now.shape, -inf, dtype=like.dtype, device=like.device) if start is None else start
        return lowest.scatter_reduce(now.dim, now.group, entries, "amax")

    x, low = sign * now.entries.detach(), sign * before.entries
    low_base = None if before.base is None else sign * before.base
    top_before = tops(low_base, low.nan_to_num(-inf), low)
    reached = low == top_before.gather(now.dim, now.group)
    base = None if now.base is None else sign * now.base.detach()
    base_reached = None if low_base is None else low_base == top_before
    start = None if base is None or base_reached is None else base.masked_fill(~base_reached, -inf)
    top = tops(start, x.masked_fill(~reached, -inf), x)
    below = torch.nextafter(top, torch.full_like(top, -inf))
    high = torch.where(reached, top.gather(now.dim, now.group), torch.minimum(x, below.gather(now.dim, now.group)))
    _move(now.memory, torch.where(x.isnan() | low.isnan(), now.memory.detach(), sign * high))
    if now.base is not None and base is not None and base_reached is not None:
        _move(now.base, sign * torch.where(base_reached, top, torch.minimum(base, below)))


def _larger(call: Call) -> tuple[Tensor, Tensor, int] | None:
    """A compared tensor that has the result's shape, the other tensor, and 1 if the former comes first, else -1."""
    x, other = call.x, call.parameters[1]
    shape = torch.broadcast_shapes(x.shape, other.shape)
    if x.shape == shape and x.is_floating_point():
        return x, other, 1
    return (other, x, -1) if other.shape == shape and other.is_floating_point() else None


def _off_windows(operation: Operation, call: Call, seen: Call) -> Callable[[Tensor], Tensor]:
    """A function of a pooling's input that returns in which of its planes a window is off its branch."""
    planes = call.x.dim() - call.parameters[0].dims
    recorded = _winners(operation, call, seen.x)

    def off(x: Tensor) -> Tensor:
        return ~((_winners(operation, call, x) == recorded) | seen.x.isnan()).flatten(planes).all(planes)

    return off


def _pooled(operation: Operation, call: Call, seen: Call) -> Tensor:
    """The input of a pooling: plane by plane, for windows overlap."""
    x = call.x.detach()
    planes = x.dim() - call.parameters[0].dims
    off_windows = _off_windows(operation, call, seen)
    for way in (_equalised, _ordered, _recorded):
        off = off_windows(x)
        if not off.any():
            break
        shape = (*off.shape, *(1,) * (x.dim() - planes))
        x = torch.where(off.view(shape), way(operation, call, x, seen.x, planes), x)
    return x


def _equalised(operation: Operation, call: Call, x: Tensor, seen: Tensor, planes: int) -> Tensor:
    """Entries that tied in a window get one value: the one that the first of them has."""
    windows = _shared(operation, call, seen, "sum", torch.ones_like)
    tied = windows > _shared(operation, call, seen, "minimal", torch.ones_like) * (1 + 1e-9)
    if not tied.any():
        return x
    plane = torch.arange(seen.shape[:planes].numel(), device=x.device, dtype=torch.float64)
    plane = plane.view(*seen.shape[:planes], *(1,) * (x.dim() - planes)).expand_as(x)
    keys = [plane[tied], seen[tied].double()]
    if bool((windows <= 1).all()):  # no entry wins two windows: those of different windows need not be equal
        keys.append(_shared(operation, call, seen, "sum", _numbers)[tied])
    _, group = torch.stack(keys, 1).unique(dim=0, return_inverse=True)
    values = x[tied]
    positions = torch.arange(len(group), device=x.device)
    first = torch.full_like(positions, len(group)).scatter_reduce(0, group, positions, "amin")
    return x.masked_scatter(tied, values[first[group]])


def _ordered(operation: Operation, call: Call, x: Tensor, seen: Tensor, planes: int) -> Tensor:
    """Entries in the order of the recorded ones: what stands too low is raised above what was smaller."""
    flat, order = x.flatten(planes), seen.flatten(planes).argsort(stable=True, dim=-1)
    values, before = flat.gather(-1, order), seen.flatten(planes).gather(-1, order)
    top, source = values.cummax(-1)
    first = torch.ones_like(before, dtype=torch.bool)
    first[..., 1:] = before[..., 1:] > before[..., :-1]
    rank = first.cumsum(-1)
    raised = top + (rank - rank.gather(-1, source)) * torch.finfo(x.dtype).eps * top.abs()
    return torch.zeros_like(flat).scatter(-1, order, raised).view(x.shape)


def _recorded(operation: Operation, call: Call, x: Tensor, seen: Tensor, planes: int) -> Tensor:
    """The recorded values themselves, where nothing else leads to the branch."""
    return seen.to(x.dtype)


def _shared(operation: Operation, call: Call, x: Tensor, choice: Any, weights: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum, for each entry, the gradients of the windows that it wins, each with the window's own weight."""
    apart = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)  # not a checkpoint's, which would run it again
    with torch.enable_grad(), apart:
        leaf = x.detach().double().requires_grad_()
        pooled = operation.apply(Selection(Jacobians(max_pool=choice)), call._replace(x=leaf, return_indices=False))
        (sums,) = torch.autograd.grad(pooled, leaf, weights(pooled.detach()))
    return sums


def _winners(operation: Operation, call: Call, x: Tensor) -> Tensor:
    """Return which entries reach the maximum of which windows: each window has a random number, each entry a sum."""
    return _shared(operation, call, x, "sum", _random)


def _random(t: Tensor) -> Tensor:
    return torch.rand(t.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(t)


def _numbers(t: Tensor) -> Tensor:
    return torch.arange(1.0, t.numel() + 1, dtype=t.dtype, device=t.device).view(t.shape)


def _itself(saved: Tensor) -> Tensor:
    return saved


def _same_branch(operation: Operation, call: Call, seen: Call) -> bool:
    """Return whether an operation's own values lead to the recorded branch; a hinge that does not is moved there."""
    return operation.name == "hinge" and _same_hinges(call, seen)


def _off_norms(call: Call, seen: Call) -> Tensor:
    """Return which entries belong to vectors that are not on their recorded side of 0, or of the smallest divisor."""
    function, p, dim = call.parameters[:3]
    least = call.parameters[3] if function == "normalize" else 0.0
    dims = dimensions(call.x, dim)
    sides = [torch.sign(torch.linalg.vector_norm(t.x.detach(), p, dims, True) - least) for t in (call, seen)]
    return (sides[0] != sides[1].to(sides[0].dtype)).expand_as(call.x)


def _off_hinges(call: Call, seen: Call) -> Tensor:
    """Return which hinges are not on their recorded side."""
    u, before = _hinges(call, call.x.detach()), _hinges(seen, seen.x)
    return torch.sign(u) != torch.sign(before).to(u.dtype)


def _where_off(off: Tensor | None, before: Tensor, now: Tensor) -> Tensor:
    """Recorded values where something is off its branch, by samples if that is known; the replay's own elsewhere."""
    if off is None or not off.dim() or not now.dim() or off.shape[0] != now.shape[0]:
        return before
    samples = off.flatten(1).any(1) if off.dim() > 1 else off
    return torch.where(samples.view(-1, *(1,) * (now.dim() - 1)), before, now)


def _hinges(call: Call, x: Tensor) -> Tensor:
    function, others, rest = call.parameters
    rest = {name: value for name, value in rest.items() if name != "reduction"}
    return HINGES[function](x, *others, **rest)[0]


def _same_hinges(call: Call, seen: Call) -> bool:
    u, before = _hinges(call, call.x.detach()), torch.sign(_hinges(seen, seen.x))
    if bool((torch.sign(u) == before).all()):
        return True
    function, others, _ = call.parameters
    x = call.x.detach()
    slope = {"hinge_embedding_loss": -1.0, "margin_ranking_loss": None}.get(function, 0.0)
    if slope is None:
        slope = -others[1].to(x.dtype)
    elif not slope:
        return False
    wanted = _beside(u, torch.zeros_like(u), before.to(u.dtype))
    moved = torch.where(u == wanted, x.expand_as(u), x + (wanted - u) / slope)
    if moved.shape != x.shape or not bool((torch.sign(_hinges(call, moved)) == before).all()):
        return False
    _move(call.x, moved)
    return True
