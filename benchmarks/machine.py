"""The facts about the machine and the timing that stand beside every figure."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def describe(device: str) -> dict[str, Any]:
    """The machine and versions, without names of hosts or folders."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def keep_memory() -> None:
    """Start the program again with an allocator that keeps what is freed.

    Otherwise a large tensor lies in pages that are mapped anew or in recycled ones, by chance and by what ran before;
    on a CPU mapping costs more than the operations that are timed. glibc's allocator reads these when a program starts.
    """
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    if sys.platform == "linux" and not keep.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **keep})


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:  # a machine that only computes may have no git
        return ""
    return done.stdout.strip()


def interleaved(
    closures: dict[str, Callable[[], object]], device: str, seconds: float = 2.0, least: int = 7
) -> dict[str, np.ndarray]:
    """Time closures in turn, A B C A B C, so that the machine's drift hits all alike.

    Returns:
        Seconds of each turn, by name.
    """

    def once(f: Callable[[], object]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for f in closures.values():
        once(f), once(f)
    times: dict[str, list[float]] = {name: [] for name in closures}
    end = time.perf_counter() + seconds * len(closures)
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, f in closures.items():
            times[name].append(once(f))
    return {name: np.array(t) for name, t in times.items()}
