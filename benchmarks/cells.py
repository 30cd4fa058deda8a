"""One training cell of the grid for Figure 3: VGG11 on 5,000 images of 32 x 32 pixels, tested on 10,000 every epoch.

On a CUDA device a cell's steps are replays of a captured graph. Three rows: a cell alone with eager steps, a cell alone
with captured ones, and cells side by side in several processes, whose time is the mean of their seconds divided by the
number of processes. The images are random: a step's time does not depend on them. A CPU captures nothing, so that its
first two rows are the same.

python -m benchmarks.cells [--device cuda] [--epochs 20] [--workers 6] writes benchmarks/results/cells_<device>.json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from unittest import mock

import torch

from benchmarks.machine import describe
from nslightning.experiments import Experiment, folder_of, run, training

RESULTS = Path(__file__).parent / "results"
CELL = {
    "backbone": "paper/vgg11", "data": "Synthetic", "data_options": {"image_shape": (3, 32, 32), "num_classes": 10},
    "batch_norm": False, "learning_rate": 0.01, "rule": "published", "relu": 1,
}  # fmt: skip


def seconds(cells: int, workers: int, device: str, fixed: dict[str, object]) -> float:
    """Compute cells of the grid: the mean of their seconds, start of the processes and data left out."""
    experiment = Experiment("cells", "train", "small", fixed=fixed, grids=({"seed": list(range(cells))},))
    with tempfile.TemporaryDirectory() as output:
        report = run(experiment, output, workers=workers, device=device)
        assert report.computed == cells, report.failed
        files = (folder_of(experiment, output) / "cells").glob("*.json")
        taken = [json.loads(file.read_text())["seconds"] for file in files]
    return sum(taken) / len(taken)


def main() -> None:
    """Time the three rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=20, help="of 40 steps each")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--precision", type=int, default=32, choices=(16, 24, 32, 64))
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    data = CELL["data_options"] | {"images": options.images, "eval_images": options.test_images}
    fixed = CELL | {"data_options": data, "epochs": options.epochs, "precision": options.precision}
    seconds(1, 1, options.device, fixed | {"epochs": 1})  # what is made once: libraries, kernels, images
    with mock.patch.object(training, "_CAPTURING", ()):
        eager = seconds(1, 1, options.device, fixed)
    captured = seconds(1, 1, options.device, fixed)
    # Twice as many cells as processes: the first cell of each process has what is made once in it.
    together = seconds(2 * options.workers, options.workers, options.device, fixed) / options.workers
    record = {
        "machine": describe(options.device),
        "arguments": {name: value for name, value in vars(options).items() if name != "out"},
        "seconds per cell": {"alone, eager": eager, "alone": captured, "side by side": together},
        "of eager": {"alone": round(captured / eager, 3), "side by side": round(together / eager, 3)},
    }
    print(json.dumps({name: record[name] for name in ("seconds per cell", "of eager")}, indent=1))
    out = options.out or RESULTS / f"cells_{options.device}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
