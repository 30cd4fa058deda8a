"""What a number depends on besides the config."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """What a number depends on besides the config: code, libraries, machine.

    Returns:
        The command, the git commit of the code (with ``+changes`` where the tree differs from it; None outside a
        repository), versions of Python and the libraries, the CUDA devices, and what the arithmetic depends on
        (:func:`nslightning.arithmetic.record`).
    """
    import torch

    from nslightning.arithmetic import record

    versions: dict[str, str | None] = {}
    for package in ("nslightning", "torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy", "wandb"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__  # which also says for which device it was built
    program = Path(sys.argv[0]).name  # not where it is installed
    return {
        "command": shlex.join(["nslightning" if program == "__main__.py" else program, *sys.argv[1:]]),
        "git": _commit(Path(__file__).parent) or _commit(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "arithmetic": record(),
    }


def _commit(folder: Path) -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ":/") else "")
    except (OSError, subprocess.SubprocessError):
        return None
