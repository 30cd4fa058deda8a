"""The objects that replace the methods of a patched module; they are attributes of the instance.

The class of the module stays the same. Python looks a method up on the instance first, and ``nn.Module.__call__`` looks
``forward`` up there too: both get the object. The object runs the method that the class has at the time of the call.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import warnings
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from contextlib import _AsyncGeneratorContextManager, _GeneratorContextManager
from functools import partial, partialmethod, singledispatchmethod, wraps
from types import CodeType, FunctionType, MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nslightning._torch import (
    call_with_hooks,
    compiler_is_imported,
    compiler_is_reading,
    derives,
    disable_function_modes,
    fx_tracer,
    fx_tracers_code,
    has_autograd_formula,
    is_compiled_function,
    is_tracing,
    kept_attributes,
    number_of,
    other_function_modes,
    sequence_number,
    traced_functions,
    while_compiling,
    without_mode,
)
from nslightning.ops.autograd import native
from nslightning.ops.record import FUNCTIONS, OPERATIONS, positional
from nslightning.surgery.graph import foreign_nodes, is_checkpoint, kinds, mark, nodes, structure, tensors
from nslightning.surgery.interception import (
    FunctionalCalls,
    begun,
    compiling_run,
    evaluate,
    running,
    teach_the_compiler,
)
from nslightning.surgery.report import PatchReport, PatchWarning, TracedUnreachedError
from nslightning.surgery.state import Part

__all__ = [
    "Caller",
    "ClassName",
    "LeftAlone",
    "Method",
    "Reduction",
    "SiteForward",
    "SiteText",
    "accessors",
    "binds_itself",
    "nothing_to_patch",
]

#: The code objects that call a method of a patched module; their local variable `self` is the module.
accessors: set[CodeType] = {nn.Module.__call__.__code__, getattr(nn.Module, call_with_hooks()).__code__}
_NONE = object()
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _MethodType(type):
    """Makes a method of a function and an object, too, as ``types.MethodType`` does for ``weakref.WeakMethod``."""

    def __call__(cls, *args: Any) -> Any:
        if len(args) == 2 and isinstance(args[1], nn.Module):
            function, module = args
            methods = (m for m in module.__dict__.values() if issubclass(type(m), cls) and m.has_function(function))
            return next(methods, None) or MethodType(function, module)
        return super().__call__(*args)


class Method(metaclass=_MethodType):
    """One method of one patched module.

    It looks like the bound method that it replaces: signature, annotations, documentation, ``__wrapped__``,
    ``__func__`` and ``inspect.ismethod`` are those of the bound method. Copies and pickles belong to the copied module.
    It refers to the module weakly, so that Python frees a patched model as soon as an unpatched one. Where code holds
    it longer than the module, a call raises. A method that is copied or pickled without its module keeps its module
    alive. After :func:`~nslightning.unpatch` it runs the method that it replaced.

    Args:
        module: The module.
        name: The method's name.
        part: The surgery's record of the module.
        replaced: The attribute that the instance had under this name before.
    """

    #: The module, where this may be its only reference.
    owner: nn.Module | None = None

    def __init__(self, module: nn.Module, name: str, part: Part, replaced: Any = _NONE) -> None:
        self.ref, self.name, self.part, self.replaced = weakref.ref(module), name, part, replaced
        defined = inspect.getattr_static(type(module), name, None)
        self.unbound = isinstance(defined, (staticmethod, classmethod))  # it does not take the module as an argument
        self.descriptor: Any = defined if binds_itself(defined) else None
        self.kind = type(self.stock(module))
        for attribute in ("__doc__", "__module__", "__annotations__"):  # otherwise Python finds those of this class
            self.__dict__[attribute] = getattr(self.stock(module), attribute, None)

    @property
    def module(self) -> nn.Module:
        """The module that it belongs to."""
        module = self.ref()
        if module is None:
            raise ReferenceError(
                f"the module of this patched {self.name} is gone, since code kept only the method: keep the module in "
                f"a variable, such as `model`, and call `model.{self.name}`"
            )
        return module

    @property
    def is_replacement(self) -> bool:
        """Return whether the instance had an attribute under this name before the patch."""
        return self.replaced is not _NONE

    def stock(self, module: nn.Module) -> Callable[..., Any]:
        """The method that it replaces.

        Args:
            module: The module, or a shallow copy of it.

        Returns:
            The bound method.
        """
        if self.is_replacement:
            return self.replaced  # type: ignore[no-any-return] # of the user's class: any type
        if self.descriptor is not None:  # the class returns no plain function for it
            return self.descriptor.__get__(module, type(module))  # type: ignore[no-any-return] # the same
        method = getattr(type(module), self.name)
        if self.unbound:
            return method  # type: ignore[no-any-return] # of the user's class: any type
        if torch.compiler.is_compiling():  # the compiler of torch 2.11 does not follow a descriptor's `__get__`
            return partial(method, module)
        return method.__get__(module)  # type: ignore[no-any-return] # of the user's class: any type

    @property  # type: ignore[misc] # a read-only `__class__`
    def __class__(self) -> type:  # `inspect` and Lightning read it
        # The compiler of torch 2.11 would call the stock function of a bound method, and so drop the choice.
        return type(self) if compiler_is_reading() else self.kind

    @property
    def __wrapped__(self) -> Any:
        return self.stock(self.module)

    def __getattr__(self, name: str) -> Any:
        if name == "__globals__":
            raise AttributeError(
                "torch.jit.script drops the Jacobian choice: unpatch the model first (for cloudpickle, too, where a "
                "lambda is an attribute)"
            )
        if name in _OF_METHODS or name in _PICKLING:
            raise AttributeError(name)  # the object is not initialised yet
        return getattr(self.stock(self.module), name)

    def __repr__(self) -> str:
        return f"<patched {self.stock(self.module)!r}>"

    def __eq__(self, other: object) -> bool:
        """Whether the methods that they replace are equal: a model may look a bound method up in a dictionary."""
        if self is other or (module := self.ref()) is None:
            return self is other
        if isinstance(type(other), _MethodType):
            of = other.ref()  # type: ignore[attr-defined] # mypy narrows no type by its metaclass
            other = None if of is None else other.stock(of)  # type: ignore[attr-defined] # the same
        return bool(self.stock(module) == other)

    def __hash__(self) -> int:
        module = self.ref()
        return object.__hash__(self) if module is None else hash(self.stock(module))

    def has_function(self, function: Any) -> bool:
        """Return whether this object replaces the bound method of a function."""
        return getattr(self.stock(self.module), "__func__", None) is function

    @property
    def stands(self) -> bool:
        """Return whether the module has it in the method's place."""
        return self.module.__dict__.get(self.name) is self

    def retire(self) -> None:
        """Run the stock method from now on: code may have kept this object."""
        self.part.undone = True

    def __copy__(self) -> Method:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if not self.stands:
            return copy.deepcopy(self.stock(self.module), memo)
        by_itself = id(self.module) not in memo
        module = copy.deepcopy(self.module, memo)
        if by_itself:
            return _kept(module, self.name)
        kept = (copy.deepcopy(self.replaced, memo),) if self.is_replacement else ()
        part = copy.deepcopy(self.part, memo)
        if id(self) in memo:  # the part knows the tables that this method stands in
            return memo[id(self)]
        return type(self)(module, self.name, part, *kept)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if kept_attributes(self.module) is not None:
            raise pickle.PicklingError(
                "torch.fx pickles the code of a GraphModule and no more: unpatch the model first"
            )
        if not self.stands:
            return getattr, (self.module, self.name)
        kept = (self.replaced,) if self.is_replacement else ()
        return _unpickled, (type(self), self.module, self.name, self.part, *kept)


def binds_itself(value: Any) -> bool:
    """Return whether an object in a class makes the method itself when it is read, as a decorator's object may.

    Args:
        value: What the class has under the method's name.

    Returns:
        False for functions, and for what is no method.
    """
    if isinstance(value, (partialmethod, singledispatchmethod)):
        return True
    cls = type(value)
    if cls.__module__ in ("builtins", "functools") or not callable(value):
        return False
    return hasattr(cls, "__get__") and not hasattr(cls, "__set__")


class Reduction(Method):
    """The method that tells :mod:`copy` and :mod:`pickle` what a module is made of.

    A shallow copy has the attributes of its original. It needs methods of its own, which read the copy.
    """

    def __call__(self, protocol: Any) -> Any:
        """What the module is made of."""
        reduced = self.stock(self.module)(protocol)
        if isinstance(reduced, str) or sys._getframe(1).f_code is not copy.copy.__code__:
            return reduced
        return _shallow_copy, reduced


def _shallow_copy(make: Callable[..., Any], args: tuple[Any, ...], state: Any = None, *_: Any) -> Any:
    """A copy from what a module is made of, as ``copy.copy`` makes it, with methods of its own."""
    copied = make(*args)
    if state is not None:
        copied.__setstate__(state)
    _adopt(copied)
    return copied


def _adopt(copied: nn.Module) -> None:
    """Give a shallow copy, and the copies inside it, their own methods in the place of those of the original."""
    for module in copied.modules():
        for name, method in list(vars(module).items()):
            if issubclass(type(method), Method) and method.name == name and method.ref() is not module:
                kept = (method.replaced,) if method.is_replacement else ()
                module.__dict__[name] = type(method)(module, name, method.part, *kept)


def _unpickled(cls: type[Method], module: nn.Module, name: str, part: Part, *replaced: Any) -> Any:
    """A method from a pickle of its whole module, which has no attributes yet, or from a pickle of the method alone."""
    return _kept(module, name) if name in module.__dict__ else cls(module, name, part, *replaced)


def _kept(module: nn.Module, name: str) -> Any:
    """A method that keeps its module alive, because the method may hold the only reference to the module."""
    method = getattr(module, name)
    if isinstance(method, Method):
        method.owner = module
    return method


_OF_METHODS = ("ref", "name", "part", "replaced", "owner", "unbound", "descriptor", "kind")
_PICKLING = ("__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__", "__reduce__")


class SiteForward(Method):
    """The ``forward`` of a module that is a nonsmooth operation.

    Attributes:
        fast: The fast path. It exists once the report has the site, and runs first if a call outside the compiler has
            one positional argument. If it returns ``NotImplemented``, the ordinary path runs.
    """

    fast: Callable[[Tensor], Any] | None = None

    def __init__(self, module: nn.Module, name: str, part: Part, replaced: Any = _NONE) -> None:
        super().__init__(module, name, part, replaced)
        self.settled = False  # whether `fast` was asked for
        part.surgery.sites.add(self)

    def __call__(self, x: Any = _NONE, /, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the operation under the choice."""
        if not (args or kwargs or torch.compiler.is_compiling()):
            fast = self.fast
            if fast is not None:
                result = fast(x)
                if result is not NotImplemented:
                    return result
        return self.ordinary(args if x is _NONE else (x, *args), kwargs)

    def retire(self) -> None:
        """Run the stock method from now on, without the fast path."""
        super().retire()
        self.fast, self.settled = None, True

    def ordinary(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The ordinary path, which takes every call.

        Args:
            args: The positional arguments of the module's forward.
            kwargs: Its keyword arguments.

        Returns:
            The stock module's result, bit for bit.
        """
        part = self.part
        surgery, (site, operation, cls) = part.surgery, part.reached
        if part.undone:
            return self.stock(self.module)(*args, **kwargs)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            _refuse_tracing()
        module = self.module if compiling else _accessor(self, 3)
        run = None if compiling else running(surgery)
        if run is not None and run.others and run.part is not part:  # the call that stock makes is theirs to see
            before, run.part = run.part, part
            try:
                return self.stock(module)(*args, **kwargs)
            finally:
                run.part = before
        try:
            with disable_function_modes():
                call = operation.modules[cls](module, *args, **positional(kwargs))
                elsewhere = call is None or not call.x.is_floating_point()
        except Exception:
            if not compiling:
                self.stock(module)(*args, **kwargs)  # raises in PyTorch's words
            raise
        if elsewhere:  # integers and quantised values have no gradient
            return self.stock(module)(*args, **kwargs)
        assert call is not None
        rules = surgery.decide(part, operation.name, None if run is None else run.number)
        selection = surgery.selections[rules]
        if compiling:
            return evaluate(operation, selection, call)
        if run is None and part.names[0] == "" and torch.is_grad_enabled():  # the model is this operation alone
            site.calls, surgery.report.traced = site.calls or 1, True
        looking = run is not None and (run.recording or run.others)  # the fast path shows no call
        if not (self.settled or looking or surgery.counted) and site.calls and surgery.report.traced:
            self.settled = True
            self.fast = native.site(operation.name, module, selection)
        if run is None:
            if selection.observer is not None:
                selection.observer(part.names[0], operation, call)
            return evaluate(operation, selection, call)
        run.count(surgery.row(part, operation.name, site.kind, call.inplace, "module", rules))
        start = sequence_number() if run.recording else 0
        if selection.observer is not None:
            with disable_function_modes():
                selection.observer(part.names[0], operation, call)
        result = evaluate(operation, selection, call)
        if run.recording:
            run.owned.append((start, sequence_number()))
        return result


class SiteText(Method):
    """The ``extra_repr`` of a site: the module's own text, followed by the choice."""

    def __call__(self) -> str:
        """The text between the parentheses."""
        module, part = self.module, self.part
        base = self.stock(module)()
        selection = part.surgery.selections[part.first or ()]
        value = getattr(selection.jacobians, part.reached[1].name)
        return f"{base}{', ' if base else ''}jacobian={part.reached[1].written(value)}"


class ClassName(Method):
    """The method that returns the name of a module's class. A ``torch.fx`` tracer calls it first.

    A tracer runs the code of the class, and would silently drop the choice at functional calls.
    """

    def __call__(self) -> str:
        """The name."""
        caller = sys._getframe(1)
        if not torch.compiler.is_compiling() and caller.f_code is fx_tracers_code():
            if type(caller.f_locals.get("self")).__name__ == "QuantizationTracer":
                raise RuntimeError(_QUANTIZE)
            if self.part.may_call:
                raise RuntimeError(_FX)
        return str(self.stock(self.module)())


_COMPILED = (
    "parts of the model are compiled by themselves: they take the choice, but the report cannot list their sites, and "
    "custom backwards in them are not seen. Compile the patched model instead"
)
_FX = "torch.fx drops the Jacobian choice at functional calls: unpatch the model first, and patch the traced graph"
_QUANTIZE = "FX quantisation replaces modules, and their Jacobian choice with them: unpatch the model first"


def _refuse_tracing() -> None:
    """Refuse ``torch.jit.trace``, which drops the choice, where gradients are on; warn where they are off."""
    if not is_tracing():
        return
    if torch.is_grad_enabled():
        raise RuntimeError(
            "torch.jit.trace drops the Jacobian choice: unpatch the model first, or trace it under torch.no_grad() to "
            "run it only"
        )
    warnings.warn("a trace has PyTorch's own derivatives, and no Jacobian choice", PatchWarning, stacklevel=4)


class Caller(Method):
    """A method of a module whose code may call functions: they are caught while it runs."""

    #: Modules of torch's that take another kernel where a mode is active, if they are in evaluation mode and no
    #: gradient passes: tests/surgery/test_stock.py reads off their source which they are.
    FUSED: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.MultiheadAttention,
        nn.TransformerEncoderLayer,
        nn.TransformerEncoder,
    )

    #: Whether what it returns may be the model's results, so that the report is complete when it has run.
    returns_results = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method."""
        surgery = self.part.surgery
        if self.part.undone:
            return self.stock(self.module)(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self._compiled(args, kwargs)
        _refuse_tracing()
        module = _accessor(self, 2)
        method = self.stock(module)
        if (tracer := fx_tracer((*args, *kwargs.values()))) is not None:
            if not self.part.may_call:
                return method(*args, **kwargs)
            if self.name not in ("forward", call_with_hooks()):
                raise RuntimeError(_FX)
            # A leaf of the graph: the graph calls the module, and the module keeps the choice.
            return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
        run = running(surgery)
        if self._fused(module, args, kwargs):
            return self._unseen(run, method, args, kwargs)
        # Without derivatives there is no choice to make, and without observers no call to show.
        if not (derives() or surgery.watched):
            return self._idle(run, module, method, args, kwargs)
        if run is None:
            return self._outermost(module, method, args, kwargs)
        return self._inside(run, module, method, args, kwargs)

    def _unseen(
        self, run: FunctionalCalls | None, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the method without a mode."""
        if run is None:
            return method(*args, **kwargs)
        with without_mode(run):
            return method(*args, **kwargs)

    def _idle(
        self,
        run: FunctionalCalls | None,
        module: nn.Module,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the method where derivatives are off: without a mode, unless a part of its code switches them on.

        Whether there is such a part is looked at in the first run, and in the run after one that made autograd nodes.
        """
        surgery, entrance = self.part.surgery, (self.part, self.name, module.training)
        if not surgery.catching or is_tracing():
            return method(*args, **kwargs)
        if not surgery.may_wake(entrance):
            start = sequence_number()
            result = self._unseen(run, method, args, kwargs)
            if sequence_number() != start:
                surgery.made_nodes(entrance)
            return result
        if run is not None:
            before, run.idle, run.origin.woken = (run.idle, run.origin.woken), True, False
            try:
                return self._inside(run, module, method, args, kwargs)
            finally:
                surgery.woke(entrance, run.origin.woken)
                run.idle, run.origin.woken = before[0], before[1] or run.origin.woken
        run = FunctionalCalls(surgery, self.part)
        run.idle = True
        with begun(run):
            result = method(*args, **kwargs)
        if run.woken:
            self._finish(run, module, (args, kwargs), result)
        driven = self._suspended(method, args, result)
        surgery.woke(entrance, run.woken or driven is not None)
        return result if driven is None else driven

    def _outermost(
        self, module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        part = self.part
        surgery, key = part.surgery, (part, self.name, module.training)
        recording = torch.is_grad_enabled() and surgery.records(key)
        seen = surgery.catching or recording or surgery.counted or surgery.watched
        if not (seen or other_function_modes(FunctionalCalls)):
            start = sequence_number()
            result = method(*args, **kwargs)
            if sequence_number() - start not in surgery.counts:
                surgery.look_at_next(key)
            if start < surgery.first:  # in another thread
                mark(tensors(result), surgery)
            return result
        run = FunctionalCalls(surgery, part, recording)
        run.entered.add(key)
        if recording or run.others:
            for site in surgery.sites:
                site.fast, site.settled = None, False
        if compiler_is_imported():  # the method may run parts that are compiled
            _teach_the_compiler()
        with begun(run):
            start = sequence_number()
            result = method(*args, **kwargs)
            run.spans.append((start, sequence_number(), part))
        if start < surgery.first:  # in another thread
            mark(tensors(result), surgery)
        if (driven := self._suspended(method, args, result)) is not None:
            return driven
        self._finish(run, module, (args, kwargs), result)
        return self._returned(module, method, result)

    def _inside(
        self,
        run: FunctionalCalls,
        module: nn.Module,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        before, run.part = run.part, self.part
        if not run.idle:
            run.entered.add((self.part, self.name, module.training))
        start = sequence_number() if run.recording else 0
        try:
            result = method(*args, **kwargs)
        finally:
            run.part = before
        if run.recording:
            run.spans.append((start, sequence_number(), self.part))
        if (driven := self._suspended(method, args, result)) is not None:
            return driven
        return self._returned(module, method, result)

    def _suspended(self, method: Callable[..., Any], args: tuple[Any, ...], result: Any) -> Any:
        """A driver for the generator, coroutine or asynchronous generator that the method returned, or None.

        A context manager that is made from a generator gets the driver in the generator's place.
        """
        if isinstance(result, (_GeneratorContextManager, _AsyncGeneratorContextManager)):
            driven = self._suspended(method, args, result.gen)
            result.gen = result.gen if driven is None else driven
            return None
        if any(result is x for x in args):  # the caller made it, not the method
            return None
        if inspect.isgenerator(result):
            begins = inspect.getgeneratorstate(result) == inspect.GEN_CREATED
            return self._driven(result) if begins and result.gi_code is not Caller._driven.__code__ else None
        if inspect.iscoroutine(result):
            begins = inspect.getcoroutinestate(result) == inspect.CORO_CREATED
            return self._awaited(result) if begins and result.cr_code is not Caller._awaited.__code__ else None
        if isinstance(result, AsyncGenerator) and inspect.isasyncgenfunction(inspect.unwrap(method)):
            return self._iterated(result)
        return None

    def _returned(self, module: nn.Module, method: Callable[..., Any], result: Any) -> Any:
        """The method's result. Functions in it that take a choice, or that the method made, become entrances."""
        if isinstance(result, (map, filter)) and torch.is_grad_enabled():
            warnings.warn(
                f"{self.name} returns a {type(result).__name__}, whose code runs later and keeps PyTorch's derivative: "
                "return a list, or a generator",
                PatchWarning,
                stacklevel=4,
            )
        if type(result) is tuple:
            changed = tuple(self._returned(module, method, x) for x in result)
            return changed if any(x is not y for x, y in zip(changed, result, strict=True)) else result
        if type(result) in (list, dict) and len(result) <= 64:
            for key, x in list(result.items() if isinstance(result, dict) else enumerate(result)):
                if (changed := self._later_or_partial(module, method, x)) is not x:
                    result[key] = changed
            return result
        return self._later_or_partial(module, method, result)

    def _later_or_partial(self, module: nn.Module, method: Callable[..., Any], result: Any) -> Any:
        if isinstance(result, partial):
            code = self._later(module, method, result.func)
            return result if code is result.func else partial(code, *result.args, **result.keywords)
        return self._later(module, method, result)

    def _later(self, module: nn.Module, method: Callable[..., Any], function: Any) -> Any:
        if not (_makes(method, function) or (isinstance(function, Callable) and _chooses(function))):  # type: ignore[arg-type] # any callable with a name
            return function
        entrance = Caller(module, f"{self.name}.{function.__name__}", self.part, function)

        @wraps(function)
        def later(*args: Any, **kwargs: Any) -> Any:
            return entrance(*args, **kwargs) if entrance.ref() is not None else function(*args, **kwargs)

        later.module = module  # type: ignore[attr-defined] # the entrance refers to it weakly
        return later

    async def _awaited(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await _Steps(self._driven(coroutine))

    async def _iterated(self, generator: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
        step = generator.asend(None)
        while True:
            try:
                value = await _Steps(self._driven(step))
            except StopAsyncIteration:
                return
            try:
                step = generator.asend((yield value))
            except GeneratorExit:
                await generator.aclose()
                raise
            except BaseException as error:
                step = generator.athrow(error)

    def _driven(self, generator: Any) -> Generator[Any, Any, Any]:
        """A generator that runs each step of a generator or a coroutine as part of the method."""
        surgery, step = self.part.surgery, partial(generator.send, None)
        key = (self.part, self.name, self.module.training)
        recording = torch.is_grad_enabled() and surgery.records(key)  # in all its steps, or in no step
        while True:
            inner = running(surgery)
            try:
                if inner is not None:
                    before, inner.part = inner.part, self.part
                    try:
                        value = step()
                    finally:
                        inner.part = before
                else:
                    value = self._step(step, recording)
            except StopIteration as stop:
                return stop.value
            try:
                sent = yield value
                step = partial(generator.send, sent)
            except GeneratorExit:
                generator.close()
                raise
            except BaseException as error:
                step = partial(generator.throw, error)

    def _step(self, step: Callable[[], Any], recording: bool) -> Any:
        """Run the code to its next ``yield`` or ``await``, or to its end, and check the graph of the value."""
        surgery = self.part.surgery
        run = FunctionalCalls(surgery, self.part, recording and torch.is_grad_enabled())
        run.entered.add((self.part, self.name, self.module.training))
        run.idle = not (derives() or surgery.watched)
        if run.recording:
            for site in surgery.sites:
                site.fast, site.settled = None, False
        if compiler_is_imported():
            _teach_the_compiler()
        start = sequence_number()
        try:
            with begun(run):
                value = step()
        except (StopIteration, StopAsyncIteration) as stop:
            run.spans.append((start, sequence_number(), self.part))
            self._finish(run, self.module, ((), {}), getattr(stop, "value", None))
            raise
        run.spans.append((start, sequence_number(), self.part))
        self._finish(run, self.module, ((), {}), value)
        return value

    def _fused(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether the module would take another kernel without the mode, and no gradient passes through it."""
        if module.training or not isinstance(module, self.FUSED):
            return False
        if not torch.is_grad_enabled():
            return True
        arguments = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        return not any(x.requires_grad for x in (*arguments, *module.parameters()))

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _teach_the_compiler()
        part, module = self.part, self.module
        surgery, method = part.surgery, self.stock(module)
        idle = not (torch.is_grad_enabled() or surgery.watched)
        if not surgery.catching or (idle and surgery.fused):
            return method(*args, **kwargs)
        if compiling_run(surgery):
            result = method(*args, **kwargs)
        else:
            run = FunctionalCalls(surgery, part)
            run.idle = idle
            with run:
                result = method(*args, **kwargs)
        self._look_at_trace()
        return result

    @while_compiling
    def _look_at_trace(self) -> bool:
        """Name the custom functions in the graph being traced: the compiled graph has one node for all of its code."""
        surgery = self.part.surgery
        for name in _traced_custom_functions():
            site = surgery.row(self.part, "custom", name, False, "unreached")
            site.calls = site.calls or 1
            if surgery.strict and self.part.chosen:
                raise TracedUnreachedError(surgery.report.model, [site])
        return True

    def _finish(
        self, run: FunctionalCalls, module: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], result: Any
    ) -> None:
        """Add the evaluations of a run to the report; check the run's graph if it differs from earlier ones."""
        surgery, report = self.part.surgery, self.part.surgery.report
        run.await_gradients()
        if run.differentiating:
            start, end, _ = run.spans[-1]
            entrance = (self.part, self.name, module.training)
            calls = frozenset((id(site), n) for site, n in run.evaluations.values() if site.how == "functional")
            path = (frozenset(run.entered), calls, kinds(*arguments), structure(result), end - start)
            if run.recording or (path not in surgery.looked and surgery.looks_again(entrance)):
                _look(run, module, arguments, result)
                surgery.checked(entrance, path, run.recording)
                surgery.counts.add(end - start)
        first = not report.traced and run.differentiating
        if first and not run.evaluations:  # a reentrant checkpoint computes without gradients until its backward
            first = self.returns_results and _has_gradient(result)
            first = first and not any(map(is_checkpoint, nodes(tensors(result), _inputs(run, arguments))))
        for site, evaluations in run.evaluations.values():
            site.calls = site.calls or evaluations
        report.traced |= first
        if first and self.part.names[0] == "" and not report.reached:
            compiled = any(map(is_compiled_function, nodes(tensors(result), _inputs(run, arguments))))
            warnings.warn(_COMPILED if compiled else nothing_to_patch(report), PatchWarning, stacklevel=4)
        elif first and self.part.names[0] == "":
            for hint in surgery.idle(module):
                warnings.warn(hint, PatchWarning, stacklevel=4)


class _Steps:
    """An awaitable object made from a generator."""

    def __init__(self, generator: Generator[Any, Any, Any]) -> None:
        self.generator = generator

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.generator


def _makes(method: Callable[..., Any], function: Any) -> bool:
    """Return whether the code of a method makes a function: a closure or a lambda that its body defines."""
    if not isinstance(function, FunctionType) or not inspect.isroutine(method):
        return False
    code: CodeType | None = getattr(inspect.unwrap(method), "__code__", None)
    return code is not None and function.__code__ in _inner(code)


def _inner(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner(constant)


def _chooses(function: Callable[..., Any]) -> bool:
    """Return whether a function of PyTorch's takes a choice."""
    try:
        return function in FUNCTIONS
    except TypeError:  # it has no hash
        return False


class LeftAlone(Caller):
    """The ``forward`` of an operation that the surgery leaves alone: the nodes that it makes are not checked."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method."""
        if torch.compiler.is_compiling():
            with disable_function_modes():
                return self.stock(self.module)(*args, **kwargs)
        module = _accessor(self, 2)
        run = running(self.part.surgery)
        if run is None:
            return self.stock(module)(*args, **kwargs)
        start = sequence_number() if run.recording else 0
        result = self._inside(run, module, self.stock(module), args, kwargs)
        if run.recording:
            run.owned.append((start, sequence_number()))
        return result


FunctionalCalls.entrances |= {
    method.__code__ for method in (Caller._outermost, Caller._inside, Caller._driven, Caller._step, Caller._compiled)
}


@while_compiling
def _teach_the_compiler() -> bool:
    """Prepare the compiler for patched models, before it first compiles one, or a part of one."""
    teach_the_compiler((*_EAGER, foreign_nodes, kinds, nodes, structure, tensors))
    return True


def _traced_custom_functions() -> Iterator[str]:
    """The custom functions, and operators with their own formula, in the graph being traced."""
    for name, file, code in traced_functions():
        places = file.replace("\\", "/").split("/")
        if name == "autograd_function_apply" and not {"nslightning", "torch"} & set(places):
            yield code or "a custom autograd function"
        elif "." in name and not name.startswith("nslightning."):
            namespace, _, operator = name.partition(".")
            if has_autograd_formula(f"{namespace}::{operator.partition('.')[0]}"):
                yield name


def _accessor(method: Method, depth: int) -> nn.Module:
    """The module on which a method was looked up: a shallow copy may share the object with its original.

    ``nn.DataParallel`` makes such copies, one per device. The first call gives them their own methods.
    """
    frame = sys._getframe(depth)
    if frame.f_code in accessors and isinstance(caller := frame.f_locals.get("self"), nn.Module):
        if caller is not method.ref():
            _adopt(caller)
        return caller
    return method.module


def _has_gradient(result: Any) -> bool:
    """Return whether a method's result holds a tensor that autograd can differentiate."""
    return any(x.grad_fn is not None for x in tensors(result))


def _look(run: FunctionalCalls, module: nn.Module, arguments: Any, result: Any) -> None:
    """Name the kinks and custom backwards of the graph that belong to no site."""
    surgery = run.surgery
    made = tensors(result, *module.modules())
    earlier = range(surgery.first_node, run.spans[-1][0])  # of the runs before, whose graphs a module may keep
    for node in foreign_nodes(made, _inputs(run, arguments)):
        if node.operation != "custom" and (not run.recording or node.number in earlier or _owned(run, node.number)):
            continue
        if (ranked := next((r for r in run.ranked if r.first <= node.number < r.last), None)) is not None:
            run.count(surgery.unreached(ranked.part, ranked.operation, ranked.kind))
            continue
        part = next((part for start, end, part in run.spans if start <= node.number < end), run.part)
        if part.site is not None and part.site.how == "unreached" and node.operation != "custom":
            run.count(part.site)  # the module is named already
        elif part.chosen:
            run.count(surgery.unreached(part, node.operation, node.kind))


def _inputs(run: FunctionalCalls, arguments: Any) -> list[Tensor]:
    """The tensors among a run's arguments that the run did not overwrite: their graphs are not the model's."""
    start, end, _ = run.spans[-1]
    return [x for x in tensors(arguments) if x.grad_fn is None or not start <= number_of(x.grad_fn) < end]


def _owned(run: FunctionalCalls, number: int) -> bool:
    return any(start <= number < end for start, end in run.owned)


_EAGER = (
    Caller._outermost,
    Caller._inside,
    Caller._idle,
    Caller._unseen,
    Caller._driven,
    Caller._step,
    Caller._finish,
    Caller._suspended,
    Caller._returned,
    _accessor,
    _look,
    _has_gradient,
)


def nothing_to_patch(report: PatchReport) -> str:
    """The warning for a model without any nonsmooth operation.

    Args:
        report: The model's.

    Returns:
        One sentence.
    """
    among = f" among only={', '.join(report.only)}" if report.only else ""
    among += f" without skip={', '.join(report.skip)}" if report.skip else ""
    return f"{report.model} has nothing to patch: none of {', '.join(OPERATIONS)} was found{among}"
