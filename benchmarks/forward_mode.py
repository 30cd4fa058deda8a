"""The cost of p directional derivatives in forward mode, beside one backward, over the dimension p.

The function is a ReLU network with one layer on R^p, the sum of relu(W x): to evaluate it is one product of a matrix
and a vector. Forward mode along p directions, the columns of D, computes W D: a product of two matrices. Where the
function is differentiable a backward and D^T g give the same numbers for less. At x = 0 nothing of the kind does: the
directional derivative along d is the sum of relu(W d), no linear function of d, and forward schemes for nonsmooth
programs have to compute these. Bolte, Boustany, Pauwels and Pesquet-Popescu (ICLR 2023) bound their cost from below by
that of a product of two p x p matrices.

Run `python -m benchmarks.forward_mode` (about ten minutes on one core). Times are the thread's own, so that other
processes count for little; the smallest of the repetitions.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from benchmarks.machine import describe
from nslightning.ops import relu

DIMENSIONS = (10, 30, 100, 300, 1000, 3000, 10000)
CHUNK = 2000  # directions at once, which bounds the memory


def smallest(run: Callable[[], Any], seconds: float) -> float:
    """The smallest time of a call, of as many as fit in some seconds; of one alone, where that takes longer."""
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < 1000):
        begun = time.thread_time()
        run()
        times.append(time.thread_time() - begun)
    return min(times)


def measure(p: int, seconds: float) -> dict[str, float]:
    """Times at one dimension, in seconds."""
    generator = torch.Generator().manual_seed(p)
    weight = torch.randn(p, p, generator=generator) / math.sqrt(p)
    x = torch.randn(p, generator=generator)
    directions = torch.randn(p, p, generator=generator)

    def function(x: Tensor) -> Tensor:
        return relu(weight @ x).sum()

    def evaluate() -> Tensor:
        with torch.no_grad():
            return function(x)

    def backward() -> Tensor:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf)
        return gradient

    def forward_mode() -> Tensor:
        along: Tensor = vmap(lambda v: jvp(function, (x,), (v,))[1], chunk_size=min(p, CHUNK))(directions)
        return along

    torch.testing.assert_close(forward_mode(), directions @ backward(), rtol=1e-3, atol=1e-3 * math.sqrt(p))
    return {
        "dimension": p,
        "evaluation": smallest(evaluate, seconds),
        "backward": smallest(backward, seconds),
        "forward_mode": smallest(forward_mode, seconds),
        "matrix_product": smallest(lambda: weight @ directions, seconds),
    }


def slope(rows: list[dict[str, float]], name: str, least: float = 300) -> float:
    """The exponent of a time's ratio to the evaluation's, over the larger dimensions: least squares in logarithms."""
    xs = [math.log(row["dimension"]) for row in rows if row["dimension"] >= least]
    ys = [math.log(row[name] / row["evaluation"]) for row in rows if row["dimension"] >= least]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimensions", type=int, nargs="+", default=list(DIMENSIONS))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each time")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/forward_mode_cpu.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for p in arguments.dimensions:
        rows.append(measure(p, arguments.seconds))
        print({k: float(f"{v:.3g}") for k, v in rows[-1].items()}, flush=True)
    record = {
        "machine": describe("cpu"),
        "rows": rows,
        "slopes_from_300": {name: slope(rows, name) for name in ("backward", "forward_mode", "matrix_product")}
        if sum(row["dimension"] >= 300 for row in rows) > 1
        else {},
    }
    arguments.output.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
