"""Stochastic arithmetic: results whose last bit is drawn, to see what depends on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ["ROUNDED", "RandomRounding"]

#: One rounding per entry, which can be redone in float64.
_POINTWISE = frozenset({"add", "sub", "rsub", "mul", "div", "addcmul", "addcdiv", "lerp", "sqrt", "reciprocal"})

#: Many roundings per entry, or none that float64 tells: products, sums, transcendental functions.
_SUMS = frozenset(
    {
        *("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "convolution_backward"),
        *("sum", "mean", "var", "var_mean", "norm", "linalg_vector_norm", "cumsum", "logsumexp"),
        *("rsqrt", "exp", "expm1", "log", "log1p", "pow", "tanh", "sigmoid", "erf", "gelu", "silu"),
        *("tanh_backward", "sigmoid_backward", "gelu_backward", "silu_backward", "avg_pool2d", "avg_pool2d_backward"),
        *("_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward"),
        *("_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data"),
        *("native_batch_norm", "_native_batch_norm_legit", "native_batch_norm_backward", "cudnn_batch_norm"),
        *("cudnn_batch_norm_backward", "native_layer_norm", "native_layer_norm_backward", "native_group_norm"),
        *("native_group_norm_backward", "_native_batch_norm_legit_functional", "batch_norm_backward"),
        *("_batch_norm_with_update", "nll_loss_forward", "mse_loss", "mse_loss_backward"),
    }
)

#: The ATen operations whose results are rounded at random.
ROUNDED = _POINTWISE | _SUMS


class RandomRounding(TorchDispatchMode):
    r"""While this is entered, the results of floating-point operations are rounded up or down at random.

    Monte Carlo arithmetic with random rounding (Parker 1997). An operation that rounds once per entry (a sum, a
    product, a quotient, a root) is redone in float64: an exact result stays, another one becomes one of its two
    neighbours, each with the probability that makes the mean exact. A result of many roundings (a matrix product, a
    convolution, a sum, a norm, an exponential) moves by one ulp up or down, each with probability 1/4. A zero stays
    zero. What rounds nothing (ReLU, max pooling, selections, copies) is left alone, and so are the ``foreach`` and
    fused steps of optimizers. The backward's operations are rounded like the forward's.

    Two runs that differ in the seed alone show what rounding does; a difference that is no larger is not known.

    Args:
        seed: Of the draws. The global random streams are not touched.

    Example:
        >>> x = torch.full((4,), 0.1)
        >>> with RandomRounding(0):
        ...     y, z = x * x, x * 2
        >>> bool(((y.double() - 0.01).abs() < 1e-8).all()), torch.equal(z, torch.full((4,), 0.2))
        (True, True)
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and round its results."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        bare = name.removesuffix("_") if not name.startswith("_") else name
        if bare not in ROUNDED or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        exact = None
        if bare in _POINTWISE and name == bare:
            exact = func(*tree_map(_wide, args), **tree_map(_wide, kwargs))
        before = args[0].clone() if name != bare and bare in _POINTWISE else None
        result = func(*args, **kwargs)
        if before is not None:  # in place: redone from what stood there
            exact = getattr(torch.ops.aten, bare)(*tree_map(_wide, (before, *args[1:])), **tree_map(_wide, kwargs))
        if name != bare:
            result.copy_(self._moved(result, exact))
            return result
        return tree_map(lambda y: self._moved(y, exact), result)

    def _moved(self, y: Any, exact: Any) -> Any:
        if not isinstance(y, Tensor) or not y.is_floating_point() or y.numel() == 0 or y.layout != torch.strided:
            return y
        drawn = torch.rand(y.shape, generator=self._generator(y.device), device=y.device)
        if isinstance(exact, Tensor) and exact.dtype == torch.float64 and y.dtype != torch.float64:
            error = exact - y.double()
            other = _neighbour(y, error > 0)
            gap = (other.double() - y.double()).abs()
            moves = (drawn.double() * gap < error.abs()) & (error != 0)
        else:
            other, moves = _neighbour(y, drawn < 0.25), drawn < 0.5
        return torch.where(moves & (y != 0) & y.isfinite() & other.isfinite(), other, y)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def _neighbour(y: Tensor, up: Tensor) -> Tensor:
    """The next number of the dtype, upwards where it is said."""
    if y.dtype in (torch.float32, torch.float64):
        return torch.nextafter(y, torch.where(up, torch.inf, -torch.inf).to(y))
    bits = y.contiguous().view(torch.int16)  # sign and magnitude: away from zero is one more
    away = up == (y > 0)
    return torch.where(away, bits + 1, bits - 1).to(torch.int16).view(y.dtype)
