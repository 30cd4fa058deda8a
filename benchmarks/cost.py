"""The cheap-gradient experiment: MLPs over depth, width and batch, and three networks of the zoo.

Run `python benchmarks/cost.py` (about ten minutes on two cores); results go to benchmarks/results/. Ratios of
different machines are not to be compared.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler writes to stderr

import torch
from torch import nn

from nslightning import Jacobians
from nslightning.models.backbones import create_backbone, input_channels
from nslightning.probes.cost import BOUND, cost_ratio, cost_scaling
from nslightning.probes.cost_data import CostReport, CostScaling
from nslightning.report.cost_figures import plot_cost, plot_scaling
from nslightning.report.cost_table import scaling_table, table

CHOICES = {
    "relu0.5": Jacobians(relu=0.5),
    "relu1": Jacobians(relu=1.0),
    "relu1+minimal": Jacobians(relu=1.0, max_pool="minimal"),
}
DEPTHS, WIDTHS, BATCHES = (1, 2, 5, 10), (128, 256, 512, 1024), (32, 128, 256)
PUBLISHED = (2.58, 4.94)  # the range over depths 1 to 20 and widths 1000 to 5000 on the authors' machine
DEAD = 0.1


def mlp(depth: int, width: int) -> nn.Module:
    """784-width^depth-10, a tenth of its hidden units dead (weights and bias 0): ties in float32 too."""
    torch.manual_seed(0)
    network = create_backbone("paper/fc", 10, (1, 28, 28), hidden=(width,) * depth)
    with torch.no_grad():
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Linear) and name != "classifier":
                dead = int(DEAD * width)
                layer.weight[:dead] = 0
                layer.bias[:dead] = 0
    return network


def batch_for(model: str, shape: tuple[int, int, int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, input_channels(model, shape), *shape[1:]), torch.randint(10, (size,))


def mlps(folder: Path, repetitions: int) -> None:
    by_batch: dict[int, dict[str, CostScaling]] = {}
    choices = {name: CHOICES[name] for name in ("relu0.5", "relu1")}
    for size in BATCHES:
        by_batch[size] = {
            f"{depth} hidden": cost_scaling(
                lambda width, depth=depth: mlp(depth, width),
                WIDTHS,
                batch_for("paper/fc", (1, 28, 28), size),
                choices,
                repetitions=repetitions,
                per_module=False,
                name=f"784-width^{depth}-10",
            )
            for depth in DEPTHS
        }
        for name, scaling in by_batch[size].items():
            print(f"\nbatch {size}, {name}\n{scaling_table(scaling)}", flush=True)
    data = {str(size): {n: s.to_dict() for n, s in scalings.items()} for size, scalings in by_batch.items()}
    (folder / "cost_mlp_cpu.json").write_text(json.dumps(data, allow_nan=False) + "\n")


def models(folder: Path, repetitions: int) -> None:
    cases = {
        "paper/vgg11": ((3, 32, 32), 16),
        "torchvision/resnet18": ((3, 64, 64), 8),
        "timm/mobilenetv3_small_050": ((3, 96, 96), 16),
    }
    reports = {}
    for name, (shape, size) in cases.items():
        torch.manual_seed(0)
        network = create_backbone(name, 10, shape).train()
        batch = batch_for(name, shape, size)
        reports[name] = cost_ratio(network, batch, CHOICES, repetitions=repetitions, name=name)
        print(f"\n{table(reports[name])}", flush=True)
    data = {name: report.to_dict() for name, report in reports.items()}
    (folder / "cost_models_cpu.json").write_text(json.dumps(data, allow_nan=False) + "\n")


def draw(folder: Path) -> None:
    """Draw and tabulate what has been measured."""
    lines = ["# What a gradient costs", "", "Made by `python benchmarks/cost.py`."]
    if (path := folder / "cost_mlp_cpu.json").exists():
        data = json.loads(path.read_text())
        by_batch = {b: {n: CostScaling.from_dict(s) for n, s in scalings.items()} for b, scalings in data.items()}
        for ending in ("png", "pdf"):
            for choice, name in (("stock", "cost_mlp_cpu"), ("relu1", "cost_mlp_cpu_relu1")):
                plot_scaling(by_batch["128"], folder / f"{name}.{ending}", choice=choice, published=PUBLISHED)
        lines += ["", *mlp_table(by_batch)]
    if (path := folder / "cost_models_cpu.json").exists():
        reports = {n: CostReport.from_dict(r) for n, r in json.loads(path.read_text()).items()}
        for ending in ("png", "pdf"):
            plot_cost(reports, folder / f"cost_models_cpu.{ending}")
        for report in reports.values():
            lines += ["", f"## {report.model}", "", "```", table(report), "```"]
    (folder / "cost_cpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def mlp_table(by_batch: dict[str, dict[str, CostScaling]]) -> list[str]:
    first = next(iter(by_batch["128"].values())).reports[0]
    env = first.environment
    lines = [
        "## MLPs 784-width^depth-10",
        "",
        f"{env['machine']}, {env['cores']} cores shared with other work; {env['clock']}, one thread, "
        f"torch {env['torch']}, {first.dtype}; ratios of minima of n = {first.forward.n} interleaved rounds. "
        f"A tenth of the hidden units is dead, so that ReLU meets ties. Published range, on another machine: "
        f"{PUBLISHED[0]} to {PUBLISHED[1]}.",
        "",
        "| batch | depth | "
        + " | ".join(f"{c.name}, widths {WIDTHS[0]} to {WIDTHS[-1]}" for c in first.choices)
        + " | J/F | FLOP ratio | slope stock | slope p J/F |",
        "|" + "---|" * (6 + len(first.choices)),
    ]
    for batch, scalings in by_batch.items():
        for name, scaling in scalings.items():
            cells = [", ".join(f"{r.ratio(c.name):.2f}" for r in scaling.reports) for c in first.choices]
            jvp = ", ".join(f"{r.jvp_ratio:.1f}" for r in scaling.reports if r.jvp_ratio is not None)
            flops = ", ".join(f"{r.flop_ratio:.2f}" for r in scaling.reports if r.flop_ratio is not None)
            slopes = scaling.slopes()
            cells += [jvp, flops, f"{slopes['stock']:+.2f}", f"{slopes['forward mode']:+.2f}"]
            lines.append(f"| {batch} | {name} | " + " | ".join(cells) + " |")
    everything = [r for s in by_batch.values() for scaling in s.values() for r in scaling.reports]
    for choice in (c.name for c in first.choices):
        ratios = sorted(r.ratio(choice) for r in everything)
        over = sum(not r.holds(choice) for r in everything)
        lines += [
            "",
            f"{choice}: {ratios[0]:.2f} to {ratios[-1]:.2f}, median {ratios[len(ratios) // 2]:.2f}, "
            f"{over} of {len(ratios)} over the bound {BOUND:g}.",
        ]
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", default="all", choices=["all", "mlps", "models", "draw"])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.part in ("all", "mlps"):
        mlps(arguments.output, arguments.repetitions)
    if arguments.part in ("all", "models"):
        models(arguments.output, arguments.repetitions)
    draw(arguments.output)
