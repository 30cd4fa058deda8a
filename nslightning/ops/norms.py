"""The absolute value and the norms: of numbers and of vectors, in losses, in normalisation, over pooling windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.ops.autograd.layouts import autocasts
from nslightning.ops.autograd.nodes import OwnFunction
from nslightning.ops.autograd.pointwise import pointwise, pointwise_operation
from nslightning.ops.autograd.routing import ROUTES, Route, around, at_zero, dimensions, own, restored, wide
from nslightning.ops.autograd.selection import Selection, fixed
from nslightning.ops.loss_arguments import arguments, reduction
from nslightning.ops.module_base import ChosenFunction, ChosenModule
from nslightning.ops.record import Call, Kernels, Kink, Operation, Rule, number, only, plain, register, spelled

__all__ = [
    "Abs",
    "L1Loss",
    "Norm",
    "NormPool2d",
    "Normalize",
    "abs",
    "l1_loss",
    "norm",
    "norm_pool2d",
    "normalize",
]

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------------------- mechanism
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
    """The gradient that each entry of a zero vector receives."""
    each = torch.where(tied, g.to(wide(g)) * choice[0], 0).to(tensors[0].dtype)
    return (restored(each, *parameters).expand_as(tensors[0]),)


ROUTES["norm"] = Route("norm", 1, _zero, _everywhere, native=0.0, reduces=True)


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


class _PublishedNorms(OwnFunction):
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


def tied_norms(x: Tensor, p: float = 2.0, dim: Any = None) -> tuple[Tensor, int]:
    """Count how many vectors are zero; for p = 1, how many entries are.

    Args:
        x: Input, any shape, floating dtype.
        p: The exponent.
        dim: The dimensions of the vectors; None is all.

    Returns:
        ``(ties, evaluations)``, the first on the input's device.
    """
    values = x if p == 1 else torch.linalg.vector_norm(x, p, dim)
    return torch.count_nonzero(values == 0), values.numel()


@own
def absolute(
    x: Tensor, target: Tensor, selection: Selection, reduction: str = "mean", weight: Tensor | None = None
) -> Tensor:
    """The absolute error with the choice of ``abs`` that ``selection`` names at backward time.

    Args:
        x: Input, any shape, floating dtype.
        target: Target of a shape that broadcasts with the input's.
        selection: The choice, read when the backward runs.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: A weight for each entry.

    Returns:
        ``torch.nn.functional.l1_loss(x, target, reduction=reduction, weight=weight)``, bit for bit.
    """
    weights: dict[str, Any] = {} if weight is None else {"weight": weight}
    loss: Tensor = F.l1_loss(x, target, reduction=reduction, **weights)
    u = x - target
    scale = u.new_ones(()) if weight is None else weight.detach()
    if reduction == "mean":
        scale = scale / (u.numel() if weight is None else scale.sum())
    return around("abs", selection, ((), True), u, scale, loss)


# ------------------------------------------------------------------------------------------- spellings of the norms
def _norm(x: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None) -> Any:
    p = 2.0 if p in ("fro", None) else number(p)
    if out is not None or not isinstance(p, (int, float)) or not 1 <= p < math.inf or x.is_complex():
        return None
    return x, p, dim, keepdim, dtype, torch.norm


def _linalg_norm(x: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, **rest: Any) -> Any:
    dims = x.dim() if dim is None else len(dim) if isinstance(dim, (list, tuple)) else 1
    if ord is not None and ord != "fro" and dims != 1:
        return None  # of a matrix: its singular values, or the greatest sum
    parsed = _norm(x, ord, dim, keepdim, **rest)
    return parsed and (*parsed[:-1], torch.linalg.vector_norm)


def _vector_norm(x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, **rest: Any) -> Any:
    parsed = _norm(x, ord, dim, keepdim, **rest)
    return parsed and (*parsed[:-1], torch.linalg.vector_norm)


def _distance(x: Tensor, other: Tensor, p: float = 2) -> Any:
    if autocasts(x):
        return None  # some devices would subtract in another precision
    return _norm(x - other, p)


def _pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    return _norm(x1 - x2 + eps, p, -1, keepdim)


def _euclidean(parse: Callable[..., Any], *args: Any, **kwargs: Any) -> Call | None:
    parsed = parse(*args, **kwargs)
    return None if parsed is None or parsed[1] == 1 else Call(parsed[0], ("norm", *parsed[1:]))


def _of_absolutes(parse: Callable[..., Any], *args: Any, **kwargs: Any) -> Call | None:
    parsed = parse(*args, **kwargs)
    if parsed is None or parsed[1] != 1:
        return None
    return Call(parsed[0], within=lambda selection, x: chosen_norm(x, selection, *parsed[1:]))


def _normalized(x: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Call | None:
    if out is not None or not 1 <= (p := number(p)) < math.inf:
        return None
    return Call(x, ("normalize", p, dim, eps))


_NORMS: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = (
    (_norm, (torch.norm, Tensor.norm)),
    (_linalg_norm, (torch.linalg.norm,)),
    (_vector_norm, (torch.linalg.vector_norm, aten.linalg_vector_norm)),
    (_distance, (torch.dist, Tensor.dist)),
    (_pairwise_distance, (F.pairwise_distance, torch.pairwise_distance)),
)


def _apply_norm(selection: Selection, call: Call) -> Tensor:
    function, *parameters = call.parameters
    return (unit if function == "normalize" else chosen_norm)(call.x, selection, *parameters)


def _norm_ties(call: Call) -> tuple[Tensor, int]:
    function, p, dim = call.parameters[:3]
    if function == "norm":
        return tied_norms(call.x, p, dim)
    norms = torch.linalg.vector_norm(call.x, p, dim)  # a zero vector is divided by eps: no tie
    return torch.count_nonzero(norms == call.parameters[3]), norms.numel()


def _pairwise_module(call: Callable[..., Call | None], m: Any, x1: Tensor, x2: Tensor) -> Call | None:
    return call(_pairwise_distance, x1, x2, m.norm, m.eps, m.keepdim)


# ---------------------------------------------------------------------------------------------- the absolute value
_ARGUMENTS = {name: tuple(arguments(name)) for name in ("l1_loss", "smooth_l1_loss")}


def _l1(x: Tensor, target: Tensor, how: str, weight: Tensor | None) -> Call | None:
    if x.is_complex() or target.is_complex():  # the modulus of a complex number has no choice
        return None

    def within(selection: Selection, u: Tensor) -> Tensor:
        return absolute(u, u.new_zeros(()).expand_as(u), selection, how, weight)  # |u - 0| is |u| to the bit

    if target.size() != x.size():
        F.l1_loss(x.detach(), target.detach())  # warns, or raises
    if autocasts(x):  # subtract in the precision that it would
        precision = F.l1_loss(x.new_zeros(()), target.new_zeros(())).dtype
        x, target = x.to(precision), target.to(precision)
    return Call(x - target, within=within)


def _l1_function(function: str, *args: Any, **kwargs: Any) -> Call | None:
    by_name = dict(zip(_ARGUMENTS[function], args, strict=False)) | kwargs
    if function == "smooth_l1_loss" and by_name.get("beta", 1.0) != 0:
        return None  # smooth
    return _l1(by_name["x"], by_name["target"], reduction(by_name), by_name.get("weight"))


#: L1 losses and 1-norms are absolute values inside.
_ABSOLUTES = {
    function: call
    for parse, functions in _NORMS
    for function, call in spelled(partial(_of_absolutes, parse), *functions).items()
}
ABS = register(
    pointwise_operation(
        "abs",
        (Kink("x = 0", lambda: 0.0, lambda: (-1.0, 1.0)),),
        Kernels(forward=aten.abs.default, forward_=aten.abs_.default, backward=lambda g, x: g * x.sgn()),
        apply=lambda selection, call: (
            pointwise("abs", call.x, selection, inplace=call.inplace)
            if call.within is None
            else call.within(selection, call.x)
        ),
        formula="|x|",
        choice="The derivative of the absolute value at 0.",
        modules={
            nn.L1Loss: lambda m, x, target, weight=None: _l1(x, target, m.reduction, weight),
            nn.SmoothL1Loss: only(lambda m: m.beta == 0, lambda m, x, target: _l1(x, target, m.reduction, None)),
            nn.PairwiseDistance: only(lambda m: m.norm == 1, partial(_pairwise_module, _of_absolutes)),
        },
        functions=plain("abs")
        | plain("absolute")
        | spelled(lambda x: Call(x), Tensor.__abs__)
        | {getattr(F, name): partial(_l1_function, name) for name in ("l1_loss", "smooth_l1_loss")}
        | _ABSOLUTES,
        jax=1.0,
        note="L1 losses and 1-norms take it at each of their entries.",
        example=torch.abs,
    )
)
ROUTES["abs"] = at_zero("abs", float(ABS.stock()[0] or 0.0))
register(
    Operation(
        name="norm",
        formula="the Euclidean norm of vectors",
        kinks=(Kink("x = 0", clarke="the unit ball", stock="0"),),
        choice="The share of ``g`` that each entry of a vector of Euclidean norm 0 receives; the native choice is 0.",
        apply=_apply_norm,
        ties=_norm_ties,
        modules={nn.PairwiseDistance: only(lambda m: 1 < m.norm < math.inf, partial(_pairwise_module, _euclidean))},
        functions={F.normalize: _normalized}
        | {f: call for parse, fs in _NORMS for f, call in spelled(partial(_euclidean, parse), *fs).items()},
        corners=lambda *parameters: (),  # one number for all entries names few elements of a ball
        note="With a number c each entry receives c g. JAX and TensorFlow return NaN.",
        references=(
            "Boustany, On the numerical reliability of nonsmooth autodiff: a MaxPool case study, TMLR 2024 "
            "(NormPool: version 1 is 0, version 2 is 1)"
        ),
        example=lambda x: x.norm(),
        at=(0.0,),
    )
)


# --------------------------------------------------------------------------------------------------------- public
def abs(x: Tensor, at_zero: float | None = None, inplace: bool = False) -> Tensor:
    r"""The absolute value with a chosen derivative at 0.

    The Clarke Jacobian at 0 is [-1, 1]. PyTorch and TensorFlow return 0, JAX 1.

    Args:
        x: Input, any shape, floating dtype.
        at_zero: The derivative at 0; ``None`` is the native choice.
        inplace: Overwrite ``x``.

    Returns:
        ``torch.abs(x)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is not a finite number.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, requires_grad=True)
        >>> abs(x, at_zero=1.0).sum().backward()
        >>> x.grad
        tensor([1.])
    """
    return pointwise("abs", x, fixed("abs", at_zero), inplace=inplace)


def l1_loss(
    x: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None, *, at_zero: float | None = None
) -> Tensor:
    r"""The absolute error with a chosen derivative where input and target are equal.

    .. math:: \ell = |x - t|.

    The Clarke Jacobian at x = t is [-1, 1]. PyTorch and TensorFlow return 0, JAX 1. ``smooth_l1_loss`` with beta = 0 is
    the same function; with beta > 0 it is smooth, and so is ``huber_loss``.

    Args:
        x: Input, any shape, floating dtype.
        target: Target of a shape that broadcasts with the input's.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: A weight for each entry.
        at_zero: The derivative of the absolute value at 0; None is the native choice.

    Returns:
        ``torch.nn.functional.l1_loss(...)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is not a finite number.

    Example:
        >>> x = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> l1_loss(x, torch.tensor([1.0, 2.0]), "sum", at_zero=1.0).backward()
        >>> x.grad
        tensor([1., 1.])
    """
    return absolute(x, target, fixed("abs", at_zero), reduction, weight)


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
        at_zero: The share of the incoming gradient that each entry of a zero vector receives; None: the native one.

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
    return chosen_norm(x, fixed("norm", at_zero), 2.0, dim, keepdim)


def normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, *, at_eps: float | None = None) -> Tensor:
    r"""Divide vectors by their norms, with a chosen derivative where a norm is just ``eps``.

    .. math:: y = x / \max(\lVert x \rVert_p, \epsilon).

    At 0 the derivative is unique, since the divisor is :math:`\epsilon` there. At a norm of :math:`\epsilon` the
    divisor's Clarke Jacobian is [0, 1]. PyTorch takes that of its ``clamp_min``: 1 up to torch 2.13, 0 in 2.15.

    Args:
        x: Input, any shape, floating dtype.
        p: The exponent, 1 < p < inf.
        dim: The dimension of the vectors.
        eps: The smallest divisor.
        at_eps: The derivative of the divisor where the norm is ``eps``; None is the native choice.

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
    return unit(x, fixed("clamp", choice), p, dim, eps)


def norm_pool2d(
    x: Tensor, kernel_size: int | tuple[int, int], *, at_zero: float | None = None, rule: Rule = "exact"
) -> Tensor:
    r"""Pooling by the Euclidean norm of each window, with a chosen gradient at windows of zeros.

    NormPool of Boustany, *On the numerical reliability of nonsmooth autodiff: a MaxPool case study*, TMLR 2024: its
    version 1 gives every entry of a zero window 0, its version 2 the incoming gradient itself. Windows do not overlap;
    rows and columns left over at the end are dropped. Sums of squares are formed as ``torch.linalg.vector_norm`` does,
    in float32 for fp16 and bf16; the paper's code squares in the working precision, where small entries vanish.

    Args:
        x: Input of shape (N, C, H, W) or (C, H, W), floating dtype.
        kernel_size: Window height and width, which are also the steps between windows.
        at_zero: The share of the incoming gradient that each entry of a zero window receives: 0 is version 1, 1 is
            version 2; None is the native choice, 0.
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
    return norm_pool(x, fixed("norm", at_zero, rule), (kernel[0], kernel[1]))


class Abs(ChosenFunction):
    """:func:`~nslightning.ops.abs` as a module."""

    fields = ("abs",)

    def __init__(self, inplace: bool = False, *, at_zero: float | None = None) -> None:
        super().__init__(at_zero, inplace=inplace, at_zero=at_zero)

    def forward(self, x: Tensor) -> Tensor:
        """The absolute value of a tensor of any shape."""
        return pointwise("abs", x, self.selection, inplace=self.arguments["inplace"])


class L1Loss(ChosenModule, nn.L1Loss, choice="at_zero"):
    """:func:`~nslightning.ops.l1_loss` as a module."""


class Norm(ChosenFunction):
    """:func:`~nslightning.ops.norm` as a module."""

    fields = ("norm",)

    def __init__(
        self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False, *, at_zero: float | None = None
    ) -> None:
        super().__init__(at_zero, dim=dim, keepdim=keepdim, at_zero=at_zero)

    def forward(self, x: Tensor) -> Tensor:
        """The norms of the vectors of a tensor of any shape."""
        return chosen_norm(x, self.selection, 2.0, self.arguments["dim"], self.arguments["keepdim"])


class Normalize(ChosenFunction):
    """:func:`~nslightning.ops.normalize` as a module."""

    fields = ("clamp",)

    def __init__(self, p: float = 2.0, dim: int = 1, eps: float = 1e-12, *, at_eps: float | None = None) -> None:
        super().__init__(None if at_eps is None else (at_eps, at_eps), p=p, dim=dim, eps=eps, at_eps=at_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the vectors of a tensor of any shape."""
        p, dim, eps, _ = self.arguments.values()
        return unit(x, self.selection, p, dim, eps)


class NormPool2d(ChosenFunction):
    """:func:`~nslightning.ops.norm_pool2d` as a module: NormPool, of which version 1 is 0 and version 2 is 1."""

    fields = ("norm",)

    def __init__(self, kernel_size: int | tuple[int, int], *, at_zero: float | None = None) -> None:
        super().__init__(at_zero, kernel_size=kernel_size, at_zero=at_zero)

    def forward(self, x: Tensor) -> Tensor:
        """Pool a tensor of shape (N, C, H, W) or (C, H, W)."""
        height, width = nn.modules.utils._pair(self.arguments["kernel_size"])
        return norm_pool(x, self.selection, (height, width))
