"""Builds the C++ autograd nodes (``nodes.cpp``) for the installed PyTorch.

PyTorch's C++ interface changes with every version, so the nodes cannot come ready with the package. They are compiled
once, in about half a minute, by ``make setup`` or by ``python -m nslightning.ops.kernels.build``, into the folder of
:mod:`~nslightning.ops.kernels.store`. Without a compiler the Python nodes return the same bits.

The package does not import this module: Python would warn where it is run as a command.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from nslightning.ops.kernels import store

__all__ = ["BuildError", "build"]


class BuildError(RuntimeError):
    """The nodes could not be compiled."""


def build(*, again: bool = False) -> Path:
    """Compile the nodes, unless that was done before.

    Args:
        again: Compile even so.

    Returns:
        The library.

    Raises:
        BuildError: If there is no C++ compiler, or it fails; the message holds its output.
    """
    into = store.library()
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
        command = [compiler, *store.FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
        command += [f"-isystem{path}" for path in headers] + [str(store.SOURCE), "-o", str(made)]
        command += [f"-L{home / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10", "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shown = "\n".join(done.stderr.strip().splitlines()[:30])
            raise BuildError(
                f"{compiler} could not compile {store.SOURCE.name} for torch {torch.__version__}:\n{shown}"
            )
        made.replace(into)  # at once, so that no other process loads half a library
    return into


def main() -> int:
    """Compile the nodes and say where they are.

    Returns:
        The exit status: 0, also where the Python nodes have to do.
    """
    if store.library().exists():
        print(f"nslightning: the C++ autograd nodes for torch {torch.__version__} are built: {store.library()}")
        return 0
    print(f"nslightning: compiling the C++ autograd nodes for torch {torch.__version__}, about 30 s ...", flush=True)
    try:
        print(f"nslightning: {build()}")
    except BuildError as error:
        print(f"nslightning: {error}\nThe Python nodes are used; they return the same bits.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
