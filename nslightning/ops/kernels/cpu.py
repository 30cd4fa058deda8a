"""Fused CPU kernels, in C++, for the operations whose ATen composition passes over the memory most often.

They compute the same as :mod:`~nslightning.ops.kernels.triton` does on CUDA devices, and also say whether a tie was
met. Half precisions are computed in float32 and rounded once. The kernels (``cpu.cpp``) are compiled when the package
is installed. Where that was not possible, :func:`available` is false, and the composition is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from nslightning.ops.autograd.layouts import empty_as_stock, filled_as_stock, image_layout, laid_out_as
from nslightning.ops.autograd.selection import pool_coefficients

__all__ = [
    "DTYPES",
    "addresses",
    "any_zero",
    "available",
    "mark",
    "overwrite",
    "pool_backward",
    "pool_forward",
    "pool_shares",
    "relu_backward",
    "relu_forward",
    "sums",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_VERSION = 9  # of the functions' arguments, as in cpu.cpp


def available() -> bool:
    """Return whether the kernels were compiled, from this version's source."""
    return _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    spec = find_spec("nslightning.ops.kernels._cpu")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    if ctypes.c_int64.in_dll(library, "version").value != _VERSION:
        return None
    memory, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("sums", None, [memory, memory, number, number, ctypes.c_bool, memory, number]),
        ("any_zero", ctypes.c_bool, [memory, number, number]),
        ("relu_forward", None, [memory, memory, memory, number, number]),
        ("relu_backward", None, [*[memory] * 4, number, ctypes.c_double, ctypes.c_bool, number]),
        ("mark", None, [memory, number, number, ctypes.c_double, memory, memory, number]),
        ("overwrite", None, [*[memory] * 4, *[number] * 3, ctypes.c_double, ctypes.c_bool, number]),
        ("pool_forward", ctypes.c_bool, [*[memory] * 4, ctypes.c_bool, number]),
        ("pool_backward", None, [*[memory] * 5, *[ctypes.c_bool] * 3, number]),
    ):
        for dtype in DTYPES:
            function = getattr(library, _named(name, dtype))
            function.argtypes, function.restype = arguments, result
    return library


def addresses(names: Sequence[str]) -> dict[str, int]:
    """Return where kernels lie in memory, for code that calls them itself.

    Args:
        names: The kernels, such as ``"relu_forward"``.

    Returns:
        The addresses by the name in the library, such as ``"relu_forward_float32"``; empty where there is no library.
    """
    library = _library()
    if library is None:
        return {}
    every = [_named(name, dtype) for name in names for dtype in DTYPES]
    return {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in every}


def _named(name: str, dtype: torch.dtype) -> str:
    """A kernel's name in the library, such as relu_forward_float32."""
    return f"{name}_{str(dtype).removeprefix('torch.')}"


def _run(name: str, dtype: torch.dtype, *arguments: Tensor | float | ctypes.Array[ctypes.c_int64]) -> bool | None:
    """Call a kernel on the memory of the tensors among its arguments."""
    values = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    result: bool | None = getattr(_library(), _named(name, dtype))(*values, torch.get_num_threads())
    return result


def sums(tensor: Tensor, reference: Tensor, *, carried: bool) -> Tensor:
    """Return how far a tensor is from another one, by sums that do not depend on the number of threads.

    Args:
        tensor: The difference d if it was carried, else the tensor a = b + d; contiguous.
        reference: The tensor b, likewise.
        carried: Whether ``tensor`` holds the difference.

    Returns:
        Shape (5,), float64: the sum of ``|d|``, that of ``d^2``, the largest ``|d|``, the sum of ``a^2`` and that of
        ``a b``, formed in float64.
    """
    size = 1 << 14
    parts = torch.empty((-(-tensor.numel() // size), 5), dtype=torch.float64)
    _run("sums", tensor.dtype, tensor, reference, tensor.numel(), size, carried, parts)
    total = parts.sum(0)
    if len(parts) > 1:
        total[2] = parts[:, 2].max()
    return total


def any_zero(x: Tensor) -> bool:
    """Return whether ReLU meets a tie.

    Args:
        x: ReLU's input, as in :func:`relu_forward`.

    Returns:
        Whether an entry is 0; the kernel stops reading at the first one.
    """
    return bool(_run("any_zero", x.dtype, x, x.numel()))


def relu_forward(x: Tensor, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """ReLU, and where its input is 0.

    Args:
        x: Input, any shape, dense in memory (contiguous in some order of its dimensions).
        inplace: Write the result over it.

    Returns:
        ``torch.relu(x)``, bit for bit, and the ties, eight to a byte in the order of the memory, of shape
        ``(ceil(numel / 8),)``.
    """
    half = x.dtype.itemsize == 2  # whose output is stock's, written after the ties are known
    y = x if inplace or half else empty_as_stock(x)
    bits = torch.empty(-(-x.numel() // 8), dtype=torch.uint8, device=x.device)
    _run("relu_forward", x.dtype, x, y, bits, x.numel())
    if half and inplace:
        torch.relu_(x.data)  # its version is counted where it is marked as dirty
    elif half:
        y = torch.relu(x)
    return y, bits


def relu_backward(g: Tensor, y: Tensor, bits: Tensor, alpha: float, *, constant: bool = False) -> Tensor:
    """The gradient of ReLU with the derivative ``alpha`` at 0.

    Args:
        g: Incoming gradient, of ``y``'s shape and dtype.
        y: The output of :func:`relu_forward`.
        bits: The ties that :func:`relu_forward` returned.
        alpha: ReLU'(0).
        constant: Write ``alpha`` itself at ties, the published rule.

    Returns:
        The gradient with respect to the input.
    """

    def fill(g: Tensor, gradient: Tensor) -> None:
        _run("relu_backward", y.dtype, g, y, bits, gradient, y.numel(), alpha, constant)

    return filled_as_stock(g, y, fill)


def mark(x: Tensor, position: float, size: int) -> tuple[Tensor, Tensor]:
    """Return where a tensor is equal to a number.

    Args:
        x: Shape (n,), contiguous.
        position: The number.
        size: The entries of a block, a multiple of 8.

    Returns:
        The numbers of the blocks that have any and their bits, as in
        :class:`~nslightning.ops.autograd.tie_bits.TieBits`.
    """
    blocks = -(-x.numel() // size)
    bits = torch.empty((blocks, size // 8), dtype=torch.uint8, device=x.device)
    met = torch.empty(blocks, dtype=torch.bool, device=x.device)
    _run("mark", x.dtype, x, x.numel(), size, position, bits, met)
    numbers = met.nonzero().squeeze(1)
    return numbers, bits if len(numbers) == blocks else bits[numbers]


def overwrite(gradient: Tensor, g: Tensor, ties: tuple[Tensor, Tensor], derivative: float, *, constant: bool) -> None:
    """Overwrite the gradient of tied entries.

    Args:
        gradient: Shape (n,), contiguous.
        g: Incoming gradient, likewise.
        ties: The result of :func:`mark`.
        derivative: The derivative at the ties.
        constant: Write it itself, not its product with ``g``.
    """
    numbers, bits = ties
    sizes = len(numbers), g.numel(), 8 * bits.shape[1]
    _run("overwrite", g.dtype, gradient, g, numbers, bits, *sizes, derivative, constant)


def pool_forward(
    x: Tensor, geometry: Sequence[tuple[int, int]], size: tuple[int, int], *, zeros: bool = True
) -> tuple[Tensor, Tensor, bool]:
    """2-d max pooling, and which entries of each window reach its maximum.

    Args:
        x: Input of shape (N, C, H, W), contiguous or channels_last.
        geometry: Kernel, stride, padding and dilation; at most 16 positions in a window.
        size: The output's height and width.
        zeros: Count a tied window as one even where its maximum is 0.

    Returns:
        The stock output; int16 masks of its shape: bit q is set where the window's q-th entry, in row-major order,
        reaches the maximum, and where that is NaN, the entry that PyTorch picks alone; and whether a window is tied.
    """
    y = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=image_layout(x))
    mask = torch.empty_like(y, dtype=torch.int16)
    return y, mask, bool(_run("pool_forward", x.dtype, x, y, mask, _numbers(x, y, geometry), zeros))


def _disjoint(geometry: Sequence[tuple[int, int]]) -> bool:
    return all(s > d * (k - 1) for k, s, _, d in zip(*geometry, strict=True))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the kernels compute."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool_backward(
    g: Tensor,
    mask: Tensor,
    geometry: Sequence[tuple[int, int]],
    size: tuple[int, int],
    weights: tuple[float, float, float, float],
    *,
    layout: torch.memory_format | None = None,
) -> Tensor:
    """The gradient of 2-d max pooling.

    Args:
        g: Incoming gradient, of the output's shape.
        mask: The masks of :func:`pool_forward`.
        geometry: As in :func:`pool_forward`.
        size: The input's height and width.
        weights: ``(share, whole, each, last)`` of :meth:`~nslightning.ops.autograd.selection.Selection.pool_weights`.
        layout: The input's memory format, which masks of one window an image do not tell; by default theirs.

    Returns:
        The gradient with respect to the input.
    """
    share, whole, each, last = weights
    # As the composition sums up: what the target receives beside its share, apart from the shares. In half precision
    # stock rounds each of its own sums.
    vertex = (share, whole, each) == (0, 1, 0)
    apart = not (_disjoint(geometry) or vertex or (whole == 0 and g.dtype.itemsize > 2))
    coefficients = pool_coefficients(share, whole, each, _wide(g.dtype), apart=apart)
    return _share(g, mask, geometry, size, layout, coefficients, bool(last), apart, vertex)


def pool_shares(
    g: Tensor,
    mask: Tensor,
    geometry: Sequence[tuple[int, int]],
    size: tuple[int, int],
    coefficients: Tensor,
    last: bool,
    *,
    layout: torch.memory_format | None = None,
) -> Tensor:
    """The gradient of 2-d max pooling, from coefficients instead of weights, such as those of a difference.

    Args:
        g: As in :func:`pool_backward`.
        mask: As in :func:`pool_backward`.
        geometry: As in :func:`pool_backward`.
        size: As in :func:`pool_backward`.
        coefficients: As :func:`~nslightning.ops.autograd.selection.pool_coefficients` has them; float64 for
            float64, else float32.
        last: Whether the target is the last tied entry.
        layout: As in :func:`pool_backward`.

    Returns:
        The gradient with respect to the input.
    """
    return _share(g, mask, geometry, size, layout, coefficients, last, False, False)


def _share(
    g: Tensor,
    mask: Tensor,
    geometry: Sequence[tuple[int, int]],
    size: tuple[int, int],
    layout: torch.memory_format | None,
    coefficients: Tensor,
    *how: bool,
) -> Tensor:
    layout = image_layout(mask) if layout is None else layout
    gradient = torch.empty((*mask.shape[:2], *size), dtype=g.dtype, device=g.device, memory_format=layout)
    numbers = _numbers(gradient, mask, geometry)
    _run("pool_backward", g.dtype, laid_out_as(g, mask), mask, coefficients, gradient, numbers, *how)
    return gradient


def _numbers(x: Tensor, y: Tensor, geometry: Sequence[tuple[int, int]]) -> ctypes.Array[ctypes.c_int64]:
    """A ``Geometry`` of cpu.cpp."""
    numbers = (*x.shape, *y.shape[2:], *sum(geometry, ()), image_layout(x) == torch.channels_last)
    return (ctypes.c_int64 * len(numbers))(*numbers)
