"""The C++ autograd nodes, where they were built: a patched call then costs the host what a stock call costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from nslightning.ops.autograd.selection import Selection

__all__ = ["Described", "backward", "describe", "release"]


class Described(NamedTuple):
    """What a C++ node says of itself.

    Args:
        operation: The field of :class:`~nslightning.Jacobians` that chooses.
        selection: Where the choice is read.
        tied: False where the forward saw that no choice can matter.
    """

    operation: str
    selection: Selection
    tied: bool


def describe(node: Any) -> Described | None:
    """What a backward node says of itself.

    Args:
        node: A backward node.

    Returns:
        None for every node but those of the package's C++ operations.
    """
    return None


def backward(node: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
    """Run a C++ node's backward outside a backward pass.

    Args:
        node: A node that :func:`describe` knows.
        *incoming: The gradients that come to its outputs.

    Returns:
        The gradients for its inputs, under the choice that its selection holds now.
    """
    raise NotImplementedError


def release(node: Any) -> bool:
    """Free what a C++ node saved.

    Args:
        node: A backward node.

    Returns:
        Whether it was one of the package's C++ nodes.
    """
    return False
