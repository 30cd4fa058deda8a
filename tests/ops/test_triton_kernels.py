"""The CUDA kernels: interpreted on a CPU, and compiled for devices that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")


def test_interpreted() -> None:
    # A separate process: whether kernels are interpreted is decided when Triton is imported.
    file = Path(__file__).parents[1] / "triton_interpreted.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # announces a default that changes no result here
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_compiles_without_a_device(dtype, capability, tmp_path, monkeypatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nslightning.ops.kernels import triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    values, wide = f"*{dtype}", {"LAST": False, "WIDE": False, "BLOCK": 1024}
    shape = {"C": 64, "H": 56, "W": 56, "OH": 28, "OW": 28, "KH": 3, "KW": 3, "SH": 2, "SW": 2, "PH": 1, "PW": 1}
    geometry: dict[str, Any] = {**shape, "DH": 1, "DW": 1, **wide}
    sources = [
        (kernels._relu_forward, [values, values, "*u8", "i32"], {"ROWS": 128}),
        (kernels._relu_backward, [values, values, "*u8", values, "i32", "fp32", "i32"], {"MEMORY": False, "ROWS": 128}),
        (kernels._relu_backward, [values, values, "*u8", values, "i32", "*fp64", "*i1"], {"MEMORY": True, "ROWS": 128}),
        (kernels._pool_forward, [values, values, "*i16", "i32"], geometry),
        (kernels._pool_backward, [values, "*i16", "*fp32", "i32", values, "i32"], {**geometry, "MEMORY": False}),
        (kernels._pool_backward, [values, "*i16", "*fp32", "*fp64", values, "i32"], {**geometry, "MEMORY": True}),
    ]
    if dtype == "fp32":
        from nslightning.optim import _fused

        numbers = ["*i64", "*i64", *["fp32"] * 11]
        sources += [
            (_fused._step, numbers, {"VELOCITY": velocity, "ALIGNED": aligned, "BLOCK": 4096})
            for velocity, aligned in ((True, True), (True, False), (False, True))
        ]
    for kernel, types, constants in sources:
        signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
