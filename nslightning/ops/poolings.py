"""Max pooling: of windows of one size, adaptive and fractional, in one dimension to three."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning._torch import native_nn
from nslightning.ops.autograd.fractional import Fractional, pool_fractional, tied_fractional
from nslightning.ops.autograd.pooling import adaptive, pool, regular, tied_windows
from nslightning.ops.autograd.selection import Selection, fixed
from nslightning.ops.module_base import ChosenModule
from nslightning.ops.record import Call, Kink, Operation, Rule, ShareName, register, spelled

__all__ = [
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "FractionalMaxPool2d",
    "FractionalMaxPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "fractional_max_pool2d",
    "fractional_max_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
]

aten = torch.ops.aten
_Modules = dict[type[nn.Module], Callable[..., Call | None]]
_Functions = dict[Callable, Callable[..., Call | None]]


# ---------------------------------------------------------------------------------------------------------- record
def _apply_pool(selection: Selection, call: Call) -> Tensor | tuple[Tensor, Tensor]:
    (geometry,) = call.parameters
    pooled = pool_fractional if isinstance(geometry, Fractional) else pool
    return cast(Tensor, pooled(call.x, selection, geometry, call.return_indices))


def _pool_ties(call: Call) -> tuple[Tensor, int]:
    (geometry,) = call.parameters
    if isinstance(geometry, Fractional):
        return tied_fractional(call.x, geometry)
    count = tied_windows(call.x, geometry)
    return torch.count_nonzero(count > 1), count.numel()


def _pools(dims: int, x: Tensor) -> bool:
    """Return whether an input has the shape of images, if only of none; PyTorch itself refuses the others."""
    return x.dim() in (dims + 1, dims + 2) and 0 not in x.shape[-dims - 1 :]


def _regular_pool(
    dims: int,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Call | None:
    if not _pools(dims, x):
        return None
    geometry = regular(dims, kernel_size, stride, padding, dilation, ceil_mode)
    return Call(x, (geometry,), return_indices=return_indices)


def _adaptive_pool(dims: int, x: Tensor, output_size: Any, return_indices: bool = False) -> Call | None:
    if not _pools(dims, x):
        return None
    return Call(x, (adaptive(dims, x, output_size),), return_indices=return_indices)


def _fractional_pool(
    dims: int,
    x: Tensor,
    kernel_size: Any,
    output_size: Any = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Call | None:
    if not _pools(dims, x) or (output_size is None and not _shares(dims, output_ratio)):
        return None
    windows = Fractional(dims, x, kernel_size, output_size, output_ratio, _random_samples)
    return Call(x, (windows,), return_indices=return_indices)


def _shares(dims: int, ratio: Any) -> bool:
    """Return whether PyTorch takes a share of the input's size; it has a single number in three dimensions alone."""
    return len(ratio) == dims if isinstance(ratio, (tuple, list)) else dims == 3 and isinstance(ratio, (int, float))


def _fractional_kernel(dims: int, x: Tensor, kernel_size: Any, output_size: Any, random_samples: Tensor) -> Call | None:
    return _fractional_pool(dims, x, kernel_size, output_size, None, True, random_samples)


def _pool_modules() -> _Modules:
    """Max pooling of every dimension, adaptive and fractional."""
    modules: _Modules = {}
    for dims in (1, 2, 3):
        modules[getattr(nn, f"MaxPool{dims}d")] = lambda m, x, dims=dims: _regular_pool(
            dims, x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
        )
        modules[getattr(nn, f"AdaptiveMaxPool{dims}d")] = lambda m, x, dims=dims: _adaptive_pool(
            dims, x, m.output_size, m.return_indices
        )
    for dims in (2, 3):
        modules[getattr(nn, f"FractionalMaxPool{dims}d")] = lambda m, x, dims=dims: _fractional_pool(
            dims, x, m.kernel_size, m.output_size, m.output_ratio, m.return_indices, m._random_samples
        )
    return modules


def _with_indices(plain: Callable[..., Call | None]) -> Callable[..., Call | None]:
    """Turn the arguments of a function that always returns indices into a call."""

    def call(*args: Any, **kwargs: Any) -> Call | None:
        made = plain(*args, **kwargs)
        return None if made is None else made._replace(return_indices=True)

    return call


def _pool_functions() -> _Functions:
    """The functions of torch and ATen that pool, with the calls that they make."""
    functions: _Functions = {}
    for dims in (1, 2, 3):
        for name, call in ((f"max_pool{dims}d", _regular_pool), (f"adaptive_max_pool{dims}d", _adaptive_pool)):
            plain = partial(call, dims)
            indexed = _with_indices(plain)
            homes = [home for home in (torch, aten) if hasattr(home, name)]
            functions |= spelled(plain, getattr(F, name))
            functions |= spelled(plain if call is _regular_pool else indexed, *(getattr(home, name) for home in homes))
            with_indices = f"{name}_with_indices"
            homes = [home for home in (F, torch, aten) if hasattr(home, with_indices)]
            functions |= spelled(indexed, *(getattr(home, with_indices) for home in homes))
    for dims in (2, 3):
        name, fractional = f"fractional_max_pool{dims}d", partial(_fractional_pool, dims)
        indexed = _with_indices(fractional)
        functions |= spelled(fractional, getattr(F, name)) | spelled(indexed, getattr(F, f"{name}_with_indices"))
        functions |= spelled(partial(_fractional_kernel, dims), native_nn(name), getattr(aten, name))
    return functions


_LEAST = "fix the choice and record it: patch(model, Jacobians(max_pool='minimal')) takes the element of least norm."
register(
    Operation(
        name="max_pool",
        formula="the maximum of each window",
        kinks=(
            Kink(
                "k > 1 entries reach the maximum",
                clarke="the convex hull of the unit vectors of the tied entries",
                stock="all to the first",
            ),
        ),
        choice=(
            "How a pooling window shares its gradient ``g`` over the ``k > 1`` entries that reach the maximum. A "
            "number ``beta`` gives ``beta * minimal + (1 - beta) * native`` (Boustany 2024, section 3): each tied "
            "entry gets ``g * beta / k`` and the native one ``g * (1 - beta)`` more; beta in [0, 1] stays in the "
            'Clarke Jacobian. By name: ``"native"`` (beta = 0: all to the entry PyTorch picks, the first in '
            'row-major order), ``"first"``, ``"last"``, ``"minimal"`` (beta = 1: equal shares, the element of '
            'least norm), ``"random"`` (all to one tied entry, drawn afresh at each backward pass) and ``"sum"`` '
            "(``g`` to each tied entry; outside the Clarke Jacobian)."
        ),
        apply=_apply_pool,
        ties=_pool_ties,
        modules=_pool_modules(),
        functions=_pool_functions(),
        shares=True,
        default=0.0,
        corners=lambda *parameters: ("first", "last", *("random",) * 4),
        jax="first",
        tensorflow="first",
        remedy=(
            "Windows tie where their largest entries are equal: on constant parts of an image, on the zeros behind a "
            "ReLU, behind constant channels. Use a strided convolution or average pooling, or " + _LEAST
        ),
        rounding_remedy="Compute what is pooled in float32, use average pooling, or " + _LEAST,
        references="Boustany, On the numerical reliability of nonsmooth autodiff: a MaxPool case study, TMLR 2024",
        example=lambda x: F.max_pool1d(x[None], 2),
        at=(1.0,),
    )
)


# ---------------------------------------------------------------------------------------------------------- public
def max_pool1d(
    x: Tensor,
    kernel_size: int | tuple[int],
    stride: int | tuple[int] | None = None,
    padding: int | tuple[int] = 0,
    dilation: int | tuple[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""1-d max pooling with a chosen element of its generalised Jacobian.

    The choices, and what PyTorch and the other libraries return at ties, are those of :func:`max_pool2d`, of which
    this is one row.

    Args:
        x: Input of shape (N, C, L) or (C, L), floating dtype.
        kernel_size: Window length.
        stride: Steps between windows; ``None`` is the kernel size.
        padding: Implicit -inf padding, at most half the kernel.
        dilation: Steps between the entries of a window.
        ceil_mode: Round the output's size up.
        return_indices: Also return the index, within each channel, of the entry that PyTorch picks.
        jacobian: As in :func:`max_pool2d`.
        seed: Seeds the private random stream of ``jacobian="random"``.

    Returns:
        ``torch.nn.functional.max_pool1d(...)``, bit for bit.

    Raises:
        ValueError: If the choice is unknown; if padding and dilation leave a window without entries.

    Example:
        >>> x = torch.tensor([[3.0, 3.0, 1.0, 2.0]], requires_grad=True)
        >>> max_pool1d(x, 2, jacobian=0.5).sum().backward()
        >>> x.grad
        tensor([[0.7500, 0.2500, 0.0000, 1.0000]])
    """
    geometry = regular(1, kernel_size, stride, padding, dilation, ceil_mode)
    return pool(x, fixed("max_pool", jacobian, seed=seed), geometry, return_indices)  # type: ignore[no-any-return] # one tensor or two


def max_pool2d(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    jacobian: float | ShareName | None = None,
    rule: Rule = "exact",
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""2-d max pooling with a chosen element of its generalised Jacobian.

    In a window whose maximum is reached by :math:`k > 1` entries the Clarke Jacobian is the convex hull of the unit
    vectors of these entries. PyTorch (and JAX, TensorFlow on a CPU) gives the whole gradient to the first of them in
    row-major order; with a number :math:`\beta`, entry p of a tied window receives

    .. math:: g\,\bigl(\beta / k + (1 - \beta)\,[p \text{ is the first}]\bigr),

    computed in float32 (float64 for float64) and rounded once per entry. Windows without a tie, and windows whose
    maximum is NaN, keep the stock gradient bit for bit, whatever the choice. Boustany, *On the numerical reliability
    of nonsmooth autodiff: a MaxPool case study*, TMLR 2024, section 3.

    Args:
        x: Input of shape (N, C, H, W) or (C, H, W), floating dtype.
        kernel_size: Window height and width.
        stride: Steps between windows; ``None`` is the kernel size.
        padding: Implicit -inf padding, at most half the kernel.
        dilation: Steps between the entries of a window.
        ceil_mode: Round the output's size up.
        return_indices: Also return the flat index, within each channel, of the entry that PyTorch picks.
        jacobian: A number beta, or ``"native"``, ``"first"``, ``"last"``, ``"minimal"``, ``"random"``, ``"sum"``;
            see :class:`~nslightning.Jacobians`. ``None`` is the native choice.
        rule: ``"published"`` computes ``beta * a + (1 - beta) * a`` in the working precision, as the released code
            does, forward and backward: for a large beta this is wrong everywhere, tie or not.
        seed: Seeds the private random stream of ``jacobian="random"``; the global streams are never used.

    Returns:
        ``torch.nn.functional.max_pool2d(...)``, bit for bit under the exact rule.

    Raises:
        ValueError: If the choice is unknown, or not a number under the published rule; if padding and dilation leave
            a window without entries.

    Example:
        >>> x = torch.zeros(1, 1, 2, 2, requires_grad=True)
        >>> max_pool2d(x, 2, jacobian="minimal").sum().backward()
        >>> x.grad
        tensor([[[[0.2500, 0.2500],
                  [0.2500, 0.2500]]]])
    """
    geometry = regular(2, kernel_size, stride, padding, dilation, ceil_mode)
    return pool(x, fixed("max_pool", jacobian, rule, seed), geometry, return_indices)  # type: ignore[no-any-return] # one tensor or two


def max_pool3d(
    x: Tensor,
    kernel_size: int | tuple[int, int, int],
    stride: int | tuple[int, int, int] | None = None,
    padding: int | tuple[int, int, int] = 0,
    dilation: int | tuple[int, int, int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""3-d max pooling with a chosen element of its generalised Jacobian.

    The Clarke Jacobian at ties and the choices are those of :func:`max_pool2d`. PyTorch gives the whole gradient to
    the first tied entry in row-major order, and so do the choices ``"native"``, ``"first"`` and ``beta = 0``.

    Args:
        x: Input of shape (N, C, D, H, W) or (C, D, H, W), floating dtype.
        kernel_size: Window depth, height and width.
        stride: Steps between windows; ``None`` is the kernel size.
        padding: Implicit -inf padding, at most half the kernel.
        dilation: Steps between the entries of a window.
        ceil_mode: Round the output's size up.
        return_indices: Also return the flat index, within each channel, of the entry that PyTorch picks.
        jacobian: As in :func:`max_pool2d`.
        seed: Seeds the private random stream of ``jacobian="random"``.

    Returns:
        ``torch.nn.functional.max_pool3d(...)``, bit for bit.

    Raises:
        ValueError: If the choice is unknown; if padding and dilation leave a window without entries.

    Example:
        >>> x = torch.zeros(1, 2, 2, 2, requires_grad=True)
        >>> max_pool3d(x, 2, jacobian="minimal").sum().backward()
        >>> x.grad.unique()
        tensor([0.1250])
    """
    geometry = regular(3, kernel_size, stride, padding, dilation, ceil_mode)
    return pool(x, fixed("max_pool", jacobian, seed=seed), geometry, return_indices)  # type: ignore[no-any-return] # one tensor or two


def adaptive_max_pool1d(
    x: Tensor,
    output_size: int | tuple[int],
    return_indices: bool = False,
    *,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""1-d adaptive max pooling with a chosen element of its generalised Jacobian; see :func:`adaptive_max_pool2d`.

    Args:
        x: Input of shape (N, C, L) or (C, L), floating dtype.
        output_size: The number of windows.
        return_indices: Also return the index, within each channel, of the entry that PyTorch picks.
        jacobian: As in :func:`max_pool2d`.
        seed: Seeds the private random stream of ``jacobian="random"``.

    Returns:
        ``torch.nn.functional.adaptive_max_pool1d(...)``, bit for bit.

    Raises:
        ValueError: If the choice is unknown.

    Example:
        >>> x = torch.tensor([[3.0, 3.0, 1.0, 2.0]], requires_grad=True)
        >>> adaptive_max_pool1d(x, 1, jacobian="last").sum().backward()
        >>> x.grad
        tensor([[0., 1., 0., 0.]])
    """
    return pool(x, fixed("max_pool", jacobian, seed=seed), adaptive(1, x, output_size), return_indices)  # type: ignore[no-any-return] # one tensor or two


def adaptive_max_pool2d(
    x: Tensor,
    output_size: int | tuple[int | None, int | None] | None,
    return_indices: bool = False,
    *,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""2-d adaptive max pooling with a chosen element of its generalised Jacobian.

    Of n windows over s entries, window i holds the entries from :math:`\lfloor i s / n \rfloor` up to
    :math:`\lceil (i + 1) s / n \rceil`, in each dimension; neighbours overlap where n does not divide s. The Clarke
    Jacobian at ties and the choices are those of :func:`max_pool2d`; PyTorch takes the first tied entry in row-major
    order. JAX and TensorFlow have no such operation.

    Args:
        x: Input of shape (N, C, H, W) or (C, H, W), floating dtype.
        output_size: The number of windows, one for both dimensions or one each; None is the input's size.
        return_indices: Also return the flat index, within each channel, of the entry that PyTorch picks.
        jacobian: As in :func:`max_pool2d`.
        seed: Seeds the private random stream of ``jacobian="random"``.

    Returns:
        ``torch.nn.functional.adaptive_max_pool2d(...)``, bit for bit.

    Raises:
        ValueError: If the choice is unknown.

    Example:
        >>> x = torch.zeros(1, 2, 2, requires_grad=True)
        >>> adaptive_max_pool2d(x, 1, jacobian="minimal").sum().backward()
        >>> x.grad
        tensor([[[0.2500, 0.2500],
                 [0.2500, 0.2500]]])
    """
    return pool(x, fixed("max_pool", jacobian, seed=seed), adaptive(2, x, output_size), return_indices)  # type: ignore[no-any-return] # one tensor or two


def adaptive_max_pool3d(
    x: Tensor,
    output_size: int | tuple[int | None, int | None, int | None] | None,
    return_indices: bool = False,
    *,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""3-d adaptive max pooling with a chosen element of its generalised Jacobian; see :func:`adaptive_max_pool2d`.

    Args:
        x: Input of shape (N, C, D, H, W) or (C, D, H, W), floating dtype.
        output_size: The number of windows, one for all dimensions or one each; None is the input's size.
        return_indices: Also return the flat index, within each channel, of the entry that PyTorch picks.
        jacobian: As in :func:`max_pool2d`.
        seed: Seeds the private random stream of ``jacobian="random"``.

    Returns:
        ``torch.nn.functional.adaptive_max_pool3d(...)``, bit for bit.

    Raises:
        ValueError: If the choice is unknown.

    Example:
        >>> x = torch.zeros(1, 2, 2, 2, requires_grad=True)
        >>> adaptive_max_pool3d(x, (1, 2, None), jacobian="sum").sum().backward()
        >>> x.grad.unique()
        tensor([1.])
    """
    return pool(x, fixed("max_pool", jacobian, seed=seed), adaptive(3, x, output_size), return_indices)  # type: ignore[no-any-return] # one tensor or two


def fractional_max_pool2d(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    output_size: int | tuple[int, int] | None = None,
    output_ratio: float | tuple[float, float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
    *,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""2-d fractional max pooling with a chosen element of its generalised Jacobian.

    The Clarke Jacobian at ties and the choices are those of :func:`max_pool2d`; PyTorch takes the first tied entry in
    row-major order. Windows may overlap, and an entry receives the sum over its windows. JAX has no such operation.

    Args:
        x: Input of shape (N, C, H, W) or (C, H, W), floating dtype.
        kernel_size: Window height and width.
        output_size: The number of windows, one for both dimensions or one each.
        output_ratio: Their number as a share of the input's size, where ``output_size`` is None.
        return_indices: Also return the flat index, within each channel, of the entry that PyTorch picks.
        _random_samples: Places of the windows, in [0, 1), shape (N, C, 2); None draws from PyTorch's stream, as stock
            does.
        jacobian: As in :func:`max_pool2d`.
        seed: Seeds the private random stream of ``jacobian="random"``.

    Returns:
        ``torch.nn.functional.fractional_max_pool2d(...)``, bit for bit.

    Raises:
        ValueError: If the choice is unknown; if neither size nor ratio is given.

    Example:
        >>> x = torch.zeros(1, 2, 2, requires_grad=True)
        >>> fractional_max_pool2d(x, 2, 1, jacobian="minimal").sum().backward()
        >>> x.grad
        tensor([[[0.2500, 0.2500],
                 [0.2500, 0.2500]]])
    """
    windows = Fractional(2, x, kernel_size, output_size, output_ratio, _random_samples)
    return cast(Tensor, pool_fractional(x, fixed("max_pool", jacobian, seed=seed), windows, return_indices))


def fractional_max_pool3d(
    x: Tensor,
    kernel_size: int | tuple[int, int, int],
    output_size: int | tuple[int, int, int] | None = None,
    output_ratio: float | tuple[float, float, float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
    *,
    jacobian: float | ShareName | None = None,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""3-d fractional max pooling with a chosen element of its generalised Jacobian; see :func:`fractional_max_pool2d`.

    Args:
        x: Input of shape (N, C, D, H, W) or (C, D, H, W), floating dtype.
        kernel_size: Window depth, height and width.
        output_size: The number of windows, one for all dimensions or one each.
        output_ratio: Their number as a share of the input's size, where ``output_size`` is None.
        return_indices: Also return the flat index, within each channel, of the entry that PyTorch picks.
        _random_samples: Places of the windows, in [0, 1), shape (N, C, 3); None draws from PyTorch's stream, as stock
            does.
        jacobian: As in :func:`max_pool2d`.
        seed: Seeds the private random stream of ``jacobian="random"``.

    Returns:
        ``torch.nn.functional.fractional_max_pool3d(...)``, bit for bit.

    Raises:
        ValueError: If the choice is unknown; if neither size nor ratio is given.

    Example:
        >>> x = torch.zeros(1, 3, 3, 3, requires_grad=True)
        >>> fractional_max_pool3d(x, 2, 1, jacobian="sum").sum().backward()
        >>> x.grad.sum()
        tensor(8.)
    """
    windows = Fractional(3, x, kernel_size, output_size, output_ratio, _random_samples)
    return cast(Tensor, pool_fractional(x, fixed("max_pool", jacobian, seed=seed), windows, return_indices))


class MaxPool1d(ChosenModule, nn.MaxPool1d, choice="jacobian"):
    """:func:`~nslightning.ops.max_pool1d` as a module."""


class MaxPool2d(ChosenModule, nn.MaxPool2d, choice="jacobian"):
    """:func:`~nslightning.ops.max_pool2d` as a module."""


class MaxPool3d(ChosenModule, nn.MaxPool3d, choice="jacobian"):
    """:func:`~nslightning.ops.max_pool3d` as a module."""


class AdaptiveMaxPool1d(ChosenModule, nn.AdaptiveMaxPool1d, choice="jacobian"):
    """:func:`~nslightning.ops.adaptive_max_pool1d` as a module."""


class AdaptiveMaxPool2d(ChosenModule, nn.AdaptiveMaxPool2d, choice="jacobian"):
    """:func:`~nslightning.ops.adaptive_max_pool2d` as a module."""


class AdaptiveMaxPool3d(ChosenModule, nn.AdaptiveMaxPool3d, choice="jacobian"):
    """:func:`~nslightning.ops.adaptive_max_pool3d` as a module."""


class FractionalMaxPool2d(ChosenModule, nn.FractionalMaxPool2d, choice="jacobian"):
    """:func:`~nslightning.ops.fractional_max_pool2d` as a module."""


class FractionalMaxPool3d(ChosenModule, nn.FractionalMaxPool3d, choice="jacobian"):
    """:func:`~nslightning.ops.fractional_max_pool3d` as a module."""
