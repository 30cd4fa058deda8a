"""Compiles the CUDA kernels (``cuda.cu``) for a device, by NVRTC, which comes with PyTorch's wheels for CUDA.

Also the surroundings in which kernels of Triton's are launched.

Neither a CUDA toolkit nor a device is needed to compile. The binary is kept in the folder of the C++ nodes (see
:mod:`~nslightning.ops.kernels.store`), which launch the kernels. Its name holds the device's architecture and a hash of
the source.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from ctypes.util import find_library
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from nslightning.files import replacing
from nslightning.ops.kernels import store

__all__ = ["DRIVER", "CompilationError", "available", "compiled", "image", "launching"]

#: The library of NVIDIA's driver, by which the nodes launch kernels.
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_SOURCE = Path(__file__).with_name("cuda.cu")
# No contraction: a product is rounded before it is added, as everywhere else.
_OPTIONS = ("-std=c++17", "--device-as-default-execution-space", "--fmad=false", "--ftz=false", "--prec-div=true")
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class CompilationError(RuntimeError):
    """NVRTC is not installed, or could not compile the kernels."""


@cache
def _nvrtc() -> ctypes.CDLL | None:
    """NVRTC as PyTorch's wheels bring it, else as the system has it."""
    spec = find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    pattern = "libnvrtc.so.*" if sys.platform != "win32" else "nvrtc64_*.dll"
    files = [str(path) for folder in folders for path in sorted(folder.glob(f"*/*/{pattern}"))]
    system = find_library("nvrtc")
    for name in (*files, *(() if system is None else (system,))):
        try:
            return ctypes.CDLL(name)
        except OSError:  # another platform's, or half installed
            continue
    return None


def available() -> bool:
    """Return whether there is a compiler for CUDA kernels."""
    return _nvrtc() is not None


def image(architecture: int) -> bytes:
    """The kernels compiled for an architecture, from the cache or by NVRTC, in some seconds.

    Args:
        architecture: The device's compute capability, such as 90 for 9.0.

    Returns:
        The binary that ``cuModuleLoadData`` takes.

    Raises:
        CompilationError: If there is no NVRTC, or it does not know the architecture.
    """
    headers = _SOURCE.with_name("arguments.h").read_bytes()
    source = hashlib.sha256(_SOURCE.read_bytes() + headers + repr(_OPTIONS).encode()).hexdigest()[:12]
    kept = store.cache_folder() / f"kernels-sm{architecture}-{source}.cubin"
    if kept.exists():
        return kept.read_bytes()
    binary = compiled(architecture)
    # A folder that cannot be written is no cache: the next process compiles again.
    with suppress(OSError), replacing(kept) as partial:
        partial.write_bytes(binary)
    return binary


def compiled(architecture: int) -> bytes:
    """Compile the kernels.

    Args:
        architecture: As in :func:`image`.

    Returns:
        The binary that ``cuModuleLoadData`` takes.

    Raises:
        CompilationError: As in :func:`image`; the message holds NVRTC's log.
    """
    nvrtc = _nvrtc()
    if nvrtc is None:
        raise CompilationError("there is no NVRTC: install nvidia-cuda-nvrtc of the CUDA version of PyTorch")
    header = _SOURCE.with_name("arguments.h")
    program = ctypes.c_void_p()
    _check(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), _SOURCE.read_bytes(), _SOURCE.name.encode(), 1,
            (ctypes.c_char_p * 1)(header.read_bytes()), (ctypes.c_char_p * 1)(header.name.encode()),
        ),
    )  # fmt: skip
    try:
        options = [option.encode() for option in (f"--gpu-architecture=sm_{architecture}", *_OPTIONS)]
        failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            log = _read(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise CompilationError(f"NVRTC could not compile {_SOURCE.name} for sm_{architecture}: {log or failed}")
        return _read(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, part: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{part}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{part}")(program, buffer))
    return buffer.raw


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompilationError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")


@contextmanager
def launching(x: torch.Tensor) -> Iterator[None]:
    """Launch kernels of Triton's on a tensor's device, which need not be the current one.

    Triton compiles a kernel and loads it where it is launched for the first time. While a CUDA graph is captured, the
    driver refuses calls that may wait for the device, and to load a kernel may be such a call. Here this thread may
    make them; the launch is captured as any other.

    Args:
        x: A tensor that the kernel works on; on a CPU, where Triton interprets it, nothing is done.

    Yields:
        Nothing.
    """
    if not x.is_cuda:
        yield
        return
    with torch.cuda.device(x.device), _relaxed() if torch.cuda.is_current_stream_capturing() else nullcontext():
        yield


@contextmanager
def _relaxed() -> Iterator[None]:
    """Let this thread make calls that a capture refuses."""
    driver, mode = ctypes.CDLL(DRIVER), ctypes.c_int(_RELAXED)
    _exchange(driver, mode)  # writes what it was
    try:
        yield
    finally:
        _exchange(driver, mode)


def _exchange(driver: ctypes.CDLL, mode: ctypes.c_int) -> None:
    if status := driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)):
        raise RuntimeError(f"cuThreadExchangeStreamCaptureMode: CUDA error {status}")
