"""Describes the installation: versions, devices, and the kernels in force."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

__all__ = ["describe"]

_PACKAGES = ("torch", "torchvision", "lightning", "timm", "torchmetrics", "wandb")
_NODES = {
    "built": "in force: a patched call costs what a stock call costs",
    "not built": "not built, Python nodes run (the same bits, slower calls): python -m nslightning.ops.kernels.build",
    "no CPU kernels": "not in force, since the C++ kernels are missing",
    "switched off": "switched off by NSLIGHTNING_NATIVE=0",
}
_NODES_ON_CUDA = {
    "in force": "in force, as NSLIGHTNING_NATIVE=cuda asks; no GPU has run them yet: check your results",
    "not asked for": "not in force, since no GPU has run them yet: NSLIGHTNING_NATIVE=cuda asks for them",
    "no nodes": "not in force, since there are no C++ autograd nodes",
    "no NVRTC": "not in force, since NVRTC is missing: install nvidia-cuda-nvrtc of PyTorch's CUDA version",
}


def describe() -> str:
    """Say what is installed and which of the ways to evaluate an operation are in force.

    Returns:
        A few lines; a way that is not in force comes with the command that puts it in force.
    """
    import torch

    from nslightning.ops.autograd import native
    from nslightning.ops.kernels import cpu

    kernels = "in force" if cpu.available() else "missing: install a C++ compiler, then install nslightning again"
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    triton = "installed" if find_spec("triton") is not None else "missing: operations on CUDA are composed"
    rows = {
        "Python": platform.python_version(),
        **{name: _installed(name) for name in _PACKAGES},
        "GPU": cuda,
        "C++ kernels on a CPU": kernels,
        "C++ autograd nodes": _NODES[native.state()],
        "C++ autograd nodes on CUDA": _NODES_ON_CUDA[native.cuda_state()],
        "Triton kernels on CUDA": triton,
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
