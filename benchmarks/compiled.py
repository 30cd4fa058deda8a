"""The cost of patching for a compiled training step: ``python -m benchmarks.compiled``.

A network is compiled by ``torch.compile`` as it is, and patched. Forward, loss, backward and a step of SGD are timed,
stock and patched in turn in one run, and the smallest times are compared: other work of the machine makes a step
longer, never shorter. Compilation is not timed. The patched step has one choice in force; one graph serves them all.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.host import step
from benchmarks.machine import describe, interleaved
from nslightning import Jacobians, patch
from nslightning.models import create_backbone

CHOICE = Jacobians(relu=1.0, max_pool="minimal")
#: By name: the backbone, the shape of an image and the batch.
NETWORKS = {
    "LeNet-5": ("paper/lenet5", (1, 28, 28), 128),
    "VGG11, 32x32": ("paper/vgg11", (3, 32, 32), 16),
    "ResNet-18, 32x32": ("torchvision/resnet18", (3, 32, 32), 32),
}


def main() -> None:
    """Measure and write ``benchmarks/results/compiled_<device>.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=5.0, help="for each step")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device: str = args.device
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for name in args.networks:
        backbone, shape, batch = NETWORKS[name]
        torch.manual_seed(0)
        stock = create_backbone(backbone, 10, shape).to(device)
        patched = copy.deepcopy(stock)
        patch(patched, CHOICE)
        steps = {
            variant: step(torch.compile(network), batch, device, shape)
            for variant, network in (("stock", stock), ("patched", patched))
        }
        times = interleaved(steps, device, args.seconds, least=10)
        best = {variant: float(seconds.min()) for variant, seconds in times.items()}
        ratio = best["patched"] / best["stock"]
        rows[name] = {
            "batch": batch,
            **{f"{variant}_ms": round(seconds * 1e3, 3) for variant, seconds in best.items()},
            "ratio": round(ratio, 3),
            "turns": len(times["stock"]),
        }
        print(
            f"{name:20}" + "".join(f"{v} {s * 1e3:9.2f} ms   " for v, s in best.items()) + f"x{ratio:.3f}", flush=True
        )
    out = args.out or Path(__file__).parent / "results" / f"compiled_{device}.json"
    out.write_text(json.dumps({"machine": describe(device), "threads": 1, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
