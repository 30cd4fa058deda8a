"""The parts that all executors share: the resources of an item, and the interface."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TextIO, TypeVar

__all__ = ["Executor", "ItemResult", "Resources", "cores", "use_threads"]

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The resources that the computation of a grid may use.

    Args:
        workers: Items that are computed side by side. None lets the executor choose: the processes of one machine by
            its cores and its memory, a cluster by what is free.
        device: Device of each item: ``cpu``, ``cuda``, or one GPU of this machine, such as ``cuda:1``.
        gpus_per_cell: Share of a GPU that an item takes: 0.25 puts four on one GPU. None leaves the number to
            ``workers``; Ray and submitit then give each item a whole one.
        cpus_per_cell: Threads of an item.
        options: The executor's own: ``address`` of a Ray cluster; ``cluster``, ``cells_per_job`` and the parameters of
            ``submitit.AutoExecutor``, such as ``timeout_min``.
        say: Stream to which the executor writes its choices.

    Raises:
        ValueError: If a number is not allowed.
    """

    workers: int | None = 1
    device: str = "cpu"
    gpus_per_cell: float | None = None
    cpus_per_cell: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    say: TextIO | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers={self.workers}: at least one process is needed")
        if self.cpus_per_cell < 1:
            raise ValueError(f"cpus_per_cell={self.cpus_per_cell}: a cell takes at least one")
        if self.gpus_per_cell is None:
            return
        if not 0 < self.gpus_per_cell <= 1:
            raise ValueError(
                f"gpus_per_cell={self.gpus_per_cell:g} is not above 0 and at most 1: a cell is computed on one GPU"
            )
        if not self.device.startswith("cuda"):
            raise ValueError(f"gpus_per_cell={self.gpus_per_cell:g} needs a GPU; the device is {self.device}")

    @property
    def per_gpu(self) -> int:
        """Return how many items share a GPU."""
        return 1 if self.gpus_per_cell is None else int(1 / self.gpus_per_cell + 1e-9)


class ItemResult(NamedTuple, Generic[T, R]):
    """An item that is done.

    Args:
        item: The item.
        result: The function's result; None where the worker ended before it returned.
        error: The reason why there is no result.
    """

    item: T
    result: R | None
    error: Exception | None = None


class Executor(Protocol):
    """Computes items, side by side."""

    def results(self, work: Callable[[T, str], R], items: Sequence[T]) -> Iterator[ItemResult[T, R]]:
        """Compute a function of each item.

        An iterator that is closed, or raises because of Ctrl-C, ends everything that it started.

        Args:
            work: Takes an item and the device; it and its results can be pickled. Called again for an item whose
                machine went away.
            items: The function's arguments, one for each call.

        Yields:
            Each item when it is done.
        """
        ...


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(number: int) -> None:
    """Set PyTorch's number of threads. Results depend on it, so every executor sets it."""
    import torch

    torch.set_num_threads(number)
