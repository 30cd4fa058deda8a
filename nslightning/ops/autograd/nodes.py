"""Questions to the backward nodes of the package's operations.

A graph is asked through these functions alone, whether a node was written in Python (an ``autograd.Function`` below) or
in C++ (:mod:`~nslightning.ops.autograd.native`), which has no attributes that Python could read.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nslightning._torch import in_forward_mode, in_functorch, is_tracing, is_view, kept_version
from nslightning.ops.autograd import native

if TYPE_CHECKING:
    from nslightning.ops.autograd.selection import Selection

__all__ = [
    "NonsmoothFunction",
    "OwnFunction",
    "check_changes",
    "gradients_under",
    "is_own",
    "kept_ties",
    "of_a_leaf",
    "operation_of",
    "put_in_place",
    "refuse_changes",
    "refuse_changes_of_a_copy",
    "release",
    "selection_of",
]


class OwnFunction(torch.autograd.Function):
    """An autograd function of the package, whose backward the package knows."""


class NonsmoothFunction(OwnFunction):
    """An autograd function whose backward reads a choice.

    Its node has the attributes ``operation``, the field of :class:`~nslightning.Jacobians` that chooses, and
    ``selection``. It may have ``tied``: False where the forward saw that no choice can matter.
    """


def of_a_leaf(x: Tensor) -> bool:
    """Return whether PyTorch refuses to overwrite a tensor, for it is a leaf that wants a gradient, or a view of one.

    Args:
        x: Any tensor.

    Returns:
        Whether the stock operation in place would raise.
    """
    base = x
    if not torch.compiler.is_compiling() and is_view(x) and x._base is not None:
        base = x._base
    return base.is_leaf and base.requires_grad


class _Put(OwnFunction):
    """Overwrites a tensor. No gradient goes to its earlier value, where ``copy_`` would send zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, result: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        with kept_version(x):  # `mark_dirty` counts it
            return x.copy_(result)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        return None, g


def put_in_place(x: Tensor, result: Tensor) -> Tensor:
    """Overwrite a tensor with a result that was computed elsewhere.

    Args:
        x: The tensor, of the result's shape and dtype.
        result: The result.

    Returns:
        ``x``, whose gradient goes to ``result`` as it comes: nothing is added to it, not even zeros.

    Example:
        >>> x = torch.ones(2, requires_grad=True) * 1
        >>> put_in_place(x, x.clone() * 3).tolist()
        [3.0, 3.0]
    """
    # Of a view, autograd sends the rest of its base a gradient anyway; a trace takes no function that works in place.
    if torch.compiler.is_compiling() or in_functorch() or in_forward_mode() or is_tracing() or is_view(x):
        return x.copy_(result)
    return cast(Tensor, _Put.apply(x, result))


def refuse_changes(node: Any, written: Tensor) -> None:
    """Let a node's backward raise, as stock's does, if the result in place was overwritten after the operation.

    Stock reads the result in its backward. The package's node reads other memory, and would return a gradient where
    stock raises an error.

    Args:
        node: The node of a :class:`NonsmoothFunction`, whose backward calls :func:`check_changes`.
        written: The result, in the memory that it was written to.
    """
    if not torch.compiler.is_compiling() and isinstance(node, torch.autograd.function.BackwardCFunction):
        node.written = written.detach(), written._version  # type: ignore[attr-defined] # a node takes attributes; its stub has none


def refuse_changes_of_a_copy(result: Tensor, written: Tensor) -> None:
    """Let the backward of a result that was copied to its place raise if that place was overwritten afterwards.

    Args:
        result: The result of the package's operation, or of the stock one where no entry tied.
        written: The tensor that it was copied to.
    """
    if torch.compiler.is_compiling() or in_functorch() or result.grad_fn is None:
        return
    noted = SimpleNamespace(operation=result.grad_fn.name(), written=(written.detach(), written._version))
    result.grad_fn.register_prehook(lambda _: check_changes(noted))


def check_changes(node: Any) -> None:
    """Raise stock's error if the tensor that :func:`refuse_changes` noted has changed.

    Args:
        node: The node whose backward runs.

    Raises:
        RuntimeError: If the tensor has changed.
    """
    if torch.compiler.is_compiling():  # the compiler orders writes itself
        return
    written, version = getattr(node, "written", (None, 0))
    if written is not None and written._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: the "
            f"result of {node.operation}, of shape {list(written.shape)}, is at version {written._version}; expected "
            f"version {version} instead"
        )


def is_own(node: Any) -> bool:
    """Return whether a backward node belongs to one of the package's functions.

    Args:
        node: A backward node, such as ``tensor.grad_fn``.

    Returns:
        True for nodes that read a choice, and for those that their own derivatives are made of.
    """
    cls = getattr(node, "_forward_cls", None)
    return issubclass(cls, OwnFunction) if isinstance(cls, type) else native.describe(node) is not None


def operation_of(node: Any) -> str | None:
    """The operation whose choice a backward node reads.

    Args:
        node: A backward node.

    Returns:
        A field of :class:`~nslightning.Jacobians`; None where the node reads no choice.

    Example:
        >>> from nslightning.ops import relu
        >>> operation_of(relu(torch.zeros(1, requires_grad=True), 0.5).grad_fn)
        'relu'
        >>> operation_of(torch.zeros(1, requires_grad=True).exp().grad_fn) is None
        True
    """
    if (described := native.describe(node)) is not None:
        return described.operation
    return str(node.operation) if _reads(node) else None


def selection_of(node: Any) -> Selection | None:
    """The selection that a backward node reads its choice from.

    Args:
        node: A backward node.

    Returns:
        The selection; None where the node reads no choice.
    """
    if (described := native.describe(node)) is not None:
        return described.selection
    return node.selection if _reads(node) else None


def kept_ties(node: Any) -> bool:
    """Return whether a choice may matter at a backward node that reads one.

    Args:
        node: A backward node for which :func:`operation_of` names an operation.

    Returns:
        False where the forward met no tie that could matter; True where it did, and where it did not look.
    """
    if (described := native.describe(node)) is not None:
        return described.tied
    return bool(getattr(node, "tied", True))


def gradients_under(node: Any, jacobians: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that a backward node would return under another choice than the one in force.

    They can be differentiated with respect to the incoming gradients, where gradients are enabled.

    Args:
        node: A backward node for which :func:`operation_of` names an operation.
        jacobians: The choice, a :class:`~nslightning.Jacobians`.
        *incoming: The gradients that come to the node's outputs, of their shapes.

    Returns:
        The gradients for the node's inputs, in the order of ``node.next_functions``.

    Raises:
        ValueError: If the node reads no choice.
    """
    selection = selection_of(node)
    if selection is None:
        raise ValueError(f"{node.name()} reads no choice")
    before = selection.jacobians
    selection.set(jacobians)
    try:
        if native.describe(node) is not None:
            return native.backward(node, *incoming)
        gradients = node._forward_cls.backward(node, *incoming)
    finally:
        selection.set(before)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    # A function written in Python also answers for arguments that are no tensors, and that need no gradient.
    needed = iter([g for g, needs in zip(gradients, node.needs_input_grad, strict=True) if needs])
    return tuple(None if below is None else next(needed) for below, _ in node.next_functions)


def release(node: Any) -> bool:
    """Free the tensors that a C++ node of the package saved; no backward can pass it afterwards.

    Args:
        node: A backward node.

    Returns:
        Whether it was such a node; False for every other node, which keeps its tensors.
    """
    return native.release(node)


def _reads(node: Any) -> bool:
    cls = getattr(node, "_forward_cls", None)
    return isinstance(cls, type) and issubclass(cls, NonsmoothFunction)
