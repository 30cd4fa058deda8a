"""Kinks that a model writes by hand, found by evaluation: where two sides of a comparison meet, each is tried.

``x * (x > 0)``, ``torch.where(x > 0, x, 0)``, ``x.masked_fill(x < 0, 0)``, ``x * x.sign()`` and ``x[x.argmax()]`` are
made of operations that are smooth or have no derivative, so that no graph shows the kink. But each asks a comparison
which side it is on. Where the comparison ties, answering otherwise leaves the value as it is and gives the derivative
of the other side.
"""

from __future__ import annotations

import linecache
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nslightning._torch import disable_function_modes
from nslightning.probes.gradients import wanted
from nslightning.surgery import FORGETFUL, arguments_as_called

__all__ = ["Handwritten", "handwritten"]

_COMPARISONS = frozenset(
    ("gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal")
)
_SIGNS = frozenset(("sign", "sgn"))
_PICKS = frozenset(("argmax", "argmin"))
_ROUNDINGS = 64  # units of rounding, of a norm, that another order of operations may change


@dataclass(frozen=True)
class Handwritten:
    """A comparison whose ties decide about the gradient, and not about the loss.

    Args:
        module: Qualified name of the module whose code compares; ``""`` is the model itself.
        place: File and line.
        code: The line.
        tied: Number of its evaluations that tied.
        total: Number of its evaluations.
        relative: The change of the gradient where the ties are decided otherwise, over its norm.
    """

    module: str
    place: str
    code: str
    tied: int
    total: int
    relative: float


def handwritten(model: nn.Module, loss: Callable[[], Tensor]) -> list[Handwritten]:
    """The kinks of a model that are written by hand and met ties.

    The forward runs once under watch. Each line of code that compared equal numbers is then evaluated again with its
    ties decided otherwise: ``x > 0`` is true at 0, ``sign`` is 1 there, ``argmax`` takes the last of equal entries. If
    the loss stays and the gradient does not, the line has a kink, and a choice that :func:`~nslightning.patch` does not
    reach. A comparison that did not tie is not tried, nor is what compiled and scripted code compares, and two lines
    whose ties only together leave the loss as it is are not found.

    Args:
        model: Any module with parameters.
        loss: Runs a forward and returns a 0-d loss; the same at each call.

    Returns:
        One for each such line, in the order in which they ran.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = nn.Parameter(torch.zeros(3))
        ...     def forward(self, x):
        ...         y = x * self.w
        ...         return y * (y > 0)
        >>> net = Net()
        >>> [(kink.tied, kink.relative) for kink in handwritten(net, lambda: net(torch.ones(3)).sum())]
        [(3, inf)]
    """
    with _Watch(model) as first:
        value = loss()
    tied = [line for line in first.lines.values() if line.tied]
    if not tied or not value.requires_grad:
        return []
    before = _gradient(model, value)
    kinks = []
    for line in tied:
        with _Watch(model, line.key) as watch:
            try:
                other = loss()
            except (RuntimeError, ValueError, IndexError):  # another shape: no side of a kink
                continue
        if not _same(value.detach(), other.detach()):
            continue
        change, size = _apart(_gradient(model, other), before)
        eps = torch.finfo(value.dtype).eps
        eps = max([eps, *(torch.finfo(t.dtype).eps for t in before if t.is_floating_point())])
        if change > _ROUNDINGS * eps * size and math.isfinite(change):
            relative = change / size if size else math.inf
            kept = watch.lines.get(line.key, line)
            kinks.append(Handwritten(line.module, line.place, line.code, kept.tied, kept.total, relative))
    return kinks


@dataclass
class _Line:
    """A line of code that compares."""

    key: tuple[str, str, int]
    module: str
    place: str
    code: str
    tied: int = 0
    total: int = 0


class _Watch(TorchFunctionMode):
    """Counts the ties of comparisons by lines of code, and decides those of one line otherwise.

    Args:
        model: Whose modules name the lines.
        other: The line.
    """

    def __init__(self, model: nn.Module, other: tuple[str, str, int] | None = None) -> None:
        super().__init__()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.other = other
        self.lines: dict[tuple[str, str, int], _Line] = {}

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in FORGETFUL:
            args, kwargs = arguments_as_called(func, args, kwargs)
        name = getattr(func, "__name__", "").strip("_")
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout != torch.strided or x.is_nested:
            return func(*args, **kwargs)
        with disable_function_modes(), torch.no_grad():
            tied = _ties(name, x, args, kwargs)
        if tied is None:
            return func(*args, **kwargs)
        frame = sys._getframe(1)
        line = self._line(frame, name)
        result = func(*args, **kwargs)
        with disable_function_modes(), torch.no_grad():
            line.tied += int(torch.count_nonzero(tied))
            line.total += tied.numel()
            if self.other == line.key and tied.any():
                return _otherwise(name, result, tied, x, args, kwargs)
        return result

    def _line(self, frame: FrameType | None, name: str) -> _Line:
        module = None
        place: tuple[str, int] | None = None
        while frame is not None and module is None:
            file = frame.f_code.co_filename
            if place is None and not _inside_libraries(file):
                place = file, frame.f_lineno
            owner = frame.f_locals.get("self") if place is not None else None
            if isinstance(owner, nn.Module):
                module = self.names.get(id(owner))
            frame = frame.f_back
        file, number = place or ("?", 0)
        key = (name, file, number)
        if key not in self.lines:
            code = linecache.getline(file, number).strip() or name
            self.lines[key] = _Line(key, module or "", f"{Path(file).name}:{number}", code)
        return self.lines[key]


_HOME = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent.parent)


def _inside_libraries(file: str) -> bool:
    return file.startswith((_HOME, _OURS)) or file.startswith("<frozen")


def _ties(name: str, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return where a function that compares is given equal numbers; None if it does not compare."""
    if name in _COMPARISONS or name == "heaviside":
        other = args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("values"))
        if name == "heaviside":
            return x == 0
        return None if other is None else torch.as_tensor(x == other)
    if name in _SIGNS:
        return x == 0
    if name in _PICKS:
        dim, keepdim = _picked_dim(args, kwargs)
        if x.numel() == 0:
            return None
        best = (torch.amax if name == "argmax" else torch.amin)(x, () if dim is None else dim, True)
        tied = (x == best).sum(() if dim is None else dim, keepdim=True) > 1
        if keepdim:
            return tied
        return tied.reshape(()) if dim is None else tied.squeeze(dim)
    return None


def _picked_dim(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | None, bool]:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    return dim, bool(args[2] if len(args) > 2 else kwargs.get("keepdim", kwargs.get("keepdims", False)))


def _otherwise(
    name: str, result: Tensor, tied: Tensor, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    """Return the result of a function that decides its ties the other way."""
    if result.dtype == torch.bool:
        return torch.where(tied, ~result, result)
    if name == "heaviside":
        return torch.where(tied, (result == 0).to(result.dtype), result)
    if name in _SIGNS:
        return torch.where(tied, torch.ones_like(result), result)
    if name in _PICKS:
        dim, keepdim = _picked_dim(args, kwargs)
        pick = torch.argmax if name == "argmax" else torch.argmin
        if dim is None:
            last = x.numel() - 1 - pick(x.flatten().flip(0))
            return last.reshape(result.shape)
        return x.shape[dim] - 1 - pick(x.flip(dim), dim, keepdim)
    return torch.where(tied, 1 - result, result)  # a comparison in place: 0 or 1


def _gradient(model: nn.Module, loss: Tensor) -> list[Tensor]:
    tensors = list(wanted(model).values())
    values = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, values, strict=True)]


def _same(a: Tensor, b: Tensor) -> bool:
    eps = torch.finfo(a.dtype).eps
    return bool(((a - b).abs() <= _ROUNDINGS * eps * torch.maximum(a.abs(), b.abs())).all())


def _apart(a: list[Tensor], b: list[Tensor]) -> tuple[float, float]:
    change = math.hypot(*(float((x.double() - y.double()).norm()) for x, y in zip(a, b, strict=True)))
    return change, math.hypot(*(float(y.double().norm()) for y in b))
