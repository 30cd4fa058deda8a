"""The papers' precisions, 16, 24, 32 and 64 bits, as dtypes, autocast and loss scaling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from nslightning.arithmetic import HalfProducts

__all__ = ["PRECISIONS", "computing", "halves"]

#: The dtype of weights and inputs. "24" is the papers' name of fp16 autocast over float32 weights.
PRECISIONS = {16: torch.float16, 24: torch.float32, 32: torch.float32, 64: torch.float64}


def halves(precision: int, device: torch.device) -> bool:
    """Return whether products are formed by :class:`~nslightning.arithmetic.HalfProducts`: 16 bits on a CPU.

    Args:
        precision: 16, 24, 32 or 64.
        device: The device to compute on.

    Returns:
        Whether they are.
    """
    return precision == 16 and device.type == "cpu"


@contextmanager
def computing(precision: int, device: torch.device) -> Iterator[None]:
    """Compute a forward and its loss in one of the papers' precisions.

    Args:
        precision: 16, 24, 32 or 64.
        device: The device to compute on.
    """
    with ExitStack() as stack:
        if precision == 24:
            stack.enter_context(torch.autocast(device.type, torch.float16))
        elif halves(precision, device):
            stack.enter_context(HalfProducts())
        yield
