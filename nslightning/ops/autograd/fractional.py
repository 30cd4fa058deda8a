"""Fractional max pooling with a chosen way to share the gradient over the tied entries of a window.

Each channel of each image has its own windows, drawn at random: Graham, *Fractional Max-Pooling*, 2014. Where some
are tied, the entries of all are gathered side by side, which makes the windows disjoint and regular, and
:mod:`~nslightning.ops.autograd.pooling` does the rest. On CUDA devices the gradients of
overlapping windows are added in no fixed order, as in the stock kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from nslightning._torch import in_forward_mode
from nslightning.ops.autograd.pooling import pool, tied_windows
from nslightning.ops.autograd.routing import own
from nslightning.ops.autograd.selection import Selection, data_dependent
from nslightning.ops.autograd.windows import Regular

__all__ = ["Fractional", "pool_fractional", "tied_fractional"]

aten = torch.ops.aten


class Fractional:
    """The windows of one evaluation; they are drawn when they are first asked for, as stock draws them.

    Args:
        dims: Two or three.
        x: The input, shape (N, C, *spatial) or (C, *spatial).
        kernel_size: The window's size, a number or one each.
        output_size: The number of windows, a number or one each; or None.
        output_ratio: Where it is None: their number as a share of the input's size.
        samples: The random numbers that place the windows, shape (N, C, dims), in [0, 1); None draws them.

    Raises:
        ValueError: If neither ``output_size`` nor ``output_ratio`` is given.
    """

    def __init__(
        self, dims: int, x: Tensor, kernel_size: Any, output_size: Any, output_ratio: Any, samples: Tensor | None
    ) -> None:
        if output_size is None and output_ratio is None:
            raise ValueError(f"fractional_max_pool{dims}d takes an output_size or an output_ratio")
        self.kernel = _each(dims, kernel_size)
        if output_size is None:
            shares = zip(x.shape[-dims:], _each(dims, output_ratio), strict=True)
            output_size = [int(size * share) for size, share in shares]
        self.output, self.samples = _each(dims, output_size), samples

    @property
    def dims(self) -> int:
        """The number of spatial dimensions."""
        return len(self.kernel)

    @property
    def gathered(self) -> Regular:
        """The windows once their entries lie side by side."""
        return Regular(self.kernel, self.kernel, (0,) * self.dims, (1,) * self.dims)

    def stock(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stock kernel: maxima and flat indices, within each channel, of the entries that PyTorch picks."""
        if self.samples is None:
            images = x.shape[0] if x.dim() == self.dims + 2 else 1
            self.samples = torch.rand(images, x.shape[-self.dims - 1], self.dims, dtype=x.dtype, device=x.device)
        kernel = getattr(aten, f"fractional_max_pool{self.dims}d")
        return cast(tuple[Tensor, Tensor], kernel(x, self.kernel, self.output, self.samples))

    def entries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of all windows side by side, and their flat indices within each channel.

        Args:
            x: The input.

        Returns:
            Two tensors of shape (N, C, windows times the kernel's size in each dimension), or without N.
        """
        dims, sizes = self.dims, x.shape[-self.dims :]
        zeros, corners = self.stock(torch.zeros_like(x))  # among equals stock picks the first: the window's corner
        offsets = torch.zeros((), dtype=corners.dtype, device=x.device)
        for kernel, size in zip(self.kernel, sizes, strict=True):
            offsets = offsets.unsqueeze(-1) * size + torch.arange(kernel, device=x.device)
        ahead = corners.shape[:-dims]
        places = corners.view(*ahead, *(n for size in self.output for n in (size, 1)))
        places = places + offsets.view([n for kernel in self.kernel for n in (1, kernel)])
        shape = (*ahead, *(n * k for n, k in zip(self.output, self.kernel, strict=True)))
        places = places.reshape(shape)
        flat = x.to(zeros.dtype).flatten(-dims)  # autocast widens
        return flat.gather(-1, places.flatten(-dims)).view(shape), places


def _each(dims: int, numbers: Any) -> tuple[Any, ...]:
    numbers = tuple(numbers) if isinstance(numbers, Sequence) else (numbers,)
    return tuple(numbers * dims if len(numbers) == 1 else numbers)


@own
def pool_fractional(x: Tensor, selection: Selection, windows: Fractional, return_indices: bool = False) -> Any:
    """Fractional max pooling with the choice that ``selection`` names at backward time.

    Args:
        x: Input of shape (N, C, *spatial) or (C, *spatial), floating dtype.
        selection: The choice, read when the backward runs.
        windows: The windows.
        return_indices: Also return the flat index of the entry that PyTorch picks.

    Returns:
        The stock result, bit for bit; with ``return_indices`` a tuple of it and of the indices.

    Raises:
        ValueError: If the choice is another than the reference under the published rule.
    """
    if data_dependent(x) and not in_forward_mode() and tied_fractional(x, windows)[0] == 0:
        output, indices = windows.stock(x)
        return (output, indices) if return_indices else output
    entries, places = windows.entries(x)
    output, within = pool(entries, selection, windows.gathered, True)
    indices = places.flatten(-windows.dims).gather(-1, within.flatten(-windows.dims))
    indices = aten._unsafe_view(indices, within.shape)  # stock's indices are no view
    return (output, indices) if return_indices else output


def tied_fractional(x: Tensor, windows: Fractional) -> tuple[Tensor, int]:
    """Count how many windows reach their maximum more than once.

    Args:
        x: Input of shape (N, C, *spatial) or (C, *spatial), floating dtype.
        windows: The windows.

    Returns:
        ``(tied windows, windows)``, the first on the input's device.
    """
    with torch.no_grad():
        count = tied_windows(windows.entries(x)[0], windows.gathered)
    return torch.count_nonzero(count > 1), count.numel()
