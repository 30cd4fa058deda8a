"""What a patched module runs in place of its methods: objects that stand in the instance, beside its attributes.

The module's class stays its own. ``nn.Module.__call__`` looks ``forward`` up on the instance, and so does everybody who
calls a method; each of these objects runs the method of the module's class, as it is when it is called.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nslightning._torch import (
    call_with_hooks,
    compiler_is_reading,
    disable_function_modes,
    fx_tracer,
    fx_tracers_code,
    has_autograd_formula,
    is_tracing,
    kept_attributes,
    sequence_number,
    traced_functions,
    while_compiling,
    without_mode,
)
from nslightning.ops.autograd import native
from nslightning.ops.record import OPERATIONS, positional
from nslightning.surgery.graph import foreign_nodes, structure, tensors
from nslightning.surgery.interception import (
    FunctionalCalls,
    begun,
    compiling_run,
    evaluate,
    running,
    teach_the_compiler,
)
from nslightning.surgery.report import PatchReport, PatchWarning, UnreachedError
from nslightning.surgery.state import Part

__all__ = ["Caller", "ClassName", "LeftAlone", "Method", "SiteForward", "SiteText", "nothing_to_patch"]

_CALL = getattr(nn.Module, call_with_hooks()).__code__
_NONE = object()


class Method:
    """One method of one patched module.

    It passes for the bound method that it stands for: signature, annotations, documentation, ``__wrapped__``,
    ``__func__`` and ``inspect.ismethod`` are that one's. Copies and pickles belong to the copied module. It refers to
    the module weakly, so that a patched model is freed as soon as an unpatched one.

    Args:
        module: The module.
        name: The method's name.
        part: What the surgery keeps with the module.
        replaced: What stood in the instance under this name before.
    """

    def __init__(self, module: nn.Module, name: str, part: Part, replaced: Any = _NONE) -> None:
        self.ref, self.name, self.part, self.replaced = weakref.ref(module), name, part, replaced
        for attribute in ("__doc__", "__module__", "__annotations__"):  # which would be those of this class
            self.__dict__[attribute] = getattr(self.stock(module), attribute, None)

    @property
    def module(self) -> nn.Module:
        """The module that it belongs to."""
        module = self.ref()
        if module is None:
            raise ReferenceError(f"the module of this patched {self.name} is gone: keep the module, not its method")
        return module

    @property
    def is_replacement(self) -> bool:
        """Whether the instance had something of its own under this name."""
        return self.replaced is not _NONE

    def stock(self, module: nn.Module) -> Callable[..., Any]:
        """The method that it stands for.

        Args:
            module: The module, or a shallow copy of it.

        Returns:
            The bound method.
        """
        if self.is_replacement:
            return self.replaced  # type: ignore[no-any-return]
        method = getattr(type(module), self.name)
        if torch.compiler.is_compiling():  # the compiler of torch 2.11 does not follow a descriptor's `__get__`
            return partial(method, module)
        return method.__get__(module)  # type: ignore[no-any-return]

    @property  # type: ignore[misc] # a type that may be asked for, and not be set
    def __class__(self) -> type:  # what `inspect` and Lightning ask for
        # The compiler of torch 2.11 would go on to what it takes for the method's function, and drop the choice.
        return type(self) if compiler_is_reading() else MethodType

    @property
    def __wrapped__(self) -> Any:
        return self.stock(self.module)

    def __getattr__(self, name: str) -> Any:
        if name == "__globals__":
            raise AttributeError("torch.jit.script drops the Jacobian choice: unpatch the model first")
        if name in ("ref", "name", "part", "replaced") or (name.startswith("__") and name in _PICKLING):
            raise AttributeError(name)  # while it is being made
        return getattr(self.stock(self.module), name)

    def __repr__(self) -> str:
        return f"<patched {self.stock(self.module)!r}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Method:
        module, part = copy.deepcopy(self.module, memo), copy.deepcopy(self.part, memo)
        kept = (copy.deepcopy(self.replaced, memo),) if self.is_replacement else ()
        return type(self)(module, self.name, part, *kept)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if kept_attributes(self.module) is not None:
            raise pickle.PicklingError(
                "torch.fx pickles the code of a GraphModule and no more: unpatch the model first"
            )
        kept = (self.replaced,) if self.is_replacement else ()
        return type(self), (self.module, self.name, self.part, *kept)


_PICKLING = ("__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__", "__reduce__", "__copy__")


class SiteForward(Method):
    """The ``forward`` of a module that is a nonsmooth operation.

    Attributes:
        fast: The quick way, once the report has the site: tried first with one positional argument, outside the
            compiler. Where it returns ``NotImplemented``, the ordinary way runs.
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

    def ordinary(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The way that takes every call.

        Args:
            args: The positional arguments of the module's forward.
            kwargs: Its keyword arguments.

        Returns:
            What the stock module returns, bit for bit.
        """
        part = self.part
        surgery, (site, operation, cls) = part.surgery, part.reached
        compiling = torch.compiler.is_compiling()
        if not compiling:
            _refuse_tracing()
        module = self.module if compiling else _accessor(self, 3)
        with disable_function_modes():
            call = operation.modules[cls](module, *args, **positional(kwargs))
            elsewhere = call is None or not call.x.is_floating_point()
        if elsewhere:  # integers and quantised values have no gradient
            return self.stock(module)(*args, **kwargs)
        assert call is not None
        run = None if compiling else running(surgery)
        rules = surgery.decide(part, operation.name, None if run is None else run.number)
        selection = surgery.selections[rules]
        if compiling:
            return evaluate(operation, selection, call)
        if run is None and part.names[0] == "" and torch.is_grad_enabled():  # the model is this operation alone
            site.calls, surgery.report.traced = site.calls or 1, True
        looking = run is not None and run.recording  # the quick way does not tell which nodes it makes
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
    """The ``extra_repr`` of a site: the module's own, and the choice."""

    def __call__(self) -> str:
        """The text between the parentheses."""
        module, part = self.module, self.part
        base = self.stock(module)()
        selection = part.surgery.selections[part.first or ()]
        value = getattr(selection.jacobians, part.reached[1].name)
        return f"{base}{', ' if base else ''}jacobian={'native' if value is None else value}"


class ClassName(Method):
    """The method that names a module's class: the first thing that a ``torch.fx`` tracer asks the model for.

    A tracer runs the code of the class, and would drop the choice at functional calls in silence.
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


_FX = "torch.fx drops the Jacobian choice at functional calls: unpatch the model first, and patch the traced graph"
_QUANTIZE = "FX quantisation replaces modules, and their Jacobian choice with them: unpatch the model first"


def _refuse_tracing() -> None:
    """Say that ``torch.jit.trace`` drops the choice: an error where gradients are on, for the trace may be trained."""
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method."""
        surgery = self.part.surgery
        if torch.compiler.is_compiling():
            return self._compiled(args, kwargs)
        _refuse_tracing()
        module = _accessor(self, 2)
        method = self.stock(module)
        if (tracer := fx_tracer((*args, *kwargs.values()))) is not None:
            if not self.part.may_call:
                return method(*args, **kwargs)
            if self.name != "forward":
                raise RuntimeError(_FX)
            # A leaf of the graph: the graph calls the module, and the module keeps the choice.
            return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
        run = running(surgery)
        idle = not (torch.is_grad_enabled() or surgery.watched)  # nothing to choose, and nobody watches
        if run is None:
            if idle or self._fused(module, args, kwargs):
                return method(*args, **kwargs)
            return self._outermost(module, method, args, kwargs)
        if idle or self._fused(module, args, kwargs):
            with without_mode(run):
                return method(*args, **kwargs)
        return self._inside(run, module, method, args, kwargs)

    def _outermost(
        self, module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        part = self.part
        surgery, key = part.surgery, (part, self.name, module.training)
        recording = torch.is_grad_enabled() and key not in surgery.looked
        if not surgery.catching and not recording and not surgery.counted and not surgery.watched:
            return method(*args, **kwargs)
        run = FunctionalCalls(surgery, part, recording)
        run.entered.add(key)
        if recording:
            for site in surgery.sites:
                site.fast, site.settled = None, False
        with begun(run):
            start = sequence_number()
            result = method(*args, **kwargs)
            run.spans.append((start, sequence_number(), part))
        if isinstance(result, Generator) and inspect.isgeneratorfunction(inspect.unwrap(method)):
            return self._driven(run, result)
        self._finish(run, module, (args, kwargs), result)
        return result

    def _inside(
        self,
        run: FunctionalCalls,
        module: nn.Module,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        before, run.part = run.part, self.part
        run.entered.add((self.part, self.name, module.training))
        start = sequence_number() if run.recording else 0
        try:
            result = method(*args, **kwargs)
        finally:
            run.part = before
        if run.recording:
            run.spans.append((start, sequence_number(), self.part))
        if isinstance(result, Generator) and inspect.isgeneratorfunction(inspect.unwrap(method)):
            return self._driven(run, result)
        return result

    def _driven(self, run: FunctionalCalls, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """A generator whose code runs as the method's does, whoever asks it for the next value."""
        surgery, step = self.part.surgery, partial(next, generator)
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
                    again = FunctionalCalls(surgery, self.part)
                    with begun(again):
                        value = step()
                    self._finish(again, self.module, (), value)
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

    def _fused(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the module would take another kernel without the mode, and no gradient passes through it."""
        if module.training or not isinstance(module, self.FUSED):
            return False
        if not torch.is_grad_enabled():
            return True
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        return not any(x.requires_grad for x in (*given, *module.parameters()))

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _teach_the_compiler()
        part, module = self.part, self.module
        surgery, method = part.surgery, self.stock(module)
        if not (torch.is_grad_enabled() or surgery.watched) or compiling_run(surgery):
            return method(*args, **kwargs)
        if not surgery.catching:
            return method(*args, **kwargs)
        with FunctionalCalls(surgery, part):
            result = method(*args, **kwargs)
        self._look_at_trace()
        return result

    @while_compiling
    def _look_at_trace(self) -> bool:
        """Name the custom functions in the graph being traced, which the compiler hides behind one node of its own."""
        surgery = self.part.surgery
        for name in _traced_custom_functions():
            site = surgery.row(self.part, "custom", name, False, "unreached")
            site.calls = site.calls or 1
            if surgery.strict and self.part.chosen:
                raise _TracedUnreachedError(surgery.report.model, [site])
        return True

    def _finish(self, run: FunctionalCalls, module: nn.Module, given: Any, result: Any) -> None:
        """Put what a run evaluated into the report, and look at the graph that it made if anything is new."""
        surgery, report = self.part.surgery, self.part.surgery.report
        if run.differentiating:
            key = (frozenset(run.entered), structure(result))
            if run.recording or key not in surgery.looked:
                _look(run, module, given, result)
                surgery.looked.add(key)
                entrance = (self.part, self.name, module.training)
                if run.recording:
                    surgery.looked.add(entrance)
                else:  # something new ran inside: record the next run
                    surgery.looked.discard(entrance)
        first = not report.traced and run.differentiating and (run.evaluations or _has_gradient(result))
        for site, evaluations in run.evaluations.values():
            site.calls = site.calls or evaluations
        report.traced |= bool(first)
        if first and self.part.names[0] == "" and not report.reached:
            warnings.warn(nothing_to_patch(report), PatchWarning, stacklevel=4)


class _TracedUnreachedError(UnreachedError, AssertionError):
    """The same, raised while the compiler traces: it swallows errors of other kinds, and goes on without itself."""


class LeftAlone(Caller):
    """The ``forward`` of a module that is an operation and is left alone: what it makes is not looked at."""

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
    method.__code__ for method in (Caller._outermost, Caller._inside, Caller._driven, Caller._compiled)
}


@while_compiling
def _teach_the_compiler() -> bool:
    """What the compiler has to know of patched models; it is told when it first meets one."""
    teach_the_compiler((*_EAGER, foreign_nodes, structure, tensors))
    return True


def _traced_custom_functions() -> Iterator[str]:
    """The custom functions, and operators with a formula of their own, in the graph being traced."""
    for name, file, code in traced_functions():
        places = file.replace("\\", "/").split("/")
        if name == "autograd_function_apply" and not {"nslightning", "torch"} & set(places):
            yield code or "a custom autograd function"
        elif "." in name and not name.startswith("nslightning."):
            namespace, _, operator = name.partition(".")
            if has_autograd_formula(f"{namespace}::{operator.partition('.')[0]}"):
                yield name


def _accessor(method: Method, depth: int) -> nn.Module:
    """The module on which a method was looked up: a shallow copy shares the object with what it was copied from.

    ``nn.DataParallel`` makes such copies, one per device.
    """
    frame = sys._getframe(depth)
    if frame.f_code is _CALL and isinstance(caller := frame.f_locals.get("self"), nn.Module):
        return caller
    return method.module


def _has_gradient(result: Any) -> bool:
    """Whether a method returned something to be differentiated, as one that sets up an optimizer does not."""
    return any(x.requires_grad for x in tensors(result))


def _look(run: FunctionalCalls, module: nn.Module, given: Any, result: Any) -> None:
    """Name what the graph holds that belongs to no site."""
    surgery = run.surgery
    made = tensors(result, *module.modules())
    for node in foreign_nodes(made, list(tensors(given))):
        if node.operation != "custom" and (not run.recording or _owned(run, node.number)):
            continue
        part = next((part for start, end, part in run.spans if start <= node.number < end), run.part)
        if part.site is not None and part.site.how == "unreached" and node.operation != "custom":
            run.count(part.site)  # the module is named already
        elif part.chosen:
            run.count(surgery.unreached(part, node.operation, node.kind))


def _owned(run: FunctionalCalls, number: int) -> bool:
    return any(start <= number < end for start, end in run.owned)


_EAGER = (Caller._outermost, Caller._inside, Caller._driven, Caller._finish, _accessor, _look, _has_gradient)


def nothing_to_patch(report: PatchReport) -> str:
    """What to say of a model without any nonsmooth operation.

    Args:
        report: The model's.

    Returns:
        One sentence.
    """
    among = f" among only={', '.join(report.only)}" if report.only else ""
    among += f" without skip={', '.join(report.skip)}" if report.skip else ""
    return f"{report.model} has nothing to patch: none of {', '.join(OPERATIONS)} was found{among}"
