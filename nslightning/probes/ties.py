"""Counting ties: how often a forward evaluates an operation where its Jacobian is not unique."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nslightning._torch import in_functorch, is_compiled, outside_transforms, running_transforms
from nslightning.jacobians import Jacobians
from nslightning.ops.autograd.pooling import tied_windows
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.record import OPERATIONS, Call, Count, Operation
from nslightning.probes.sums import numbers, waits
from nslightning.surgery import selections

__all__ = ["TieCounts", "Ties", "counting", "observing", "pools_of_zero", "ties"]


@dataclass
class Ties:
    """The ties that one site met.

    A tie is *structural* where the network or the data makes it, and not chance: at a position of the input that ties
    in every sample of the batch (the first dimension, of at least two; a dead unit, a batch norm that starts at zero),
    or in a pooling window all of whose entries are equal (a constant background). Such a tie comes back at each step
    and in every precision. All others are *accidental*: rounding makes them, and more of them the fewer bits there are.
    Pointwise operations and max pooling distinguish the two; elsewhere, and under ``torch.vmap``, no tie counts as
    structural.

    Args:
        operation: Field of :class:`~nslightning.Jacobians`.
        tied: Evaluations at a tie.
        total: All evaluations: the input's entries, or the pooling windows.
        structural: Those of ``tied`` that are structural.
        zero: Those of ``tied`` that are pooling windows with the maximum 0. Behind a ReLU that returns 0 at 0 these are
            always there and never matter: what is shared among their entries dies in the ReLU.
    """

    operation: str
    tied: int = 0
    total: int = 0
    structural: int = 0
    zero: int = 0

    def __str__(self) -> str:
        """The counts, on one line."""
        kinds = [f"{n:,} {kind}" for n, kind in ((self.structural, "structural"), (self.zero, "windows of 0")) if n]
        share = f"{100 * self.fraction:.3g} %"
        of = f", of them {' and '.join(kinds)}" if kinds else ""
        return f"{self.operation}: {self.tied:,} of {self.total:,} tie ({share}){of}"

    @property
    def fraction(self) -> float:
        """Tied evaluations as a share of all; 0 where nothing was evaluated."""
        return self.tied / self.total if self.total else 0.0

    @property
    def accidental(self) -> int:
        """Evaluations at a tie that is not structural."""
        return self.tied - self.structural


class TieCounts(dict[str, Ties]):
    """The ties of each site, by name; printed, one line for each."""

    def __init__(self) -> None:
        super().__init__()
        self._unread: list[tuple[str, str, tuple[Count, Count, Count, Count]]] = []

    def note(self, site: str, operation: str, four: tuple[Count, Count, Count, Count]) -> None:
        """Note an evaluation without waiting for a device.

        Args:
            site: The site's name.
            operation: Field of :class:`~nslightning.Jacobians`.
            four: Numbers: its tied evaluations, all its evaluations, its structural ties, and its tied pooling
                windows of 0.
        """
        self._unread.append((site, operation, four))

    def read(self) -> None:
        """Take in all evaluations that were noted, by one transfer from their device."""
        values = iter(numbers([number for *_, four in self._unread for number in four]))
        for site, operation, _ in self._unread:
            entry = self.setdefault(site, Ties(operation))
            entry.tied += int(next(values))
            entry.total += int(next(values))
            entry.structural += int(next(values))
            entry.zero += int(next(values))
        self._unread.clear()

    def __str__(self) -> str:
        """The sites that tie, the most often tied first, and how many do not."""
        tied = sorted(((n, t) for n, t in self.items() if t.tied), key=lambda item: -item[1].fraction)
        width = max((len(name or "(model)") for name, _ in tied), default=0)
        lines = [f"{name or '(model)':<{width}}  {met}" for name, met in tied]
        return "\n".join([*lines, f"{len(self) - len(tied)} of {len(self)} sites met no tie"])


@contextmanager
def observing(model: nn.Module, observe: Callable[[str, Operation, Call], None]) -> Iterator[None]:
    """Call a function before each evaluation at a patched site.

    Args:
        model: A patched model, or one that contains patched ones, in eager mode.
        observe: Takes the site's name, the operation and the call. A functional site is named
            ``"<module>:<function>"``. Where several parts of ``model`` were patched, each one's name comes first.

    Raises:
        ValueError: If the model is not patched.
        TypeError: If the model is compiled: its sites cannot be watched.
    """
    watched = selections(model)
    if not watched:
        raise ValueError(f"{type(model).__name__} is not patched; call `patch(model, Jacobians())` first")
    for module in model.modules():
        if is_compiled(module):
            raise TypeError("ties are counted in eager mode: give the model as it was before torch.compile")
    parts = {name: name.partition("#")[0] for name in watched}  # a part may have several selections
    several = len(set(parts.values())) > 1

    def observer(part: str) -> Callable[[str, Operation, Call], None]:
        return lambda site, operation, call: observe(".".join(filter(None, (part, site))), operation, call)

    before = {name: selection.observer for name, selection in watched.items()}
    for name, selection in watched.items():
        selection.observer = observer(parts[name]) if several else observe
    try:
        yield
    finally:
        for name, selection in watched.items():
            selection.observer = before[name]


@contextmanager
def counting(model: nn.Module) -> Iterator[TieCounts]:
    """Count the ties of every forward inside the block.

    Args:
        model: A patched model, or one that contains patched ones, in eager mode.

    Yields:
        The counts by site, named as by :func:`observing`, filled when the block ends, or by
        :meth:`TieCounts.read`: one transfer from the device for all sites. A site called several times adds up.

    Raises:
        ValueError: If the model is not patched.
        TypeError: If the model is compiled: its sites cannot be watched.
    """
    counts = TieCounts()

    def count(site: str, operation: Operation, call: Call) -> None:
        # A transform's tensors cannot be read once it has ended.
        batched = "Vmap" in running_transforms()
        for values in outside_transforms(tuple(call)) if in_functorch() else [call]:
            one = Call(*values)
            with torch.no_grad():
                tied, total = operation.ties(one)
                # Reading from a device whether an entry ties would wait for the device.
                looks = (isinstance(tied, Tensor) and waits(tied.device)) or bool(tied)
                structural, zero = _structure(operation, one) if looks else (0, 0)
            counts.note(site, operation.name, (tied, total, 0 if batched else structural, zero))

    with observing(model, count):
        yield counts
    counts.read()


def _structure(operation: Operation, call: Call) -> tuple[Count, Count]:
    """Count how many of a call's ties are structural, and how many are pooling windows with the maximum 0."""
    if operation.kernels is not None:
        structural: Count = 0
        for position in operation.positions(*call.parameters):
            tied = call.x == position
            structural = structural + torch.count_nonzero(tied & _in_every_sample(tied))
        return structural, 0
    if operation.name == "max_pool":

        def pooled(sign: int) -> Tensor:
            values: Tensor = operation.apply(stock, call._replace(x=sign * call.x, return_indices=False))
            return sign * values

        stock = Selection(Jacobians())
        tied, largest, smallest = tied_windows(call.x, *call.parameters) > 1, pooled(1), pooled(-1)
        structural = torch.count_nonzero(tied & (_in_every_sample(tied) | (largest == smallest)))
        return structural, torch.count_nonzero(tied & (largest == 0))
    return 0, 0


def pools_of_zero(call: Call) -> Tensor:
    """Return whether all windows of a max pooling that tie have the maximum 0.

    Args:
        call: A call of max pooling.

    Returns:
        Whether they do, a 0-d tensor on the input's device.
    """
    with torch.no_grad():
        largest = OPERATIONS["max_pool"].apply(Selection(Jacobians()), call._replace(return_indices=False))
        return ~torch.any((tied_windows(call.x, *call.parameters) > 1) & (largest != 0))


def _in_every_sample(tied: Tensor) -> Tensor:
    """Return where a position of the input ties in each sample of the batch: the first dimension, of at least two."""
    return tied.all(0) if tied.dim() > 1 and len(tied) > 1 else torch.zeros_like(tied)


def ties(model: nn.Module, *args: Any, **kwargs: Any) -> TieCounts:
    """The ties that one forward meets, per site.

    The forward leaves no trace: buffers (batch norm's running statistics) and the random state stay as they
    are.

    Args:
        model: A patched model, or one that contains patched ones, in eager mode and in the training or
            evaluation mode wanted.
        *args: The model's inputs.
        **kwargs: The model's keyword inputs.

    Returns:
        The counts by site, named as by :func:`counting`.

    Raises:
        ValueError: If the model is not patched.
        TypeError: If the model is compiled: its sites cannot be watched.

    Example:
        >>> import nslightning
        >>> model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
        >>> report = nslightning.patch(model, nslightning.Jacobians())
        >>> counts = ties(model, torch.tensor([[[[0.0, 1.0], [1.0, -1.0]]]]))
        >>> counts["0"].tied, counts["1"].tied, counts["1"].fraction
        (1, 1, 1.0)
    """
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.no_grad(), counting(model) as counts, torch.random.fork_rng(sorted(devices, key=str)):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        torch.func.functional_call(model, buffers, args, kwargs)
    return counts
