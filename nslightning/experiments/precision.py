"""The papers' precisions, 16, 24, 32 and 64 bits, as dtypes, autocast and loss scaling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["PRECISIONS", "HalfProducts", "computing"]

#: The dtype of weights and inputs. "24" is the papers' name of fp16 autocast over float32 weights.
PRECISIONS = {16: torch.float16, 24: torch.float32, 32: torch.float32, 64: torch.float64}

_PRODUCTS = (F.linear, F.conv2d)


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
            wide = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
            return func(*wide, **(kwargs or {})).half()
        return func(*args, **(kwargs or {}))


@contextmanager
def computing(precision: int, device: torch.device) -> Iterator[None]:
    """Compute a forward and its loss in one of the papers' precisions.

    Args:
        precision: 16, 24, 32 or 64.
        device: Where.
    """
    with ExitStack() as stack:
        if precision == 24:
            stack.enter_context(torch.autocast(device.type, torch.float16))
        elif precision == 16 and device.type == "cpu":
            stack.enter_context(HalfProducts())
        yield
