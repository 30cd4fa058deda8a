"""The record of a run's arithmetic: machine, libraries, environment and switches."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

__all__ = ["processor", "record", "switches"]

_VARIABLES = ("MKL_", "OPENBLAS_", "OMP_", "KMP_", "CUBLAS", "CUDNN_", "NVIDIA_TF32", "TORCH_BLAS", "ONEDNN_", "DNNL_")
_LIBRARIES = ("nvidia-cublas", "nvidia-cudnn")


def record() -> dict[str, Any]:
    """The machine and the switches that decide how this process computes.

    Returns:
        ``processor``, ``cores`` (those that this process may use), ``instructions`` (the vector instructions that
        PyTorch's own kernels use), ``blas`` (its name and version), ``variables`` (environment variables that BLAS,
        OpenMP and CUDA libraries read), ``libraries`` (installed versions of cuBLAS and cuDNN, and the cuDNN in use)
        and everything of :func:`switches`.
    """
    config = torch.__config__.show().splitlines()
    blas = [line.strip(" -") for line in config if "Math Kernel Library" in line or "OpenBLAS" in line]
    settings = [part.strip() for line in config for part in line.split(",") if part.strip().startswith("BLAS_INFO=")]
    installed = {d.name: d.version for d in distributions() if str(d.name).startswith(_LIBRARIES)}
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "blas": "; ".join(dict.fromkeys(blas)) or "; ".join(settings),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
        "libraries": {**dict(sorted(installed.items())), "cudnn": torch.backends.cudnn.version()},
        **switches(),
    }


def switches() -> dict[str, Any]:
    """PyTorch's switches of arithmetic, as they stand now.

    Returns:
        ``tf32_matmul``, ``tf32_cudnn``, ``matmul_precision``, ``fp16_reduced_reductions``, ``bf16_reduced_reductions``,
        ``deterministic``, ``cudnn_deterministic``, ``cudnn_benchmark``, ``flush_to_zero``, ``threads``.
    """
    matmul = torch.backends.cuda.matmul
    return {
        "tf32_matmul": matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "fp16_reduced_reductions": matmul.allow_fp16_reduced_precision_reduction,
        "bf16_reduced_reductions": matmul.allow_bf16_reduced_precision_reduction,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "flush_to_zero": flushes(),
        "threads": torch.get_num_threads(),
    }


def flushes() -> bool:
    """Return whether subnormal results become 0 in this thread."""
    return float(torch.full((1,), 2.0**-126).mul_(0.5)) == 0.0


def processor() -> str:
    """The processor's marketing name where the system names it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
