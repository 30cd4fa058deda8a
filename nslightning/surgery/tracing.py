"""Tracers of PyTorch's that run a patched model: ``torch.fx`` and ``torch.jit.trace`` may drop the choice.

What they would drop is refused. The compiler keeps the choice; this module reads what is in the graph that it traces.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nslightning._torch import call_with_hooks, fx_tracers_code, has_autograd_formula, is_tracing, traced_functions
from nslightning.surgery.methods import Method
from nslightning.surgery.report import PatchWarning

__all__ = ["ClassName", "leaf_of_graph", "refuse_tracing", "traced_custom_functions"]

_FX = "torch.fx drops the Jacobian choice at functional calls: unpatch the model first, and patch the traced graph"
_QUANTIZE = "FX quantisation replaces modules, and their Jacobian choice with them: unpatch the model first"


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


def leaf_of_graph(tracer: Any, method: Method, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a method for ``torch.fx``. Where its code may call functions, the module becomes a leaf of the graph.

    Args:
        tracer: The tracer that runs the method symbolically.
        method: The method.
        module: The module on which it was looked up.
        args: The positional arguments.
        kwargs: The keyword arguments.

    Returns:
        The result: a leaf stands for a call of the module, which keeps the choice.

    Raises:
        RuntimeError: If the code may call functions, and no call of the module stands for the method.
    """
    if not method.part.may_call:
        return method.stock(module)(*args, **kwargs)
    if method.name not in ("forward", call_with_hooks()):
        raise RuntimeError(_FX)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def refuse_tracing() -> None:
    """Refuse ``torch.jit.trace``, which drops the choice, where gradients are on; warn where they are off."""
    if not is_tracing():
        return
    if torch.is_grad_enabled():
        raise RuntimeError(
            "torch.jit.trace drops the Jacobian choice: unpatch the model first, or trace it under torch.no_grad() to "
            "run it only"
        )
    warnings.warn("a trace has PyTorch's own derivatives, and no Jacobian choice", PatchWarning, stacklevel=4)


def traced_custom_functions() -> Iterator[str]:
    """The custom functions, and operators with their own formula, in the graph being traced."""
    for name, file, code in traced_functions():
        places = file.replace("\\", "/").split("/")
        if name == "autograd_function_apply" and not {"nslightning", "torch"} & set(places):
            yield code or "a custom autograd function"
        elif "." in name and not name.startswith("nslightning."):
            namespace, _, operator = name.partition(".")
            if has_autograd_formula(f"{namespace}::{operator.partition('.')[0]}"):
                yield name
