"""The time that measuring the divergence adds to a training step: ``python -m benchmarks.divergence``.

Each case times a plain step (forward, backward, SGD) in turn with the same step with the divergence of every choice
measured on it, and then in turn with the naive way: a forward and a backward more for each choice. In pairs, for what
a step finds in the caches is what the step before it left. The figures to compare are the ratios to the plain step of
the same pair. On a CPU memory stays mapped, as it does on CUDA devices: with glibc's own settings a step of ResNet-50
takes 40 % longer, by 5 % more or less from one step to the next, and it is the pages that would be compared.

====================  ==========================================================================================
``resnet50 pool``     ResNet-50, one choice for its one max pooling
``vgg11 zeros``       VGG11, five choices; windows of zeros tie in every pooling, and nothing of it matters
``vgg11 worst``       VGG11, five choices, each of which matters from the last convolution down
``resnet50 no tie``   ResNet-50, five choices for its ReLUs, of which none ties
``fc no tie``         The papers' fully connected network, five choices for its ReLUs, of which none ties
====================  ==========================================================================================
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import describe, interleaved, keep_memory
from nslightning import Jacobians, patch, using
from nslightning.models import create_backbone
from nslightning.probes import Divergence, measure, measure_differences, recording

RELUS = {f"alpha={alpha:g}": Jacobians(relu=alpha) for alpha in (0.25, 0.5, 1.0, -1.0, 2.0)}
POOLS = {str(beta): Jacobians(max_pool=beta) for beta in ("minimal", "last", 10.0, 100.0, -1.0)}
BOTH = {f"{name}, alpha=1": Jacobians(relu=1.0, max_pool=j.max_pool) for name, j in POOLS.items()}
# The batch and the image's side, by size.
SIZES = {"small": {"resnet50": (4, 96), "vgg11": (16, 32), "fc": (64, 28)},
         "full": {"resnet50": (32, 224), "vgg11": (128, 32), "fc": (128, 28)}}  # fmt: skip


class Training:
    """A patched network that trains, and what is measured on its steps."""

    def __init__(self, network: nn.Module, x: Tensor, choices: dict[str, Jacobians]) -> None:
        self.network, self.x, self.choices = network, x, choices
        self.labels = torch.arange(len(x), device=x.device) % 10
        patch(network, Jacobians())
        self.named = dict(network.named_parameters())
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.0)  # the step that is timed stays the same one
        self.divergences: dict[str, Divergence] = {}

    def loss(self) -> Tensor:
        """One forward."""
        self.optimizer.zero_grad()
        return F.cross_entropy(self.network(self.x), self.labels)

    def plain(self) -> None:
        """A training step."""
        self.loss().backward()
        self.optimizer.step()

    def measured(self) -> None:
        """A training step whose forward and backward serve every choice."""
        loss = self.loss()
        with recording(self.network) as met:
            met.backward(loss)
        own = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        carried = met.carried(self.choices, {name: self.named[name] for name in own}, retain_graph=False)
        self.divergences = measure_differences(carried, own)
        self.optimizer.step()

    def naive(self) -> None:
        """A training step, then forward, backward and subtraction for each choice."""
        self.loss().backward()
        own = {name: p.grad.clone() for name, p in self.named.items() if p.grad is not None}
        self.optimizer.step()
        for name, choice in self.choices.items():
            loss = self.loss()
            with using(self.network, choice):
                loss.backward()
            other = {n: grad for n in own if (grad := self.named[n].grad) is not None}
            self.divergences[name] = measure(other, own)


def cases(size: str, device: str) -> dict[str, Callable[[], Training]]:
    """The cases by name, built when they are wanted."""

    def training(network: str, choices: dict[str, Jacobians], worst: bool = False) -> Training:
        torch.manual_seed(0)
        batch, side = SIZES[size][network]
        shape = (1 if network == "fc" else 3, side, side)
        name = "torchvision/resnet50" if network == "resnet50" else f"paper/{network}"
        model = create_backbone(name, 10, shape)
        if worst:  # a channel of the last convolution is exactly 0: its ReLU ties everywhere
            last = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1]
            with torch.no_grad():
                last.weight[0] = 0
                if last.bias is not None:
                    last.bias[0] = 0
        return Training(model.to(device), torch.randn(batch, *shape, device=device), choices)

    return {
        "resnet50 pool": lambda: training("resnet50", {"minimal": POOLS["minimal"]}),
        "vgg11 zeros": lambda: training("vgg11", POOLS),
        "vgg11 worst": lambda: training("vgg11", BOTH, worst=True),
        "resnet50 no tie": lambda: training("resnet50", RELUS),
        "fc no tie": lambda: training("fc", RELUS),
    }


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--case", help="only the cases whose name has this in it")
    parser.add_argument("--seconds", type=float, default=5.0, help="per variant")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    a = parser.parse_args()
    if a.device == "cpu":
        keep_memory()
    rows: list[dict[str, Any]] = []
    print(
        f"{'case':<17}{'step':<10}{'plain ms':>10}{'ms':>10}{'ratio':>8}{'of minima':>11}  largest relative divergence"
    )
    for name, build in cases(a.size, a.device).items():
        if a.case and a.case not in name:
            continue
        run = build()
        for step, one in (("measured", run.measured), ("naive", run.naive)):
            times = interleaved({"plain": run.plain, step: one}, a.device, a.seconds, least=3)
            plain, t = times["plain"], times[step]
            row = {
                "case": name, "step": step, "choices": list(run.choices), "plain_ms": float(np.median(plain)) * 1e3,
                "ms": float(np.median(t)) * 1e3, "ratio": float(np.median(t / plain)),
                "ratio_of_minima": float(t.min() / plain.min()), "turns": len(t),
                "relative": {choice: d.relative for choice, d in run.divergences.items()},
            }  # fmt: skip
            rows.append(row)
            largest = max(row["relative"].values(), default=0.0)
            print(
                f"{name:<17}{step:<10}{row['plain_ms']:>10.1f}{row['ms']:>10.1f}{row['ratio']:>8.3f}"
                f"{row['ratio_of_minima']:>11.3f}  {largest:.3g}",
                flush=True,
            )
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps({"machine": describe(a.device), "size": a.size, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
