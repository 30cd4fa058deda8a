"""Nonsmooth operations that a model calls as functions: caught while the model runs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from nslightning.ops.registry import FUNCTIONS, UNSUPPORTED_FUNCTIONS, positional

if TYPE_CHECKING:
    from nslightning.surgery.patching import Part, Surgery
    from nslightning.surgery.report import Site

__all__ = ["FunctionalCalls", "active"]

_CHECKPOINT: CodeType = inspect.unwrap(checkpoint).__code__


class FunctionalCalls(TorchFunctionMode):
    """Routes functional calls of nonsmooth operations to the chosen Jacobian, and names those that cannot be.

    Args:
        surgery: The surgery of the model that is running.
    """

    # The code of the methods that enter this mode, by which a stack frame is recognised as one of theirs.
    entrances: frozenset[CodeType] = frozenset()

    def __init__(self, surgery: Surgery) -> None:
        super().__init__()
        self.surgery = surgery
        self.differentiating = torch.is_grad_enabled()
        self.evaluations: dict[int, tuple[Site, int]] = {}

    def count(self, site: Site) -> None:
        """Count one evaluation at a site.

        Args:
            site: A row of the report.
        """
        self.evaluations[id(site)] = (site, self.evaluations.get(id(site), (site, 0))[1] + 1)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for operation in FUNCTIONS.get(func, ()):
            call = operation.functions[func](*args, **positional(kwargs))
            if call is not None and call.x.is_floating_point():
                return self._reached(operation, call, func, args, kwargs)
        if func in UNSUPPORTED_FUNCTIONS and not torch.compiler.is_compiling() and _differentiable(args, kwargs):
            module, part, _ = self._caller()
            if self.surgery.chosen(part.names, module):
                self.count(self.surgery.row(part, UNSUPPORTED_FUNCTIONS[func], func, False, reached=False))
        return func(*args, **kwargs)

    def _reached(self, operation: Any, call: Any, func: Callable, args: Any, kwargs: Any) -> Any:
        surgery = self.surgery
        if torch.compiler.is_compiling():
            if surgery.only or surgery.skip:
                raise RuntimeError(
                    "functional calls cannot be told apart under torch.compile, so `only` and `skip` cannot "
                    f"decide on this {operation.name}. Patch without `only` and `skip`, or do not compile."
                )
            return operation.apply(surgery.selection, call)
        module, part, checkpointed = self._caller()
        if not surgery.chosen(part.names, module):
            return func(*args, **kwargs)
        if checkpointed and self.differentiating:
            raise RuntimeError(
                f"{part.names[0] or 'the model'} calls {func.__name__} in a function that it gives to "
                "torch.utils.checkpoint, which will run that again in the backward, where the Jacobian "
                "choice does not reach the call. Checkpoint an nn.Module that makes the call, or `skip` it."
            )
        site = surgery.row(part, operation.name, func, call.inplace, reached=True)
        self.count(site)
        with torch._C.DisableTorchFunction():  # what the operation calls itself is not the model's
            if surgery.selection.observer is not None:
                surgery.selection.observer(f"{part.names[0]}:{site.kind}", operation, call)
            return operation.apply(surgery.selection, call)

    def _caller(self) -> tuple[nn.Module, Part, bool]:
        """The innermost module whose code is running, from the Python stack.

        Returns:
            The module, what the surgery keeps with it, and whether a checkpoint lies between the call and the
            last method that entered this mode: when the checkpoint recomputes the call, the mode will not be
            there.
        """
        caller: tuple[nn.Module, Part] | None = None
        checkpointed = False
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if caller is None and isinstance(module := frame.f_locals.get("self"), nn.Module):
                part = self.surgery.part(module)
                caller = None if part is None else (module, part)
            if frame.f_code is _CHECKPOINT:
                checkpointed = True
            if frame.f_code in self.entrances:
                break
            frame = frame.f_back
        assert caller is not None  # at the latest, the module whose method entered the mode
        return (*caller, checkpointed)


def active(surgery: Surgery) -> FunctionalCalls | None:
    """The mode that catches a model's functional calls in this thread, if one does.

    Args:
        surgery: The surgery of the model.

    Returns:
        The innermost such mode, or None.
    """
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, FunctionalCalls) and mode.surgery is surgery:
            return mode
    return None


def _differentiable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a gradient may pass through the call: integers, masks and bookkeeping are nobody's concern."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values()))
