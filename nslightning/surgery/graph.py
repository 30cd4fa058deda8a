"""Searches the autograd graph that a patched model made for kinks and custom backwards that belong to no site."""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from nslightning._torch import (
    disable_function_modes,
    eager,
    function_of,
    has_formula_of_torch,
    is_control_flow,
    number_of,
)
from nslightning.surgery.kinks import kink

__all__ = [
    "MOST",
    "OF_MODULES",
    "Foreign",
    "foreign",
    "foreign_nodes",
    "is_checkpoint",
    "kinds",
    "mark",
    "marked",
    "nodes",
    "structure",
    "tensors",
]

# These are linear in the features. Their boxes get no gradient.
_SMOOTH = ("torchvision_roi_align_default", "torchvision_ps_roi_align_default")
_OURS = ("nslightning_chosen_default",)
_OPAQUE = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, FunctionType, BuiltinFunctionType,
           MethodType, torch.dtype, torch.device, torch.Generator)  # fmt: skip
#: The attributes of a module that PyTorch or the surgery made.
OF_MODULES = frozenset((*vars(nn.Module()), "_nonsmooth_part")) - {"_buffers"}  # parameters, parts, hooks
_MARK = "nslightning"
#: A search through the attributes of a module looks into at most this number of objects.
MOST = 10_000


class Foreign(NamedTuple):
    """A node of the graph whose derivative is not the package's.

    Args:
        operation: ``"custom"`` for a backward from outside PyTorch and this package, or the ATen operation of a kink.
        kind: The name of the function, the operator, or the node.
        number: The node's sequence number; autograd counts up as it makes nodes.
    """

    operation: str
    kind: str
    number: int


@eager
def foreign_nodes(output: Iterable[Tensor], inputs: Iterable[Tensor]) -> Iterator[Foreign]:
    """The nodes between tensors and a model's inputs that surgery may not have reached.

    Args:
        output: Tensors that the model made.
        inputs: The model's inputs; the search stops at them.

    Yields:
        Each such node once. Kinks of patched sites are among them.
    """
    return (found for node in nodes(output, inputs) if (found := foreign(node)) is not None)


def foreign(node: Any) -> Foreign | None:
    """A node that surgery may not have reached.

    Surgery cannot look into the backward of a custom function: Python's ``torch.autograd.Function``, C++'s, or a custom
    operator with an autograd formula. Those of PyTorch (checkpoints, collective communication) and of this package are
    left out. Kinks are PyTorch's own nodes of :data:`~nslightning.surgery.kinks.KINKS`.

    Args:
        node: A backward node.

    Returns:
        What it is; None for other nodes.
    """
    cls, name = function_of(node), node.name()
    if name.startswith("GeneratedBackwardFor_"):
        operator = name.removeprefix("GeneratedBackwardFor_").removesuffix("Backward")
        if operator not in (*_SMOOTH, *_OURS) and not (cls is not None and has_formula_of_torch(cls)):
            return Foreign("custom", operator, number_of(node))
    elif cls is not None:
        if cls.__module__.partition(".")[0] not in ("torch", "nslightning") or is_control_flow(cls):
            return Foreign("custom", f"{cls.__module__}.{cls.__qualname__}", number_of(node))
    elif name.startswith("torch::autograd::CppNode<"):
        function = name.removeprefix("torch::autograd::CppNode<").removesuffix(">")
        if not function.startswith("nslightning"):
            return Foreign("custom", function, number_of(node))
    elif (operation := kink(node)) is not None:
        return Foreign(operation, name, number_of(node))
    return None


@eager
def nodes(output: Iterable[Tensor], inputs: Iterable[Tensor]) -> Iterator[Any]:
    """The backward nodes between tensors and a model's inputs.

    Args:
        output: Tensors that the model made.
        inputs: The model's inputs; the search stops at them.

    Yields:
        Each node once.
    """
    seen = {node for x in inputs if (node := x.grad_fn) is not None}
    todo = [node for x in output if (node := x.grad_fn) is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        todo += [below for below, _ in node.next_functions if below is not None]


def is_checkpoint(node: Any) -> bool:
    """Return whether a backward node is that of a checkpoint of ``use_reentrant=True``.

    Args:
        node: A backward node.

    Returns:
        Whether its backward runs the forward again, which ran without gradients.
    """
    return function_of(node) is CheckpointFunction


def mark(output: Iterable[Tensor], surgery: object) -> None:
    """Note in the graph of tensors that a patched model made them.

    Args:
        output: Tensors that the model made.
        surgery: The model's surgery.
    """
    with disable_function_modes():
        for x in output:
            if x.grad_fn is not None:
                metadata: Any = x.grad_fn.metadata  # the stubs take it for a method
                metadata.setdefault(_MARK, set()).add(id(surgery))


def marked(node: Any, surgeries: Iterable[object]) -> bool:
    """Return whether a backward node is the last of what a patched model computed, as :func:`mark` noted.

    Args:
        node: A backward node.
        surgeries: The surgeries of the model and its parts.

    Returns:
        Whether one of them noted it.
    """
    return not set(map(id, surgeries)).isdisjoint(node.metadata.get(_MARK, ()))


@eager
def tensors(*values: Any) -> Iterator[Tensor]:
    """The tensors that can be reached from values: through containers, dataclasses and attributes of objects.

    Args:
        *values: Anything. In a module the search visits the attributes, but not the parameters and submodules.

    Yields:
        Each tensor.
    """
    seen: set[int] = set()
    todo = deque(values)
    while todo and len(seen) < MOST:
        value = todo.popleft()
        if isinstance(value, Tensor):
            yield value
            continue
        if isinstance(value, _OPAQUE) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            todo += value
        elif isinstance(value, nn.Module):
            todo += (x for name, x in vars(value).items() if name not in OF_MODULES and not isinstance(x, nn.Module))
        elif dataclasses.is_dataclass(value):
            todo += (getattr(value, field.name, None) for field in dataclasses.fields(value))
        elif _foreign_to_torch(type(value)):
            todo += (vars(value) if hasattr(value, "__dict__") else {}).values()
            slots = (
                x for cls in type(value).__mro__ for x in vars(cls).values() if isinstance(x, MemberDescriptorType)
            )
            todo += (getattr(value, slot.__name__, None) for slot in slots)


@eager
def structure(value: Any) -> Any:
    """The structure of a value that a method returned: its classes, and the keys of its mappings.

    Args:
        value: Anything.

    Returns:
        A hashable value, the same for the same structure.
    """
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, Mapping):
        return (type(value), *((key, structure(x)) for key, x in value.items()))
    if isinstance(value, (list, tuple)) and len(value) <= 64:
        return (type(value), *map(structure, value))
    return type(value)


@eager
def kinds(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The kind of a call to a method: the classes of its arguments, and the values of its flags.

    Args:
        args: The positional arguments.
        kwargs: The keyword arguments.

    Returns:
        A hashable value. Calls with the same value take the same path through the method, unless the path depends on
        other values, such as a number.

    Example:
        >>> kinds((1.5,), {"mode": "a"}) == kinds((2.5,), {"mode": "a"}) != kinds((2.5,), {"mode": "b"})
        True
    """
    return (len(args), *kwargs, *map(_kind, args), *map(_kind, kwargs.values()))


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, (bool, Enum)) or (isinstance(value, str) and len(value) <= 64):
        return value
    if isinstance(value, (list, tuple)) and len(value) <= 64:
        return (type(value), *map(_kind, value))
    if isinstance(value, dict) and len(value) <= 64:
        return (type(value), *value, *map(_kind, value.values()))
    return type(value)


def _foreign_to_torch(cls: type) -> bool:
    """Return whether objects of this class may hold a model's tensors in their attributes."""
    if cls.__module__.startswith("torch.distributions.") or issubclass(cls, SimpleNamespace):
        return True
    top = cls.__module__.partition(".")[0]
    return top not in ("torch", "nslightning", "lightning", "numpy") and top not in sys.stdlib_module_names
