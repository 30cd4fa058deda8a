"""Every operation as an ``nn.Module`` that chooses its Jacobian itself.

Those that PyTorch has as modules are subclasses of these, with the same arguments and one more for the choice, named as
in the function; the others keep what their function is given beside the input. ``rule`` and ``seed`` are as in
:class:`~nslightning.Jacobians` and :func:`~nslightning.patch`. A patch around them leaves them alone.

Example:
    >>> from nslightning import ops
    >>> import torch
    >>> layers = torch.nn.Sequential(ops.ReLU(at_zero=0.5), ops.MaxPool1d(2, jacobian="minimal"))
    >>> x = torch.zeros(1, 2, requires_grad=True)
    >>> layers(x).sum().backward()
    >>> x.grad, layers[1]
    (tensor([[0.2500, 0.2500]]), MaxPool1d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False, ...))
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from nslightning.jacobians import Jacobians, MaxPoolChoice, Rule
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.maxima import pair, reduction
from nslightning.ops.norms import chosen_norm, norm_pool, unit
from nslightning.ops.pointwise import pointwise
from nslightning.ops.record import positional
from nslightning.ops.registry import MODULES

__all__ = [
    "ELU",
    "SELU",
    "Abs",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "Amax",
    "Amin",
    "Aminmax",
    "Clamp",
    "CosineEmbeddingLoss",
    "Fmax",
    "Fmin",
    "FractionalMaxPool2d",
    "FractionalMaxPool3d",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "HingeEmbeddingLoss",
    "L1Loss",
    "LeakyReLU",
    "MarginRankingLoss",
    "Max",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "Maximum",
    "Min",
    "Minimum",
    "MultiMarginLoss",
    "Norm",
    "NormPool2d",
    "Normalize",
    "PReLU",
    "RReLU",
    "ReLU",
    "ReLU6",
    "Softshrink",
    "Threshold",
    "TripletMarginLoss",
]


class _Chosen(nn.Module):
    """What chooses: a stock module with one argument more, whose forward is the registry's."""

    choice: ClassVar[str]  # that argument's name
    fields: ClassVar[tuple[str, ...]]  # what it sets in Jacobians
    _stock: ClassVar[type[nn.Module]]

    def __init_subclass__(cls, choice: str = "", fields: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if choice:
            cls.choice, cls._stock = choice, cls.__mro__[2]
            cls.fields = fields or tuple(op.name for op in MODULES[cls._stock])

    def __init__(self, *args: Any, rule: Rule = "exact", seed: int = 0, **kwargs: Any) -> None:
        choice = kwargs.pop(self.choice, None)
        super().__init__(*args, **kwargs)
        self.selection = Selection(Jacobians(**dict.fromkeys(self.fields, choice), rule=rule), seed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the operation.

        Args:
            *args: As for the stock module.
            **kwargs: As for the stock module.

        Returns:
            What the stock module returns, bit for bit under the exact rule.
        """
        for operation in MODULES[self._stock]:
            call = operation.modules[self._stock](self, *args, **positional(kwargs))
            if call is not None and call.x.is_floating_point():
                return operation.apply(self.selection, call)
        return super().forward(*args, **kwargs)

    def extra_repr(self) -> str:
        """The stock module's, and the choice."""
        chosen, jacobians = getattr(self.selection.jacobians, self.fields[0]), self.selection.jacobians
        parts = [super().extra_repr(), f"{self.choice}={'native' if chosen is None else chosen}"]
        return ", ".join(filter(None, (*parts, "" if jacobians.rule == "exact" else "rule=published")))


class ReLU(_Chosen, nn.ReLU, choice="at_zero"):
    """:func:`~nslightning.ops.relu` as a module."""


class ReLU6(_Chosen, nn.ReLU6, choice="at_kinks"):
    """:func:`~nslightning.ops.relu6` as a module."""


class LeakyReLU(_Chosen, nn.LeakyReLU, choice="at_zero"):
    """:func:`~nslightning.ops.leaky_relu` as a module."""


class PReLU(_Chosen, nn.PReLU, choice="at_zero"):
    """:func:`~nslightning.ops.prelu` as a module."""


class RReLU(_Chosen, nn.RReLU, choice="at_zero"):
    """:func:`~nslightning.ops.rrelu` as a module."""


class Hardtanh(_Chosen, nn.Hardtanh, choice="at_kinks"):
    """:func:`~nslightning.ops.hardtanh` as a module."""


class Hardswish(_Chosen, nn.Hardswish, choice="at_kinks"):
    """:func:`~nslightning.ops.hardswish` as a module."""


class Hardsigmoid(_Chosen, nn.Hardsigmoid, choice="at_kinks"):
    """:func:`~nslightning.ops.hardsigmoid` as a module."""


class Hardshrink(_Chosen, nn.Hardshrink, choice="at_kinks"):
    """:func:`~nslightning.ops.hardshrink` as a module."""


class Softshrink(_Chosen, nn.Softshrink, choice="at_kinks"):
    """:func:`~nslightning.ops.softshrink` as a module."""


class Threshold(_Chosen, nn.Threshold, choice="at_threshold"):
    """:func:`~nslightning.ops.threshold` as a module."""


class ELU(_Chosen, nn.ELU, choice="at_zero"):
    """:func:`~nslightning.ops.elu` as a module."""


class SELU(_Chosen, nn.SELU, choice="at_zero"):
    """:func:`~nslightning.ops.selu` as a module."""


class MaxPool1d(_Chosen, nn.MaxPool1d, choice="jacobian"):
    """:func:`~nslightning.ops.max_pool1d` as a module."""


class MaxPool2d(_Chosen, nn.MaxPool2d, choice="jacobian"):
    """:func:`~nslightning.ops.max_pool2d` as a module."""


class MaxPool3d(_Chosen, nn.MaxPool3d, choice="jacobian"):
    """:func:`~nslightning.ops.max_pool3d` as a module."""


class AdaptiveMaxPool1d(_Chosen, nn.AdaptiveMaxPool1d, choice="jacobian"):
    """:func:`~nslightning.ops.adaptive_max_pool1d` as a module."""


class AdaptiveMaxPool2d(_Chosen, nn.AdaptiveMaxPool2d, choice="jacobian"):
    """:func:`~nslightning.ops.adaptive_max_pool2d` as a module."""


class AdaptiveMaxPool3d(_Chosen, nn.AdaptiveMaxPool3d, choice="jacobian"):
    """:func:`~nslightning.ops.adaptive_max_pool3d` as a module."""


class FractionalMaxPool2d(_Chosen, nn.FractionalMaxPool2d, choice="jacobian"):
    """:func:`~nslightning.ops.fractional_max_pool2d` as a module."""


class FractionalMaxPool3d(_Chosen, nn.FractionalMaxPool3d, choice="jacobian"):
    """:func:`~nslightning.ops.fractional_max_pool3d` as a module."""


class L1Loss(_Chosen, nn.L1Loss, choice="at_zero"):
    """:func:`~nslightning.ops.l1_loss` as a module."""


class HingeEmbeddingLoss(_Chosen, nn.HingeEmbeddingLoss, choice="at_zero"):
    """:func:`~nslightning.ops.hinge_embedding_loss` as a module."""


class MarginRankingLoss(_Chosen, nn.MarginRankingLoss, choice="at_zero"):
    """:func:`~nslightning.ops.margin_ranking_loss` as a module."""


class CosineEmbeddingLoss(_Chosen, nn.CosineEmbeddingLoss, choice="at_zero"):
    """:func:`~nslightning.ops.cosine_embedding_loss` as a module."""


class TripletMarginLoss(_Chosen, nn.TripletMarginLoss, choice="at_zero"):
    """:func:`~nslightning.ops.triplet_margin_loss` as a module."""


class MultiMarginLoss(_Chosen, nn.MultiMarginLoss, choice="at_zero"):
    """:func:`~nslightning.ops.multi_margin_loss` as a module."""


class _Function(nn.Module):
    """What PyTorch has as a function only: its arguments beside the inputs, and the choice."""

    fields: ClassVar[tuple[str, ...]]  # what the choice sets in Jacobians

    def __init__(self, choice: Any, seed: int = 0, **given: Any) -> None:
        super().__init__()
        self.selection = Selection(Jacobians(**dict.fromkeys(self.fields, choice)), seed)
        self.given = given

    def extra_repr(self) -> str:
        """The arguments, and the choice."""
        return ", ".join(f"{name}={value}" for name, value in self.given.items())


class Abs(_Function):
    """:func:`~nslightning.ops.abs` as a module."""

    fields = ("abs",)

    def __init__(self, inplace: bool = False, *, at_zero: float | None = None) -> None:
        super().__init__(at_zero, inplace=inplace, at_zero=at_zero)

    def forward(self, x: Tensor) -> Tensor:
        """The absolute value of a tensor of any shape."""
        return pointwise("abs", x, self.selection, inplace=self.given["inplace"])


class Clamp(_Function):
    """:func:`~nslightning.ops.clamp` as a module."""

    fields = ("clamp",)

    def __init__(
        self,
        min: float | None = None,
        max: float | None = None,
        inplace: bool = False,
        *,
        at_bounds: tuple[float, float] | None = None,
    ) -> None:
        if min is None and max is None:
            raise ValueError("Clamp takes at least one bound: min=..., max=..., or both")
        super().__init__(at_bounds, min=min, max=max, inplace=inplace, at_bounds=at_bounds)

    def forward(self, x: Tensor) -> Tensor:
        """Clamp a tensor of any shape."""
        low, high, inplace, _ = self.given.values()
        return pointwise("clamp", x, self.selection, low, high, inplace=inplace)


class _Reduction(_Function):
    fields = ("max",)

    def __init__(
        self,
        dim: int | tuple[int, ...] | None = None,
        keepdim: bool = False,
        *,
        jacobian: float | MaxPoolChoice | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(jacobian, seed, dim=dim, keepdim=keepdim, jacobian=jacobian)

    def forward(self, x: Tensor) -> Any:
        """Reduce a tensor of any shape."""
        return reduction(type(self).__name__.lower(), x, self.selection, self.given["dim"], self.given["keepdim"])


class _Pair(_Function):
    fields = ("maximum",)

    def __init__(self, *, jacobian: float | MaxPoolChoice | None = None, seed: int = 0) -> None:
        super().__init__(jacobian, seed, jacobian=jacobian)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """Compare two tensors whose shapes broadcast."""
        return pair(type(self).__name__.lower(), x, other, self.selection)


class Max(_Reduction):
    """:func:`~nslightning.ops.max` as a module."""


class Min(_Reduction):
    """:func:`~nslightning.ops.min` as a module."""


class Amax(_Reduction):
    """:func:`~nslightning.ops.amax` as a module."""


class Amin(_Reduction):
    """:func:`~nslightning.ops.amin` as a module."""


class Aminmax(_Reduction):
    """:func:`~nslightning.ops.aminmax` as a module."""


class Maximum(_Pair):
    """:func:`~nslightning.ops.maximum` as a module."""


class Minimum(_Pair):
    """:func:`~nslightning.ops.minimum` as a module."""


class Fmax(_Pair):
    """:func:`~nslightning.ops.fmax` as a module."""


class Fmin(_Pair):
    """:func:`~nslightning.ops.fmin` as a module."""


class Norm(_Function):
    """:func:`~nslightning.ops.norm` as a module."""

    fields = ("norm",)

    def __init__(
        self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False, *, at_zero: float | None = None
    ) -> None:
        super().__init__(at_zero, dim=dim, keepdim=keepdim, at_zero=at_zero)

    def forward(self, x: Tensor) -> Tensor:
        """The norms of the vectors of a tensor of any shape."""
        return chosen_norm(x, self.selection, 2.0, self.given["dim"], self.given["keepdim"])


class Normalize(_Function):
    """:func:`~nslightning.ops.normalize` as a module."""

    fields = ("clamp",)

    def __init__(self, p: float = 2.0, dim: int = 1, eps: float = 1e-12, *, at_eps: float | None = None) -> None:
        super().__init__(None if at_eps is None else (at_eps, at_eps), p=p, dim=dim, eps=eps, at_eps=at_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the vectors of a tensor of any shape."""
        p, dim, eps, _ = self.given.values()
        return unit(x, self.selection, p, dim, eps)


class NormPool2d(_Function):
    """:func:`~nslightning.ops.norm_pool2d` as a module: NormPool, of which version 1 is 0 and version 2 is 1."""

    fields = ("norm",)

    def __init__(self, kernel_size: int | tuple[int, int], *, at_zero: float | None = None) -> None:
        super().__init__(at_zero, kernel_size=kernel_size, at_zero=at_zero)

    def forward(self, x: Tensor) -> Tensor:
        """Pool a tensor of shape (N, C, H, W) or (C, H, W)."""
        height, width = nn.modules.utils._pair(self.given["kernel_size"])
        return norm_pool(x, self.selection, (height, width))
