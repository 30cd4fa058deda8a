"""How far README's first table depends on image size, batch size and seed.

    python -m benchmarks.concern

Writes ``benchmarks/results/concern_seeds.csv``: for each network, size and seed the relative divergence of one batch of
standard normal images, the network freshly initialised and in training mode, all in one precision. It takes about five
minutes on two cores.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from nslightning.arithmetic import Arithmetic
from nslightning.models.backbones import create_backbone
from nslightning.probes.audit import CHOICES, audit

OUT = Path(__file__).parent / "results" / "concern_seeds.csv"
# Network, pixels, images, precision.
SETTINGS = [
    ("torchvision/resnet18", 32, 4, "bf16"),
    ("torchvision/resnet18", 64, 4, "bf16"),
    ("torchvision/resnet18", 128, 4, "bf16"),
    ("torchvision/resnet18", 224, 4, "bf16"),
    ("torchvision/resnet18", 64, 8, "bf16"),
    ("torchvision/resnet18", 64, 16, "bf16"),
    ("timm/resnet18", 64, 4, "bf16"),
    ("timm/resnet50", 64, 4, "64"),
    ("timm/resnet50", 128, 4, "64"),
]
SEEDS = range(3)


def main() -> None:
    """Measure and write the table."""
    Arithmetic().switch()
    choices = {name: CHOICES[name] for name in ("relu1", "beta10")}
    with OUT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["network", "pixels", "images", "precision", "seed", *choices])
        for name, pixels, images, precision in SETTINGS:
            for seed in SEEDS:
                torch.manual_seed(seed)
                network = create_backbone(name, 1000, (3, pixels, pixels))
                batch = torch.randn(images, 3, pixels, pixels, generator=torch.Generator().manual_seed(seed))
                measured = audit(network, [(batch, None)], dtypes=[precision], choices=choices, seed=seed)
                values = [f"{spread.relative:.4f}" for spread in measured.spreads]
                writer.writerow([name, pixels, images, precision, seed, *values])
                print(name, pixels, images, precision, seed, *values, flush=True)


if __name__ == "__main__":
    main()
