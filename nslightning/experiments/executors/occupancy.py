"""Measures the share of time in which a GPU works, as its driver counts it."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

__all__ = ["Occupancy"]

#: Seconds between two looks. The driver answers for the last sixth of a second, or more.
EVERY = 0.2

#: Looks below which nothing is said: a short computation is mostly its start.
LEAST = 10


class Occupancy:
    """Looks at a GPU, from a thread of its own, as long as a block runs.

    Args:
        device: The device that the block uses, such as ``cuda:1``. Of a CPU nothing is measured.

    Attributes:
        share: Afterwards, the share of the time in which a kernel ran, of all processes; None where it is not known.

    Example:
        >>> with Occupancy("cpu") as occupancy:
        ...     pass
        >>> occupancy.share is None
        True
    """

    def __init__(self, device: str) -> None:
        self.share: float | None = None
        self._device, self._seen, self._ended = device, list[float](), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Begin to look."""
        if _look(self._device) is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, and form the mean."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            if len(self._seen) >= LEAST:
                self.share = sum(self._seen) / len(self._seen)

    def _watch(self) -> None:
        while not self._ended.wait(EVERY) and (share := _look(self._device)) is not None:
            self._seen.append(share)


def _look(device: str) -> float | None:
    """Return the share of the last moment in which the GPU worked; None where it is not known."""
    if not device.startswith("cuda"):
        return None
    import torch

    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # no driver, a slice of a GPU, which has no such count, ...: memory and cores decide alone
        return None
