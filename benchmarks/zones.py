"""How fast zones are counted, against the papers' procedure: two networks, two forwards, two backwards, one at a time.

    python -m benchmarks.zones --out benchmarks/results/zones_cpu.json

Both walk over the same mini-batches with the same weights and must count the same. The procedure of the papers is done
as their code does it: operations written as masked assignments, a network per choice with the weights copied over, both
gradients in full. "By zone" asks for more than the papers' procedure tells: whether a difference is one over the reals,
which takes a replay in float64 where a choice matters.
"""

import argparse
import copy
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import describe, interleaved
from benchmarks.naive import naive_beta_pool, naive_relu
from nslightning import unpatch
from nslightning.experiments.cells import ZoneCell
from nslightning.experiments.data import load
from nslightning.experiments.networks import build
from nslightning.experiments.zones import difference_norm
from nslightning.probes import zone


class ReLU(nn.Module):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return naive_relu(x, self.alpha)


class Pool(nn.Module):
    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return naive_beta_pool(x, self.beta)


def naive_network(network: nn.Module, alpha: float, beta: float) -> nn.Module:
    """A copy with the naive operations."""
    made = copy.deepcopy(network)
    for name, module in list(made.named_modules()):
        if isinstance(module, nn.ReLU | nn.MaxPool2d):
            parent, _, child = name.rpartition(".")
            setattr(made.get_submodule(parent), child, ReLU(alpha) if isinstance(module, nn.ReLU) else Pool(beta))
    return made


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "fc 3 x 256, relu 1, no tie is met (64 bit)": (
        {"backbone": "paper/fc", "width": 256, "depth": 3, "against": {"relu": 1}, "precision": 64, "batch_size": 256},
        "bitwise_first_layer",
    ),
    "fc 3 x 256, relu 1": (
        {"backbone": "paper/fc", "width": 256, "depth": 3, "against": {"relu": 1}, "batch_size": 256},
        "bitwise_first_layer",
    ),
    "LeNet-5, relu 1": ({"backbone": "paper/lenet5", "against": {"relu": 1}}, "bitwise_first_layer"),
    "LeNet-5, max_pool minimal": ({"backbone": "paper/lenet5", "against": {"max_pool": 1}}, "linf_sum"),
    "LeNet-5, relu 1, by zone": ({"backbone": "paper/lenet5", "against": {"relu": 1}}, "zone"),
    "LeNet-5, max_pool minimal, by zone": ({"backbone": "paper/lenet5", "against": {"max_pool": 1}}, "zone"),
}


def measure(name: str, settings: dict[str, Any], norm: str, data: str, batches: int, seconds: float) -> dict[str, Any]:
    tau = {"linf_sum": 1e-7}.get(norm, 0.0)
    cell = ZoneCell(data=data, normalise=False, norm=norm, tau=tau, **settings)
    images = load(data, (), torch.device("cpu"), False, False)
    network, _ = build(cell, images, torch.device("cpu"), None)
    stock, _ = build(cell, images, torch.device("cpu"), None)
    unpatch(stock)
    beta = float(cell.alternative.max_pool or 0)
    pair = [naive_network(stock, float(c.relu), b) for c, b in ((cell.jacobians, 0.0), (cell.alternative, beta))]
    dtype = next(stock.parameters()).dtype
    some = list(images.train.batches(cell.batch_size, dtype, limit=batches))

    def differs(x: Tensor, y: Tensor) -> bool:
        if norm == "zone":  # which also tells rounding from differences
            loss = partial(F.cross_entropy, target=y)
            return zone(network, loss, x, cell.alternative, cell.jacobians).kind != "regular"
        return difference_norm(cell, (network,), x, y) > cell.tau

    def ours() -> list[bool]:
        return [differs(x, y) for x, y in some]

    def papers() -> list[bool]:
        return [_naive_norm(pair, norm, x, y) > cell.tau for x, y in some]

    a, b = ours(), papers()
    if a != b:
        raise RuntimeError(f"{name}: ours counts {sum(a)} mini-batches, the naive procedure {sum(b)}")
    times = interleaved({"ours": ours, "papers": papers}, "cpu", seconds)
    ratio = times["papers"] / times["ours"]
    return {
        "case": name,
        "batches": len(some),
        "differing": sum(a),
        "ours_ms": 1e3 * float(np.median(times["ours"])) / len(some),
        "papers_ms": 1e3 * float(np.median(times["papers"])) / len(some),
        "speed_up": float(np.median(ratio)),
        "quartiles": [float(q) for q in np.quantile(ratio, (0.25, 0.75))],
    }


def _naive_norm(pair: list[nn.Module], norm: str, x: Tensor, y: Tensor) -> float:
    grads = []
    for network in pair:
        network.zero_grad()
        F.cross_entropy(network(x), y).backward()
        grads.append([p.grad for p in network.parameters()])
    if norm != "linf_sum":
        looked_at = 1 if norm == "bitwise_first_layer" else len(grads[0])
        return float(any((a != b).any() for a, b in zip(grads[0][:looked_at], grads[1], strict=False)))
    return sum(float((a - b).abs().max()) for a, b in zip(*grads, strict=True))


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    lines = [
        "# Counting zones",
        "",
        f"{machine['cpu']}, {machine['cores']} thread(s), torch {machine['torch']}, commit {machine['commit']};",
        "medians of interleaved turns, per mini-batch. The papers' procedure: two networks, forwards and backwards.",
        "",
        "| case | mini-batches that differ | ours (ms) | papers' procedure (ms) | faster by [quartiles] |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['case']} | {row['differing']} of {row['batches']} | {row['ours_ms']:.2f} | {row['papers_ms']:.2f} "
            f"| {row['speed_up']:.1f} [{low:.1f}, {high:.1f}] |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="FashionMNISTSample", help="MNIST where it is on disk")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path, help="write this JSON and the table beside it, as .md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe("cpu")
    rows = []
    for name, (settings, norm) in CASES.items():
        rows.append(measure(name, settings, norm, arguments.data, arguments.batches, arguments.seconds))
        print(rows[-1], file=sys.stderr)
    print(table(rows, machine))
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"machine": machine, "data": arguments.data, "rows": rows}, indent=1) + "\n"
        )
        arguments.out.with_suffix(".md").write_text(table(rows, machine))


if __name__ == "__main__":
    main()
