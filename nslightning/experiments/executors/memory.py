"""Chooses the number of processes by the machine's cores and memory, and by what the first process took of them."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["Peak", "free_memory", "measured_peak", "processes_that_fit"]

#: GPU memory of a process outside PyTorch's allocator, in bytes: context, kernels, libraries.
CUDA_CONTEXT = 600 * 2**20

#: Assumed need of a process, in bytes, where the system does not say: PyTorch, the images, a small network.
_UNKNOWN = 2 * 2**30

#: Share of the free memory that is given away: later cells may need more than the first.
_USED = 0.8


class Peak(NamedTuple):
    """The peak memory of a process, in bytes, and how busy it kept its GPU.

    Args:
        host: Peak of the machine's memory.
        device: Peak of the GPU's memory; 0 on a CPU.
        device_free: Free memory of the GPU, the process's own part included; None on a CPU.
        busy: Share of the time in which the GPU worked, while the process was alone; None where it is not known.
    """

    host: int
    device: int = 0
    device_free: int | None = None
    busy: float | None = None


def measured_peak(device: str) -> Peak:
    """Return the peak memory of this process so far.

    Args:
        device: The device on which it computed.

    Returns:
        The peak.
    """
    if not device.startswith("cuda"):
        return Peak(_host_peak())
    import torch

    own = torch.cuda.max_memory_reserved(device) + CUDA_CONTEXT
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) + CUDA_CONTEXT
    return Peak(_host_peak(), own, free)


def free_memory() -> int | None:
    """Return the free part of this machine's memory, or of this container's share of it.

    Returns:
        Bytes; None where the system does not say.
    """
    free = None
    with suppress(OSError, ValueError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        left = limit - int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = left if free is None else min(free, left)
    return free


def processes_that_fit(peak: Peak, cores: int, host_free: int | None, gpus: int = 1) -> tuple[int, str]:
    """Return the number of processes to compute side by side.

    Kernels of several processes take turns on a GPU. More processes than keep it busy all the time gain nothing.

    Args:
        peak: Peak memory of the first cell's process.
        cores: Cores that each serve a process.
        host_free: Free memory of the machine while no process computes; None where it is unknown.
        gpus: GPUs that share the processes.

    Returns:
        The number, at least 1, and the reason in words.

    Example:
        >>> processes_that_fit(Peak(2 * 2**30), 16, 8 * 2**30)
        (3, 'memory: 2.0 GiB each, 8.0 GiB free')
        >>> processes_that_fit(Peak(2**30, 10 * 2**30, 75 * 2**30), 16, 64 * 2**30, gpus=2)
        (12, "the GPU's memory: 10.0 GiB each, 75.0 GiB free")
        >>> processes_that_fit(Peak(2**30, 10 * 2**30, 75 * 2**30, busy=0.3), 16, 64 * 2**30)
        (4, 'one keeps the GPU busy for 30 % of its time')
        >>> processes_that_fit(Peak(2**30), 2, None)
        (2, '2 cores')
    """
    limits = [(cores, f"{cores} cores")]
    if host_free is not None:
        words = f"memory: {peak.host / 2**30:.1f} GiB each, {host_free / 2**30:.1f} GiB free"
        limits.append((int(_USED * host_free / peak.host), words))
    if peak.device_free is not None and peak.device:
        words = f"the GPU's memory: {peak.device / 2**30:.1f} GiB each, {peak.device_free / 2**30:.1f} GiB free"
        limits.append((gpus * int(_USED * peak.device_free / peak.device), words))
    if peak.busy is not None:
        words = f"one keeps the GPU busy for {100 * peak.busy:.0f} % of its time"
        limits.append((gpus * math.ceil(1 / max(peak.busy, 0.01)), words))
    number, reason = min(limits, key=lambda limit: limit[0])
    return max(1, number), reason


def _host_peak() -> int:
    with suppress(OSError, StopIteration):  # Linux: what getrusage says was the parent's before this process began
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    if sys.platform == "win32":
        return _UNKNOWN
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
