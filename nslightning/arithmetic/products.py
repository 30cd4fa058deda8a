"""The order in which linear layers add up their products, and the precision of the products."""

from __future__ import annotations

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["ORDERS", "HalfProducts", "Ordered", "checked_order", "linear", "sequential_product", "split"]

#: The orders of summation, as they are written.
ORDERS = ("native", "bias_last", "sequential", "split_k=N", "blocks=N", "random_order")

_PRODUCTS = (F.linear, F.conv2d)
_VERSION = 1  # of the function's arguments, as in sequential.cpp


def split(order: str) -> tuple[str, int | None]:
    """An order of summation and its number.

    Args:
        order: One of :data:`ORDERS`, with a number for N.

    Returns:
        Its name, and N where it has one.

    Raises:
        ValueError: If there is no such order.

    Example:
        >>> split("split_k=4"), split("bias_last")
        (('split_k', 4), ('bias_last', None))
    """
    name, _, number = order.partition("=")
    if f"{name}=N" in ORDERS and re.fullmatch(r"[1-9]\d*", number):
        return name, int(number)
    if order not in ORDERS or order.endswith("=N"):
        raise ValueError(f"order={order!r} is not one of {', '.join(ORDERS)} (N: a positive integer)")
    return name, None


def checked_order(order: str) -> str:
    """The order itself, where there is such a one; a ValueError elsewhere."""
    split(order)
    return order


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, order: str) -> Tensor:
    r"""A linear layer whose sums are formed in a named order.

    - ``native``: as the installed library does it. On a CPU with MKL that is ``blocks=N``, and MKL chooses N.
    - ``bias_last``: the library's product, then the bias, :math:`\mathrm{fl}(\mathrm{fl}(x W^T) + b)`, as cuBLAS does.
    - ``sequential``: one accumulator per output, fused multiply-adds in the order of the inputs, then the bias.
    - ``split_k=N``: N slices of the inputs, each the library's product, added up in order, then the bias.
    - ``blocks=N``: slices of N inputs, the bias first, :math:`((b + s_1) + s_2) + \ldots`, as MKL does it.
    - ``random_order``: the library's product over the inputs in an order that is drawn at each call, then the bias.

    Args:
        x: Inputs of shape ``(..., K)``, floating dtype; float32 on a CPU for ``sequential``.
        weight: Shape ``(N, K)``.
        bias: Shape ``(N,)``, or None.
        order: One of :data:`ORDERS`.

    Returns:
        Shape ``(..., N)``. The gradients' products follow the order too, where they are formed by the same means.

    Raises:
        ValueError: If there is no such order, or ``sequential`` meets another dtype than float32.

    Example:
        >>> x, w, b = torch.tensor([[2.0**24, 1.0]]), torch.ones(1, 2), -torch.full((1,), 2.0**24)
        >>> float(linear(x, w, b, "sequential")), float(linear(x, w, b, "blocks=1"))
        (0.0, 1.0)
    """
    name, number = split(order)
    if name == "native":
        return F.linear(x, weight, bias)
    inner = x.shape[-1]
    if name == "blocks":
        start = x.new_zeros(weight.shape[0]) if bias is None else bias
        total = start.expand(*x.shape[:-1], -1)
        for part in _slices(inner, int(number or 1)):
            total = total + F.linear(x[..., part], weight[:, part])
        return total
    if name == "split_k":
        parts = [F.linear(x[..., p], weight[:, p]) for p in _slices(inner, -(-inner // int(number or 1)))]
        total = parts[0]
        for one in parts[1:]:
            total = total + one
    elif name == "sequential":
        flat: Tensor = _Sequential.apply(x.reshape(-1, inner), weight.t())
        total = flat.reshape(*x.shape[:-1], -1)
    elif name == "random_order":
        places = torch.randperm(inner, device=x.device)
        total = F.linear(x[..., places], weight[:, places])
    else:
        total = F.linear(x, weight)
    return total if bias is None else total + bias


def _slices(inner: int, size: int) -> list[slice]:
    return [slice(k, min(k + size, inner)) for k in range(0, inner, size)] or [slice(0, 0)]


class Ordered(TorchFunctionMode):
    """Linear layers (``torch.nn.functional.linear``) add up in a named order while this is entered.

    Convolutions, and products that are written as ``@``, keep the library's own.

    Args:
        order: One of :data:`ORDERS`.

    Raises:
        ValueError: If there is no such order.

    Example:
        >>> layer, x = torch.nn.Linear(300, 4), torch.rand(2, 300)
        >>> with Ordered("bias_last"):
        ...     y = layer(x)
        >>> torch.equal(y, x @ layer.weight.t() + layer.bias)
        True
    """

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = checked_order(order)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Form the sums of a linear layer; everything else passes."""
        if func is F.linear:
            return _ordered(self.order, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _ordered(order: str, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(input, weight, bias, order)


class HalfProducts(TorchFunctionMode):
    r"""Linear layers and convolutions of half-precision tensors on a CPU: float32 sums, rounded to half once.

    .. math:: y = \mathrm{fl}_{16}\bigl(\mathrm{fl}_{32}(x W^T + b)\bigr)

    with half ``x``, ``W``, ``b``, and the same for both products of the backward. That is what the tensor cores of a
    GPU compute, up to the order of the sum. PyTorch's own half kernels on a CPU without half instructions agree with
    it but for a last bit in about 2 of 1000 results, and take 3 to 50 times as long.

    Example:
        >>> x, w = torch.ones(1, 3).half(), torch.full((2, 3), 0.1).half()
        >>> with HalfProducts():
        ...     F.linear(x, w)
        tensor([[0.2998, 0.2998]], dtype=torch.float16)
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Widen the operands and round the result."""
        if func in _PRODUCTS and args[0].dtype == torch.float16 and args[0].device.type == "cpu":
            wide = [a.float() if isinstance(a, Tensor) else a for a in args]
            return func(*wide, **(kwargs or {})).half()
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------- one accumulator
class _Sequential(torch.autograd.Function):
    """The product of two matrices with one accumulator per entry; the gradients' products likewise."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return sequential_product(a, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        a, b = ctx.saved_tensors
        (g,) = gradients
        return (
            sequential_product(g, b.t()) if ctx.needs_input_grad[0] else None,
            sequential_product(a.t(), g) if ctx.needs_input_grad[1] else None,
        )


def sequential_product(a: Tensor, b: Tensor, *, compiled: bool = True) -> Tensor:
    r"""A matrix product with one accumulator per entry, by fused multiply-adds in order.

    .. math:: s_0 = 0, \quad s_k = \mathrm{fl}(s_{k-1} + a_{rk} b_{kn}), \quad y_{rn} = s_K

    Args:
        a: Shape ``(R, K)``, float32.
        b: Shape ``(K, N)``, float32.
        compiled: Use the compiled loop where it was built and the tensors are on a CPU. Elsewhere each step is formed
            in float64 and rounded once, which gives the same bits and takes about 100 times as long.

    Returns:
        Shape ``(R, N)``, float32.

    Raises:
        ValueError: If a dtype is not float32.
    """
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise ValueError(
            f"sequential sums are formed in float32; given {a.dtype} and {b.dtype}. Half precision takes them with "
            "half_products+sequential"
        )
    library = _library() if compiled and a.device.type == "cpu" else None
    if library is None:
        return _composed(a, b)
    a, b = a.contiguous(), b.contiguous()
    out = a.new_empty(a.shape[0], b.shape[1])
    size = max(1, -(-len(a) // torch.get_num_threads()))

    def run(start: int) -> None:
        part = slice(start, start + size)
        rows = a[part]
        library.sequential_product(
            rows.data_ptr(), b.data_ptr(), out[part].data_ptr(), len(rows), a.shape[1], b.shape[1]
        )

    starts = range(0, len(a), size)
    if len(starts) < 2:
        for start in starts:
            run(start)
    else:  # ctypes lets the interpreter go while the loop runs
        with ThreadPoolExecutor(len(starts)) as pool:
            list(pool.map(run, starts))
    return out


def _composed(a: Tensor, b: Tensor) -> Tensor:
    """Form the fused products in float64, where a product of two float32 is exact and sums are rounded to odd.

    Rounding to odd keeps the second rounding from seeing a tie that the first one made (Boldo, Melquiond 2008).
    """
    sums = a.new_zeros(a.shape[0], b.shape[1])
    for k in range(a.shape[1]):
        wide, product = sums.double(), a[:, k, None].double() * b[k].double()
        total = wide + product
        part = total - wide
        error = (wide - (total - part)) + (product - part)
        toward = torch.where(error > 0, torch.inf, -torch.inf).to(total)
        even = (total.view(torch.int64) & 1) == 0
        odd = torch.where((error != 0) & even & total.isfinite(), torch.nextafter(total, toward), total)
        sums = odd.float()
    return sums


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled loop; None where it was not built from this version's source."""
    built = find_spec("nslightning.arithmetic._sequential")
    if built is None or built.origin is None:
        return None
    library = ctypes.CDLL(built.origin)
    if ctypes.c_int64.in_dll(library, "version").value != _VERSION:
        return None
    library.sequential_product.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3
    library.sequential_product.restype = None
    return library
