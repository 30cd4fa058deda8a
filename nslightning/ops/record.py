"""What the registry's entries are made of: a nonsmooth operation, and one evaluation of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nslightning.ops.autograd.selection import Selection

__all__ = ["Call", "Operation", "positional", "spelled"]


class Call(NamedTuple):
    """One evaluation of an operation, whatever spelling it came in.

    Args:
        x: The input, or the first of them.
        parameters: The others, and the operation's own parameters.
        inplace: Overwrite ``x``.
        return_indices: Also return the indices that the operation finds.
        within: What evaluates it where it is part of something else, as the absolute value is of an L1 loss.
    """

    x: Tensor
    parameters: tuple[Any, ...] = ()
    inplace: bool = False
    return_indices: bool = False
    within: Callable[[Selection, Tensor], Any] | None = None


@dataclass(frozen=True, eq=False)
class Operation:
    """A nonsmooth operation.

    Args:
        name: The field of :class:`~nslightning.Jacobians` that chooses its Jacobian.
        apply: Evaluates a call under a selection.
        ties: Counts a call's ties: ``(tied evaluations, all evaluations)``.
        modules: The module classes that are this operation, each with what turns ``(module, *args)`` into a
            call.
        functions: The functions and methods that are, each with what turns its arguments into a call; this
            returns None where the arguments make it another operation.
    """

    name: str
    apply: Callable[[Selection, Call], Any]
    ties: Callable[[Call], tuple[int, int]]
    modules: dict[type[nn.Module], Callable[..., Call | None]] = field(default_factory=dict)
    functions: dict[Callable, Callable[..., Call | None]] = field(default_factory=dict)

    def __reduce__(self) -> Any:
        return _operation, (self.name,)  # one of each kind: pickles and copies name it


def _operation(name: str) -> Operation:
    from nslightning.ops.registry import OPERATIONS  # which is made of these

    return OPERATIONS[name]


def positional(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments as the registry takes them: PyTorch's functions and modules call the input ``input``.

    Args:
        kwargs: As given to a function or a module.

    Returns:
        The same under our name for the input.
    """
    return {("x" if k in ("input", "self") else k): v for k, v in kwargs.items()}


def spelled(call: Callable[..., Call | None], *functions: Callable) -> dict[Callable, Callable[..., Call | None]]:
    """Functions that take the same arguments; an ATen operator also by its overloads, as graphs call it.

    Args:
        call: Turns their arguments into a call.
        *functions: The functions.

    Returns:
        What :class:`Operation` takes.
    """
    packets = [f for f in functions if isinstance(f, torch._ops.OpOverloadPacket)]
    overloads = [getattr(f, name) for f in packets for name in f.overloads() if "out" not in name]
    return dict.fromkeys((*functions, *overloads), call)
