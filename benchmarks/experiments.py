"""Grids of small runs: the engine against the way of the released scripts, both from a cold start.

The released way: one process, one run after another, images decoded one by one by the two workers of a DataLoader, loss
and accuracy fetched after every step. The engine: several processes of one thread, images in memory. Both train the
same patched networks on the same images; one way after the other, the table has the least time of each, by the clock
and of the CPU over all processes. The engine's time has the start of its processes in it, the released way's
has not. Their accuracies differ by the order of the images and its normalisation; that they are close says that both
trained.

python -m benchmarks.experiments [--device cuda] writes benchmarks/results/experiments_<device>.json.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.machine import describe
from nslightning.experiments import Experiment, Planned, collect, run
from nslightning.experiments.data import load
from nslightning.experiments.networks import build, loaded

RESULTS = Path(__file__).parent / "results"
GRIDS = {
    "LeNet-5": {"backbone": "paper/lenet5", "grid": {"max_pool": [0, 10], "seed": [0, 1]}},
    "MLP 3x256": {"backbone": "paper/fc", "width": 256, "depth": 3, "grid": {"relu": [0, 1], "seed": [0, 1]}},
}


class OneByOne(Dataset):
    """Images as torchvision's data sets serve them: a PIL image each, transformed when it is asked for."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images.numpy(), labels
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index, 0], mode="L")), int(self.labels[index])


def released(cells: list[Planned], device: str) -> float:
    """Train the cells one after another: the mean of their final accuracies."""
    where, accuracies = torch.device(device), []
    for planned in cells:
        cell = planned.cell
        images = loaded(cell, torch.device("cpu"))
        network, _ = build(cell, images, where, None)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        parts = (images.train, images.test)
        train, test = (
            DataLoader(OneByOne(part.images.images, part.labels), size, shuffle=first, num_workers=2)
            for part, size, first in ((parts[0], 128, True), (parts[1], 100, False))
        )
        for _ in range(cell.epochs):
            network.train()
            correct = total = 0
            for x, y in train:
                x, y = x.to(where), y.to(where)
                optimizer.zero_grad()
                outputs = network(x)
                loss = F.cross_entropy(outputs, y)
                loss.backward()
                optimizer.step()
                loss.item()
                total += y.size(0)
                correct += outputs.max(1)[1].eq(y).sum().item()
            network.eval()
            correct = total = 0
            with torch.no_grad():
                for x, y in test:
                    x, y = x.to(where), y.to(where)
                    outputs = network(x)
                    F.cross_entropy(outputs, y).item()
                    total += y.size(0)
                    correct += outputs.max(1)[1].eq(y).sum().item()
        accuracies.append(correct / total)
    return sum(accuracies) / len(accuracies)


def cpu_seconds() -> float:
    """Seconds of the CPU that this process and its finished children have taken so far."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main() -> None:
    """Time both ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", default="FashionMNISTSample", help="MNIST for the papers' own")
    parser.add_argument("--train-images", type=int, help="how many training images, from the first on")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2 if not torch.cuda.is_available() else 4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    grids = {}
    for name, spec in GRIDS.items():
        options = {k: v for k, v in spec.items() if k != "grid"}
        fixed = {**options, "data": arguments.data, "train_images": arguments.train_images, "epochs": arguments.epochs}
        fixed |= {"schedule": "constant"} | ({"data_options": {"holdout": 0}} if arguments.data == "MNIST" else {})
        experiment = Experiment("benchmark", "train", "small", fixed=fixed, grids=(spec["grid"],))
        cells = experiment.cells()
        seconds: dict[str, list[float]] = {"released": [], "engine": []}
        cpu: dict[str, list[float]] = {"released": [], "engine": []}
        accuracy = {}
        load.cache_clear()
        for _ in range(arguments.rounds):
            for way in seconds:
                with tempfile.TemporaryDirectory() as folder:
                    start, before = time.perf_counter(), cpu_seconds()
                    if way == "released":
                        accuracy[way] = released(cells, arguments.device)
                    else:
                        report = run(experiment, folder, workers=arguments.workers, device=arguments.device)
                        assert report.computed == len(cells)
                    seconds[way].append(round(time.perf_counter() - start, 2))
                    cpu[way].append(round(cpu_seconds() - before, 2))
                    if way == "engine":
                        rows = collect(experiment, folder)
                        last = rows[(rows["metric"] == "test_accuracy") & (rows["epoch"] == arguments.epochs - 1)]
                        accuracy[way] = last["value"].mean()
        least, least_cpu = ({way: min(t) for way, t in times.items()} for times in (seconds, cpu))
        ratio, ratio_cpu = (times["released"] / times["engine"] for times in (least, least_cpu))
        grids[name] = {
            "runs": len(cells),
            "seconds": seconds,
            "ratio": round(ratio, 2),
            "cpu_seconds": cpu,
            "cpu_ratio": round(ratio_cpu, 2),
            "accuracy": accuracy,
        }
        print(
            f"{name}: {least['released']:.1f} s as released, {least['engine']:.1f} s here: {ratio:.1f} times faster; "
            f"CPU: {least_cpu['released']:.1f} s, {least_cpu['engine']:.1f} s: {ratio_cpu:.1f} times less",
            flush=True,
        )
    record = {"machine": describe(arguments.device), "arguments": vars(arguments), "grids": grids}
    (RESULTS / f"experiments_{arguments.device}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
