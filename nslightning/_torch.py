"""Every private name of torch that the package uses, one function each.

PyTorch may move or drop such a name in any version. Each function therefore says what it answers and in which versions
its private name was seen to work (2.11 and 2.15, where nothing else is said). Nothing outside this module may name
``torch._C``, ``torch._dynamo``, ``torch._ops`` or another private part of torch: a test looks for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "active_function_modes",
    "disable_function_modes",
    "in_dispatch_mode",
    "in_functorch",
    "is_compiled",
    "is_legacy_batch",
    "is_operator",
    "is_tracing",
    "is_view",
]


def in_functorch() -> bool:
    """Whether a ``torch.func`` transform (``vmap``, ``grad``, ``jvp``, ...) is running in this thread.

    Returns:
        True inside a transform.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_legacy_batch(x: Tensor) -> bool:
    """Whether a tensor is a batch of gradients of ``is_grads_batched=True``, which predates ``torch.func``.

    Args:
        x: Any tensor.

    Returns:
        True for such a batch.
    """
    return bool(torch._C._functorch.is_legacy_batchedtensor(x))


def in_dispatch_mode() -> bool:
    """Whether a ``TorchDispatchMode`` is active in this thread.

    Returns:
        True inside such a mode.
    """
    return bool(torch._C._len_torch_dispatch_stack() > 0)


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` is recording.

    Returns:
        True while it is.
    """
    return torch._C._get_tracing_state() is not None


def is_view(x: Tensor) -> bool:
    """Whether autograd takes a tensor for a view of another one.

    Args:
        x: Any tensor.

    Returns:
        True for a view.
    """
    return x._is_view()


def disable_function_modes() -> Any:
    """A context in which no ``TorchFunctionMode`` and no ``__torch_function__`` sees a call.

    Returns:
        The context manager.
    """
    return torch._C.DisableTorchFunction()


def active_function_modes() -> list[Any]:
    """The ``TorchFunctionMode`` objects that are active in this thread.

    Returns:
        The modes, the innermost last.
    """
    from torch.overrides import _get_current_function_mode_stack

    return list(_get_current_function_mode_stack())


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled: by ``torch.compile(module)`` or ``module.compile()``.

    Args:
        module: Any module; its children are not looked at.

    Returns:
        True if it was; also for a ``LightningModule`` that Lightning took out of its compiled wrapper.
    """
    if getattr(module, "_compiler_ctx", None) is not None:
        return True
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    # Importing the compiler takes a second, and a module that it made has imported it.
    return type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch._dynamo")


def is_operator(function: Callable[..., Any]) -> bool:
    """Whether a function is an ATen operator or one of its overloads, as graphs call it.

    Args:
        function: Any function.

    Returns:
        True for ``torch.ops.aten.relu`` and ``torch.ops.aten.relu.default``.
    """
    return isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
