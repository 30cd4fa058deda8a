"""Batches on their way to a device while it still works on the one before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from nslightning.data.sampler import Batch

__all__ = ["ahead"]


def ahead(batches: Iterable[Batch], device: torch.device, cuda: Any = torch.cuda) -> Iterator[Batch]:
    """Copy each batch to a CUDA device while the device works on the one before, on a separate stream.

    Args:
        batches: Batches in pinned memory, else the copy waits.
        device: The CUDA device.
        cuda: The module of streams: ``torch.cuda``, or a stand-in in tests.

    Yields:
        The batches on the device. The current stream's work on a batch waits there for the copy of this batch alone.
    """
    stream = cuda.Stream(device)
    copied: tuple[Batch, Any] | None = None
    for x, y in batches:
        with cuda.stream(stream):
            following = (x.to(device, non_blocking=True), y.to(device, non_blocking=True)), stream.record_event()
        if copied is not None:
            yield _arrived(*copied, cuda.current_stream(device))
        copied = following
    if copied is not None:
        yield _arrived(*copied, cuda.current_stream(device))


def _arrived(batch: Batch, event: Any, current: Any) -> Batch:
    current.wait_event(event)
    for tensor in batch:
        tensor.record_stream(current)  # their memory is not given away before this stream is done with it
    return batch
