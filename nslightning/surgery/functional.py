"""Nonsmooth operations that a model calls as functions: caught while the model runs."""

from __future__ import annotations

import builtins
import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from nslightning.ops.registry import FUNCTIONS, UNSUPPORTED_FUNCTIONS, positional
from nslightning.surgery.report import UnreachedError

if TYPE_CHECKING:
    from nslightning.surgery.patching import Part, Surgery
    from nslightning.surgery.report import Site

__all__ = ["FunctionalCalls", "active", "custom_functions", "in_checkpoint", "teach_the_compiler"]

# Linear in what gradients pass through: the boxes have none.
_SMOOTH = ("torchvision_roi_align_default", "torchvision_ps_roi_align_default")
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
        self._numbers: dict[tuple[int, str], int] = {}

    def count(self, site: Site) -> None:
        """Count one evaluation at a site.

        Args:
            site: A row of the report.
        """
        self.evaluations[id(site)] = (site, self.evaluations.get(id(site), (site, 0))[1] + 1)

    def number(self, part: Part, operation: str) -> int:
        """The number, from 0, of the call of an operation that a module now makes.

        Args:
            part: What the surgery keeps with the module.
            operation: The field of :class:`~nslightning.Jacobians`.

        Returns:
            How many such calls this forward has made before.
        """
        key = (id(part), operation)
        self._numbers[key] = self._numbers.get(key, -1) + 1
        return self._numbers[key]

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.norm:  # a method written in Python, which a compiler hands over as a key of no dictionary
            func = Tensor.norm
        for operation in FUNCTIONS.get(func, ()):
            call = operation.functions[func](*args, **positional(kwargs))
            if call is not None and call.x.is_floating_point():
                return self._reached(operation, call, func, args, kwargs)
        if func in UNSUPPORTED_FUNCTIONS and _differentiable(args, kwargs):
            self._unreached(func)
        return func(*args, **kwargs)

    def _unreached(self, func: Callable) -> None:
        """Name, or refuse, a call of an operation that has no choice."""
        surgery, operation = self.surgery, UNSUPPORTED_FUNCTIONS[func]
        kind = getattr(func, "__name__", str(func))
        if torch.compiler.is_compiling():  # no row can be made here, and no caller told from another
            if surgery.strict and not (surgery.only or surgery.skip):
                raise UnreachedError.of(surgery.report.model, "", operation, kind)
            return
        module, part, _ = self._caller()
        if surgery.chosen(part.names, module):
            self.count(surgery.unreached(part, operation, kind, kind.endswith("_")))

    def _reached(self, operation: Any, call: Any, func: Callable, args: Any, kwargs: Any) -> Any:
        surgery = self.surgery
        if torch.compiler.is_compiling():
            if (one := surgery.everywhere[operation.name]) is None:
                raise RuntimeError(
                    "functional calls cannot be told apart under torch.compile, so `only`, `skip` and rules for some "
                    f"modules cannot decide on this {operation.name}. Patch without them, or do not compile."
                )
            return operation.apply(one, call)
        module, part, checkpointed = self._caller()
        if not surgery.chosen(part.names, module):
            return func(*args, **kwargs)
        if checkpointed and self.differentiating:
            site = surgery.row(part, operation.name, func.__name__, call.inplace, "unreached")
            site.decided = "called by a function given to torch.utils.checkpoint"
            if surgery.strict:
                raise UnreachedError(surgery.report.model, [site])
            self.count(site)
            return func(*args, **kwargs)
        rules = surgery.decide(part, operation.name, self)
        selection = surgery.selections[rules]
        site = surgery.row(part, operation.name, func.__name__, call.inplace, "functional", rules)
        self.count(site)
        with torch._C.DisableTorchFunction():  # what the operation calls itself is not the model's
            if selection.observer is not None:
                selection.observer(f"{part.names[0]}:{site.kind}", operation, call)
            return operation.apply(selection, call)

    def _caller(self) -> tuple[nn.Module, Part, bool]:
        """The innermost module whose code is running, from the Python stack.

        Returns:
            The module, what the surgery keeps with it, and whether a checkpoint lies between the call and the
            last method that entered this mode: when the checkpoint recomputes the call, the mode will not be
            there.
        """
        caller: tuple[nn.Module, Part] | None = None
        checkpointed = False
        frame: FrameType | None = sys._getframe(3)
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


@cache
def teach_the_compiler() -> None:
    """Make ``torch.compile`` hand to the mode what eager mode hands to it.

    In torch 2.15 Dynamo lets a mode see the methods of tensors, and of the functions those that ``torch.overrides``
    lists. That passes over functions that end with an underscore, ``torch.relu_`` or ``F.elu_``, over ``F.hardswish``
    and ``F.hardsigmoid``, and over ``abs(x)``: these kept PyTorch's own derivative, in silence.
    """
    from torch._dynamo.variables.torch import get_overridable_functions

    get_overridable_functions().update(f for f in (*FUNCTIONS, *UNSUPPORTED_FUNCTIONS) if not _overload(f))
    for absolute in (builtins.abs, operator.abs):
        torch.compiler.substitute_in_graph(absolute, skip_signature_check=True)(_absolute)


def _overload(func: Callable) -> bool:
    return isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))


def _absolute(x: Any, /) -> Any:
    return x.abs() if isinstance(x, Tensor) else x.__abs__()


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


def in_checkpoint() -> bool:
    """Whether a function given to ``torch.utils.checkpoint`` is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _CHECKPOINT:
        frame = frame.f_back
    return frame is not None


def custom_functions(output: Any, given: Any) -> Iterator[str]:
    """The autograd functions of others in the graph between a model's inputs and its output.

    Their backward is code that nobody here can look into: Python's ``torch.autograd.Function``, C++'s, and custom
    operators with an autograd formula. PyTorch's own (checkpoints, collective communication) and ours are none.

    Args:
        output: What the model returned.
        given: Its inputs.

    Yields:
        Their names, once per evaluation.
    """
    seen = {node for x in tree_leaves(given) if isinstance(x, Tensor) and (node := x.grad_fn) is not None}
    todo = [node for x in tree_leaves(output) if isinstance(x, Tensor) and (node := x.grad_fn) is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        cls = getattr(node, "_forward_cls", None)
        if (name := node.name()).startswith("GeneratedBackwardFor_"):
            if (operator := name.removeprefix("GeneratedBackwardFor_").removesuffix("Backward")) not in _SMOOTH:
                yield operator
        elif cls is not None and cls.__module__.partition(".")[0] not in ("torch", "nslightning"):
            yield f"{cls.__module__}.{cls.__qualname__}"
        elif name.startswith("torch::autograd::CppNode<"):
            yield name.removeprefix("torch::autograd::CppNode<").removesuffix(">")
        todo += [below for below, _ in node.next_functions if below is not None]


def _differentiable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a gradient may pass through the call: integers, masks and bookkeeping are nobody's concern."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values()))
