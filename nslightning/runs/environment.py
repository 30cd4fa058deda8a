"""Describes everything that a number depends on besides the config."""

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
    """Describe everything that a number depends on besides the config: code, libraries, machine.

    Returns:
        The command, the git commit of the code (with ``+changes`` where the tree differs from it in more than results;
        None outside a repository), versions of Python and the libraries, the CUDA devices, and what the arithmetic
        depends on (:func:`nslightning.arithmetic.record`).
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


def _is_result(root: Path, path: str) -> bool:
    """Return whether a file lies in the folder of a run or of an experiment: such a file changes no number."""
    folders = [root / parent for parent in Path(path).parents if parent.name]
    return any((folder / name).is_file() for folder in folders for name in ("run.json", "provenance.json"))


def _commit(folder: Path) -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        root, commit = git("rev-parse", "--show-toplevel", "HEAD").split("\n")[:2]
        # The fields are ended by NUL, and of a renamed file the old name follows without a status.
        changed = [entry[3:] for entry in git("status", "--porcelain", "-z", "-uall").split("\0") if entry[2:3] == " "]
        return commit + ("+changes" if any(not _is_result(Path(root), path) for path in changed) else "")
    except (OSError, subprocess.SubprocessError):
        return None
