"""Keeps the entries at which an operation met its kinks as bits, and overwrites just these entries of a gradient.

For eager code on a CPU, where a tensor beside the stock operation's own costs as much as the operation does: mapping
fresh memory is slower than the arithmetic. Everything here goes block by block through buffers that stay in the cache,
in the order of the storage, and uses kernels that PyTorch vectorises: comparisons that write their operand's dtype,
sums, bitwise operations (masked ones, ``where`` and those that write ``bool`` are not).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nslightning._torch import in_functorch
from nslightning.ops.autograd.selection import Selection, concrete, data_dependent
from nslightning.ops.kernels import cpu as cpu_kernels

__all__ = ["TieBits", "as_mask", "chosen_value", "find_ties", "overwrite"]

_BLOCK = 1 << 16  # entries a thread takes at a time; with a few temporaries, they fit its cache
_COMPILED_BLOCK = 1 << 13  # and where the loops are compiled, which are split over the threads by blocks
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_WEIGHTS = {
    dtype: torch.tensor([[1], [2], [4], [8], [16], [32], [64], [128]], dtype=dtype, device="cpu")
    for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


class TieBits(NamedTuple):
    """The ties of one tensor at one kink: a bit per entry of each block that has any.

    Args:
        blocks: The numbers of the blocks, shape (blocks with ties,), int64.
        bits: Shape (blocks with ties, entries of a block / 8), uint8. Bit ``k`` of byte ``j`` is entry
            ``k * (entries / 8) + j`` of its block.
    """

    blocks: Tensor
    bits: Tensor


def find_ties(x: Tensor, positions: Sequence[float], order: tuple[int, ...]) -> list[TieBits] | None:
    """Find where a tensor equals each of some numbers, in one pass.

    Args:
        x: Any shape, floating dtype, on a CPU.
        positions: The numbers.
        order: The order of the dimensions in which to read, such as
            :func:`~nslightning.ops.autograd.layouts.storage_order`.

    Returns:
        One entry per position, without blocks where that has no tie; None where no position has a tie.

    Example:
        >>> [zero] = find_ties(torch.tensor([1.0, 0.0, -0.0]), [0.0], (0,))
        >>> zero.bits
        tensor([[6]], dtype=torch.uint8)
    """
    flat = x.permute(order).reshape(-1)
    if _compiled(x):
        size = min(_COMPILED_BLOCK, max(1, -(-flat.numel() // 8)) * 8)
        ties = [TieBits(*cpu_kernels.mark(flat.contiguous(), float(position), size)) for position in positions]
        return ties if any(len(blocks) for blocks, _ in ties) else None
    size = min(_BLOCK * max(2, torch.get_num_threads()), max(1, -(-flat.numel() // 8)) * 8)
    marks = flat.new_empty(size)
    tied_blocks: list[tuple[list[int], list[Tensor]]] = [([], []) for _ in positions]
    for number, block in enumerate(flat.split(size)):
        used = marks[: block.numel()]
        for position, (blocks, bits) in zip(positions, tied_blocks, strict=True):
            if torch.eq(block, position, out=used).sum().item():
                marks[block.numel() :] = 0
                blocks.append(number)
                # At most 255, exact in every dtype.
                bits.append((marks.view(8, -1) * _WEIGHTS[x.dtype]).sum(0).to(torch.uint8))
    if not any(blocks for blocks, _ in tied_blocks):
        return None
    none = flat.new_empty((0, size // 8), dtype=torch.uint8)
    return [
        TieBits(torch.tensor(blocks, dtype=torch.long, device=flat.device), torch.stack(bits) if bits else none)
        for blocks, bits in tied_blocks
    ]


def chosen_value(derivative: float | str, constant: bool, selection: Selection, g: Tensor, tied: Tensor) -> Tensor:
    """The gradient that tied entries receive.

    Args:
        derivative: The derivative chosen at the kink, or ``"random"``.
        constant: Whether the incoming gradient is dropped, as by the published rule.
        selection: The selection whose random stream is drawn from.
        g: The incoming gradient.
        tied: Not 0 at ties, 0 elsewhere; of ``g``'s shape.

    Returns:
        A new tensor of ``g``'s shape and dtype: the gradient that each entry would receive if it were tied. A random
        derivative gives 0 at entries that are not tied.

    Raises:
        RuntimeError: If a random derivative is asked for under a ``torch.func`` transform.
    """
    if not isinstance(derivative, str):
        return torch.full_like(g, derivative) if constant else g * derivative
    if in_functorch():
        raise RuntimeError(
            'relu="random" draws once per tie, and under torch.func transforms the ties are not known. '
            "Choose a number there, or take the gradient with torch.autograd."
        )
    at = (tied.reshape(-1).nonzero().squeeze(1),)
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    drawn = torch.rand(at[0].shape, dtype=wide, device=g.device, generator=selection.generator(g.device))
    values = drawn if constant else g.reshape(-1)[at] * drawn
    return g.new_zeros(g.numel()).index_put(at, values.to(g.dtype)).view(g.shape)


def overwrite(
    gradient: Tensor,
    g: Tensor,
    ties: TieBits,
    order: tuple[int, ...],
    derivative: float | str,
    constant: bool,
    selection: Selection,
) -> Tensor:
    """Overwrite the gradient of tied entries, and leave the bits of all others alone.

    Where the result is to be differentiated again, or ``g`` is a batch of gradients (``is_grads_batched``), PyTorch's
    operations compute it, which support both.

    Args:
        gradient: The gradient with respect to the input; its memory may be reused.
        g: The incoming gradient, of the same shape and dtype.
        ties: The ties of the input.
        order: The order that :func:`find_ties` read them in.
        derivative: As in :func:`chosen_value`.
        constant: As in :func:`chosen_value`.
        selection: As in :func:`chosen_value`.

    Returns:
        The gradient.
    """
    inverse = tuple(sorted(range(len(order)), key=order.__getitem__))
    if torch.is_grad_enabled() or not data_dependent(g):
        g = g.permute(order)
        mask = _mask(ties, g.numel()).view(g.shape)
        value = chosen_value(derivative, constant, selection, g, mask)
        return torch.where(mask, value, gradient.permute(order)).permute(inverse)
    ordered, flat = gradient.permute(order).contiguous(), g.permute(order).reshape(-1)
    if not isinstance(derivative, str) and _compiled(g):
        cpu_kernels.overwrite(ordered.view(-1), flat.contiguous(), ties, derivative, constant=constant)
        return ordered.permute(inverse)
    size, integer = 8 * ties.bits.shape[1], _INTEGERS[g.element_size()]
    blocks, blocks_g = ordered.view(-1).split(size), flat.split(size)
    for number, bits in zip(ties.blocks.tolist(), ties.bits, strict=True):
        old, block_g = blocks[number].view(integer), blocks_g[number]
        tied = _unpack(bits)[: old.numel()]
        new = chosen_value(derivative, constant, selection, block_g, tied).view(integer)
        old.bitwise_xor_(new.bitwise_xor_(old).bitwise_and_(tied.to(integer)))
    return ordered.permute(inverse)


def _compiled(x: Tensor) -> bool:
    """Return whether compiled loops take a tensor on a CPU."""
    return concrete(x) and x.dtype in cpu_kernels.DTYPES and cpu_kernels.available()


def _mask(ties: TieBits, length: int) -> Tensor:
    """The ties of a tensor's entries, in the order that :func:`find_ties` read them in, bool."""
    size = 8 * ties.bits.shape[1]
    blocks = (ties.bits.unsqueeze(1) & _WEIGHTS[torch.uint8].to(ties.bits.device)).ne(0).flatten(1)
    mask = torch.zeros(-(-length // size), size, dtype=torch.bool, device=ties.bits.device)
    return mask.index_copy(0, ties.blocks, blocks).view(-1)[:length]


def as_mask(ties: TieBits, x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The ties as a mask.

    Args:
        ties: The ties of a tensor.
        x: A tensor of its shape.
        order: The order that :func:`find_ties` read them in.

    Returns:
        Bool, of the shape of ``x``.
    """
    places = [int(i) for i in order]  # compiled autograd hands over numbers that it does not know
    return _mask(ties, x.numel()).view([x.shape[i] for i in places]).movedim(list(range(len(places))), places)


def _unpack(bits: Tensor) -> Tensor:
    """One block's ties, shape (entries,), int8: -1 at a tie, else 0."""
    return (bits & _WEIGHTS[torch.uint8]).ne_(0).view(torch.int8).neg_().view(-1)
