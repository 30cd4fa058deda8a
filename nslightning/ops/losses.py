"""The hinge losses. Each is the stock function; only its ties take another way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.ops.autograd.routing import ROUTES, around, at_zero, own
from nslightning.ops.autograd.selection import Selection, data_dependent, fixed
from nslightning.ops.clamps import CLAMP
from nslightning.ops.loss_arguments import arguments, defaults, reduction
from nslightning.ops.module_base import ChosenModule
from nslightning.ops.record import Call, Kink, Operation, only, register, spelled

__all__ = [
    "CosineEmbeddingLoss",
    "HingeEmbeddingLoss",
    "MarginRankingLoss",
    "MultiMarginLoss",
    "TripletMarginLoss",
    "cosine_embedding_loss",
    "hinge_embedding_loss",
    "margin_ranking_loss",
    "multi_margin_loss",
    "triplet_margin_loss",
]

# A hinge's argument u, of which the loss is the mean (or the sum) of max(u, 0), and where it is in force.
_Hinge = tuple[Tensor, Tensor | None]


def _hinge_embedding(x: Tensor, target: Tensor, margin: float = 1.0) -> _Hinge:
    return margin - x, target != 1


def _margin_ranking(x: Tensor, other: Tensor, target: Tensor, margin: float = 0.0) -> _Hinge:
    return -target * (x - other) + margin, None


def _cosine_embedding(x: Tensor, other: Tensor, target: Tensor, margin: float = 0.0) -> _Hinge:
    tiny = 1e-12  # as in the stock kernel
    squares = ((x * x).sum(-1) + tiny) * ((other * other).sum(-1) + tiny)
    return (x * other).sum(-1) / squares.sqrt() - margin, target == -1


def _triplet_margin(
    x: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
) -> _Hinge:
    near, far = F.pairwise_distance(x, positive, p, eps), F.pairwise_distance(x, negative, p, eps)
    if swap:
        far = torch.minimum(far, F.pairwise_distance(positive, negative, p, eps))
    return margin + near - far, None


def _multi_margin(x: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None) -> _Hinge:
    if x.dim() == 0:  # one class, and no hinge
        x, target = x.unsqueeze(0), target.unsqueeze(0)
    target = target.unsqueeze(-1) if x.dim() == target.dim() + 1 else target
    others = torch.ones_like(x).scatter(-1, target, 0) / x.shape[-1]
    return margin - x.gather(-1, target) + x, others if weight is None else others * weight[target]


HINGES: dict[str, Callable[..., _Hinge]] = {
    "hinge_embedding_loss": _hinge_embedding,
    "margin_ranking_loss": _margin_ranking,
    "cosine_embedding_loss": _cosine_embedding,
    "triplet_margin_loss": _triplet_margin,
    "multi_margin_loss": _multi_margin,
}


@own
def hinge(
    function: str, selection: Selection, *args: Any, margin: float, reduction: str = "mean", **kwargs: Any
) -> Tensor:
    """A hinge loss with the choice that ``selection`` names at backward time.

    Args:
        function: A key of :data:`HINGES`.
        selection: The choice, read when the backward runs.
        *args: The tensors that the stock function takes.
        margin: Its margin.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        **kwargs: Its other parameters.

    Returns:
        The stock function's result, bit for bit.
    """
    loss: Tensor = getattr(F, function)(*args, margin=margin, reduction=reduction, **kwargs)
    # The arguments in the precision that autocast may have chosen for the loss.
    args = tuple(a.to(loss.dtype) if a.is_floating_point() else a for a in args)
    if data_dependent(loss):  # u is formed with its graph only where it is needed
        with torch.no_grad():
            u, active = HINGES[function](*args, margin=margin, **kwargs)
            if not ((u == 0) & (True if active is None else active != 0)).any():
                return loss
    u, active = HINGES[function](*args, margin=margin, **kwargs)
    rows = function == "multi_margin_loss"
    spread = ((-1,), False) if rows and reduction == "none" else ((), True)
    count = u.numel() // (u.shape[-1] if rows else 1) if reduction == "mean" else 1
    scale = u.new_ones(()) if active is None else active.to(u.dtype)
    # The compiler takes the multi-margin loss apart into a clamp, whose derivative is then stock's.
    route = "multi_margin" if rows and not torch.compiler.is_compiling() else "hinge"
    return around(route, selection, spread, u, scale / count, loss)


def tied_hinges(function: str, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Count how many hinges of a loss are evaluated at 0.

    Args:
        function: A key of :data:`HINGES`.
        *args: As for the stock function.
        **kwargs: As for the stock function, without ``reduction``.

    Returns:
        ``(ties, hinges in force)``, on the input's device.
    """
    u, active = HINGES[function](*args, **kwargs)
    within = torch.ones_like(u, dtype=torch.bool) if active is None else (active != 0).expand_as(u)
    return torch.count_nonzero((u == 0) & within), torch.count_nonzero(within)


# --------------------------------------------------------------------------------------------------------- record
_NAMES = {name: tuple(arguments(name)) for name in HINGES}
_DEFAULTS = {name: defaults(name) for name in HINGES}
_TENSORS = {"hinge_embedding_loss": 2, "multi_margin_loss": 2}  # three in the others


def _hinged(function: str, names: tuple[str, ...], defaults: dict[str, Any], *args: Any, **kwargs: Any) -> Call | None:
    by_name = defaults | dict(zip(names, args, strict=False)) | kwargs
    how = reduction(by_name)
    if by_name.get("p", 1) != 1 and function == "multi_margin_loss":
        return None  # of squares: smooth
    x, *others = (by_name.pop(n) for n in names[: _TENSORS.get(function, 3)])
    return Call(x, (function, tuple(others), by_name | {"reduction": how}))


def _hinge_functions() -> dict[Callable, Callable[..., Call | None]]:
    functions: dict[Callable, Callable[..., Call | None]] = {}
    for name in HINGES:
        names = _NAMES[name]
        functions |= spelled(partial(_hinged, name, names, _DEFAULTS[name]), getattr(F, name))
        if hasattr(torch, name):
            short = tuple(n for n in names if n not in ("size_average", "reduce"))
            own = _DEFAULTS[name] | {"reduction": _own_reduction(name)}
            functions |= spelled(partial(_hinged, name, short, own), getattr(torch, name))
    return functions


def _own_reduction(name: str) -> str:
    """How a function of ``torch`` reduces by itself: torch 2.15 documents the mean, and returns each entry."""
    rows = torch.ones(2, 2)
    tensors = (rows, rows, rows[0] if name == "cosine_embedding_loss" else rows)
    return "none" if getattr(torch, name)(*tensors[: _TENSORS.get(name, 3)]).dim() else "mean"


def _hinge_module(function: str, m: nn.Module, *args: Any, **kwargs: Any) -> Call | None:
    names = _NAMES[function]
    own = {n: getattr(m, n) for n in names if n in ("margin", "p", "eps", "swap", "weight", "reduction")}
    return _hinged(function, names, _DEFAULTS[function], **dict(zip(names, args, strict=False)) | kwargs | own)


def _apply_hinge(selection: Selection, call: Call) -> Tensor:
    function, others, rest = call.parameters
    return hinge(function, selection, call.x, *others, **rest)


def _hinge_ties(call: Call) -> tuple[Tensor, Tensor]:
    function, others, rest = call.parameters
    return tied_hinges(function, call.x, *others, **{n: v for n, v in rest.items() if n != "reduction"})


#: The losses clamp from below: at a hinge stock returns the same as for the clamp.
_NATIVE = float(CLAMP.stock(0.0, None)[0] or 0.0)
ROUTES["hinge"] = at_zero("hinge", _NATIVE)
ROUTES["multi_margin"] = at_zero("hinge", 0.0)  # has a kernel of its own
register(
    Operation(
        name="hinge",
        formula="max(u, 0) inside the hinge losses",
        kinks=(
            Kink(
                "u = 0",
                sides=lambda *parameters: (0.0, 1.0),
                stock="that of clamp_min: 1 up to torch 2.13, 0 in 2.15",
            ),
        ),
        choice=(
            "The derivative of ``max(u, 0)`` at 0 inside the hinge losses; the native choice is that of ``clamp_min``."
        ),
        apply=_apply_hinge,
        ties=_hinge_ties,
        modules={
            nn.HingeEmbeddingLoss: partial(_hinge_module, "hinge_embedding_loss"),
            nn.MarginRankingLoss: partial(_hinge_module, "margin_ranking_loss"),
            nn.CosineEmbeddingLoss: partial(_hinge_module, "cosine_embedding_loss"),
            nn.TripletMarginLoss: partial(_hinge_module, "triplet_margin_loss"),
            nn.MultiMarginLoss: only(lambda m: m.p == 1, partial(_hinge_module, "multi_margin_loss")),
        },
        functions=_hinge_functions(),
        jax=0.5,
        tensorflow=1.0,
        taken=(_NATIVE,),
        # Where stock's clamp takes 1, None would be both ends: the multi-margin loss takes 0 in every version.
        corners=lambda *parameters: (0.0 if _NATIVE else None, 1.0),
        example=lambda u: F.margin_ranking_loss(u, torch.zeros_like(u), -torch.ones_like(u), reduction="none"),
    )
)


# --------------------------------------------------------------------------------------------------------- public
def hinge_embedding_loss(
    x: Tensor, target: Tensor, margin: float = 1.0, reduction: str = "mean", *, at_zero: float | None = None
) -> Tensor:
    r"""The hinge embedding loss with a chosen derivative at its hinge.

    .. math:: \ell = x \text{ where } t = 1, \quad \max(0, m - x) \text{ where } t = -1.

    The Clarke Jacobian of :math:`\max(0, u)` at 0 is [0, 1]; PyTorch takes what its ``clamp_min`` does, which is 1 up
    to torch 2.13 and 0 in 2.15, Keras 1, and optax 1/2.

    Args:
        x: Distances, any shape, floating dtype.
        target: 1 or -1 for each.
        margin: The margin m.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        at_zero: The derivative of :math:`\max(0, u)` at 0; None is the native choice.

    Returns:
        ``torch.nn.functional.hinge_embedding_loss(...)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is not a finite number.

    Example:
        >>> x = torch.tensor([1.0, 0.5], requires_grad=True)
        >>> hinge_embedding_loss(x, torch.tensor([-1.0, -1.0]), reduction="sum", at_zero=0.5).backward()
        >>> x.grad
        tensor([-0.5000, -1.0000])
    """
    chosen = fixed("hinge", at_zero)
    return hinge("hinge_embedding_loss", chosen, x, target, margin=margin, reduction=reduction)


def margin_ranking_loss(
    x: Tensor,
    other: Tensor,
    target: Tensor,
    margin: float = 0.0,
    reduction: str = "mean",
    *,
    at_zero: float | None = None,
) -> Tensor:
    r"""The margin ranking loss with a chosen derivative at its hinge.

    .. math:: \ell = \max(0, -t\,(x - y) + m).

    With the default margin of 0 every pair of equal scores is a tie. See :func:`hinge_embedding_loss` for what the
    libraries return.

    Args:
        x: First scores, floating dtype.
        other: Second scores y, of the same shape.
        target: 1 where the first score ought to be greater, else -1.
        margin: The margin m.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        at_zero: The derivative of :math:`\max(0, u)` at 0; None is the native choice.

    Returns:
        ``torch.nn.functional.margin_ranking_loss(...)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is not a finite number.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> margin_ranking_loss(x, torch.zeros(2), torch.tensor([1.0, -1.0]), reduction="sum", at_zero=0.5).backward()
        >>> x.grad
        tensor([-0.5000,  0.5000])
    """
    chosen = fixed("hinge", at_zero)
    return hinge("margin_ranking_loss", chosen, x, other, target, margin=margin, reduction=reduction)


def cosine_embedding_loss(
    x: Tensor,
    other: Tensor,
    target: Tensor,
    margin: float = 0.0,
    reduction: str = "mean",
    *,
    at_zero: float | None = None,
) -> Tensor:
    r"""The cosine embedding loss with a chosen derivative at its hinge.

    .. math:: \ell = 1 - \cos(x, y) \text{ where } t = 1, \quad \max(0, \cos(x, y) - m) \text{ where } t = -1.

    With the default margin of 0 orthogonal vectors are ties. See :func:`hinge_embedding_loss` for what the libraries
    return.

    Args:
        x: First vectors, of shape (N, D) or (D,), floating dtype.
        other: Second vectors y, of the same shape.
        target: 1 or -1 for each pair, of shape (N,) or ().
        margin: The margin m.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        at_zero: The derivative of :math:`\max(0, u)` at 0; None is the native choice.

    Returns:
        ``torch.nn.functional.cosine_embedding_loss(...)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is not a finite number.

    Example:
        >>> x = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> y, t = torch.tensor([[0.0, 1.0]]), torch.tensor([-1.0])
        >>> cosine_embedding_loss(x, y, t, at_zero=1.0).backward()
        >>> x.grad
        tensor([[0., 1.]])
    """
    chosen = fixed("hinge", at_zero)
    return hinge("cosine_embedding_loss", chosen, x, other, target, margin=margin, reduction=reduction)


def triplet_margin_loss(
    x: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: str = "mean",
    *,
    at_zero: float | None = None,
) -> Tensor:
    r"""The triplet margin loss with a chosen derivative at its hinge.

    .. math:: \ell = \max(0, m + \lVert x - x_+ + \epsilon \rVert_p - \lVert x - x_- + \epsilon \rVert_p).

    See :func:`hinge_embedding_loss` for what the libraries return. The distances keep PyTorch's own derivative, and
    with ``swap`` so does the smaller of two.

    Args:
        x: Anchors, of shape (N, D) or (D,), floating dtype.
        positive: Inputs of the anchors' class, of the same shape.
        negative: Inputs of another class, of the same shape.
        margin: The margin m.
        p: The exponent of the norm.
        eps: Added to each difference.
        swap: Take the negative's distance to the positive where it is smaller.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        at_zero: The derivative of :math:`\max(0, u)` at 0; None is the native choice.

    Returns:
        ``torch.nn.functional.triplet_margin_loss(...)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is not a finite number.

    Example:
        >>> x, near, far = torch.zeros(1, 1, requires_grad=True), torch.ones(1, 1), torch.tensor([[-2.0]])
        >>> triplet_margin_loss(x, near, far, eps=0.0, at_zero=0.5).backward()
        >>> x.grad
        tensor([[-1.]])
    """
    chosen = fixed("hinge", at_zero)
    rest: dict[str, Any] = {"margin": margin, "p": p, "eps": eps, "swap": swap, "reduction": reduction}
    return hinge("triplet_margin_loss", chosen, x, positive, negative, **rest)


def multi_margin_loss(
    x: Tensor,
    target: Tensor,
    margin: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    at_zero: float | None = None,
) -> Tensor:
    r"""The multi-class hinge loss with a chosen derivative at its hinges.

    .. math:: \ell = \frac{w_t}{C} \sum_{i \ne t} \max(0, m - x_t + x_i).

    PyTorch's kernel returns 0 at the hinges in every version. With squares (``p=2`` of the stock function) the loss is
    smooth.

    Args:
        x: Scores of shape (N, C) or (C,), float32 or float64.
        target: The classes, of shape (N,) or ().
        margin: The margin m.
        weight: A weight for each class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        at_zero: The derivative of :math:`\max(0, u)` at 0; None is the native choice.

    Returns:
        ``torch.nn.functional.multi_margin_loss(...)``, bit for bit.

    Raises:
        ValueError: If ``at_zero`` is not a finite number.

    Example:
        >>> x = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> multi_margin_loss(x, torch.tensor([0]), at_zero=1.0).backward()
        >>> x.grad
        tensor([[-0.5000,  0.5000]])
    """
    chosen = fixed("hinge", at_zero)
    return hinge("multi_margin_loss", chosen, x, target, margin=margin, weight=weight, reduction=reduction)


class HingeEmbeddingLoss(ChosenModule, nn.HingeEmbeddingLoss, choice="at_zero"):
    """:func:`~nslightning.ops.hinge_embedding_loss` as a module."""


class MarginRankingLoss(ChosenModule, nn.MarginRankingLoss, choice="at_zero"):
    """:func:`~nslightning.ops.margin_ranking_loss` as a module."""


class CosineEmbeddingLoss(ChosenModule, nn.CosineEmbeddingLoss, choice="at_zero"):
    """:func:`~nslightning.ops.cosine_embedding_loss` as a module."""


class TripletMarginLoss(ChosenModule, nn.TripletMarginLoss, choice="at_zero"):
    """:func:`~nslightning.ops.triplet_margin_loss` as a module."""


class MultiMarginLoss(ChosenModule, nn.MultiMarginLoss, choice="at_zero"):
    """:func:`~nslightning.ops.multi_margin_loss` as a module."""
