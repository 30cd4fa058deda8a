"""The time of `make reproduce-all SCALE=small` on this processor: a step of each kind of cell, times their number.

A training's step is timed on random images, an evaluation counts as a third of a step for each of its images, and a
pass of `zones` as a step and a second backward. The time is that of the process on the CPU, one thread, so that others
on the machine hardly change it; cells side by side on n cores take an n-th. Cells of the exact estimator take what
those in `results/` took on the clock. `python -m benchmarks.reproduction` (about ten minutes) writes
benchmarks/results/reproduction_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.machine import describe
from nslightning.experiments import Experiment
from nslightning.experiments.cells import Cell, TrainCell, TwinCell, ZoneCell
from nslightning.experiments.figures import FIGURES, feeding
from nslightning.experiments.networks import build
from nslightning.experiments.precision import PRECISIONS
from nslightning.experiments.training import Run

ROOT = Path(__file__).parents[1]
#: Training images, test images, and shape of an image.
SIZES = {
    "MNIST": (60_000, 10_000, (1, 28, 28)),
    "CIFAR10": (50_000, 10_000, (3, 32, 32)),
    "SVHN": (73_257, 26_032, (3, 32, 32)),
}


class Shape:
    """The properties of images that building a network reads."""

    num_classes = 10

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        self.image_shape = image_shape


@cache
def step_seconds(backbone: str, options: str, precision: int, batch_size: int, shape: tuple[int, int, int]) -> float:
    """CPU seconds of one training step: the least of two after a first one."""
    cell = TrainCell(
        backbone=backbone,
        backbone_options=yaml.safe_load(options),
        precision=precision,
        batch_size=batch_size,  # type: ignore[arg-type] # a number from YAML
    )
    network, _ = build(cell, Shape(shape), torch.device("cpu"), None)  # type: ignore[arg-type] # what `build` reads of images
    run = Run(cell, network, torch.device("cpu"))
    x, y = torch.rand(batch_size, *shape, dtype=PRECISIONS[precision]), torch.arange(batch_size) % 10
    taken = []
    for _ in range(3):
        begun = time.process_time()
        run.step(x, y)
        taken.append(time.process_time() - begun)
    print(f"{backbone} {options} {precision} bits, {batch_size} images: {min(taken[1:]):.3f} s", flush=True)
    return min(taken[1:])


def seconds(cell: Cell) -> float:
    """CPU seconds of a cell."""
    images, tested, shape = SIZES[cell.data]
    images = min(images, cell.train_images or images)
    size = min(cell.batch_size, 128)  # larger ones cost as many steps of 128
    step = step_seconds(cell.backbone, yaml.safe_dump(cell.options), cell.precision, size, shape) / size
    if isinstance(cell, TwinCell):
        twins = len(cell.choices) + cell.control
        seen = cell.steps * cell.batch_size if cell.steps else cell.epochs * images
        return step * twins * (seen + (0 if cell.steps else cell.epochs * tested / 3))
    if isinstance(cell, TrainCell):
        return step * cell.epochs * (images + tested / 3)
    assert isinstance(cell, ZoneCell)
    batches = cell.batches or -(-images // cell.batch_size)
    return step * 5 / 3 * cell.thetas * min(images, batches * cell.batch_size)


def counted(name: str, planned: int) -> float:
    """Clock seconds of an experiment by the exact estimator, from what its cells took here."""
    cells = json.loads((ROOT / "results" / name / "small" / "provenance.json").read_text())["cells"].values()
    return planned * sum(cell["seconds"] for cell in cells) / len(cells)


def main() -> None:
    """Estimate every experiment and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "reproduction_cpu.json")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    experiments: dict[str, Any] = {}
    for file in sorted((ROOT / "configs" / "experiments").glob("*.yaml")):
        cells = [planned.cell for planned in Experiment.read(file, "small").cells()]
        exact = any(isinstance(cell, ZoneCell) and cell.estimator == "exact" for cell in cells)
        total = counted(file.stem, len(cells)) if exact else sum(map(seconds, cells))
        experiments[file.stem] = {"cells": len(cells), "core_hours": round(total / 3600, 2)}
        print(file.stem, experiments[file.stem], flush=True)
    figures = {
        name: {"experiments": feeding(name), "core_hours": sum(experiments[e]["core_hours"] for e in feeding(name))}
        for name, drawing in FIGURES.items()
        if drawing.needs_results
    }
    record = {"machine": describe("cpu"), "experiments": experiments, "figures": figures}
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
