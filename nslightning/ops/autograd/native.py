"""The C++ autograd nodes, where they were built: a patched call then costs the host what a stock call costs.

The nodes (``ops/kernels/nodes.cpp``) take the calls that networks make in training: plain tensors in eager mode on a
CPU, and where ``NSLIGHTNING_NATIVE=cuda`` is set on a CUDA device. Each function here returns ``NotImplemented`` for
any other call, and the Python nodes take it, with the same bits.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from nslightning._torch import in_functorch, is_transformed, outside_every_mode
from nslightning.ops.kernels import cpu, cuda, store
from nslightning.ops.record import OPERATIONS as RECORDS

if TYPE_CHECKING:
    from nslightning.ops.autograd.selection import Selection

__all__ = [
    "OPERATIONS",
    "Described",
    "backward",
    "composition",
    "cuda_state",
    "describe",
    "load",
    "max_pool2d",
    "pointwise",
    "release",
    "site",
    "state",
    "stock_relu",
]

#: The operations that have a C++ node, in the order in which ``nodes.cpp`` numbers them; max pooling comes last.
OPERATIONS = ("relu", "relu6", "leaky_relu", "hardtanh", "clamp", "hardswish", "hardsigmoid", "max_pool")
_KERNELS = (
    "any_equal",
    "relu_forward",
    "relu_backward",
    "linear_backward",
    "replace",
    "pool_forward",
    "pool_backward",
)
_NAN = float("nan")

# The composed gradient of an operation: (parameters, selection, saved tensors, incoming gradient, other selection).
_Composition = Callable[..., Tensor]
_compositions: dict[str, tuple[_Composition, _Composition | None, _Composition | None]] = {}


class Described(NamedTuple):
    """The description of a C++ node.

    Args:
        operation: The field of :class:`~nslightning.Jacobians` that chooses.
        selection: The selection from which the choice is read.
        tied: False where the forward saw that no choice can matter.
    """

    operation: str
    selection: Selection
    tied: bool


def composition(
    operation: str, gradient: _Composition, difference: _Composition | None = None, ties: _Composition | None = None
) -> None:
    """Register how an operation's gradient is composed of PyTorch's operations, where its C++ node does not compute it.

    Args:
        operation: One of :data:`OPERATIONS`.
        gradient: ``(parameters, saved, g, selection) -> gradient``; ``nodes.cpp`` lists the tensors that a node saves.
        difference: ``(parameters, saved, g, selection, less) -> gradient``: the gradient under one choice
            less that under another.
        ties: ``(parameters, saved) -> flag``: whether the forward met a tie, a 0-d tensor.
    """
    _compositions[operation] = (gradient, difference, ties)


@cache
def _library() -> ModuleType | None:
    if state() != "built":
        return None
    name = "_nslightning_nodes"
    loader = ExtensionFileLoader(name, str(store.library()))
    spec = spec_from_file_location(name, store.library(), loader=loader)
    if spec is None:
        return None
    library = module_from_spec(spec)
    loader.exec_module(library)
    at_lower, at_upper = RECORDS["clamp"].stock(-1.0, 1.0)
    library.connect(_SELF, cpu.addresses(_KERNELS), at_lower, at_upper, stock_relu())
    return library


def load() -> None:
    """Load the library now. Loading makes an autograd node, and surgery counts the nodes that a forward makes."""
    _library()


def stock_relu() -> Tensor:
    """A result of PyTorch's own ReLU, whose backward node shows the class of such nodes."""
    with outside_every_mode(), torch.enable_grad():
        return torch.relu(torch.zeros(1, device="cpu", requires_grad=True))


def state() -> str:
    """Return whether the C++ nodes are in force, for ``nslightning --version --verbose``.

    Returns:
        ``"built"``, ``"switched off"`` (by ``NSLIGHTNING_NATIVE=0``), ``"no CPU kernels"`` or ``"not built"``.
    """
    if os.environ.get("NSLIGHTNING_NATIVE") == "0":
        return "switched off"
    if not cpu.available():
        return "no CPU kernels"
    return "built" if store.library().exists() else "not built"


def cuda_state() -> str:
    """Return whether the C++ nodes take CUDA tensors, too, for ``nslightning --version --verbose``.

    Returns:
        ``"in force"``, ``"not asked for"`` (no GPU has run these kernels yet, so ``NSLIGHTNING_NATIVE=cuda`` has to ask
        for them), ``"no nodes"`` (:func:`state` says why) or ``"no NVRTC"``.
    """
    if state() != "built":
        return "no nodes"
    if os.environ.get("NSLIGHTNING_NATIVE") != "cuda":
        return "not asked for"
    return "in force" if cuda.available() else "no NVRTC"


def _choice(library: ModuleType, selection: Selection) -> Any:
    """The memory that a selection's C++ nodes read; None where it has none, made inside a ``torch.func`` transform."""
    if selection.shared is None:
        if in_functorch():
            return None
        kinks = tuple(selection.kinks[name] for name in OPERATIONS[:-1])
        tensors = (*kinks, selection.pool, selection.published, selection.watched)
        plain = not any(is_transformed(tensor) for tensor in tensors)
        selection.shared = library.share(kinks, *tensors[-3:], selection.constant) if plain else False
    return selection.shared or None


def site(operation: str, module: nn.Module, selection: Selection) -> Callable[[Tensor], Any] | None:
    """The C++ function that takes the calls of a module that is one operation.

    Args:
        operation: A field of :class:`~nslightning.Jacobians`.
        module: The module; its attributes are read at each call.
        selection: The choice.

    Returns:
        A function of the input, which returns ``NotImplemented`` for a call that it does not take; None where there is
        no C++ node for the operation.
    """
    library = _library()
    if library is None or operation not in OPERATIONS or operation == "clamp":
        return None
    if (choice := _choice(library, selection)) is None:
        return None
    return cast(Callable[[Tensor], Any], library.site(operation, selection, choice, module.__dict__))


def pointwise(
    operation: str, x: Tensor, selection: Selection, parameters: tuple[Any, ...], inplace: bool
) -> Tensor | Any:
    """Apply a pointwise operation.

    Args:
        operation: A field of :class:`~nslightning.Jacobians`.
        x: The input.
        selection: The choice, read when the backward runs.
        parameters: The operation's own: at most two numbers, None where one is absent.
        inplace: Overwrite ``x``.

    Returns:
        The result, or ``NotImplemented``.
    """
    if torch.compiler.is_compiling() or operation not in OPERATIONS or (library := _library()) is None:
        return NotImplemented
    if not all(p is None or (isinstance(p, (int, float)) and p == p) for p in parameters):
        return NotImplemented
    numbers = [_NAN if p is None else p for p in parameters] + [_NAN] * (2 - len(parameters))
    if (choice := _choice(library, selection)) is None:
        return NotImplemented
    return library.pointwise(operation, x, selection, choice, inplace, *numbers)


def max_pool2d(
    x: Tensor,
    selection: Selection,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> Tensor | Any:
    """Apply 2-d max pooling.

    Args:
        x: The input.
        selection: The choice, read when the backward runs.
        kernel: The windows' height and width.
        stride: The steps between them.
        padding: Implicit -inf padding.
        dilation: The steps between a window's entries.
        ceil_mode: Round the output's size up.

    Returns:
        The result, or ``NotImplemented``.
    """
    if torch.compiler.is_compiling() or (library := _library()) is None:
        return NotImplemented
    if (choice := _choice(library, selection)) is None:
        return NotImplemented
    return library.max_pool2d(x, selection, choice, kernel, stride, padding, dilation, ceil_mode)


def describe(node: Any) -> Described | None:
    """Describe a backward node.

    Args:
        node: A backward node.

    Returns:
        The description of a node of the package's C++ operations; None for every other node.
    """
    library = _library()
    described = None if library is None else library.describe(node)
    return None if described is None else Described(*described)


def backward(node: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
    """Run a C++ node's backward outside a backward pass.

    Args:
        node: A node that :func:`describe` knows.
        *incoming: The gradient that comes to its output.

    Returns:
        The gradient for its input, under the choice that its selection holds now.
    """
    library = _library()
    assert library is not None  # the node came from it
    return (library.backward(node, *incoming),)


def release(node: Any) -> bool:
    """Free the tensors that a C++ node saved.

    Args:
        node: A backward node.

    Returns:
        Whether it was one of the package's C++ nodes.
    """
    library = _library()
    return library is not None and bool(library.release(node))


# ---------------------------------------------------------------------------------------- called by the C++ nodes
def _connect(index: int) -> bool:
    """Load the CUDA kernels for a device that a node met for the first time, if they are in force.

    Returns:
        Whether the answer is final; False while a CUDA graph is captured, when kernels must not be loaded.
    """
    if cuda_state() != "in force" or torch.version.hip is not None:
        return True
    if torch.cuda.is_current_stream_capturing():
        return False
    library = _library()
    assert library is not None  # it called this function
    major, minor = torch.cuda.get_device_capability(index)
    try:
        library.load(index, cuda.image(10 * major + minor), cuda.DRIVER, False)
    except RuntimeError as error:
        warnings.warn(
            f"The C++ autograd nodes do not take tensors on cuda:{index}, as NSLIGHTNING_NATIVE=cuda asks: {error} "
            "The Python nodes run, with the same bits.",
            stacklevel=2,
        )
    return True


def _hold(selection: Selection, x: Tensor) -> None:
    """Give the nodes of a selection the memory on a device that captured launches read."""
    if (numbers := selection.meet(x)) is not None:
        library, kinks = _library(), tuple(numbers[name] for name in OPERATIONS[:-1])
        assert library is not None  # it called this function
        library.hold(selection.shared, x.device.index or 0, kinks, numbers[".pool"], numbers[".published"])


def _composed(
    operation: str, parameters: tuple[Any, ...], selection: Selection, saved: tuple[Tensor, ...], g: Tensor, _: Any
) -> Tensor:
    return _compositions[operation][0](parameters, saved, g, selection)


def _record(
    operation: str, parameters: tuple[Any, ...], selection: Selection, saved: tuple[Tensor, ...], g: Tensor, node: Any
) -> None:
    recorder = selection.recorder
    if recorder is None:  # it was removed after the node had looked
        return
    gradient, difference, ties = _compositions[operation]
    functions = [partial(function, parameters, saved, g) for function in (gradient, difference) if function is not None]
    recorder(node, *functions, **({} if ties is None else {"ties": partial(ties, parameters, saved)}))


class _Module:
    """The functions that ``nodes.cpp`` calls."""

    _composed = staticmethod(_composed)
    _connect = staticmethod(_connect)
    _hold = staticmethod(_hold)
    _record = staticmethod(_record)


_SELF = _Module()
