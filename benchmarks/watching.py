"""The cost of looking: the strict check of the graph at the first step, and whether to look again at each later one.

``python -m benchmarks.watching`` trains networks of torchvision and an encoder of transformers' kind for some steps,
patched under the reference choice, and takes the time inside the check (``Caller._finish``) by itself: the difference
of two whole steps is noisier than it. Printed are the median step, the share that the check has of later steps,
and the time of the first look, in steps.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks.machine import describe
from nslightning import Jacobians, patch
from nslightning.models.backbones import create_backbone
from nslightning.surgery.entrances import Caller

Network = tuple[Callable[[], nn.Module], tuple[int, ...]]
NETWORKS: dict[str, Network] = {
    "lenet5, 28x28": (lambda: create_backbone("paper/lenet5", 10, (1, 28, 28)), (1, 28, 28)),
    "resnet18, 32x32": (lambda: create_backbone("paper/resnet18", 10, (3, 32, 32)), (3, 32, 32)),
    "googlenet, 224x224": (
        lambda: torchvision.models.googlenet(num_classes=10, init_weights=False, aux_logits=False),
        (3, 224, 224),
    ),
    "transformer encoder, 64 tokens": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 256, batch_first=True), 4),
        (64, 128),
    ),
}


class Clock:
    """The time that passes inside the check."""

    def __init__(self) -> None:
        self.seconds, self.check = 0.0, Caller._finish

    def __enter__(self) -> "Clock":
        def timed(caller: Caller, *args: Any) -> None:
            start = time.perf_counter()
            self.check(caller, *args)
            self.seconds += time.perf_counter() - start

        Caller._finish = timed  # type: ignore[method-assign, assignment] # timed for this measurement
        return self

    def __exit__(self, *_: object) -> None:
        Caller._finish = self.check  # type: ignore[method-assign] # put back


def measure(network: Network, batch: int, steps: int) -> dict[str, float]:
    """The median step, the check's share of the later steps, and the first look in steps."""
    build, shape = network
    torch.manual_seed(0)
    model = build().train()
    patch(model, Jacobians())
    x, y = torch.randn(batch, *shape), torch.arange(batch) % 10
    taken, checked = [], []
    for _ in range(steps + 1):
        with Clock() as clock:
            start = time.perf_counter()
            output: Tensor = model(x)
            F.cross_entropy(output if output.dim() == 2 else output.mean(1), y).backward()
            taken.append(time.perf_counter() - start)
        checked.append(clock.seconds)
    step = statistics.median(taken[1:])
    return {"step": step, "share": statistics.median(checked[1:]) / step, "first look": checked[0] / step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    results = {}
    for name in args.networks:
        results[name] = measure(NETWORKS[name], args.batch, args.steps)
        print(f"{name}: step {results[name]['step']:.4f} s, check {results[name]['share']:.3%} of it, first look "
              f"{results[name]['first look']:.1%} of one", flush=True)  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps({"machine": describe("cpu"), "batch": args.batch, "results": results}, indent=1))


if __name__ == "__main__":
    main()
