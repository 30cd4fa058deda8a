"""Functional calls of a patched model, caught while its code runs."""

from __future__ import annotations

import builtins
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from types import CodeType, FrameType
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from nslightning._torch import (
    active_function_modes,
    as_subclass,
    beneath_modes,
    carries_tangent,
    compile_as,
    compile_functions_for_modes,
    compiler_is_imported,
    derives,
    disable_function_modes,
    disabled_torch_function,
    eager,
    is_exporting,
    is_linked,
    is_operator,
    never_compile_eager,
    other_function_modes,
    sequence_number,
    while_compiling,
)
from nslightning.ops.autograd.routing import watchers
from nslightning.ops.autograd.selection import Selection, refuse_traced_transforms
from nslightning.ops.record import FUNCTIONS, Call, Operation, named
from nslightning.ops.unreached import SMOOTH, UNSUPPORTED_FUNCTIONS
from nslightning.surgery.exporting import exported
from nslightning.surgery.graph import foreign
from nslightning.surgery.report import Site, UnreachedError
from nslightning.surgery.state import CHECKPOINT, Part, Surgery

__all__ = [
    "FORGETFUL",
    "FunctionalCalls",
    "arguments_as_called",
    "compiling_run",
    "evaluate",
    "running",
    "teach_the_compiler",
    "waits_for_backward",
]

# Functions of torch whose handler forgets arguments where a mode is active: the mode would call them without.
# tests/surgery/test_stock.py reads this off their source.
FORGETFUL: frozenset[Callable[..., Any]] = frozenset(
    (torch.nn.functional.l1_loss, torch.chain_matmul, Tensor.dim_order, Tensor.__dlpack__)
)


# Functions that run a backward: PyTorch takes the mode away while they do, and code that runs in it begins afresh.
_BACKWARDS = frozenset((torch.autograd.grad, torch.autograd.backward, Tensor.backward))


class Ranked(NamedTuple):
    """A call that returned values in an order that PyTorch chose, and their indices, which may be all that is used.

    Args:
        first: The number of the first autograd node that it made.
        last: The number after the last one's.
        part: The surgery's record of the module that made the call.
        operation: The operation, which has no choice.
        kind: The name of the function.
    """

    first: int
    last: int
    part: Part
    operation: str
    kind: str


class FunctionalCalls(TorchFunctionMode):
    """One run of a patched model's code: what it evaluates is counted, and its functional calls are caught.

    Args:
        surgery: The surgery of the model that is running.
        entrance: The method that begins it: the surgery's record of its module, its name, and whether the module is in
            training mode.
        recording: Note which autograd nodes each site and each module makes.
        idle: Whether the method that is running was called without gradients: only calls in a part of its code that
            switches derivatives on matter.

    Attributes:
        part: The surgery's record of the innermost patched module whose code is running.
        differentiating: Whether gradients were wanted when the run began.
        evaluations: Number of evaluations of each row of the report.
        owned: Ranges of autograd nodes that a site made, or a call that the report names or the surgery leaves alone.
        ranked: Calls of an operation without a choice that return indices too.
        made: Backward nodes that Python made, and the surgery's records of the modules whose code ran then.
        extent: The range of autograd nodes that the run made, once it has ended.
        spans: Ranges of those that the code of an inner module made, the innermost first.
        entered: The methods that ran, as in ``entrance``.
        over: Whether the run has ended; a thread that it started may still be running.
        others: How many modes of others see each call first.
        woken: Whether a part of its code that switches derivatives on made a call that may matter.
    """

    def __init__(
        self, surgery: Surgery, entrance: tuple[Part, str, bool], recording: bool = False, idle: bool = False
    ) -> None:
        super().__init__()
        self.surgery, self.entrance, self.recording, self.idle = surgery, entrance, recording, idle
        self.part = entrance[0]
        self.differentiating = torch.is_grad_enabled()
        self.evaluations: dict[int, tuple[Site, int]] = {}
        self.owned: list[tuple[int, int]] = []
        self.ranked: list[Ranked] = []
        self.made: list[tuple[ref[Any], Part]] = []
        self.spans: list[tuple[int, int, Part]] = []
        self.entered: set[tuple[Part, str, bool]] = set()
        self.origin = self  # a copy for another thread refers to the run that it was copied from
        self.over = False
        self.others = other_function_modes(FunctionalCalls)
        self.woken = False
        self.extent = (0, 0)
        self._numbers: dict[tuple[int, str], int] = {}

    def in_thread(self) -> FunctionalCalls:
        """Return this run for another thread, which shares the counts and has its own running module."""
        run = object.__new__(FunctionalCalls)
        run.__dict__.update(self.__dict__)
        return run

    def count(self, site: Site) -> None:
        """Count one evaluation at a site.

        Args:
            site: A row of the report.
        """
        self.evaluations[id(site)] = (site, self.evaluations.get(id(site), (site, 0))[1] + 1)

    def own(self, start: int, end: int) -> None:
        """Note that an operation with its own choice made some nodes.

        Args:
            start: The number of the first node.
            end: The number after the last one's.
        """
        if any(run.origin is self for run in (*_here.runs, *_here.paused)):  # each thread numbers its own nodes
            self.owned.append((start, end))

    @eager
    def outermost(self, code: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a method's code as this run, in this thread and in those that the code starts.

        Args:
            code: The code.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            What the code returns.
        """
        surgery, before = self.surgery, _here.runs
        if self.recording or self.others:  # a fast path notes no nodes, and shows no call to others
            for site in surgery.sites:
                site.fast, site.settled = None, False
        if compiler_is_imported():  # the code may run parts that are compiled
            teach_the_compiler()
        self.entered.add(self.entrance)
        _here.runs = (*before, self)
        _threads.follow()
        if self.recording:
            watchers.append(self.own)
            _functions.follow()
        mode = beneath_modes(self, self.others) if self.others else self if surgery.catching else nullcontext()
        start = sequence_number()
        try:
            with mode:
                return code(*args, **kwargs)
        finally:
            self.extent, self.over = (start, sequence_number()), True
            if self.recording:
                watchers.remove(self.own)
                _functions.release()
            _threads.release()
            _here.runs = before

    @eager
    def inside(self, part: Part, code: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the code of another module's method as a part of this run.

        Args:
            part: The surgery's record of the module.
            code: The code.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            What the code returns.
        """
        before, self.part = self.part, part
        start = sequence_number() if self.recording else 0
        try:
            return code(*args, **kwargs)
        finally:
            self.part = before
            if self.recording:
                self.spans.append((start, sequence_number(), part))

    def owning(self, code: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run code whose nodes the check of the graph passes over: a site's, or some that the report names.

        Args:
            code: The code.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            What the code returns.
        """
        if not self.recording:
            return code(*args, **kwargs)
        start = sequence_number()
        result = code(*args, **kwargs)
        self.owned.append((start, sequence_number()))
        return result

    def evaluate(self, part: Part, operation: Operation, call: Call, kind: str, how: Any) -> Any:
        """Evaluate a call of a site under the choice, count it, and show it to the observer.

        Args:
            part: The surgery's record of the module that makes the call.
            operation: The operation.
            call: The call.
            kind: The name of the function, or of the module's class.
            how: How the surgery reaches the site: ``"functional"`` or ``"module"``.

        Returns:
            The stock call's result.
        """
        surgery = self.surgery
        rules = surgery.decide(part, operation.name, self.number)
        selection = surgery.selections[rules]
        site = surgery.row(part, operation.name, kind, call.inplace, how, rules)
        self.count(site)
        if selection.observer is not None:
            name = part.names[0] if how == "module" or site is part.site else f"{part.names[0]}:{site.kind}"
            with disable_function_modes():
                selection.observer(name, operation, call)
        return self.owning(evaluate, operation, selection, call)

    def number(self, part: Part, operation: str) -> int:
        """The number, from 0, of the call of an operation that a module now makes.

        Args:
            part: The surgery's record of the module.
            operation: The field of :class:`~nslightning.Jacobians`.

        Returns:
            How many such calls this run has made before.
        """
        key = (id(part), operation)
        self._numbers[key] = self._numbers.get(key, -1) + 1
        return self._numbers[key]

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BACKWARDS and not torch.compiler.is_compiling():
            self.await_gradients()
            with _no_run():
                return func(*args, **kwargs)
        # The compiler hands this method, which is written in Python, over as an object that no dictionary has as a key.
        if func is Tensor.norm:
            func = Tensor.norm
        if func in FORGETFUL and not torch.compiler.is_compiling():
            args, kwargs = arguments_as_called(func, args, kwargs)
        if self.idle and not self._wakes(func):
            return func(*args, **kwargs)
        # A result in `out=` has no gradient, and PyTorch refuses `out=` where one is wanted.
        operations = FUNCTIONS.get(func, ()) if kwargs.get("out") is None else ()
        for operation in operations:
            try:
                call = operation.functions[func](*args, **named(func, kwargs))
            except Exception:
                if torch.compiler.is_compiling():
                    raise
                return self._misread(operation, func, args, kwargs)
            if call is not None and call.x.is_floating_point():
                return self._reached(operation, call, func, args, kwargs)
        if func in UNSUPPORTED_FUNCTIONS and _differentiable(args, kwargs):
            return self._unreached(func, args, kwargs)
        return self.owning(func, *args, **kwargs) if func in SMOOTH else func(*args, **kwargs)

    def _wakes(self, func: Callable) -> bool:
        """Return whether derivatives are on though the method was called without; note it if the function matters."""
        if not (torch.is_grad_enabled() if torch.compiler.is_compiling() else derives()):
            return False
        self.origin.woken |= func in FUNCTIONS or func in UNSUPPORTED_FUNCTIONS
        return True

    def _unreached(self, func: Callable, args: Any, kwargs: Any) -> Any:
        """Name, or refuse, a call of an operation that has no choice."""
        surgery, operation, part = self.surgery, UNSUPPORTED_FUNCTIONS[func], self.part
        kind = getattr(func, "__name__", str(func))
        if torch.compiler.is_compiling():  # no row can be made here, and the calling module is not known
            if surgery.strict and not (surgery.only or surgery.skip):
                surgery.refuse_traced(operation, kind)
            return func(*args, **kwargs)
        if not part.chosen:
            return self.owning(func, *args, **kwargs)
        start = sequence_number()
        result = func(*args, **kwargs)
        if _with_indices(result):  # it matters only if the values are used: the graph or the backward shows that
            self.ranked.append(Ranked(start, sequence_number(), part, operation, kind))
            node = result[0].grad_fn
            if node is not None:
                node.register_prehook(lambda _: self._flows(part, operation, kind))
            return result
        self.owned.append((start, sequence_number()))
        self.count(surgery.unreached(part, operation, kind, kind.endswith("_")))
        return result

    def await_gradients(self) -> None:
        """Name, or refuse, custom backwards as soon as a gradient comes to them, wherever the model put their results.

        Such as a closure, an iterator, an argument of the method, or the loss of an inner gradient.
        """
        made, self.origin.made = self.origin.made, []
        for node, part in ((node, part) for one, part in made if (node := one()) is not None):
            if part.chosen and is_linked(node) and (found := foreign(node)) is not None:
                node.register_prehook(lambda _, part=part, kind=found.kind: self._flows(part, "custom", kind))

    def _flows(self, part: Part, operation: str, kind: str) -> None:
        """Name, or refuse, a call that a gradient passes through."""
        site = self.surgery.unreached(part, operation, kind)
        site.calls = site.calls or 1

    def _misread(self, operation: Operation, func: Callable, args: Any, kwargs: Any) -> Any:
        """Run a call whose arguments the record could not read: PyTorch refuses them, or the call keeps its own way."""
        result = self.owning(func, *args, **kwargs)
        if self.part.chosen and not self.origin.over and _differentiable(args, kwargs):
            why = "with arguments that the patch cannot read"
            self._left(operation, func.__name__, False, why, "Name its arguments as PyTorch's documentation does")
        return result

    def _left(self, operation: Operation, kind: str, inplace: bool, why: str, way: str) -> None:
        """Name, or refuse, a call that keeps PyTorch's own derivative for a reason of its own."""
        site = self.surgery.row(self.part, operation.name, kind, inplace, "unreached")
        site.decided = why
        if self.surgery.strict:
            raise UnreachedError(self.surgery.report.model, [site], way)
        self.count(site)

    def _reached(self, operation: Operation, call: Call, func: Callable, args: Any, kwargs: Any) -> Any:
        surgery = self.surgery
        if torch.compiler.is_compiling():
            if (one := surgery.everywhere[operation.name]) is None:
                raise RuntimeError(
                    "torch.compile does not show which module calls a function, so `only`, `skip` and rules for some "
                    f"modules cannot decide on this {operation.name}. Patch without them, or do not compile."
                )
            return evaluate(operation, one, call)
        part = self.part
        if not part.chosen or self.origin.over:
            return self.owning(func, *args, **kwargs)
        kind = func.__name__
        if (self.differentiating and _recomputed()) or not _plain(call.x):
            why, way = f"on a {type(call.x).__name__}, whose class sees the call first", "Give it a plain tensor"
            if _plain(call.x):
                why = "in a function that it gives to torch.utils.checkpoint"
                way = "Checkpoint an nn.Module that makes the call"
            self._left(operation, kind, call.inplace, why, way)
            return self.owning(func, *args, **kwargs)
        return self.evaluate(part, operation, call, kind, "functional")


def _with_indices(result: Any) -> bool:
    """Return whether a function returned values and their indices."""
    return isinstance(result, tuple) and len(result) == 2 and not result[1].is_floating_point()


def evaluate(operation: Operation, selection: Selection, call: Call) -> Any:
    """Evaluate a call. The mode does not see functions that the operation itself calls.

    Args:
        operation: The operation.
        selection: The choice.
        call: The call to evaluate.

    Returns:
        The stock call's result; a subclass of tensors comes back as itself.
    """
    if torch.compiler.is_compiling():
        refuse_traced_transforms()
    if is_exporting() and torch.is_grad_enabled():
        with disable_function_modes():
            return exported(operation, selection, call)
    with disable_function_modes():
        result = operation.apply(selection, call)
    if torch.compiler.is_compiling() or disabled_torch_function(type(call.x)) or call.inplace:
        return result
    return as_subclass(result, type(call.x))


def _plain(x: Tensor) -> bool:
    """Return whether PyTorch decides what a function does with a tensor, and not the tensor's own class."""
    cls = type(x)
    return disabled_torch_function(cls) or cls.__torch_function__.__func__ is Tensor.__torch_function__.__func__  # type: ignore[attr-defined] # class methods, which the stubs call functions


# What calls a model's methods: a stack frame that runs one of these is an entrance.
_ENTRANCES = (FunctionalCalls.outermost.__code__, FunctionalCalls.inside.__code__)


def _recomputed() -> bool:
    """Return whether a checkpoint lies between a functional call and the patched method that made it.

    The mode is not active when the checkpoint computes the call a second time, in the backward.
    """
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_code not in _ENTRANCES:
        if frame.f_code is CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def arguments_as_called(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a function of :data:`FORGETFUL` was called with: its frame on the stack still has them.

    Args:
        func: The function that a mode's ``__torch_function__`` received; that method must be the caller.
        args: The positional arguments that it received.
        kwargs: The keyword arguments that it received.

    Returns:
        The positional and the keyword arguments.
    """
    code: CodeType = func.__code__
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:  # the handler itself was called, so no argument is missing
        return args, kwargs
    names, values = code.co_varnames, frame.f_locals
    positions, n = code.co_argcount, code.co_argcount + code.co_kwonlyargcount
    rest = values[names[n]] if code.co_flags & 0x04 else ()  # *args
    return (*(values[name] for name in names[:positions]), *rest), {name: values[name] for name in names[positions:n]}


def _differentiable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a gradient may pass through the call: integers, masks and bookkeeping have no derivative."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    return not torch.compiler.is_compiling() and any(map(carries_tangent, tensors))


# ------------------------------------------------------------------------------------------ runs of this thread
class _Runs(threading.local):
    """The runs under way in this thread, the innermost last."""

    runs: tuple[FunctionalCalls, ...] = ()
    paused: tuple[FunctionalCalls, ...] = ()  # while a backward that they began runs


_here = _Runs()


@eager
def running(surgery: Surgery) -> FunctionalCalls | None:
    """The run of a model's code in this thread, in eager mode.

    Args:
        surgery: The surgery of the model.

    Returns:
        The run, or None.
    """
    for run in reversed(_here.runs):
        if run.surgery is surgery:
            return run
    return None


def waits_for_backward(surgery: Surgery) -> bool:
    """Return whether a model's code has begun a backward in this thread, and waits for it.

    Args:
        surgery: The surgery of the model.

    Returns:
        Whether a run is paused: a checkpoint computes a part of the forward again.
    """
    return any(run.surgery is surgery for run in _here.paused)


def compiling_run(surgery: Surgery) -> bool:
    """Return whether the compiler traces code whose functional calls are caught already.

    Args:
        surgery: The surgery of the model.

    Returns:
        True inside a patched method.
    """
    return any(isinstance(mode, FunctionalCalls) and mode.surgery is surgery for mode in active_function_modes())


@contextmanager
def _no_run() -> Iterator[None]:
    """Let patched methods begin runs of their own: a checkpoint calls them in a backward, where no mode is active."""
    before = _here.runs, _here.paused
    _here.runs, _here.paused = (), (*_here.paused, *_here.runs)
    try:
        yield
    finally:
        _here.runs, _here.paused = before


class _Replaced:
    """Replaces methods of classes that are not this package's while a patched method runs in some thread."""

    def __init__(self, *replacements: tuple[type, str, Any]) -> None:
        self.lock, self.users, self.replacements = threading.Lock(), 0, replacements
        self.before: list[Any] = []

    @eager
    def follow(self) -> None:
        """A method begins."""
        with self.lock:
            self.users += 1
            if self.users == 1:
                self.before = [vars(cls).get(name) for cls, name, _ in self.replacements]
                for cls, name, replacement in self.replacements:
                    setattr(cls, name, replacement)

    @eager
    def release(self) -> None:
        """A method ends."""
        with self.lock:
            self.users -= 1
            if not self.users:
                for (cls, name, _), before in zip(self.replacements, self.before, strict=True):
                    delattr(cls, name) if before is None else setattr(cls, name, before)


def _start(thread: threading.Thread) -> None:
    worker = getattr(getattr(thread, "_target", None), "__module__", "") == "concurrent.futures.thread"
    if _here.runs and not worker:  # a pool's worker outlives the method; each task that it runs carries its own run
        thread.run = _following(thread.run)  # type: ignore[method-assign] # this thread's alone
    _threads.before[0](thread)


def _submit(pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return _threads.before[1](pool, _following(function) if _here.runs else function, *args, **kwargs)


def _note(node: Any, *_: Any) -> None:
    """Note a backward node that Python makes, for the innermost run of this thread."""
    for run in reversed((*_here.paused, *_here.runs)):
        if run.recording:
            run.origin.made.append((ref(node), run.part))
            return


# A mode is active in one thread only: the threads and tasks that a patched method starts become part of its run. The
# replacements check whether the calling thread runs a patched method.
_threads = _Replaced((threading.Thread, "start", _start), (ThreadPoolExecutor, "submit", _submit))
# No mode sees that a custom function is applied.
_functions = _Replaced((BackwardCFunction, "__init__", _note))


def _following(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs in another thread as part of the runs of this one."""
    runs = tuple(run.in_thread() for run in _here.runs)

    def follow(*args: Any, **kwargs: Any) -> Any:
        before = _here.runs
        _here.runs = runs
        try:
            return _within(runs, lambda: function(*args, **kwargs))
        finally:
            _here.runs = before

    return follow


def _within(runs: tuple[FunctionalCalls, ...], function: Callable[[], Any]) -> Any:
    if not runs:
        return function()
    outer, *inner = runs
    if not outer.surgery.catching:
        return _within(tuple(inner), function)
    with outer:
        return _within(tuple(inner), function)


# ------------------------------------------------------------------------------------------------- compiler
@while_compiling
def teach_the_compiler() -> bool:
    """Make ``torch.compile`` hand to the mode what eager mode hands to it.

    This happens once, before a patched model or a part of one is compiled.

    In torch 2.15 it passes over functions that end with an underscore, ``torch.relu_`` or ``F.elu_``, over
    ``F.hardswish`` and ``F.hardsigmoid``, and over ``abs(x)``: these kept PyTorch's own derivative, in silence.

    Returns:
        True: the compiler takes it for a constant.
    """
    _teach()
    return True


@cache
def _teach() -> None:
    compile_functions_for_modes(f for f in (*FUNCTIONS, *UNSUPPORTED_FUNCTIONS) if not is_operator(f))
    for absolute in (builtins.abs, operator.abs):
        compile_as(absolute, _absolute)
    never_compile_eager()


def _absolute(x: Any, /) -> Any:
    return x.abs() if isinstance(x, Tensor) else x.__abs__()
