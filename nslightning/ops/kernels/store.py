"""The folder of the compiled libraries, and the name of each.

PyTorch's C++ interface changes with every version, so a name holds the versions of PyTorch and Python and a hash of the
source. A library of another version or source has another name and is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

import torch

from nslightning import files

__all__ = ["FLAGS", "SOURCE", "cache_folder", "library"]

SOURCE = Path(__file__).with_name("nodes.cpp")
FLAGS = ("-std=c++20", "-O2", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
_HEADER = Path(__file__).with_name("arguments.h")


def cache_folder() -> Path:
    """Return the folder where compiled libraries are kept: ``nslightning/native`` in the user's cache folder.

    Returns:
        The folder, which may not exist; ``NSLIGHTNING_NATIVE_DIR`` names another one.
    """
    if named := os.environ.get("NSLIGHTNING_NATIVE_DIR"):
        return Path(named).expanduser()
    return files.cache_folder("native")


def library() -> Path:
    """Return the path of the library for this PyTorch, Python and source, which may not exist yet.

    Returns:
        The file, which may not exist.
    """
    source = hashlib.sha256(SOURCE.read_bytes() + _HEADER.read_bytes() + repr(FLAGS).encode()).hexdigest()[:12]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return cache_folder() / f"nodes-torch{torch.__version__}-{source}{suffix}"
