"""The CUDA kernels: interpreted on a CPU, and compiled for devices that need not be there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")


def test_interpreted() -> None:
    # A separate process: whether kernels are interpreted is decided when Triton is imported.
    file = Path(__file__).parents[1] / "triton_interpreted.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_compiles_without_a_device(dtype, capability, tmp_path, monkeypatch) -> None:
    """Every kernel, with the options of its launch: no product is contracted with a sum, no quotient is approximate."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nslightning.ops.kernels import triton as kernels
    from nslightning.optim import _fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = []

    def compile_each(kernel, signatures, constants):
        """Argument types as a launch finds them: a number that is 1 is a constant."""
        for types in signatures:
            named = dict(zip(kernel.arg_names, types, strict=False))
            ones = {name: 1 for name, kind in named.items() if kind == "1"}
            signature = named | dict.fromkeys({**constants, **ones}, "constexpr")
            source = ASTSource(fn=kernel, signature=signature, constexprs={**constants, **ones})
            options = {"enable_fp_fusion": False}
            assembled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
            assert assembled["cubin"]
            compiled.append(assembled["ptx"])

    x, ties, chosen, memory = f"*{dtype}", "*u8", ["fp32", "i32"], ["*fp64", "*i1"]
    compile_each(kernels._relu_forward, [[x, x, ties, "i32"], [x, x, ties, "i64"]], {"ROWS": 128})
    backward = [[x, x, ties, x, "i32", *chosen], [x, x, ties, x, "i64", "fp32", "1"]]
    compile_each(kernels._relu_backward, backward, {"MEMORY": False, "ROWS": 128})
    compile_each(kernels._relu_backward, [[x, x, ties, x, "i32", *memory]], {"MEMORY": True, "ROWS": 128})
    shape = {"C": 64, "H": 56, "W": 56, "OH": 28, "OW": 28, "KH": 3, "KW": 3, "SH": 2, "SW": 2, "PH": 1, "PW": 1}
    for layout, count in ((False, "i32"), (True, "i64")):
        geometry: dict[str, Any] = {**shape, "DH": 1, "DW": 1, "LAST": layout, "WIDE": count == "i64", "BLOCK": 1024}
        compile_each(kernels._pool_forward, [[x, x, "*i16", count]], geometry)
        for of_memory, targets in ((False, ("i32", "1")), (True, ("*fp64",))):
            signatures = [[x, "*i16", "*fp32", last, x, count] for last in targets]
            compile_each(kernels._pool_backward, signatures, {**geometry, "MEMORY": of_memory})
    if dtype == "fp32":
        numbers = ["*i64", "*i64", *["fp32"] * 11]
        for velocity, aligned in ((True, True), (True, False), (False, True)):
            compile_each(_fused._step, [numbers], {"VELOCITY": velocity, "ALIGNED": aligned, "BLOCK": 4096})
    for assembly in compiled:
        assert not re.search(r"\b(fma|mad)\.\S*(f32|f16)|\.approx|div\.full|\b(add|sub|mul|div|sqrt)\S*\.ftz", assembly)


def test_entries_beyond_32_bits_are_counted_in_64(monkeypatch) -> None:
    """Of the input or, with padding, of the output, which has more; and in the last block, which reaches beyond."""
    from nslightning.ops.kernels import triton as kernels

    wide = {}
    monkeypatch.setattr(
        kernels, "_launch", lambda kernel, entries, *arguments, **constants: wide.update({kernel: constants["WIDE"]})
    )
    geometry = ((2, 2), (1, 1), (1, 1), (1, 1))
    for side, expected in ((1000, False), (46_339, False), (46_340, True), (60_000, True)):
        x = torch.empty(1, 1, side, side, dtype=torch.float16, device="meta")
        y, mask, _ = kernels.pool_forward(x, geometry, (side + 1, side + 1))
        kernels.pool_shares(y, mask, geometry, (side, side), torch.empty(2, 17, device="meta"), False)
        assert wide == {kernels._pool_forward: expected, kernels._pool_backward: expected}
        assert expected == (y.numel() + kernels._BLOCK >= 2**31)
