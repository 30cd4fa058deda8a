"""Norms: of vectors, in normalisation, and over pooling windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nslightning.jacobians import Jacobians
from nslightning.jacobians import Rule as ChoiceRule
from nslightning.ops.autograd.routing import RULES, Rule, around, dimensions, fixed, own, restored, wide
from nslightning.ops.autograd.selection import Selection

__all__ = ["chosen_norm", "norm", "norm_pool", "norm_pool2d", "normalize", "tied_norms", "unit"]


def _zero(tensors: tuple[Tensor, ...], parameters: tuple[Any, ...]) -> tuple[Tensor]:
    return (tensors[1] == 0,)


def _everywhere(
    choice: tuple[Tensor, ...],
    uniform: Callable[[Tensor], Tensor] | None,
    g: Tensor,
    tensors: tuple[Tensor, ...],
    parameters: tuple[Any, ...],
    tied: Tensor,
) -> tuple[Tensor]:
    """What each entry of a zero vector receives."""
    each = torch.where(tied, g.to(wide(g)) * choice[0], 0).to(tensors[0].dtype)
    return (restored(each, *parameters).expand_as(tensors[0]),)


RULES["norm"] = Rule("norm", 1, _zero, _everywhere, native=0.0, reduces=True)


@own
def chosen_norm(
    x: Tensor,
    selection: Selection,
    p: float = 2.0,
    dim: Any = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
    stock: Callable[..., Tensor] = torch.linalg.vector_norm,
) -> Tensor:
    """The p-norm of vectors with the choice that ``selection`` names at backward time.

    Args:
        x: Input, any shape, floating dtype.
        selection: The choice, read when the backward runs: ``norm`` for 1 < p < inf, ``abs`` for p = 1.
        p: The exponent, 1 <= p < inf.
        dim: The dimensions; None is all.
        keepdim: Keep the reduced dimensions with size 1.
        dtype: As in ``torch.linalg.vector_norm``.
        stock: The function, or ``torch.norm``, which is another one to autocast.

    Returns:
        ``stock(x, p, dim, keepdim, dtype=dtype)``, bit for bit.
    """
    norms = stock(x, p, dim, keepdim, dtype=dtype)
    parameters = (dimensions(x, dim), keepdim)
    if p == 1:
        return around("abs", selection, parameters, x, norms.new_ones(()), norms)
    return around("norm", selection, parameters, x, norms.detach(), norms)


@own
def unit(x: Tensor, selection: Selection, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> Tensor:
    """Divide vectors by their p-norms, or by ``eps`` where these are smaller.

    Args:
        x: Input, any shape, floating dtype.
        selection: The choice, read when the backward runs: as for :func:`chosen_norm`, and at a norm of just ``eps``
            the one of ``clamp`` for its lower bound.
        p: The exponent, 1 <= p < inf.
        dim: The dimensions of the vectors.
        eps: The smallest divisor.

    Returns:
        ``torch.nn.functional.normalize(x, p, dim, eps)``, bit for bit.
    """
    norms = chosen_norm(x, selection, p, dim, keepdim=True, stock=torch.norm)
    divisors = around("clamp_min", selection, ((), True), norms - eps, norms.new_ones(()), norms.clamp_min(eps))
    return x / divisors.expand_as(x)


def norm_pool(x: Tensor, selection: Selection, kernel: tuple[int, int]) -> Tensor:
    """The Euclidean norm of each window with the choice that ``selection`` names at backward time.

    The published rule computes in the input's precision: squares, their sum, its root and ``x / norm`` are each rounded
    to it, so that small windows of halves have the norm 0 and large ones infinity.

    Args:
        x: Input of shape (N, C, H, W) or (C, H, W), floating dtype.
        selection: The choice, read when the backward runs; the rule is read here.
        kernel: Window height and width, which are also the steps between windows.

    Returns:
        Shape (N, C, H // height, W // width), or the same without N.
    """
    (height, width), (rows, columns) = kernel, (x.shape[-2] // kernel[0], x.shape[-1] // kernel[1])
    whole = x[..., : rows * height, : columns * width]
    windows = whole.unflatten(-1, (columns, width)).unflatten(-3, (rows, height))
    if selection.jacobians.rule == "published":
        published: Tensor = _PublishedNorms.apply(windows, selection)
        return published
    return chosen_norm(windows, selection, 2.0, (-3, -1))


class _PublishedNorms(torch.autograd.Function):
    """The norms of windows (..., height, columns, width), formed in the input's own precision."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, selection: Selection) -> Tensor:
        norms = windows.square().sum((-3, -1)).sqrt()
        ctx.save_for_backward(windows, norms)
        ctx.selection = selection
        return norms

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        windows, norms = ctx.saved_tensors
        norms, g = norms[..., None, :, None], gradients[0][..., None, :, None]
        choice = ctx.selection.jacobians.norm or 0.0
        return torch.where(norms != 0, windows / norms, choice) * g, None


def tied_norms(x: Tensor, p: float = 2.0, dim: Any = None) -> tuple[int, int]:
    """How many vectors are zero; for p = 1, how many entries are.

    Args:
        x: Input, any shape, floating dtype.
        p: The exponent.
        dim: The dimensions of the vectors; None is all.

    Returns:
        ``(ties, evaluations)``.
    """
    values = x if p == 1 else torch.linalg.vector_norm(x, p, dim)
    return int(torch.count_nonzero(values == 0)), values.numel()


# --------------------------------------------------------------------------------------------------------- public
def norm(
    x: Tensor,
    dim: int | tuple[int, ...] | None = None,
    keepdim: bool = False,
    *,
    at_zero: float | None = None,
) -> Tensor:
    r"""The Euclidean norm of vectors with a chosen gradient at 0.

    .. math:: y = \lVert x \rVert_2, \qquad \bar x = \bar y\, x / y \text{ where } y \ne 0, \text{ else } c\,\bar y.

    The Clarke Jacobian at 0 is the unit ball; the choice gives each of n entries the same, so it lies in it for
    :math:`|c| \le 1 / \sqrt n`. PyTorch returns 0, JAX and TensorFlow NaN.

    Args:
        x: Input, any shape, floating dtype.
        dim: The dimensions; None is all.
        keepdim: Keep the reduced dimensions with size 1.
        at_zero: What each entry of a zero vector receives, times the incoming gradient; None is the reference.

    Returns:
        ``torch.linalg.vector_norm(x, 2, dim, keepdim)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is not a finite number.

    Example:
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
        >>> norm(x, 1, at_zero=0.5).sum().backward()
        >>> x.grad
        tensor([[0.6000, 0.8000],
                [0.5000, 0.5000]])
    """
    return chosen_norm(x, fixed(Jacobians(norm=at_zero)), 2.0, dim, keepdim)


def normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, *, at_eps: float | None = None) -> Tensor:
    r"""Divide vectors by their norms, with a chosen derivative where a norm is just ``eps``.

    .. math:: y = x / \max(\lVert x \rVert_p, \epsilon).

    At 0 nothing is to be chosen, for there the divisor is :math:`\epsilon`; at a norm of :math:`\epsilon` the divisor's
    Clarke Jacobian is [0, 1], and PyTorch takes what its ``clamp_min`` does: 1 up to torch 2.13, 0 in 2.15.

    Args:
        x: Input, any shape, floating dtype.
        p: The exponent, 1 < p < inf.
        dim: The dimension of the vectors.
        eps: The smallest divisor.
        at_eps: The derivative of the divisor where the norm is ``eps``; None is the reference.

    Returns:
        ``torch.nn.functional.normalize(x, p, dim, eps)``, bit for bit.

    Raises:
        ValueError: If ``at_eps`` is not a finite number.

    Example:
        >>> x = torch.tensor([[2.0, 0.0]], requires_grad=True)
        >>> normalize(x, eps=2.0, at_eps=1.0).sum().backward()
        >>> x.grad
        tensor([[0.0000, 0.5000]])
    """
    choice = None if at_eps is None else (at_eps, at_eps)
    return unit(x, fixed(Jacobians(clamp=choice)), p, dim, eps)


def norm_pool2d(
    x: Tensor, kernel_size: int | tuple[int, int], *, at_zero: float | None = None, rule: ChoiceRule = "exact"
) -> Tensor:
    r"""Pooling by the Euclidean norm of each window, with a chosen gradient at windows of zeros.

    NormPool of Boustany, *On the numerical reliability of nonsmooth autodiff: a MaxPool case study*, TMLR 2024: its
    version 1 gives every entry of a zero window 0, its version 2 the incoming gradient itself. Windows do not overlap;
    rows and columns left over at the end are dropped. Sums of squares are formed as ``torch.linalg.vector_norm`` does,
    in float32 for fp16 and bf16; the paper's code squares in the working precision, where small entries vanish.

    Args:
        x: Input of shape (N, C, H, W) or (C, H, W), floating dtype.
        kernel_size: Window height and width, which are also the steps between windows.
        at_zero: What each entry of a zero window receives, times the incoming gradient: 0 is version 1, 1 is version
            2; None is the reference, 0.
        rule: ``published`` forms squares, sums, roots and quotients in the input's precision, as the paper's code.

    Returns:
        Shape (N, C, H // height, W // width), or the same without N.

    Raises:
        ValueError: If ``at_zero`` is not a finite number.

    Example:
        >>> x = torch.zeros(1, 1, 2, 2, requires_grad=True)
        >>> norm_pool2d(x, 2, at_zero=1.0).sum().backward()
        >>> x.grad
        tensor([[[[1., 1.],
                  [1., 1.]]]])
    """
    kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    return norm_pool(x, fixed(Jacobians(norm=at_zero, rule=rule)), (kernel[0], kernel[1]))
