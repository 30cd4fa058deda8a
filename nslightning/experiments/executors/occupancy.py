"""Measures the share of time in which a GPU works, by NVIDIA's management library, which comes with the driver."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

__all__ = ["Occupancy"]

#: Seconds between two looks. The library answers for the last sixth of a second, or more.
EVERY = 0.2

#: Looks below which nothing is said: a short computation is mostly its start.
LEAST = 10

_LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


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
        if (look := _look(self._device)) is not None:
            self._thread = threading.Thread(target=self._watch, args=(look,), daemon=True)
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

    def _watch(self, look: Callable[[], float | None]) -> None:
        while not self._ended.wait(EVERY) and (share := look()) is not None:
            self._seen.append(share)


def _look(device: str) -> Callable[[], float | None] | None:
    """A function that returns the share of the last moment in which the GPU worked; None where there is none."""
    if not device.startswith("cuda"):
        return None
    import torch

    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    handle = ctypes.c_void_p()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None

    def look() -> float | None:
        rates = _Utilization()
        failed = library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates))
        return None if failed else rates.gpu / 100

    return look
