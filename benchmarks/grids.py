"""Ten thousand cells: how long a grid takes to be planned, and its finished cells to be collected.

python -m benchmarks.grids [--cells N] writes benchmarks/results/grids_cpu.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe
from nslightning.experiments import Experiment, collect, folder_of

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", type=int, default=10_000)
    number = parser.parse_args().cells
    fixed = {"backbone": "paper/lenet5", "data": "FashionMNISTSample", "epochs": 10, "learning_rate": 0.01}
    grid = {"seed": list(range(number // 10)), "max_pool": [0, 1, 10, 100, "minimal"], "precision": [32, 16]}
    experiment = Experiment("large", "train", "small", fixed=fixed, grids=(grid,))
    start = time.perf_counter()
    cells = experiment.cells()
    planned = time.perf_counter() - start
    metrics = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate", "nan")
    rows = [{"epoch": epoch, "metric": name, "value": 0.5} for epoch in range(10) for name in metrics]
    content = json.dumps({"settings": {}, "provenance": {"data": "made up"}, "seconds": 1.0, "rows": rows})
    with tempfile.TemporaryDirectory() as output:
        folder = folder_of(experiment, output) / "cells"
        folder.mkdir(parents=True)
        for cell in cells:
            (folder / f"{cell.id}.json").write_text(content)
        start = time.perf_counter()
        table = collect(experiment, output)
        collected = time.perf_counter() - start
    numbers = {"cells": len(cells), "rows": len(table), "plan_s": round(planned, 2), "collect_s": round(collected, 2)}
    print(numbers)
    (RESULTS / "grids_cpu.json").write_text(json.dumps({"machine": describe("cpu"), **numbers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
