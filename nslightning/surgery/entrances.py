"""The methods of a patched model whose code may call functions: its functional calls are caught while they run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nslightning._torch import (
    derives,
    disable_function_modes,
    eager,
    fx_tracer,
    is_tracing,
    other_function_modes,
    sequence_number,
    while_compiling,
    without_mode,
)
from nslightning.surgery.checks import finish
from nslightning.surgery.graph import mark, tensors
from nslightning.surgery.interception import FunctionalCalls, compiling_run, running, teach_the_compiler
from nslightning.surgery.later import driven, with_entrances
from nslightning.surgery.methods import Method, accessor
from nslightning.surgery.origins import name_stray
from nslightning.surgery.report import TracedUnreachedError
from nslightning.surgery.state import Part
from nslightning.surgery.tracing import leaf_of_graph, refuse_tracing, traced_custom_functions

__all__ = ["Caller", "LeftAlone"]


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
        refuse_tracing()
        module = accessor(self, 2)
        if (tracer := fx_tracer((*args, *kwargs.values()))) is not None:
            return leaf_of_graph(tracer, self, module, args, kwargs)
        method, run = self.stock(module), running(surgery)
        if self._fused(module, args, kwargs):
            return self._unseen(run, method, args, kwargs)
        # Without derivatives there is no choice to make, and without observers no call to show.
        if not (derives() or surgery.watched):
            return self._idle(run, module, method, args, kwargs)
        if run is None:
            return self._outermost(module, method, args, kwargs)
        return self._inside(run, module, method, args, kwargs)

    def _entrance(self, module: nn.Module) -> tuple[Part, str, bool]:
        """What the surgery counts the method's runs by: the path through its code depends on the training mode."""
        return self.part, self.name, module.training

    @eager
    def _unseen(
        self, run: FunctionalCalls | None, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the method without a mode."""
        if run is None:
            return method(*args, **kwargs)
        with without_mode(run):
            return method(*args, **kwargs)

    @eager
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
        surgery, entrance = self.part.surgery, self._entrance(module)
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
        run = FunctionalCalls(surgery, entrance, idle=True)
        result = run.outermost(method, *args, **kwargs)
        if run.woken:
            finish(run, module, (args, kwargs), result, self.returns_results)
        driver = driven(method, args, result, partial(self._steps, module))
        surgery.woke(entrance, run.woken or driver is not None)
        return result if driver is None else driver

    @eager
    def _outermost(
        self, module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        surgery, entrance = self.part.surgery, self._entrance(module)
        recording = torch.is_grad_enabled() and surgery.records(entrance)
        seen = surgery.catching or recording or surgery.counted or surgery.watched
        if not (seen or other_function_modes(FunctionalCalls)):
            start = sequence_number()
            result = method(*args, **kwargs)
            if sequence_number() - start not in surgery.counts:
                surgery.look_at_next(entrance)
            if start < surgery.first:  # in another thread
                mark(tensors(result), surgery)
            return result
        if recording:
            name_stray(surgery)
        run = FunctionalCalls(surgery, entrance, recording)
        result = run.outermost(method, *args, **kwargs)
        if run.extent[0] < surgery.first:  # in another thread
            mark(tensors(result), surgery)
        if (driver := driven(method, args, result, partial(self._steps, module))) is not None:
            return driver
        finish(run, module, (args, kwargs), result, self.returns_results)
        return with_entrances(self.name, method, result, partial(self._of_function, module))

    @eager
    def _inside(
        self,
        run: FunctionalCalls,
        module: nn.Module,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if not run.idle:
            run.entered.add(self._entrance(module))
        result = run.inside(self.part, method, *args, **kwargs)
        if isinstance(result, Tensor):  # no code in it runs later
            return result
        if (driver := driven(method, args, result, partial(self._steps, module))) is not None:
            return driver
        return with_entrances(self.name, method, result, partial(self._of_function, module))

    def _steps(self, module: nn.Module) -> Callable[[Callable[[], Any]], Any]:
        """A function that runs each step of a generator or a coroutine; called when the first step begins."""
        recording = torch.is_grad_enabled() and self.part.surgery.records(self._entrance(module))
        return partial(self._step, module, recording)  # in all its steps, or in no step

    @eager
    def _step(self, module: nn.Module, recording: bool, step: Callable[[], Any]) -> Any:
        """Run a step as a part of the method, and check the graph of its value."""
        surgery = self.part.surgery
        if (inner := running(surgery)) is not None:
            return inner.inside(self.part, step)
        idle = not (derives() or surgery.watched)
        run = FunctionalCalls(surgery, self._entrance(module), recording and torch.is_grad_enabled(), idle)
        try:
            value = run.outermost(step)
        except (StopIteration, StopAsyncIteration) as stop:
            finish(run, module, ((), {}), getattr(stop, "value", None), self.returns_results)
            raise
        finish(run, module, ((), {}), value, self.returns_results)
        return value

    def _of_function(self, module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
        """The entrance of a function that the method returned."""
        entrance = Caller(module, f"{self.name}.{function.__name__}", self.part, function)

        @wraps(function)
        def later(*args: Any, **kwargs: Any) -> Any:
            return entrance(*args, **kwargs) if entrance.ref() is not None else function(*args, **kwargs)

        later.module = module  # type: ignore[attr-defined] # the entrance refers to it weakly
        return later

    def _fused(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether the module would take another kernel without the mode, and no gradient passes through it."""
        if module.training or not isinstance(module, self.FUSED):
            return False
        if not torch.is_grad_enabled():
            return True
        arguments = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        return not any(x.requires_grad for x in (*arguments, *module.parameters()))

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        teach_the_compiler()
        module, surgery = self.module, self.part.surgery
        method = self.stock(module)
        idle = not (torch.is_grad_enabled() or surgery.watched)
        if not surgery.catching or (idle and surgery.fused):
            return method(*args, **kwargs)
        if compiling_run(surgery):
            result = method(*args, **kwargs)
        else:
            with FunctionalCalls(surgery, self._entrance(module), idle=idle):
                result = method(*args, **kwargs)
        self._look_at_trace()
        return result

    @while_compiling
    def _look_at_trace(self) -> bool:
        """Name the custom functions in the graph being traced: the compiled graph has one node for all of its code."""
        surgery = self.part.surgery
        for name in traced_custom_functions():
            site = surgery.row(self.part, "custom", name, False, "unreached")
            site.calls = site.calls or 1
            if surgery.strict and self.part.chosen:
                raise TracedUnreachedError(surgery.report.model, [site])
        return True


class LeftAlone(Method):
    """The ``forward`` of an operation that the surgery leaves alone: the nodes that it makes are not checked."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method."""
        if torch.compiler.is_compiling():
            with disable_function_modes():
                return self.stock(self.module)(*args, **kwargs)
        module = accessor(self, 2)
        run = running(self.part.surgery)
        if run is None:
            return self.stock(module)(*args, **kwargs)
        return run.owning(run.inside, self.part, self.stock(module), *args, **kwargs)
