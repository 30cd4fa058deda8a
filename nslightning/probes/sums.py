"""Sums over gradients and their differences, in float64: on a device without waiting for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import inf

import torch
from torch import Tensor

from nslightning._torch import foreach_add, foreach_norm, foreach_sub
from nslightning.ops.autograd.selection import concrete
from nslightning.ops.kernels import cpu as cpu_kernels
from nslightning.probes.shards import local

__all__ = ["LARGEST", "dense", "is_nothing", "nothing", "numbers", "rows", "squares", "waits", "wide"]

#: The column of a row that is a largest value; all others are sums.
LARGEST = 2

_BLOCK = 1 << 18
_GROUP = 1 << 24  # entries that are widened at a time on a device


def waits(device: torch.device) -> bool:
    """Return whether reading a tensor's values waits for its device.

    Args:
        device: The tensor's device.

    Returns:
        True for every device but the CPU.
    """
    return device.type != "cpu"


def numbers(scalars: Sequence[Tensor | float]) -> list[float]:
    """The values of 0-d tensors, all by one transfer from their device.

    Args:
        scalars: Tensors of any real dtype, or numbers, which stay as they are.

    Returns:
        Their values in float64, in their order. Integers are exact up to 2^53.

    Example:
        >>> numbers([torch.tensor(3), 0.5, torch.tensor(True)])
        [3.0, 0.5, 1.0]
    """
    tensors = [s.detach() for s in scalars if isinstance(s, Tensor)]
    if not tensors:
        return [float(s) for s in scalars]
    device = tensors[0].device
    values = iter(torch.stack([t.to(torch.float64).to(device) for t in tensors]).tolist())
    return [next(values) if isinstance(s, Tensor) else float(s) for s in scalars]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision that sums are formed in.

    Args:
        dtype: A floating or complex dtype.

    Returns:
        float64, or complex128.
    """
    return torch.complex128 if dtype.is_complex else torch.float64


def dense(gradient: Tensor) -> Tensor:
    """A gradient with all the entries that this process holds of it: those of embeddings may be sparse.

    Args:
        gradient: Any layout; it may be nested, or distributed over processes.

    Returns:
        The same, strided.
    """
    gradient = local(gradient)
    if gradient.is_nested:
        return torch.cat([part.flatten() for part in gradient.unbind()])
    return gradient.to_dense() if gradient.layout != torch.strided else gradient


@lru_cache(maxsize=64)
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def nothing(like: Tensor) -> Tensor:
    """A difference of zeros that takes no memory; :func:`is_nothing` recognises it without reading it.

    Args:
        like: Any tensor.

    Returns:
        One zero, expanded to the tensor's shape.
    """
    like = local(like)
    return _zero(like.dtype, like.device).expand(like.shape)


def is_nothing(difference: Tensor) -> bool:
    """Return whether a difference is one zero, expanded, as :func:`nothing` returns it.

    Args:
        difference: Any tensor.

    Returns:
        Whether it is. On a device only what :func:`nothing` made is known to be.
    """
    if difference.layout != torch.strided or not difference.numel() or any(difference.stride()):
        return False
    if waits(difference.device):
        return difference.data_ptr() == _zero(difference.dtype, difference.device).data_ptr()
    return not difference[(0,) * difference.dim()].any()


def squares(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The squared lengths.

    Args:
        tensors: Dense tensors.

    Returns:
        0-d float64 tensors where they are.
    """
    squared_lengths = [torch.zeros((), dtype=torch.float64, device=t.device) for t in tensors]
    for members in _groups(tensors):
        for i, length in zip(members, foreach_norm(_widened(tensors, members), 2), strict=True):
            squared_lengths[i] = length.square()
    for i, t in enumerate(tensors):
        if not waits(t.device):
            for (block,) in _blocks(t):
                squared_lengths[i] += torch.vdot(block, block).real
    return squared_lengths


def rows(
    gradients: Sequence[Tensor], reference: Sequence[Tensor], square: Sequence[Tensor], *, carried: bool
) -> Tensor:
    """Return the sums that the norms of differences need, a row for each pair.

    Args:
        gradients: Dense gradients a, or differences d = a - b if they were carried.
        reference: Dense gradients b of the same shapes.
        square: The squared length of each b, from :func:`squares`.
        carried: Whether ``gradients`` holds differences.

    Returns:
        Shape (pairs, 6), float64, on the first one's device: the sum of ``|d|``, that of its squares, the largest
        ``|d|``, the squared lengths of a and b, and their product.
    """
    if not gradients:
        return torch.zeros(0, 6, dtype=torch.float64)
    table: list[Tensor] = [torch.empty(0)] * len(gradients)
    for members in _groups(reference):
        differences, bases = _widened(gradients, members), _widened(reference, members)
        if carried:
            others = foreach_add(bases, differences)
        else:
            others, differences = differences, foreach_sub(differences, bases)
        columns = (*(foreach_norm(differences, p) for p in (1, 2, inf)), foreach_norm(others, 2))
        for i, l1, l2, linf, length in zip(members, *columns, strict=True):
            dd, aa, bb = l2.square(), length.square(), square[i]
            table[i] = torch.stack([l1, dd, linf, aa, bb, (aa + bb - dd) / 2])
    for i, b in enumerate(reference):
        if not waits(b.device) or not b.numel():
            sums = _sums(gradients[i], b, carried=carried)
            table[i] = torch.cat([sums[:4], square[i].view(1), sums[4:]])
    return torch.stack([row.to(table[0].device) for row in table])


def _groups(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Group tensors on devices to work on together: of one device and kind, and not too many entries."""
    open_groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        if waits(t.device) and t.numel():
            group = open_groups.setdefault((t.device, wide(t.dtype)), [])
            if group and sum(tensors[j].numel() for j in group) + t.numel() > _GROUP:
                yield group[:]
                group.clear()
            group.append(i)
    yield from (group for group in open_groups.values() if group)


def _widened(tensors: Sequence[Tensor], members: Sequence[int]) -> list[Tensor]:
    return [tensors[i].detach().to(wide(tensors[i].dtype)) for i in members]


def _sums(gradient_or_difference: Tensor, reference: Tensor, *, carried: bool = False) -> Tensor:
    """(l1, l2^2, linf, |a|^2, a.b) of a choice's gradient a = b + d, of which d is given if ``carried``, else a."""
    pair = gradient_or_difference, reference
    plain = all(concrete(t) and t.device.type == "cpu" and t.is_contiguous() for t in pair)
    if plain and gradient_or_difference.dtype == reference.dtype in cpu_kernels.DTYPES and cpu_kernels.available():
        return cpu_kernels.sums(gradient_or_difference.detach(), reference.detach(), carried=carried)
    total = torch.zeros(5, dtype=torch.float64, device=reference.device)
    for one, b, other in _blocks(gradient_or_difference, reference, gradient_or_difference):
        a, d = (other.add_(b), one) if carried else (one, other.sub_(b))
        products = [torch.vdot(d, d).real, torch.vdot(a, a).real, torch.vdot(a, b).real]
        size = d.abs() if d.is_complex() else d.abs_()
        top = torch.maximum(total[2], size.aminmax().max)
        total = total + torch.stack([size.sum(), products[0], torch.zeros_like(top), *products[1:]])
        total[2] = top
    return total


def _blocks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Copies of tensors of one size in float64, in blocks that fit the cache; each block overwrites the last."""
    flat = [t.detach().flatten() for t in tensors]
    size = min(_BLOCK, len(flat[0]))
    if not size:
        return
    kind = torch.complex128 if any(t.is_complex() for t in flat) else torch.float64
    memory = [torch.empty(size, dtype=kind, device=t.device) for t in flat]
    for blocks in zip(*(t.split(size) for t in flat), strict=True):
        yield [into[: len(block)].copy_(block) for into, block in zip(memory, blocks, strict=True)]
