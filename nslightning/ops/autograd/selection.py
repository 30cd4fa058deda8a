"""The one mutable object that patched operations share and that their backward passes read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from nslightning._torch import (
    in_dispatch_mode,
    in_functorch,
    is_legacy_batch,
    is_tracing,
    is_zero_tensor,
    outside_every_mode,
)
from nslightning.ops.autograd.shares import PoolWeights, pool_weights, shares
from nslightning.ops.record import OPERATIONS, RULES, Choice, Operation, Rule, follow, known

__all__ = [
    "OwnChoice",
    "Selection",
    "concrete",
    "data_dependent",
    "fixed",
    "guarded",
    "pool_coefficients",
    "pool_difference_coefficients",
    "read_now",
]


@torch.library.custom_op("nslightning::read_now", mutates_args=())
def read_now(values: Tensor, gradient: Tensor) -> Tensor:
    """Read a selection's tensor inside a compiled backward.

    The compiler may move what depends on the forward's inputs alone into the forward, and a choice read there
    would be the one in force then. Naming the incoming gradient keeps the read in the backward.

    Args:
        values: A tensor of a :class:`Selection`.
        gradient: The incoming gradient; not read.

    Returns:
        A copy of ``values`` on the gradient's device, where the compiled kernels read it.

    Raises:
        RuntimeError: If the choice is random: it is drawn for the ties alone, whose number a compiled graph does not
            know.
    """
    if torch.isinf(values).any():
        raise RuntimeError(
            'the choice "random" cannot be taken by a compiled backward. Choose something else, or do not compile.'
        )
    return values.to(gradient.device, copy=True)


@read_now.register_fake
def _(values: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(values, device=gradient.device)


@dataclass(frozen=True)
class OwnChoice:
    """The choice that a call or a module names itself: of its own operations, stock's for all others.

    Args:
        operations: The operations that it is for.
        value: What it chooses for each of them.
        rule: The arithmetic.

    Raises:
        ValueError: If the value is no choice of such an operation, or the rule is not known.

    Example:
        >>> choice = OwnChoice(("relu",), 0.5)
        >>> choice.relu, choice.hardswish
        (0.5, None)
    """

    operations: tuple[str, ...]
    value: Any = None
    rule: Rule = "exact"

    def __post_init__(self) -> None:
        for name in self.operations:
            object.__setattr__(self, "value", OPERATIONS[name].checked(self.value))
        known("rule", self.rule, RULES)

    def __getattr__(self, operation: str) -> Any:
        if operation not in OPERATIONS:
            raise AttributeError(f"there is no operation {operation!r}")
        return self.value if operation in self.operations else None


class Selection:
    """The Jacobian choice now in force; every backward pass reads it when it runs.

    The choice is held twice: as the frozen object that eager code reads, and as small CPU tensors that a compiled
    backward reads, filled in place so that no recompilation is needed. A context variable would not do: CUDA backward
    passes run on other threads.

    Args:
        jacobians: The choice to start with: :class:`~nslightning.Jacobians`, or another object with a field for each
            operation and ``rule``.
        seed: Seeds the private generators of the ``"random"`` choice; the global random streams are never touched.

    Example:
        >>> from nslightning import Jacobians
        >>> selection = Selection(Jacobians(relu=1.0))
        >>> selection.set(Jacobians(relu=0.5))
        >>> selection.jacobians.relu
        0.5
    """

    def __init__(self, jacobians: Choice, seed: int = 0) -> None:
        self.seed = seed
        self.shared: Any = None  # these tensors' memory as the C++ nodes hold it
        self._observer: Callable[[str, Any, Any], None] | None = None
        self._recorder: Callable[..., None] | None = None
        self._generators: dict[torch.device, torch.Generator] = {}
        # float64 0-d and 1-d CPU tensors never promote the gradients they multiply.
        self.kinks: dict[str, Tensor] = {}
        self.shares: dict[str, Tensor] = {}
        self._numbers: dict[str, np.ndarray] = {}  # the same memory, by operation or by attribute
        self.watched = self._memory(".watched", [False, False])  # by a recorder, by an observer: read by C++ nodes
        self.published = self._memory(".published", False)
        self.pool = self._memory(".pool", [0.0] * 4)
        for operation in OPERATIONS.values():
            self._hold(operation)
        _LIVE.add(self)
        self.set(jacobians)

    @property
    def observer(self) -> Callable[[str, Any, Any], None] | None:
        """Called with (site name, operation, call) before each evaluation at a patched site, in eager mode."""
        return self._observer

    @observer.setter
    def observer(self, observer: Callable[[str, Any, Any], None] | None) -> None:
        self._observer = observer
        self._numbers[".watched"][1] = observer is not None

    @property
    def recorder(self) -> Callable[..., None] | None:
        """Called in eager mode by each backward that met ties.

        It takes the autograd node and what that would have returned under any choice, ``Selection -> gradient``; and
        where there is a better way than to subtract, what one choice adds to another, ``(Selection, Selection) ->
        gradient``.
        """
        return self._recorder

    @recorder.setter
    def recorder(self, recorder: Callable[..., None] | None) -> None:
        self._recorder = recorder
        self._numbers[".watched"][0] = recorder is not None

    def _memory(self, name: str, values: list[float] | list[bool] | bool) -> Tensor:
        """An ordinary CPU tensor in every surrounding: inference mode, a default device, fake tensors, a transform."""
        self._numbers[name] = np.array(values)
        with outside_every_mode():
            return torch.from_numpy(self._numbers[name])

    def _hold(self, operation: Operation) -> None:
        """Make the tensor of an operation's choice, with the reference."""
        if operation.shares:
            self.shares[operation.name] = self._memory(operation.name, _compiled(shares(None), None))
        else:
            self.kinks[operation.name] = self._memory(operation.name, [float("nan")] * len(operation.kinks))

    def set(self, jacobians: Choice) -> None:
        """Make ``jacobians`` the choice that every later backward pass takes.

        Args:
            jacobians: The choice.
        """
        self.jacobians: Any = jacobians  # a `Choice`, of the caller's own type
        # NumPy writes past the version counter that autograd checks: changing the choice between forward and backward
        # is what this object is for. It also writes past every mode and transform.
        self._numbers[".published"][...] = jacobians.rule == "published"
        # NaN stands for the reference, infinity for a random choice, which `read_now` refuses.
        for name in self.kinks:
            for i, value in enumerate(self.at_kinks(name)):
                number = float("nan") if value is None else float("inf") if isinstance(value, str) else value
                self._numbers[name][i] = number
        for name in self.shares:
            self._numbers[name][:] = _compiled(shares(choice := getattr(jacobians, name)), choice)
        pooling = jacobians.max_pool
        self._numbers[".pool"][:] = _compiled(pool_weights(pooling), pooling)

    def at_kinks(self, operation: str) -> tuple[float | str | None, ...]:
        """The derivatives at the kinks of a pointwise operation.

        Args:
            operation: A field of :class:`~nslightning.Jacobians`, such as ``"relu"``.

        Returns:
            One entry per kink, ``None`` where the reference choice is meant, ``"random"`` for a draw at each tie.
        """
        value: Any = getattr(self.jacobians, operation)
        if value is None:
            return (None,) * len(self.kinks[operation])
        return value if isinstance(value, tuple) else (value,)

    def pool_weights(self) -> PoolWeights:
        """The choice of max pooling as weights.

        Returns:
            ``(share, whole, each, last)``: of ``k`` tied entries each receives ``g * (share / k + each)``, and the
            first one (the last one if ``last`` is 1) receives ``g * whole`` more.
        """
        return pool_weights(self.jacobians.max_pool)

    def generator(self, device: torch.device) -> torch.Generator:
        """The private random stream of the ``"random"`` choice on a device.

        Args:
            device: Where the draws are made.

        Returns:
            A generator seeded once with ``seed``.
        """
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def reseed(self, seed: int) -> None:
        """Start the private random streams again.

        Args:
            seed: The new seed.
        """
        self.seed, self._generators = seed, {}

    @contextmanager
    def other_streams(self, seed: int) -> Iterator[None]:
        """Draw from other random streams inside the block; afterwards the old ones go on where they were.

        Args:
            seed: Seeds the other streams.

        Example:
            >>> selection, cpu = Selection(OwnChoice(("max_pool",), "random")), torch.device("cpu")
            >>> with selection.other_streams(1):
            ...     _ = torch.rand(1, generator=selection.generator(cpu))
            >>> torch.equal(torch.rand(1, generator=selection.generator(cpu)),
            ...             torch.rand(1, generator=torch.Generator().manual_seed(0)))
            True
        """
        before = self.seed, self._generators
        self.reseed(seed)
        try:
            yield
        finally:
            self.seed, self._generators = before

    def __getstate__(self) -> dict[str, Any]:
        return {"jacobians": self.jacobians, "seed": self.seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc] # a fresh start is what unpickling means here

    def __repr__(self) -> str:
        return f"Selection({self.jacobians!r})"


_LIVE: WeakSet[Selection] = WeakSet()


@follow
def _hold_everywhere(operation: Operation) -> None:
    with torch.inference_mode(False):
        for selection in _LIVE:
            selection._hold(operation)


def _compiled(weights: tuple[float, ...], choice: Any) -> list[float]:
    """The weights as a compiled backward reads them: infinite for a random choice, which `read_now` refuses."""
    return [float("inf") if choice == "random" else w for w in weights]


def fixed(operations: str | tuple[str, ...], value: Any, rule: Rule = "exact", seed: int = 0) -> Selection:
    """A selection that stays as it is, for calls that name their choice.

    Args:
        operations: The operation, or several.
        value: The choice.
        rule: The arithmetic.
        seed: Seeds a random choice: then each call starts a stream of its own.

    Returns:
        The selection.

    Raises:
        ValueError: If the value is no choice of the operation, or the rule is not known.

    Example:
        >>> fixed("softshrink", (0.0, 1.0)).at_kinks("softshrink")
        (0.0, 1.0)
    """
    choice = OwnChoice((operations,) if isinstance(operations, str) else operations, value, rule)
    return Selection(choice, seed) if choice.value == "random" else _kept(choice)


def guarded(y: Tensor, operation: str, selection: Selection) -> Tensor:
    """A stock result that takes no choice, because of its layout: a backward that would need one is refused.

    Args:
        y: The result of a stock operation.
        operation: Whose it is.
        selection: The choice, read when the backward runs.

    Returns:
        ``y``. Its backward raises a ``RuntimeError`` under another choice than the reference, and where somebody
        records what choices change.
    """

    def refuse(g: Tensor) -> None:
        record, choice = OPERATIONS[operation], getattr(selection.jacobians, operation)
        reference = choice is None or choice == record.default
        if not reference or selection.recorder is not None:
            raise RuntimeError(
                f"{operation} of a tensor of layout {y.layout}{' (nested)' if y.is_nested else ''} has PyTorch's own "
                f"derivative only; given {operation}={choice!r}. Make the tensor dense before it (x.to_dense(), or "
                "padding), or skip this site."
            )

    if y.requires_grad:
        y.register_hook(refuse)
    return y


@lru_cache(maxsize=1024)
def _kept(choice: OwnChoice) -> Selection:
    return Selection(choice)


@lru_cache(maxsize=256)
def pool_coefficients(
    share: float,
    whole: float,
    each: float,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    apart: bool = False,
) -> Tensor:
    """The weights of max pooling, by how many entries of a window are tied.

    Args:
        share: As in :meth:`Selection.pool_weights`, like the next two.
        whole: See there.
        each: See there.
        dtype: In which they are formed.
        device: Where they are wanted.
        apart: Count what every tied entry receives and what the target receives beside it apart.

    Returns:
        Shape (2, 17): the coefficients of the gradient of a window with column-many tied entries, for these and for
        the target.

    Example:
        >>> pool_coefficients(0.0, 1.0, 0.0, torch.float32)[:, 2]  # the reference: all to the target
        tensor([0., 1.])
    """
    # Formed on the device: a copy from the host would wait for it.
    count = torch.arange(17, dtype=dtype, device=device)
    rest = torch.div(share, count.clamp(min=1)) + each
    target = torch.full_like(rest, whole) if apart else rest + whole
    # No tie: all to the target, which is the only one.
    return torch.stack([torch.where(count < 2, 0.0 if apart else 1.0, rest), torch.where(count < 2, 1.0, target)])


def pool_difference_coefficients(
    weights: tuple[float, float, float, float],
    less: tuple[float, float, float, float],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, bool] | None:
    """What one choice's coefficients add to another's, which is nothing where no entry ties.

    Args:
        weights: Of :meth:`Selection.pool_weights`.
        less: The other choice's.
        dtype: In which they are wanted; they are formed in float64.
        device: Where they are wanted.

    Returns:
        Coefficients as :func:`pool_coefficients` has them, and whether the target is the last tied entry. None where
        the two choices have targets of their own.

    Example:
        >>> table, last = pool_difference_coefficients((1, 0, 0, 0), (0, 1, 0, 0), torch.float32)  # minimal, reference
        >>> table[:, 1:3]
        tensor([[ 0.0000,  0.5000],
                [ 0.0000, -0.5000]])
    """
    (*one, last), (*other, other_last) = weights, less
    if one[1] and other[1] and last != other_last:
        return None
    table = pool_coefficients(*one, torch.float64, device) - pool_coefficients(*other, torch.float64, device)
    return table.to(dtype), bool(last if one[1] else other_last)


def concrete(x: Tensor) -> bool:
    """Whether an operation has the values of its input before it, in memory.

    Args:
        x: The operation's input, any shape and dtype.

    Returns:
        True in eager mode. Not while compiling or tracing or under ``torch.func`` transforms, nor for a tensor's
        subclass, a batch of gradients (``is_grads_batched``), one whose negation is put off or zeros without memory.
    """
    if torch.compiler.is_compiling() or is_tracing() or in_functorch() or in_dispatch_mode():
        return False
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.layout == torch.strided
        and not is_legacy_batch(x)
        and not (x.is_neg() or is_zero_tensor(x))
    )


def data_dependent(x: Tensor) -> bool:
    """Whether an operation may look at its values to choose its path.

    Args:
        x: The operation's input, any shape and dtype.

    Returns:
        True on a CPU for a :func:`concrete` tensor. Not on an accelerator, where looking would wait for the device.
    """
    return x.device.type == "cpu" and concrete(x)
