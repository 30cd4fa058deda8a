"""Tensors of which each process holds a part, as the parameters and gradients of FSDP2 are."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["is_shard", "local", "reshard", "totals"]


def is_shard(t: Tensor) -> bool:
    """Return whether a tensor is distributed over processes.

    Args:
        t: Any tensor.

    Returns:
        True for a ``DTensor``.
    """
    module = sys.modules.get("torch.distributed.tensor")  # without it there is none, and to import it takes time
    return module is not None and isinstance(t, module.DTensor)


def reshard(model: nn.Module) -> None:
    """Have FSDP2 show a model's parameters as shards, also those that it keeps whole from the forward to the backward.

    Those are the root module's own. Whole ones are other tensors, without what the processes exchange: their gradients
    would be one process's, and after the backward they are not the model's parameters any more.

    Args:
        model: Any module.
    """
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def local(t: Tensor) -> Tensor:
    """The part of a tensor that this process holds.

    Args:
        t: Any tensor.

    Returns:
        The part; the tensor itself where it is not distributed. A sum whose terms lie in several processes is formed
        first.
    """
    if not is_shard(t):
        return t
    from torch.distributed.tensor import Replicate

    whole: DTensor = t  # type: ignore[assignment] # as was asked
    if any(p.is_partial() for p in whole.placements):
        whole = whole.redistribute(placements=[Replicate() if p.is_partial() else p for p in whole.placements])
    part: Tensor = whole.to_local()
    return part


def totals(rows: Tensor, tensors: Sequence[Tensor], largest: int) -> Tensor:
    """Sums over the parts of tensors as sums over the tensors: one exchange for each way of distributing them.

    Args:
        rows: One row per tensor: sums over the part that this process holds.
        tensors: The tensors.
        largest: The column that is a largest value instead of a sum.

    Returns:
        The same over the whole tensors; ``rows`` itself where none is distributed.
    """
    groups: dict[Any, list[int]] = {}
    for i, t in enumerate(tensors):
        if is_shard(t):
            placements = t.placements  # type: ignore[attr-defined] # a DTensor's
            mesh = t.device_mesh  # type: ignore[attr-defined] # a DTensor's
            for dim, placement in enumerate(placements):
                if placement.is_shard():
                    groups.setdefault((mesh, dim), []).append(i)
    for (mesh, dim), members in groups.items():
        group = mesh.get_group(dim)
        part = rows[members].to(mesh.device_type)
        top = part[:, largest].contiguous()
        torch.distributed.all_reduce(part, group=group)
        torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group=group)
        part[:, largest] = top
        rows = rows.index_copy(0, torch.tensor(members, device=rows.device), part.to(rows.device))
    return rows
