"""Stochastic arithmetic: results whose last bit is drawn, to see what depends on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = ["EXACT", "ONE_ROUNDING", "RandomRounding"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: ATen operations that round once per entry, which is redone in float64.
ONE_ROUNDING = _words(
    "add sub rsub mul div addcmul addcdiv lerp sqrt reciprocal leaky_relu leaky_relu_backward softshrink remainder "
    "_prelu_kernel _prelu_kernel_backward _to_copy copy"
)

#: Those that copy or add up: an entry that is a copy stays.
_SCATTERED = _words(
    "scatter scatter_add scatter_reduce index_add index_put _index_put_impl _unsafe_index_put index_reduce put "
    "embedding_dense_backward col2im unfold_backward max_pool2d_with_indices_backward "
    "max_pool3d_with_indices_backward adaptive_max_pool2d_backward adaptive_max_pool3d_backward "
    "fractional_max_pool2d_backward fractional_max_pool3d_backward reflection_pad1d_backward "
    "reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward replication_pad2d_backward "
    "replication_pad3d_backward upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward"
)

#: Those that round nothing: they select, compare, copy, fill, draw, or change a sign.
EXACT = _words(
    "abs neg relu threshold threshold_backward hardtanh hardtanh_backward hardshrink hardshrink_backward "
    "softshrink_backward clamp clamp_min clamp_max maximum minimum fmax fmin max min amax amin aminmax cummax cummin "
    "kthvalue median nanmedian mode sort topk sign sgn copysign floor ceil round trunc frac fmod floor_divide "
    "heaviside nan_to_num nextafter frexp ldexp max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d "
    "adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d max_unpool2d max_unpool3d "
    "cat stack clone lift lift_fresh flip roll rot90 repeat repeat_interleave tril triu constant_pad_nd "
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle index index_select gather take masked_select "
    "masked_fill masked_scatter masked_scatter_backward index_fill index_copy where select_scatter slice_scatter "
    "as_strided_scatter diagonal_scatter select_backward slice_backward diagonal_backward diag_embed block_diag "
    "embedding im2col unique_dim unique_consecutive _unique _unique2 upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d _unsafe_view _reshape_alias _unsafe_index _unsafe_masked_index _pin_memory _conj_physical "
    "resize resize_as set _resize_output complex view_as_complex real imag "
    "empty empty_like empty_strided empty_permuted new_empty new_empty_strided new_full new_ones new_zeros full "
    "full_like ones ones_like zeros zeros_like zero fill scalar_tensor eye arange linspace logspace "
    "_efficientzerotensor rand rand_like randn randn_like randint randint_like randperm normal uniform bernoulli "
    "exponential cauchy geometric log_normal random multinomial poisson tril_indices triu_indices "
    "_amp_update_scale _amp_foreach_non_finite_check_and_unscale"
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Kind(NamedTuple):
    """An operation's name without decoration, and the arguments that it writes to."""

    name: str
    written: tuple[int | str, ...]  # places of arguments, or names of those that are given by name alone


@cache
def _kind(operation: Any) -> _Kind:
    name = operation.overloadpacket.__name__
    bare = name.removesuffix("_") if not name.endswith("__") else name
    bare = bare.removeprefix("_foreach_")
    if operation.is_view or operation.namespace == "nslightning" or (bare.endswith("_copy") and bare != "_to_copy"):
        bare = "clone"
    written: list[int | str] = []
    for place, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(argument.name if argument.kwarg_only else place)
    return _Kind(bare, tuple(written))


class RandomRounding(TorchDispatchMode):
    r"""While this is entered, the results of floating-point operations are rounded up or down at random.

    Monte Carlo arithmetic with random rounding (Parker 1997). An operation that rounds once per entry (a sum, a
    product, a quotient, a root, a conversion to a narrower dtype) is redone with more digits: an exact result stays,
    another one becomes one of its two neighbours, each with the probability that makes the mean exact. A result of
    many roundings (a matrix product, a convolution, a reduction, an exponential) moves by one ulp up or down, each with
    probability 1/4; where entries are copied or added up, as gradients of an embedding are, copies stay. A zero stays
    zero.

    Operations that round nothing (:data:`EXACT`: ReLU, max pooling, selections, copies, creations) are left alone.
    Every other one rounds, your own operations too. The backward's operations are rounded like the forward's, and so
    are the steps of optimizers. Sparse tensors, dtypes of 8 bits and batch norm's running statistics are left
    alone.

    Two runs that differ in the seed alone show what rounding does; a difference that is no larger is not known.

    Args:
        seed: Seed of the draws. The global random streams are not touched.

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
        if torch.is_inference_mode_enabled():  # operations made of others arrive whole there
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        name, written = _kind(func)
        if name in EXACT or (name in ("_to_copy", "copy") and _complex(args)):
            return func(*args, **kwargs)
        wide: Callable[[Sequence[Tensor]], Sequence[Tensor | None]] = _unknown
        if name in ONE_ROUNDING or name in _SCATTERED:
            wide = _redone(func, name, args, kwargs)
        result = func(*args, **kwargs)
        returned, structure = tree_flatten(result)
        touched = _written(written, args, kwargs)
        fresh = [y for y in returned if isinstance(y, Tensor) and not any(y is t for t in touched)]
        moves = {id(y) for y in fresh}
        copies_stay = name in _SCATTERED
        moved = [self._moved(y, e, copies_stay) for y, e in zip(touched + fresh, wide(touched + fresh), strict=True)]
        for place, value in zip(touched, moved, strict=False):
            place.copy_(value)
        new = iter(moved[len(touched) :])
        return tree_unflatten([next(new) if id(y) in moves else y for y in returned], structure)

    def _moved(self, y: Any, error: Tensor | None, copies_stay: bool) -> Any:
        if not isinstance(y, Tensor) or y.numel() == 0 or y.layout != torch.strided:
            return y
        if y.dtype in (torch.complex64, torch.complex128):
            return torch.view_as_complex(self._moved(torch.view_as_real(y.resolve_conj()), None, copies_stay))
        if y.dtype not in _DTYPES:
            return y
        drawn = torch.rand(y.shape, generator=self._generator(y.device), device=y.device)
        if error is not None and not copies_stay:
            other = _neighbour(y, error > 0)
            gap = (other.double() - y.double()).abs()
            moves = (drawn.double() * gap < error.abs()) & (error != 0)
        else:
            other, moves = _neighbour(y, drawn < 0.25), drawn < 0.5
            if error is not None:
                moves &= error != 0
        rounded = torch.where(moves & (y != 0) & y.isfinite() & other.isfinite(), other, y)
        return torch.empty_like(y).copy_(rounded)  # with the strides that it had

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


def _written(places: tuple[int | str, ...], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors at the places that an operation writes to."""
    values = [kwargs.get(p) if isinstance(p, str) else args[p] for p in places if isinstance(p, str) or p < len(args)]
    return [t for t in tree_flatten(values)[0] if isinstance(t, Tensor)]


def _complex(args: tuple[Any, ...]) -> bool:
    return any(isinstance(t, Tensor) and t.is_complex() for t in tree_flatten(args)[0])


def _unknown(results: Sequence[Any]) -> Sequence[Tensor | None]:
    return [None] * len(results)


def _redone(
    operation: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Sequence[Any]], Sequence[Tensor | None]]:
    """The errors of an operation's results, as a function of these; None where they are not known.

    Operands are copied before the operation may overwrite them.
    """
    if name in ("_to_copy", "copy"):
        sources = [t.to(torch.float64, copy=True) for t in tree_flatten(args[0 if name == "_to_copy" else 1])[0]]
        return lambda results: [
            source.to(y.device).expand_as(y) - y.double() for source, y in zip(sources, results, strict=True)
        ]
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    whole = name == "div" and not any(t.is_floating_point() for t in tensors)  # a quotient of whole numbers
    tensors = [t for t in tensors if t.is_floating_point()]
    if tensors and all(t.dtype == torch.float64 for t in tensors):
        operands = [_exactly(a) for a in args[:2]]
        plain = not any(v != 1 for k, v in kwargs.items() if k == "alpha") and not kwargs.get("rounding_mode")
        error = _ERRORS.get(name) if plain and len(args) <= 2 and not any(o is None for o in operands) else None
        return lambda results: [error(y, *operands) if error and isinstance(y, Tensor) else None for y in results]
    lowest = all(t.dtype != torch.float64 or t.dim() == 0 for t in tensors)

    def widened(value: Any) -> Any:
        if isinstance(value, Tensor) and (value.is_floating_point() or (whole and not value.is_complex())):
            # A number beside tensors is rounded to their dtype first.
            number = value.dim() == 0 and value.dtype == torch.float64 and lowest
            return value.float().double() if number else value.to(torch.float64, copy=True)
        if isinstance(value, float) and lowest:
            return float(torch.tensor(value, dtype=torch.float32))
        return value

    named = {k: widened(v) for k, v in kwargs.items()}
    places = tuple(tree_map(widened, args))
    try:
        exact = operation(*places, **named)
    except (NotImplementedError, RuntimeError):  # no float64 on this device, or for this operation
        return _unknown
    touched = _written(_kind(operation).written, places, named)
    fresh = [y for y in tree_flatten(exact)[0] if isinstance(y, Tensor) and not any(y is t for t in touched)]

    def errors(results: Sequence[Any]) -> Sequence[Tensor | None]:
        return [
            e - y.double() if isinstance(e, Tensor) and e.dtype == torch.float64 and y.dtype != torch.float64 else None
            for e, y in zip(touched + fresh, results, strict=True)
        ]

    return errors


# ------------------------------------------------------------------------ what float64 rounds away (Dekker 1971)
def _exactly(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.clone() if value.dtype == torch.float64 else None
    return torch.tensor(float(value), dtype=torch.float64) if isinstance(value, (int, float)) else None


def _of_sum(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    part = y - a
    return (a - (y - part)) + (b - part)


def _of_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return ((a1 * b1 - y) + a1 * b2 + a2 * b1) + a2 * b2


def _of_quotient(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    product = y * b
    return ((a - product) - _of_product(product, y, b)) / b


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    """A number as the sum of two of 26 bits."""
    shifted = a * (2.0**27 + 1)
    high = shifted - (shifted - a)
    return high, a - high


_ERRORS: dict[str, Callable[..., Tensor]] = {
    "add": _of_sum,
    "sub": lambda y, a, b: _of_sum(y, a, -b),
    "rsub": lambda y, a, b: _of_sum(y, b, -a),
    "mul": _of_product,
    "div": _of_quotient,
    "reciprocal": lambda y, a: _of_quotient(y, torch.ones_like(a), a),
    "sqrt": lambda y, a: _of_quotient(y, a, y) / 2,
}


def _neighbour(y: Tensor, up: Tensor) -> Tensor:
    """The next number of the dtype, upwards where it is said."""
    if y.dtype in (torch.float32, torch.float64):
        return torch.nextafter(y, torch.where(up, torch.inf, -torch.inf).to(y))
    bits = y.contiguous().view(torch.int16)  # sign and magnitude: away from zero is one more
    away = up == (y > 0)
    return torch.where(away, bits + 1, bits - 1).to(torch.int16).view(y.dtype)
