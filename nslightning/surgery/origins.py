"""Whose code runs: that of a library, of a model, or of a method of a patched model outside the patch.

Such a method is ``Net.forward(model, x)``: Python runs it without the surgery's objects. It shows where it calls a part
of the model that has one of them: then the method is on the stack, and no patched method runs.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from types import CodeType, FrameType

from torch import nn

from nslightning.surgery.interception import waits_for_backward
from nslightning.surgery.report import PatchWarning
from nslightning.surgery.state import Part, Surgery

__all__ = ["name_stray", "of_library"]

_OF_MODULES = frozenset(dir(nn.Module)) - {"forward"}
_DEPTH = 64  # frames of the stack that one look goes through
_EXAMPLES = "nslightning.surgery.patching"  # it runs a model on an example


def of_library(module: str) -> bool:
    """Return whether code comes from a library that calls no function which a choice should reach.

    Args:
        module: The name of the module that defines the code.

    Returns:
        True for PyTorch, Lightning and Python's own modules.
    """
    return module.partition(".")[0] in ("torch", "lightning", "pytorch_lightning", "typing", "abc", "builtins")


def name_stray(surgery: Surgery) -> None:
    """Warn of a method of the model's that runs outside the patch, if the stack shows one.

    Args:
        surgery: The surgery of the model. None of its methods runs in this thread.
    """
    if not surgery.stack_looks or waits_for_backward(surgery):
        return
    surgery.stack_looks -= 1
    codes = _codes(surgery)
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None or frame.f_globals.get("__name__") == _EXAMPLES:
            return
        code = frame.f_code
        # Of other frames the variables are not read: Python would keep them alive until the function returns.
        module = frame.f_locals.get(code.co_varnames[0]) if code in codes else None
        part = surgery.part(module) if isinstance(module, nn.Module) else None
        if part is not None and part.chosen and part.may_call:
            warnings.warn(_sentence(part, type(module).__name__, code.co_name), PatchWarning, stacklevel=4)
            return
        frame = frame.f_back


def _codes(surgery: Surgery) -> set[CodeType]:
    """The code of the methods that the surgery replaces: of a model's own classes, and no method of ``nn.Module``'s."""
    own = {base for cls in surgery.classes for base in cls.__mro__ if not of_library(base.__module__)}
    methods = [f for cls in own for name, f in vars(cls).items() if name not in _OF_MODULES and callable(f)]
    codes = (getattr(inspect.unwrap(method), "__code__", None) for method in methods)
    return {code for code in codes if isinstance(code, CodeType) and code.co_argcount}


def _sentence(part: Part, kind: str, name: str) -> str:
    where = f"{part.names[0]}.{name}" if part.names[0] else name
    return (
        f"{where} of the patched {part.surgery.report.model} runs outside the patch: functions that it calls keep "
        f"PyTorch's derivative. Call `model.{where}(...)`, not `{kind}.{name}(model, ...)`; add a method before the "
        "patch, and take or begin it after the patch"
    )
