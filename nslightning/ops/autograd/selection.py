"""The one mutable object that patched operations share and that their backward passes read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from math import inf
from typing import Any, cast
from weakref import WeakSet, WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from nslightning._torch import (
    in_dispatch_mode,
    in_functorch,
    is_legacy_batch,
    is_tracing,
    is_view,
    is_zero_tensor,
    outside_every_mode,
    running_transforms,
    while_compiling,
)
from nslightning.ops.autograd.shares import PoolWeights, pool_weights, shares
from nslightning.ops.record import OPERATIONS, RULES, Choice, Operation, Rule, follow, known

__all__ = [
    "LIBRARY",
    "OwnChoice",
    "Selection",
    "TracedTransformError",
    "concrete",
    "data_dependent",
    "fixed",
    "guarded",
    "pool_coefficients",
    "pool_difference_coefficients",
    "read_now",
    "refuse_random",
    "refuse_traced_transforms",
    "replayed",
]


LIBRARY = torch.library.Library("nslightning", "FRAGMENT")  #: The operators that a compiler takes whole.


def _read_now(values: Tensor, gradient: Tensor) -> Tensor:
    refuse_random(values)
    return values.clone()


# Not by `torch.library.custom_op`, whose operators cost the host several times as much.
LIBRARY.define("read_now(Tensor values, Tensor gradient) -> Tensor", tags=(torch.Tag.flexible_layout,))
LIBRARY.impl("read_now", _read_now, "CompositeExplicitAutograd")
torch.library.register_fake("nslightning::read_now", lambda values, gradient: torch.empty_like(values))


def read_now(values: Tensor, gradient: Tensor) -> Tensor:
    """Read a selection's tensor in a backward that is compiled, or captured in a CUDA graph.

    The compiler may move a computation that depends only on the forward's inputs into the forward, which would read
    the choice in force at that time. Naming the incoming gradient keeps the read in the backward.

    Args:
        values: A tensor of a :class:`Selection`, on the gradient's device.
        gradient: The incoming gradient; not read.

    Returns:
        A copy of ``values``.

    Raises:
        RuntimeError: If the choice is random: it is drawn for the ties alone, whose number a graph does not know.
    """
    return cast(Tensor, torch.ops.nslightning.read_now.default(values, gradient))


def refuse_random(values: Tensor) -> None:
    """Raise if the choice is random, for which a selection's memory holds infinity.

    Args:
        values: A tensor of a :class:`Selection`.

    Raises:
        RuntimeError: If the choice is random. A replay raises nothing, since it runs no Python.
    """
    on_host = values.numpy() if values.device.type == "cpu" else _ON_HOST.get(values.data_ptr())
    numbers = [] if on_host is None else on_host.ravel().tolist()
    if inf in numbers:  # a replay runs no Python, so it returns infinities
        raise RuntimeError(
            'the choice "random" cannot be taken by a compiled backward, nor by one that is captured in a CUDA graph. '
            "Choose something else, or run it in eager mode."
        )


#: By the address of a selection's numbers on a device, the same numbers on the host.
_ON_HOST: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()
#: The tensors that captured graphs read. They are kept, since a graph may be replayed after its model is deleted.
_REPLAYED: set[Tensor] = set()


def replayed(g: Tensor) -> bool:
    """Return whether a backward is recorded to run without its Python code: compiled, or captured in a CUDA graph.

    Such a backward reads the choice from tensors, see :meth:`Selection.read`, and no path may depend on the choice.

    Args:
        g: The incoming gradient.

    Returns:
        True while a compiler traces, or the stream of ``g``'s device is captured.
    """
    return torch.compiler.is_compiling() or _captured(g.device)


def _captured(device: torch.device) -> bool:
    return _has_graphs(device) and torch.cuda.is_current_stream_capturing()


def _slot(device: torch.device) -> str:
    """The attribute of a selection that holds its numbers on a device."""
    return f"_on_{device.type}_{device.index}"


def _write(tensor: Tensor, numbers: np.ndarray, places: Iterable[int]) -> None:
    """Write numbers into a device's memory, each by a kernel that has it as an argument."""
    with torch.no_grad():
        # `data` has a separate version counter, so that a graph may have saved the tensor.
        flat = tensor.data.view(-1)
        for i in places:
            flat[i].fill_(numbers[i].item())


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _has_own_memory(device: torch.device) -> bool:
    """Return whether a device does not read the host's memory."""
    return device.type != "cpu"


@dataclass(frozen=True)
class OwnChoice:
    """The choice that a call or a module names for its own operations; all others keep the stock choice.

    Args:
        operations: The operations that it is for.
        value: The choice for each of them.
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

    The choice is held twice: as the frozen object that eager code reads, and as small tensors that are filled in place.
    A compiled backward reads these, which takes no recompilation, and a captured CUDA graph when it is replayed. On a
    device they are filled on its current stream, by kernels, without a wait and without a copy from the host. A
    context variable would not do: CUDA backward passes run on other threads.

    Args:
        jacobians: The choice to start with: :class:`~nslightning.Jacobians`, or another object with a field for each
            operation and ``rule``.
        seed: Seeds the private generators of the ``"random"`` choice; the global random streams are never touched.
        constant: Whether the choice never changes.

    Example:
        >>> from nslightning import Jacobians
        >>> selection = Selection(Jacobians(relu=1.0))
        >>> selection.set(Jacobians(relu=0.5))
        >>> selection.jacobians.relu
        0.5
    """

    def __init__(self, jacobians: Choice, seed: int = 0, *, constant: bool = False) -> None:
        self.seed, self.constant = seed, constant
        self.shared: Any = None  # these tensors' memory as the C++ nodes hold it
        self._observer: Callable[[str, Any, Any], None] | None = None
        self._recorder: Callable[..., None] | None = None
        self._generators: dict[torch.device, torch.Generator] = {}
        # float64 0-d and 1-d CPU tensors never promote the gradients they multiply.
        self.kinks: dict[str, Tensor] = {}
        self.shares: dict[str, Tensor] = {}
        self.memory: dict[str, Tensor] = {}  # these and the next, by operation or by attribute
        self._numbers: dict[str, np.ndarray] = {}  # the same memory
        self._devices: dict[torch.device, dict[str, Tensor]] = {}  # the same numbers on devices
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

        It takes the autograd node and a function that returns its gradient under any choice, ``Selection -> gradient``.
        Where a better way exists than to subtract two gradients, it also takes a function that returns the gradient
        under one choice less that under another, ``(Selection, Selection) -> gradient``. Where the forward kept its
        ties, it takes by the keyword ``ties`` a function that returns whether there is any, a 0-d tensor.
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
            self.memory[name] = torch.from_numpy(self._numbers[name])
        return self.memory[name]

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
        before = {name: numbers.copy() for name, numbers in self._numbers.items()} if self._devices else {}
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
        for device, tensors in self._devices.items():
            for name, tensor in tensors.items():
                self._fill(device, tensor, name, before.get(name))

    def _fill(self, device: torch.device, tensor: Tensor, name: str, before: np.ndarray | None) -> None:
        """Write the numbers that changed into a device's memory, on its current stream."""
        numbers = np.atleast_1d(self._numbers[name])
        changed = list(range(len(numbers)))
        if before is not None:
            equal = np.array_equal if numbers.dtype == bool else partial(np.array_equal, equal_nan=True)
            old = np.atleast_1d(before)
            changed = [i for i in changed if not equal(numbers[i], old[i])]
        if not changed:
            return
        if before is not None and _captured(device):
            raise RuntimeError(
                "the Jacobian choice changes inside a captured step, so that each replay would set it again. Change it "
                "between replays, or capture a graph for each choice."
            )
        with outside_every_mode():
            _write(tensor, numbers, changed)

    def meet(self, x: Tensor) -> dict[str, Tensor] | None:
        """Make the memory that captured graphs read, before one is captured.

        Args:
            x: An operation's input.

        Returns:
            The memory, as :meth:`on` returns it; None if the device has none.
        """
        if torch.compiler.is_compiling():  # `read` makes it where a graph wants it
            return None
        wanted = _has_graphs(x.device) and not (self.constant or x.device in self._devices)
        if wanted and concrete(x) and not _captured(x.device):
            self._prepare(x.device)
        return self._devices.get(x.device)

    @while_compiling
    def _prepare(self, device: torch.device) -> bool:
        """Make a device's memory; a compiler runs this when it traces a call of it."""
        if device not in self._devices:
            with outside_every_mode():
                memory = {n: torch.empty(t.shape, dtype=t.dtype, device=device) for n, t in self.memory.items()}
            for name, tensor in memory.items():
                self._fill(device, tensor, name, None)
                if device.type != "meta":
                    _ON_HOST[tensor.data_ptr()] = self._numbers[name]
            self._devices[device] = memory
            setattr(self, _slot(device), memory)
        return True

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The numbers of the choice in the memory of a device, where they are rewritten when it changes.

        Args:
            device: The device.

        Returns:
            By operation, and ``".pool"`` and ``".published"``.

        Raises:
            RuntimeError: If the device's stream is captured and no operation of this choice ran there before.
        """
        if not _has_own_memory(device):
            return self.memory
        if not torch.compiler.is_compiling() and device not in self._devices and _captured(device):
            raise RuntimeError(
                "a captured step reads the Jacobian choice from the device's memory, which an ordinary step makes "
                "there: run one step before the capture"
            )
        self._prepare(device)
        memory: dict[str, Tensor] = getattr(self, _slot(device))  # a compiler may know the dictionary as it was before
        return memory

    def read(self, name: str, g: Tensor) -> Tensor:
        """The numbers of the choice as a backward reads them that is :func:`replayed`.

        Args:
            name: An operation, ``".pool"`` or ``".published"``.
            g: The incoming gradient.

        Returns:
            A new tensor on ``g``'s device. NaN stands for the reference.
        """
        if torch.compiler.is_compiling():
            # A fresh number: an operator's argument is written to memory, and so is all that it is a view of.
            return read_now(self.on(g.device)[name], g[(slice(0, 1),) * g.dim()].sum())
        if self.constant:  # filled at each replay
            constant, numbers = torch.empty_like(self.memory[name], device=g.device), np.atleast_1d(self._numbers[name])
            _write(constant, numbers, range(len(numbers)))
            return constant
        values = self.on(g.device)[name]
        _REPLAYED.add(values)
        return read_now(values, g)

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
            device: The device of the draws.

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
        return {"jacobians": self.jacobians, "seed": self.seed, "constant": self.constant}

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
        seed: Seeds a random choice: then each call starts its own stream.

    Returns:
        The selection.

    Raises:
        ValueError: If the value is no choice of the operation, or the rule is not known.

    Example:
        >>> fixed("softshrink", (0.0, 1.0)).at_kinks("softshrink")
        (0.0, 1.0)
    """
    if torch.compiler.is_compiling():
        refuse_traced_transforms()
    choice = OwnChoice((operations,) if isinstance(operations, str) else operations, value, rule)
    return Selection(choice, seed, constant=True) if choice.value == "random" else _kept(choice)


class TracedTransformError(NotImplementedError, AssertionError):
    """The compiler traces a choice in a transform that drops it. The compiler lets only some error classes through."""


@while_compiling
def refuse_traced_transforms() -> bool:
    """Refuse a choice that the compiler traces in forward mode, where it would keep PyTorch's derivative.

    It refuses a choice inside ``vmap`` and ``grad`` together, too: the compiler has no rule for it.

    Returns:
        True.

    Raises:
        TracedTransformError: Inside ``torch.func.jvp``, ``jacfwd`` and ``hessian``, or ``vmap`` of ``grad``.
    """
    transforms = running_transforms()
    if "Jvp" in transforms or {"Vmap", "Grad"} <= transforms:
        raise TracedTransformError(
            "torch.compile drops the Jacobian choice inside torch.func.jvp, jacfwd, hessian and vmap of grad: compile "
            "the model, and call the transform outside of the compiled function"
        )
    return True


def guarded(y: Tensor, operation: str, selection: Selection) -> Tensor:
    """A stock result that takes no choice, because of how it lies in memory: a backward that would need one is refused.

    Args:
        y: The result of a stock operation.
        operation: Whose it is.
        selection: The choice, read when the backward runs.

    Returns:
        ``y``. Its backward raises a ``RuntimeError`` under another choice than the reference, and while a
        recorder is set.
    """

    def refuse(g: Tensor) -> None:
        record, choice = OPERATIONS[operation], getattr(selection.jacobians, operation)
        reference = choice is None or choice == record.default
        if not reference or selection.recorder is not None:
            kind = f"of layout {y.layout}{' (nested)' if y.is_nested else ''}"
            remedy = "Make the tensor dense before it (x.to_dense(), or padding)"
            if y.layout == torch.strided and not y.is_nested:
                kind, remedy = "whose entries share memory, in place,", "Clone the tensor before it"
            raise RuntimeError(
                f"{operation} of a tensor {kind} has PyTorch's own derivative only; given {operation}={choice!r}. "
                f"{remedy}, or skip this site."
            )

    if y.requires_grad:
        # An operation that overwrites a view becomes a node of the base: gradients of other views pass it, too.
        memory = y._base if not torch.compiler.is_compiling() and is_view(y) and y._base is not None else y
        memory.register_hook(refuse)
    return y


@lru_cache(maxsize=1024)
def _kept(choice: OwnChoice) -> Selection:
    return Selection(choice, constant=True)


@lru_cache(maxsize=256)
def pool_coefficients(
    share: float | Tensor,
    whole: float | Tensor,
    each: float | Tensor,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    apart: bool = False,
) -> Tensor:
    """The weights of max pooling for each number of tied entries in a window.

    Args:
        share: As in :meth:`Selection.pool_weights`.
        whole: As in :meth:`Selection.pool_weights`.
        each: As in :meth:`Selection.pool_weights`.
        dtype: The dtype of the result.
        device: The device of the result.
        apart: Keep the share of every tied entry and the target's extra share in separate rows.

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
    target = torch.zeros_like(rest) + whole if apart else rest + whole
    # No tie: all to the target, which is the only one.
    return torch.stack([torch.where(count < 2, 0.0 if apart else 1.0, rest), torch.where(count < 2, 1.0, target)])


def pool_difference_coefficients(
    weights: tuple[float, float, float, float],
    less: tuple[float, float, float, float],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, bool] | None:
    """The coefficients of one choice less those of another, which are 0 where no entry ties.

    Args:
        weights: The choice, as :meth:`Selection.pool_weights` returns it.
        less: The weights of the other choice.
        dtype: The dtype of the result; the coefficients are formed in float64.
        device: The device of the result.

    Returns:
        Coefficients as :func:`pool_coefficients` has them, and whether the target is the last tied entry. None where
        the two choices have different targets.

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
    """Return whether an operation has the values of its input before it, in memory.

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
    """Return whether an operation may look at its values to choose its path.

    Args:
        x: The operation's input, any shape and dtype.

    Returns:
        True on a CPU for a :func:`concrete` tensor; False on an accelerator, where looking would wait for the device.
    """
    return x.device.type == "cpu" and concrete(x)
