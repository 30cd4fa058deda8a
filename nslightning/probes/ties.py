"""Counting ties: how often a forward evaluates an operation where its Jacobian is not unique."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nslightning.ops.registry import Call, Operation
from nslightning.surgery import surgeries

__all__ = ["Ties", "counting", "ties"]


@dataclass
class Ties:
    """The ties that one site met.

    Args:
        operation: Field of :class:`~nslightning.Jacobians`.
        tied: Evaluations at a tie.
        total: All evaluations: the input's entries, or the pooling windows.
    """

    operation: str
    tied: int = 0
    total: int = 0

    @property
    def fraction(self) -> float:
        """Tied evaluations as a share of all; 0 where nothing was evaluated."""
        return self.tied / self.total if self.total else 0.0


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[str, Ties]]:
    """Count the ties of every forward inside the block.

    Args:
        model: A patched model, or one that contains patched ones, in eager mode.

    Yields:
        The counts by site, filled as forwards run. A site called several times adds up; a functional site is
        named ``"<module>:<function>"``. Where several parts of ``model`` were patched, each one's name comes
        first.

    Raises:
        ValueError: If the model is not patched.
        TypeError: If the model is compiled: its sites cannot be watched.
    """
    found = surgeries(model)
    if not found:
        raise ValueError(f"{type(model).__name__} is not patched; call `patch(model, Jacobians())` first")
    for module in model.modules():
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise TypeError("ties are counted in eager mode: give the model as it was before torch.compile")
    counts: dict[str, Ties] = {}

    def observer(prefix: str) -> Callable[[str, Operation, Call], None]:
        def observe(site: str, operation: Operation, call: Call) -> None:
            with torch.no_grad():
                tied, total = operation.ties(call)
            entry = counts.setdefault(".".join(filter(None, (prefix, site))), Ties(operation.name))
            entry.tied += tied
            entry.total += total

        return observe

    before = {s: s.observer for surgery in found.values() for s in surgery.selections.values()}
    for name, surgery in found.items():
        observe = observer(name if len(found) > 1 else "")
        for selection in surgery.selections.values():
            selection.observer = observe
    try:
        yield counts
    finally:
        for selection, old in before.items():
            selection.observer = old


def ties(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Ties]:
    """The ties that one forward meets, per site.

    The forward leaves no trace: buffers (batch norm's running statistics) and the random state stay as they
    are.

    Args:
        model: A patched model, or one that contains patched ones, in eager mode and in the training or
            evaluation mode wanted.
        *args: The model's inputs.
        **kwargs: The model's keyword inputs.

    Returns:
        The counts by site, named as by :func:`counting`.

    Raises:
        ValueError: If the model is not patched.
        TypeError: If the model is compiled: its sites cannot be watched.

    Example:
        >>> import nslightning
        >>> model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
        >>> report = nslightning.patch(model, nslightning.Jacobians())
        >>> found = ties(model, torch.tensor([[[[0.0, 1.0], [1.0, -1.0]]]]))
        >>> found["0"].tied, found["1"].tied, found["1"].fraction
        (1, 1, 1.0)
    """
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.no_grad(), counting(model) as counts, torch.random.fork_rng(sorted(devices, key=str)):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        torch.func.functional_call(model, buffers, args, kwargs)
    return counts
