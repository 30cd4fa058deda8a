"""Builds the C++ autograd nodes (``nodes.cpp``) for the installed PyTorch, and finds what was built.

PyTorch's C++ interface changes with every version, so the nodes cannot come ready with the package. They are compiled
once, in about half a minute, by ``make setup`` or by ``python -m nslightning.ops.kernels.build``, into a cache folder,
under a name that holds the versions of PyTorch and Python and a hash of the source. A library of another version or
source has another name and is never loaded. Without a compiler the Python nodes return the same bits.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from nslightning import files

__all__ = ["SOURCE", "BuildError", "build", "cache_folder", "library"]

SOURCE = Path(__file__).with_name("nodes.cpp")
_HEADER = Path(__file__).with_name("arguments.h")
_FLAGS = ("-std=c++20", "-O2", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-w")


class BuildError(RuntimeError):
    """The nodes could not be compiled."""


def cache_folder() -> Path:
    """Where compiled libraries are kept: ``nslightning/native`` in the user's cache folder.

    Returns:
        The folder, which may not exist; ``NSLIGHTNING_NATIVE_DIR`` names another one.
    """
    if named := os.environ.get("NSLIGHTNING_NATIVE_DIR"):
        return Path(named).expanduser()
    return files.cache_folder("native")


def library() -> Path:
    """Where the library for this PyTorch, Python and source is, or would be.

    Returns:
        The file, which may not exist.
    """
    source = hashlib.sha256(SOURCE.read_bytes() + _HEADER.read_bytes() + repr(_FLAGS).encode()).hexdigest()[:12]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return cache_folder() / f"nodes-torch{torch.__version__}-{source}{suffix}"


def build(*, again: bool = False) -> Path:
    """Compile the nodes, unless that was done before.

    Args:
        again: Compile even so.

    Returns:
        The library.

    Raises:
        BuildError: If there is no C++ compiler, or it fails; the message holds its output.
    """
    into = library()
    if into.exists() and not again:
        return into
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("there is no C++ compiler: install g++ or clang++, or name one in CXX")
    home = Path(torch.__file__).parent
    headers = [home / "include", home / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    abi = int(torch.compiled_with_cxx11_abi())
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent) as folder:
        made = Path(folder) / into.name
        command = [compiler, *_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
        command += [f"-isystem{path}" for path in headers] + [str(SOURCE), "-o", str(made)]
        command += [f"-L{home / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10", "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shown = "\n".join(done.stderr.strip().splitlines()[:30])
            raise BuildError(f"{compiler} could not compile {SOURCE.name} for torch {torch.__version__}:\n{shown}")
        made.replace(into)  # at once, so that no other process loads half a library
    return into


def main() -> int:
    """Compile the nodes and say where they are.

    Returns:
        The exit status: 0, also where the Python nodes have to do.
    """
    if library().exists():
        print(f"nslightning: the C++ autograd nodes for torch {torch.__version__} are built: {library()}")
        return 0
    print(f"nslightning: compiling the C++ autograd nodes for torch {torch.__version__}, about 30 s ...", flush=True)
    try:
        print(f"nslightning: {build()}")
    except BuildError as error:
        print(f"nslightning: {error}\nThe Python nodes are used; they return the same bits.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
