"""Every private name of torch that the package uses, one function each.

PyTorch may move or drop such a name in any version. Each function therefore says what it answers and in which versions
its private name was seen to work (2.11 and 2.15, where nothing else is said). Nothing outside this module may name
``torch._C``, ``torch._dynamo``, ``torch._ops`` or another private part of torch: a test looks for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules._functions import BackwardHookFunction

__all__ = [
    "active_function_modes",
    "disable_function_modes",
    "foreach_add",
    "foreach_norm",
    "foreach_sub",
    "function_of",
    "hides_its_inside",
    "hooks_of",
    "in_dispatch_mode",
    "in_functorch",
    "is_compiled",
    "is_compiled_function",
    "is_legacy_batch",
    "is_operator",
    "is_tracing",
    "is_view",
    "runs_module_hooks",
    "without_post_accumulate_hooks",
]


def runs_module_hooks(node: Any) -> bool:
    """Whether a backward node runs the full backward hooks of a module.

    Args:
        node: A backward node.

    Returns:
        True for the nodes around a module that has such hooks.
    """
    return function_of(node) is BackwardHookFunction


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


def foreach_add(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """Add tensors pairwise, by few kernels.

    Args:
        one: Tensors on one device.
        other: Tensors of the same shapes and dtypes.

    Returns:
        The sums.
    """
    return list(torch._foreach_add(list(one), list(other)))


def foreach_norm(tensors: Sequence[Tensor], p: float) -> list[Tensor]:
    """The p-norms of tensors, by few kernels.

    Args:
        tensors: Tensors of one dtype on one device, none of them empty.
        p: The exponent.

    Returns:
        0-d real tensors.
    """
    return list(torch._foreach_norm(list(tensors), p))


def foreach_sub(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """Subtract tensors pairwise, by few kernels.

    Args:
        one: Tensors on one device.
        other: Tensors of the same shapes and dtypes.

    Returns:
        The differences.
    """
    return list(torch._foreach_sub(list(one), list(other)))


def function_of(node: Any) -> type[torch.autograd.Function] | None:
    """The autograd function, written in Python, that a backward node belongs to.

    Args:
        node: A backward node, such as ``tensor.grad_fn``.

    Returns:
        The class of the function; None for a node that was written in C++.
    """
    function = getattr(node, "_forward_cls", None)
    return function if isinstance(function, type) else None


def is_compiled_function(node: Any) -> bool:
    """Whether a backward node is that of a compiled graph, which may hold any number of operations.

    Args:
        node: A backward node.

    Returns:
        True for what ``torch.compile`` made, whatever its backend, unless the backend runs the eager operations.
    """
    return hasattr(function_of(node), "compiled_bw")


def hooks_of(x: Tensor) -> list[Callable[[Tensor], Tensor | None]]:
    """The hooks of ``register_hook`` that a leaf's gradient passes.

    Args:
        x: A leaf tensor.

    Returns:
        The hooks, in the order in which they run.
    """
    return list((x._backward_hooks or {}).values())


def hides_its_inside(node: Any) -> bool:
    """Whether a backward node may run code of somebody else's: a Python function, a C++ one, a scripted graph.

    PyTorch registers a Python type for each of its own C++ nodes; all others share one. Of its Python functions, batch
    norm over processes, the sink of DDP and the place where a module's backward hooks run hide nothing.

    Args:
        node: A backward node.

    Returns:
        False for the nodes of PyTorch's own operations.
    """
    function = function_of(node)
    if function is None:
        return type(node).__name__ == "CppFunction"
    return (function.__module__, function.__name__) not in (
        ("torch.nn.modules._functions", "BackwardHookFunction"),
        ("torch.nn.modules._functions", "SyncBatchNorm"),
        ("torch.nn.parallel.distributed", "_DDPSink"),
    )


@contextmanager
def without_post_accumulate_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let no hook of ``register_post_accumulate_grad_hook`` run inside the block, as optimizers in the backward do.

    Args:
        tensors: Leaf tensors.

    Yields:
        Nothing.
    """
    found = [hooks for t in tensors if (hooks := getattr(t, "_post_accumulate_grad_hooks", None))]
    kept = [dict(hooks) for hooks in found]
    for hooks in found:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(found, kept, strict=True):
            hooks.update(before)
