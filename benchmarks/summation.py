"""The order in which the installed library adds up a linear layer: ``python -m benchmarks.summation``.

For each shape of the layers behind the share of initialisations S_01 (``docs/findings.md``): the named order whose bits
are the library's for all entries, or for most, and on a CUDA device the kernels that ran, by PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import describe
from nslightning.arithmetic import Arithmetic
from nslightning.arithmetic.products import linear

DTYPES = {"float32": torch.float32, "float16": torch.float16, "float64": torch.float64}
#: Rows (images), inputs and outputs: the first layer and an inner one, by width and by batch size.
SHAPES = [
    *((256, 784, width) for width in (16, 64, 256, 512, 1024)),
    *((256, width, width) for width in (16, 64, 256, 512, 1024)),
    *((batch, 784, 256) for batch in (16, 64, 512, 1024)),
]
BLOCKS = (64, 128, 192, 256, 320, 336, 384, 448, 512)


def orders(inputs: int, dtype: torch.dtype, device: str) -> list[str]:
    """The named orders that differ on this number of inputs."""
    by_block = [f"blocks={n}" for n in BLOCKS if n < inputs] + [f"blocks={inputs}"]
    one_by_one = ["sequential"] * (device == "cpu" and dtype == torch.float32)
    return ["bias_last", *by_block, *(f"split_k={n}" for n in (2, 4, 8)), *one_by_one]


def kernels(x: Tensor, weight: Tensor, bias: Tensor) -> list[str]:
    """The CUDA kernels of one call."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        F.linear(x, weight, bias)
        torch.cuda.synchronize()
    return sorted({event.name for event in recorded.events() if "Memcpy" not in event.name})


def measure(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The share of a layer's outputs that each order gives bit for bit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, inputs, generator=generator).to(device, dtype)
    bound = inputs**-0.5
    weight, bias = (
        ((2 * torch.rand(*shape, generator=generator) - 1) * bound).to(device, dtype)
        for shape in ((outputs, inputs), (outputs,))
    )
    with torch.no_grad():
        native = F.linear(x, weight, bias)
        shares = {
            order: (linear(x, weight, bias, order) == native).double().mean().item()
            for order in orders(inputs, dtype, device)
        }
    best = max(shares, key=lambda order: shares[order])
    names = kernels(x, weight, bias) if device == "cuda" else []
    return {"best": best, "share": shares[best], "bias_last": shares["bias_last"], "kernels": names}


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    device: str = arguments.device
    rows: list[dict[str, Any]] = []
    for name, dtype in DTYPES.items():
        for tf32 in (False, True) if device == "cuda" and name == "float32" else (False,):
            with Arithmetic(tf32=tf32).applied():
                for shape in SHAPES:
                    row = {"dtype": name, "tf32": tf32, "shape": shape, **measure(*shape, dtype, device)}
                    rows.append(row)
                    print(
                        f"{name:9}{'TF32 ' if tf32 else ''}{'x'.join(map(str, shape)):14} {row['best']:12} "
                        f"{row['share']:7.2%}  bias last {row['bias_last']:7.2%}  {' '.join(row['kernels'])}",
                        flush=True,
                    )
    if arguments.out:
        content = {"machine": describe(device), "threads": torch.get_num_threads(), "rows": rows}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
