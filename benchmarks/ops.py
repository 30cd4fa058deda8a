"""The operations against stock PyTorch, a naive implementation and the memory's speed: ``python -m benchmarks.ops``.

Each row times forward plus backward of one operation on one shape, all variants in turn in one run; the figures to
compare are the ratios. ``ties`` is the share of tied evaluations planted in the input: none (the operation is then
stock on a CPU), a realistic 1 in a million, and half. On a CPU tensors lie in recycled memory.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe, interleaved, keep_memory
from benchmarks.memory import kept
from benchmarks.naive import naive_beta_pool, naive_relu
from nslightning import ops

_SHAPES = [(128, 64, 32, 32), (64, 256, 56, 56), (256, 64, 112, 112)]
SHAPES = {"small": _SHAPES[:1], "medium": _SHAPES[:2], "full": _SHAPES}


def step(f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Callable[[], None]:
    """Forward plus backward of one operation; ``x`` is a leaf, and its ``grad`` is dropped."""

    def run() -> None:
        torch.autograd.grad(f(x), x, g)

    return run


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str, ties: float) -> Tensor:
    """Normal numbers without a zero, then the share ``ties`` of them set to 0."""
    x = torch.randn(shape, device=device).to(dtype)
    x[x == 0] = 1
    if ties:
        x[torch.rand(shape, device=device) < ties] = 0
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    return x.detach().requires_grad_()


def cases(shape: tuple[int, ...], ties: float) -> Iterator[tuple[str, dict[str, Callable[[Tensor], Tensor]]]]:
    """Name of the operation, and its variants: ``stock`` first, ``naive`` where there is one."""
    yield (
        "relu",
        {"stock": F.relu, "alpha=1": lambda x: ops.relu(x, 1.0), "naive": lambda x: naive_relu(x, 1.0)},
    )
    yield "relu6", {"stock": F.relu6, "(1, 1)": lambda x: ops.relu6(x, (1.0, 1.0))}
    yield "leaky_relu", {"stock": F.leaky_relu, "0.5": lambda x: ops.leaky_relu(x, 0.01, 0.5)}
    choices = {"native": "native", "minimal": "minimal", "beta=10": 10.0, "last": "last"}
    for k, s, p in ((2, 2, 0), (3, 2, 1)):
        variants: dict[str, Callable[[Tensor], Tensor]] = {"stock": lambda x, k=k, s=s, p=p: F.max_pool2d(x, k, s, p)}
        for name, choice in choices.items():
            variants[name] = lambda x, k=k, s=s, p=p, c=choice: ops.max_pool2d(x, k, s, p, jacobian=c)
        if k == 2:
            variants["naive"] = lambda x: naive_beta_pool(x, 10.0)
        yield f"max_pool2d {k}x{k}/{s}", variants


def traffic(name: str, x: Tensor) -> int:
    """Bytes that forward plus backward cannot avoid: read x, write y; read g and y, write the gradient."""
    n = x.numel() * x.element_size()
    if name.startswith("max_pool2d"):
        y = n // 4
        return n + y + 2 * y + n  # the window's winner could be packed into a byte; nothing is counted for it
    return 5 * n


def limit(x: Tensor, device: str) -> float:
    """Bytes per second of a copy, the speed of the memory."""
    source = x.detach().contiguous()
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device, seconds=0.3)["copy"]
    return 2 * source.numel() * source.element_size() / float(np.median(times))


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", choices=SHAPES, default="small")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--seconds", type=float, default=1.0, help="per variant")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    a = parser.parse_args()
    dtype = getattr(torch, a.dtype)
    rows: list[dict[str, Any]] = []
    print(
        f"{'operation':<17}{'shape':<18}{'layout':<15}{'ties':<8}{'variant':<10}"
        f"{'ms':>9}{'vs stock':>10}{'GB/s':>8}{'of copy':>9}{'kept MB':>9}"
    )
    for shape in SHAPES[a.shapes]:
        for layout in ("contiguous", "channels_last"):
            for ties in (0.0, 1e-6, 0.5):
                x = inputs(shape, dtype, a.device, layout, ties)
                speed = limit(x, a.device)
                for name, variants in cases(shape, ties):
                    g = torch.randn_like(F.relu(x) if "pool" not in name else variants["stock"](x))
                    times = interleaved({v: step(f, x, g) for v, f in variants.items()}, a.device, a.seconds)
                    stock = float(np.median(times["stock"]))
                    for variant, t in times.items():
                        median = float(np.median(t))
                        rate = traffic(name, x) / median
                        held = kept(variants[variant], x)  # beside the input
                        row = {
                            "operation": name, "shape": shape, "layout": layout, "dtype": a.dtype, "ties": ties,
                            "variant": variant, "ms": median * 1e3,
                            "quartiles_ms": (np.quantile(t, [0.25, 0.75]) * 1e3).tolist(),
                            "ratio": median / stock, "GB/s": rate / 1e9, "of_copy": rate / speed, "turns": len(t),
                            "kept_bytes": held,
                        }  # fmt: skip
                        rows.append(row)
                        print(
                            f"{name:<17}{'x'.join(map(str, shape)):<18}{layout:<15}{ties:<8g}{variant:<10}"
                            f"{row['ms']:>9.2f}{row['ratio']:>10.2f}{row['GB/s']:>8.1f}{row['of_copy']:>9.0%}"
                            f"{held / 1e6:>9.1f}",
                            flush=True,
                        )
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps({"machine": describe(a.device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    keep_memory()
    main()
