"""Nonsmooth operations that a model calls as functions: caught while the model runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nslightning.ops.registry import FUNCTIONS, UNSUPPORTED_FUNCTIONS

if TYPE_CHECKING:
    from nslightning.surgery.patching import Surgery

__all__ = ["FunctionalCalls"]


class FunctionalCalls(TorchFunctionMode):
    """Routes functional calls of nonsmooth operations to the chosen Jacobian, and names those that cannot be.

    Args:
        surgery: The surgery of the model that is running.
    """

    def __init__(self, surgery: Surgery) -> None:
        super().__init__()
        self.surgery = surgery

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = FUNCTIONS.get(func)
        call = operation.functions[func](*args, **_positional(kwargs)) if operation is not None else None
        compiling = torch.compiler.is_compiling()
        if operation is not None and call is not None:
            owner = None if compiling else _owner(self.surgery.names)
            if self.surgery.chosen(owner):
                if owner is not None:
                    self.surgery.saw(owner, operation.name, func.__name__, call.inplace, reached=True)
                    if self.surgery.selection.observer is not None:
                        self.surgery.selection.observer(f"{owner}:{func.__name__}", operation, call)
                return operation.apply(self.surgery.selection, call)
        elif func in UNSUPPORTED_FUNCTIONS and not compiling and _differentiable(args):
            owner = _owner(self.surgery.names)
            if self.surgery.chosen(owner):
                self.surgery.saw(owner, func.__name__, func.__name__, False, reached=False)
        return func(*args, **kwargs)


def _positional(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments under our name for the input."""
    return {("x" if k == "input" else k): v for k, v in kwargs.items()}


def _differentiable(args: tuple[Any, ...]) -> bool:
    x = args[0] if args else None
    return isinstance(x, Tensor) and x.is_floating_point() and (x.requires_grad or not torch.is_grad_enabled())


def _owner(names: dict[int, str]) -> str:
    """The qualified name of the innermost module whose code is running, from the Python stack."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            return names[id(module)]
        frame = frame.f_back
    return ""
