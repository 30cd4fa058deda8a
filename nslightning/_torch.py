"""Every private name of torch that the package uses, one function each.

PyTorch may move or drop such a name in any version. Each function therefore says what it answers and in which versions
its private name was seen to work (2.11 and 2.15, where nothing else is said). Nothing outside this module may name
``torch._C``, ``torch._dynamo``, ``torch._ops`` or another private part of torch: a test looks for that.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import repeat
from types import CodeType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import _reduction
from torch.nn.modules._functions import BackwardHookFunction

# The helpers of torch.optim's own optimizers: they read a number that may be a tensor, choose between their
# implementations, and switch gradients on for `differentiable=True`.
from torch.optim.optimizer import _default_to_fused_or_foreach as default_to_fused_or_foreach
from torch.optim.optimizer import _get_scalar_dtype as scalar_dtype
from torch.optim.optimizer import _get_value as number_of_tensor
from torch.optim.optimizer import _to_scalar as scalar_of
from torch.optim.optimizer import _use_grad_for_differentiable as use_grad_for_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Function = TypeVar("_Function", bound=Callable[..., Any])

__all__ = [
    "active_function_modes",
    "as_subclass",
    "beneath_modes",
    "call_with_hooks",
    "compile_as",
    "compile_functions_for_modes",
    "compiler_is_reading",
    "default_to_fused_or_foreach",
    "disable_function_modes",
    "disabled_torch_function",
    "eager",
    "exchanges_values",
    "foreach_add",
    "foreach_norm",
    "foreach_sub",
    "forget_kept_attributes",
    "function_of",
    "fx_tracer",
    "fx_tracers_code",
    "gradient_dtypes",
    "has_autograd_formula",
    "has_formula_of_torch",
    "hides_its_inside",
    "hooks_of",
    "in_dispatch_mode",
    "in_forward_mode",
    "in_functorch",
    "is_compiled",
    "is_compiled_function",
    "is_control_flow",
    "is_exporting",
    "is_legacy_batch",
    "is_operator",
    "is_tracing",
    "is_transformed",
    "is_view",
    "is_zero_tensor",
    "keep_saved_buffers",
    "kept_attributes",
    "legacy_reduction",
    "native_nn",
    "never_compile_eager",
    "number_of",
    "number_of_tensor",
    "other_function_modes",
    "outside_every_mode",
    "outside_transforms",
    "overloads",
    "runs_module_hooks",
    "saved_tensor_names",
    "scalar_dtype",
    "scalar_of",
    "sequence_number",
    "set_cudnn",
    "traced_functions",
    "use_grad_for_differentiable",
    "while_compiling",
    "without_mode",
    "without_post_accumulate_hooks",
]


def runs_module_hooks(node: Any) -> bool:
    """Return whether a backward node runs the full backward hooks of a module.

    Args:
        node: A backward node.

    Returns:
        True for the nodes around a module that has such hooks.
    """
    return function_of(node) is BackwardHookFunction


def is_control_flow(function: type[torch.autograd.Function]) -> bool:
    """Return whether an autograd function is that of ``torch.cond`` or a loop like it, which compiles its branches.

    Args:
        function: What :func:`function_of` returned.

    Returns:
        True for ``cond``, ``switch``, ``while_loop``, ``map``, ``scan`` and ``associative_scan``.
    """
    package, _, name = function.__module__.rpartition(".")
    flows = ("cond", "switch", "while_loop", "map", "scan", "associative_scan")
    return package == "torch._higher_order_ops" and name in flows


def in_functorch() -> bool:
    """Return whether a ``torch.func`` transform (``vmap``, ``grad``, ``jvp``, ...) is running in this thread.

    Returns:
        True inside a transform.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def outside_transforms(values: Any) -> Iterator[Any]:
    """The tensors in a structure as they are outside of every ``torch.func`` transform.

    Args:
        values: A structure of tensors.

    Yields:
        The same structure of the tensors that these hold: once, and under ``vmap`` once for each example.
    """
    functorch = torch._C._functorch
    leaves, spec = tree_flatten(values)
    wrapped = [t for t in leaves if isinstance(t, Tensor) and functorch.is_functorch_wrapped_tensor(t)]
    if not wrapped:
        yield values
        return
    level = max(map(functorch.maybe_get_level, wrapped))
    columns: list[Iterable[Any]] = []
    examples = 1
    for leaf in leaves:
        inner = leaf
        if any(leaf is t for t in wrapped) and functorch.maybe_get_level(leaf) == level:
            inner = functorch.get_unwrapped(leaf)
            if functorch.is_batchedtensor(leaf):
                rows = inner.unbind(functorch.maybe_get_bdim(leaf))
                columns.append(rows)
                examples = len(rows)
                continue
        columns.append(repeat(inner))
    for _, *row in zip(range(examples), *columns, strict=False):
        yield from outside_transforms(tree_unflatten(row, spec))


def is_legacy_batch(x: Tensor) -> bool:
    """Return whether a tensor is a batch of gradients of ``is_grads_batched=True``, which predates ``torch.func``.

    Args:
        x: Any tensor.

    Returns:
        True for such a batch.
    """
    return bool(torch._C._functorch.is_legacy_batchedtensor(x))


def in_dispatch_mode() -> bool:
    """Return whether a ``TorchDispatchMode`` is active in this thread.

    Returns:
        True inside such a mode.
    """
    return bool(torch._C._len_torch_dispatch_stack() > 0)


def is_tracing() -> bool:
    """Return whether ``torch.jit.trace`` is recording.

    Returns:
        True while it is.
    """
    return torch._C._get_tracing_state() is not None


def compiler_is_reading() -> bool:
    """Return whether ``torch.compile`` is looking at the code and the objects of a model, in this thread.

    ``torch.compiler.is_compiling`` answers for the code that is compiled; this answers for the compiler's own.

    Returns:
        True while it is.
    """
    return torch._guards.TracingContext.try_get() is not None


def is_transformed(x: Tensor) -> bool:
    """Return whether a tensor was made inside a ``torch.func`` transform and holds another one in place of memory.

    Args:
        x: Any tensor.

    Returns:
        True for such a tensor, also after the transform has ended.
    """
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


@contextmanager
def outside_every_mode() -> Iterator[None]:
    """Make ordinary tensors inside the block, whatever mode or ``torch.func`` transform is running.

    Yields:
        Control, with inference mode, dispatch modes and transforms switched off.
    """
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.utils._python_dispatch import _disable_current_modes

    with torch.inference_mode(False), temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield


@cache
def saved_tensor_names(kind: type) -> tuple[str, ...]:
    """The attributes under which backward nodes of a kind give access to what they saved.

    Args:
        kind: The class of a backward node of autograd's own.

    Returns:
        Their names; empty for nodes of custom functions.
    """
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def gradient_dtypes(node: Any) -> tuple[torch.dtype, ...]:
    """The dtypes of the gradients that come to a backward node.

    Args:
        node: A backward node.

    Returns:
        One for each output of its forward.
    """
    return tuple(metadata.dtype for metadata in node._input_metadata)


def keep_saved_buffers() -> Any:
    """A context in which a compiled backward leaves what the forward saved alone, so that it may run again.

    Returns:
        The context manager; it holds for what is compiled inside it.
    """
    import torch._functorch.config

    return torch._functorch.config.patch(donated_buffer=False)


def is_view(x: Tensor) -> bool:
    """Return whether autograd takes a tensor for a view of another one.

    Args:
        x: Any tensor.

    Returns:
        True for a view.
    """
    return x._is_view()


def kept_version(x: Tensor) -> Any:
    """A context after which a tensor has the version that it had before.

    For an autograd function that works in place: ``mark_dirty`` counts the overwriting, and the kernel counts it, too.

    Args:
        x: Any tensor.

    Returns:
        A context manager.
    """
    return torch.autograd._unsafe_preserve_version_counter(x)  # type: ignore[attr-defined] # not in the stubs


def other_function_modes(ours: type) -> int:
    """The number of active ``TorchFunctionMode`` objects of others, inside the innermost of ours.

    Args:
        ours: The class of ours.

    Returns:
        Their number, without the mode of ``torch.device``, which makes tensors and changes nothing else.
    """
    if not torch._C._len_torch_function_stack():
        return 0
    from torch.utils._device import DeviceContext

    modes = active_function_modes()
    above = next((i for i, mode in enumerate(reversed(modes)) if isinstance(mode, ours)), len(modes))
    return above if any(not isinstance(mode, DeviceContext) for mode in modes[len(modes) - above :]) else 0


@contextmanager
def beneath_modes(mode: Any, number: int) -> Iterator[None]:
    """A context in which a ``TorchFunctionMode`` is active outside of others, which see each call first.

    Args:
        mode: The mode.
        number: How many of the active modes see the calls first.

    Yields:
        Nothing.
    """
    from torch.overrides import _pop_mode, _push_mode

    above = [_pop_mode() for _ in range(number)]
    _push_mode(mode)
    for other in reversed(above):
        _push_mode(other)
    try:
        yield
    finally:
        for _ in range(number + 1):
            _pop_mode()
        for other in reversed(above):
            _push_mode(other)


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
    """Return whether a module was compiled: by ``torch.compile(module)`` or ``module.compile()``.

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


def is_exporting() -> bool:
    """Return whether ``torch.export`` is at work; code that ``torch.compile`` traces may ask, too.

    The compiler of torch 2.11 answers True to ``torch.compiler.is_exporting`` whenever it traces.

    Returns:
        True while it is.
    """
    return torch.compiler._is_exporting_flag


def is_operator(function: Callable[..., Any]) -> bool:
    """Return whether a function is an ATen operator or one of its overloads, as graphs call it.

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
        tensors: Tensors of one dtype on one device; each has entries.
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
    function: Any = getattr(node, "_forward_cls", None)
    while getattr(function, "__module__", None) == "torch._functorch.autograd_function":  # made by a transform
        forward = inspect.unwrap(function.forward)
        function = inspect.getclosurevars(forward).nonlocals.get("autograd_function")
    return function if isinstance(function, type) else None


def is_linked(node: Any) -> bool:
    """Return whether a backward node that Python made belongs to a graph.

    Args:
        node: The object that a custom function's ``forward`` gets as its context.

    Returns:
        False where no gradient was wanted, or nothing refers to the results any more.
    """
    try:
        return bool(node.next_functions)
    except RuntimeError:  # as torch 2.11 says it
        return False


def is_compiled_function(node: Any) -> bool:
    """Return whether a backward node is that of a compiled graph, which may hold any number of operations.

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
    """Return whether a backward node may run code of somebody else's: a Python function, a C++ one, a scripted graph.

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


def has_formula_of_torch(function: type[torch.autograd.Function]) -> bool:
    """Return whether a custom operator's formula for its gradient is PyTorch's own, as that of its attention is.

    Args:
        function: The autograd function that PyTorch generated for the operator.

    Returns:
        False for an operator of somebody else's.
    """
    backward = inspect.getclosurevars(function.backward).nonlocals.get("orig_backward", function.backward)
    formula = getattr(inspect.getclosurevars(backward).nonlocals.get("info"), "_backward_fn", None)
    return getattr(formula, "__module__", "").startswith("torch.")


def exchanges_values(node: Any) -> bool:
    """Return whether a backward node waits for other processes, as batch norm or a sum over processes does.

    PyTorch's functions for this stand in ``torch.distributed``, and its operators in the namespace of ``c10d``.

    Args:
        node: A backward node.

    Returns:
        True if it does.
    """
    function = function_of(node)
    if function is None:
        return "c10d" in node.name()
    name = (function.__module__, function.__name__)
    return function.__module__.startswith("torch.distributed.") or name == (
        "torch.nn.modules._functions",
        "SyncBatchNorm",
    )


@contextmanager
def without_post_accumulate_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let no hook of ``register_post_accumulate_grad_hook`` run inside the block, as optimizers in the backward do.

    Args:
        tensors: Leaf tensors.

    Yields:
        Nothing.
    """
    hook_dicts = [hooks for t in tensors if (hooks := getattr(t, "_post_accumulate_grad_hooks", None))]
    kept = [dict(hooks) for hooks in hook_dicts]
    for hooks in hook_dicts:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(hook_dicts, kept, strict=True):
            hooks.update(before)


def sequence_number() -> int:
    """The number that the next autograd node made by this thread will carry.

    Returns:
        It grows by one with each node.
    """
    return int(torch._C._autograd._get_sequence_nr())


def number_of(node: Any) -> int:
    """The number that an autograd node carries, by which :func:`sequence_number` tells when it was made.

    Args:
        node: A ``grad_fn``.

    Returns:
        Its number; the largest of all for a leaf's.
    """
    return int(node._sequence_nr())


@contextmanager
def without_mode(mode: Any) -> Iterator[None]:
    """A context in which one active ``TorchFunctionMode`` is not there, and all the others are.

    ``DisableTorchFunction`` would switch off those of others, too, and what tensor subclasses do.

    Args:
        mode: The mode. Where it is not active in this thread, nothing changes.

    Yields:
        Nothing.
    """
    from torch.overrides import _pop_mode, _push_mode

    if not any(active is mode for active in active_function_modes()):
        yield
        return
    above: list[Any] = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_mode(other)
    try:
        yield
    finally:
        for _ in above:
            _pop_mode()
        _push_mode(mode)
        for other in reversed(above):
            _push_mode(other)


def disabled_torch_function(cls: type) -> bool:
    """Return whether a class of tensors leaves calls to PyTorch: plain tensors, parameters, distributed ones.

    Args:
        cls: A class of tensors.

    Returns:
        False where the class has a ``__torch_function__`` that sees the calls.
    """
    return cls is Tensor or getattr(cls, "__torch_function__", None) is torch._C._disabled_torch_function_impl


def as_subclass(result: Any, cls: type) -> Any:
    """Results of a function as PyTorch's own ``__torch_function__`` hands them out.

    Args:
        result: The function's result: a tensor, or a nest of tensors and other values.
        cls: The class of tensors that was given to it.

    Returns:
        The same, the tensors in it as members of the class.
    """
    from torch._tensor import _convert

    return _convert(result, cls)


def call_with_hooks() -> str:
    """The name of the method that runs a module's hooks around its ``forward``.

    ``nn.Module.__call__`` looks it up on the instance.

    Returns:
        The name.
    """
    return "_call_impl"


def fx_tracers_code() -> CodeType | None:
    """The code of ``torch.fx.Tracer.trace``, by which a stack frame is recognised as a tracer's.

    Returns:
        The code; None as long as ``torch.fx`` was not imported.
    """
    tracing = sys.modules.get("torch.fx._symbolic_trace")
    # The first compilation puts a wrapper in the method's place.
    return None if tracing is None else inspect.unwrap(tracing.Tracer.trace).__code__


def fx_tracer(values: Iterable[Any]) -> Any:
    """The tracer of ``torch.fx`` that runs a call symbolically.

    Args:
        values: The call's arguments.

    Returns:
        The tracer; None where all values are known.
    """
    proxies = sys.modules.get("torch.fx.proxy")
    if proxies is None:
        return None
    return next((value.tracer for value in values if isinstance(value, proxies.Proxy)), None)


def kept_attributes(module: nn.Module) -> dict[str, Any] | None:
    """The attributes that a copy of an fx ``GraphModule`` keeps beside what its graph names.

    Args:
        module: Any module.

    Returns:
        The mutable mapping, by the attributes' names; None for a module of another kind.
    """
    graphs = sys.modules.get("torch.fx.graph_module")
    if graphs is None or not isinstance(module, graphs.GraphModule):
        return None
    kept: dict[str, Any] = module.meta.setdefault(graphs._USER_PRESERVED_ATTRIBUTES_KEY, {})
    return kept


def forget_kept_attributes(module: nn.Module, names: Iterable[str]) -> None:
    """Take attributes out of :func:`kept_attributes`, and leave no trace where none remains.

    Args:
        module: Any module.
        names: The attributes' names.
    """
    if (kept := kept_attributes(module)) is not None:
        for name in names:
            kept.pop(name, None)
        if not kept:
            meta: Any = module.meta
            del meta[sys.modules["torch.fx.graph_module"]._USER_PRESERVED_ATTRIBUTES_KEY]


def while_compiling(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make ``torch.compile`` run a function when it traces a call of it, and take what it returns for a constant.

    ``torch.compiler.assume_constant_result`` does the same, and imports the compiler for it, which takes a second.

    Args:
        function: Takes nothing beside ``self``.

    Returns:
        The function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined] # what the compiler looks for on a function
    return function


def compiler_is_imported() -> bool:
    """Return whether this process has imported the compiler, so that the code of a model may use it.

    Returns:
        False as long as ``torch.compile`` was not called; also True where a library imports it.
    """
    return "torch._dynamo.variables.torch" in sys.modules


def compile_functions_for_modes(functions: Iterable[Callable[..., Any]]) -> None:
    """Make ``torch.compile`` hand calls of functions to a ``TorchFunctionMode``, as eager mode does.

    In torch 2.15 it does so for the methods of tensors, and of the functions for those that ``torch.overrides`` lists.

    Args:
        functions: The functions.
    """
    from torch._dynamo.variables.torch import get_overridable_functions

    get_overridable_functions().update(functions)


def compile_as(original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Make ``torch.compile`` trace another function wherever code calls a builtin one.

    Args:
        original: The builtin function.
        replacement: A function written in Python.
    """
    torch.compiler.substitute_in_graph(original, skip_signature_check=True)(replacement)


_eager: list[Callable[..., Any]] = []


def eager(function: _Function) -> _Function:
    """Note that a function is for eager mode: see :func:`never_compile_eager`.

    Args:
        function: The function, written in Python.

    Returns:
        The function.
    """
    _eager.append(function)
    return function


def never_compile_eager() -> None:
    """Let ``torch.compile`` leave the code of eager functions alone where it compiles frame by frame after a break.

    Functions that they call are compiled as before.
    """
    from torch._dynamo.eval_frame import skip_code

    for function in _eager:
        skip_code(function.__code__)


def traced_functions() -> list[tuple[str, str, str]]:
    """The custom autograd functions, and the operators of others, in the graph that ``torch.compile`` now traces.

    Returns:
        Of each its name, and the file and the line of code of its call; empty where nothing is traced.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        graph = InstructionTranslator.current_tx().output.graph
    except AttributeError:
        return []
    calls = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = getattr(node.target, "__name__", str(node.target))
        custom = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims")
        if name == "autograd_function_apply" or custom:
            lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
            places = [i for i, line in enumerate(lines) if line.startswith("File ")]
            file = lines[places[-1]].split('"')[1] if places else ""
            code = lines[places[-1] + 1] if places and places[-1] + 1 < len(lines) else ""
            calls.append((str(node.target) if custom else name, file, code))
    return calls


def has_autograd_formula(name: str) -> bool:
    """Return whether an operator has a formula for its gradient, and not one of PyTorch's own.

    Args:
        name: Such as ``"torchvision::nms"``.

    Returns:
        True for one written in C++ or registered from Python.
    """
    from torch._library.custom_ops import OPDEFS

    if getattr(getattr(OPDEFS.get(name), "_backward_fn", None), "__module__", "").startswith("torch."):
        return False
    keys = ("Autograd", "AutogradCPU", "AutogradCUDA")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)


def in_forward_mode() -> bool:
    """Return whether forward-mode differentiation (``torch.autograd.forward_ad``) is running.

    Returns:
        True inside a ``dual_level``.
    """
    return forward_ad._current_level >= 0


def running_transforms() -> set[str]:
    """The ``torch.func`` transforms that run in this thread, or inside which a compiler traces code.

    Returns:
        Some of ``"Jvp"``, ``"Grad"``, ``"Vmap"`` and ``"Functionalize"``; ``"Jvp"`` stands for a dual level, too.
    """
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    interpreters = retrieve_all_functorch_interpreters() if in_functorch() else []
    dual = {"Jvp"} if in_forward_mode() else set()
    return dual | {interpreter.key().name for interpreter in interpreters}


def derives() -> bool:
    """Return whether operations lead to derivatives in this thread.

    Returns:
        True where gradients are on, and where forward-mode differentiation or a ``torch.func`` transform is running:
        these work under ``torch.no_grad`` too.
    """
    return torch.is_grad_enabled() or in_forward_mode() or in_functorch()


def carries_tangent(x: Tensor) -> bool:
    """Return whether forward-mode differentiation passes through a tensor.

    Args:
        x: Any tensor.

    Returns:
        True for a tensor with a tangent, and for one that ``torch.func.jvp`` follows.
    """
    if in_functorch() and torch._C._functorch.is_gradtrackingtensor(x):
        return True
    return in_forward_mode() and forward_ad.unpack_dual(x).tangent is not None


def is_zero_tensor(x: Tensor) -> bool:
    """Return whether a tensor is zeros without memory, as autograd makes them for gradients that are known to be 0.

    Args:
        x: Any tensor.

    Returns:
        True for such zeros.
    """
    return x._is_zerotensor()


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """Return how a loss is reduced that was called with the arguments of early versions.

    Args:
        size_average: Mean rather than sum.
        reduce: Whether to reduce at all.

    Returns:
        ``"mean"``, ``"sum"`` or ``"none"``; PyTorch warns of the old arguments.
    """
    return str(_reduction.legacy_get_string(size_average, reduce))


def native_nn(name: str) -> Callable[..., Any]:
    """A function behind one of ``torch.nn.functional``, as the modules of ``torch.nn`` call it.

    Args:
        name: Such as ``"fractional_max_pool2d"``.

    Returns:
        The function.
    """
    function: Callable[..., Any] = getattr(torch._C._nn, name)
    return function


def overloads(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The overloads of an ATen operator, as graphs call them.

    Args:
        function: Any function.

    Returns:
        Those that return their result; none for what is no operator such as ``torch.ops.aten.relu``.
    """
    if not isinstance(function, torch._ops.OpOverloadPacket):
        return []
    return [getattr(function, name) for name in function.overloads() if "out" not in name]


def set_cudnn(switch: str, value: bool) -> None:
    """Set a switch of cuDNN's, also where the process has called ``torch.backends.disable_global_flags``.

    The public attribute raises there, and the context manager that is allowed takes all switches at once. Seen in 2.15.

    Args:
        switch: ``"allow_tf32"`` or ``"benchmark"``.
        value: True switches it on.
    """
    getattr(torch._C, f"_set_cudnn_{switch}")(value)


def scale_of(scaler: torch.amp.GradScaler) -> Tensor | float:
    """The factor of a scaler of gradients, without waiting for its device as ``get_scale`` does.

    Args:
        scaler: The scaler.

    Returns:
        Its own tensor; a number before it has scaled anything, and where it is switched off.
    """
    scale: Tensor | None = scaler._get_scale_async() if scaler.is_enabled() else None
    return scaler.get_scale() if scale is None else scale
