"""A step of ``nslightning fit`` beside a bare loop over ready batches: ``python -m benchmarks.fit``.

The bare loop trains the stock network on batches that lie ready in memory. ``fit`` is the command's own training: data,
callbacks, metrics and the metrics file included, validation and checkpoints left out. Both take turns within one
process, epoch by epoch, and the median times of their steps are compared. In 16-mixed both are channels-last.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.machine import describe
from nslightning.cli import main as nslightning
from nslightning.commands.training_cli import TrainCLI
from nslightning.models import create_backbone

#: Backbone, data and the images' shape, by the name of a row.
ROWS: dict[str, tuple[str, list[str], tuple[int, int, int]]] = {
    "LeNet-5, Fashion-MNIST sample": ("paper/lenet5", ["--data=FashionMNISTSample"], (1, 28, 28)),
    "VGG11, synthetic 32x32": ("paper/vgg11", ["--data=Synthetic"], (3, 32, 32)),
    "ResNet-50, synthetic 224x224": ("torchvision/resnet50", ["--data=Synthetic"], (3, 224, 224)),
}
BATCH = 128


class Epochs(Callback):
    """Times each epoch's steps, and lets the bare loop have its turn between two epochs.

    Args:
        device: The device that trains.
        between: A function to run between two epochs.
    """

    reads_step_metrics = False

    def __init__(self, device: str, between: Callable[[], None]) -> None:
        self.device, self.between = device, between
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Start the clock."""
        self.start = clock(self.device)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        """Read it."""
        self.seconds.append((clock(self.device) - self.start) / trainer.num_training_batches)
        self.between()


def clock(device: str) -> float:
    """Seconds: of this thread's work on a CPU, which other programs do not lengthen; by the clock on a device."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time()


class BareLoop:
    """Steps of the stock network over ready batches.

    Args:
        backbone: Its name.
        shape: The images' shape.
        device: Where.
        precision: Lightning's name of the precision.
        steps: Steps in a turn.
    """

    def __init__(self, backbone: str, shape: tuple[int, int, int], device: str, precision: str, steps: int) -> None:
        torch.manual_seed(0)
        self.network = create_backbone(backbone, 10, shape).to(device)
        self.batches = [
            (torch.randn(BATCH, *shape, device=device), torch.arange(BATCH, device=device) % 10) for _ in range(8)
        ]
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.01, momentum=0.9)
        self.mixed = precision == "16-mixed"
        if self.mixed:  # as such a loop is written
            self.network = self.network.to(memory_format=torch.channels_last)
            self.batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in self.batches]
        self.scaler = torch.amp.GradScaler(device, enabled=self.mixed)
        self.device, self.steps = device, steps
        self.seconds: list[float] = []

    def turn(self) -> None:
        """Take the steps of a turn, and note the time that one took."""
        start = clock(self.device)
        for i in range(self.steps):
            x, y = self.batches[i % len(self.batches)]
            self.optimizer.zero_grad()
            with torch.autocast(self.device, torch.float16, enabled=self.mixed):
                loss = F.cross_entropy(self.network(x), y)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.seconds.append((clock(self.device) - start) / self.steps)


def measure(
    backbone: str, data: list[str], shape: tuple[int, int, int], args: argparse.Namespace, options: list[str]
) -> dict[str, Any]:
    """The median time of a step of both."""
    bare = BareLoop(backbone, shape, args.device, args.precision, args.steps)
    epochs = Epochs(args.device, bare.turn)
    synthetic = [f"--data.images={BATCH * args.steps}", f"--data.image_shape={list(shape)}"]
    stock = TrainCLI.instantiate_trainer

    def with_clock(self: TrainCLI, **keywords: Any) -> Any:
        trainer = stock(self, **keywords)
        trainer.callbacks.insert(0, epochs)
        return trainer

    TrainCLI.instantiate_trainer = with_clock  # type: ignore[method-assign] # the clock is no option of the command
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            words = [
                f"--model.backbone={backbone}",
                *data,
                *(synthetic if "--data=Synthetic" in data else ()),
                *(["--model.channels_last=true"] * bare.mixed),
                f"--data.batch_size={BATCH}",
                f"--output={folder}",
                f"--trainer.max_epochs={args.epochs}",
                f"--trainer.limit_train_batches={args.steps}",
                "--trainer.limit_val_batches=0.0",
                "--trainer.num_sanity_val_steps=0",
                "--trainer.enable_checkpointing=false",
                f"--trainer.accelerator={'gpu' if args.device == 'cuda' else 'cpu'}",
                "--trainer.devices=1",
                f"--trainer.precision={args.precision}",
                *options,
            ]
            status = nslightning(["fit", *words])
    finally:
        TrainCLI.instantiate_trainer = stock  # type: ignore[method-assign] # put back
    assert status == 0, status
    # The first epoch pays for the start, and the first turn of the bare loop for its own.
    fit, loop = (statistics.median(seconds[1:]) for seconds in (epochs.seconds, bare.seconds))
    row = {"bare_ms": round(loop * 1e3, 3), "fit_ms": round(fit * 1e3, 3), "ratio": round(fit / loop, 3)}
    row |= {"bare_images_per_second": round(BATCH / loop), "fit_images_per_second": round(BATCH / fit)}
    if args.released:
        row["released_images_per_second"] = round(released(backbone, shape, args.device))
    return row


class OneByOne(Dataset[tuple[torch.Tensor, int]]):
    """Images as the released scripts serve them: a PIL image each, cropped, flipped and normalised when asked for.

    Args:
        count: Number of images.
        shape: Shape of each image.
    """

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        channels, height, width = shape
        self.pixels = torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8).numpy()
        steps = [transforms.RandomCrop(height, height // 8), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize((0.5,) * channels, (0.5,) * channels)])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index].squeeze())), index % 10


def released(backbone: str, shape: tuple[int, int, int], device: str) -> float:
    """Images a second of the released scripts' loop: eight workers, and the loss fetched at each step."""
    network = create_backbone(backbone, 10, shape).to(device)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    workers = 8 if device == "cuda" else 2
    images = OneByOne(BATCH * (200 if device == "cuda" else 20), shape)
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=workers, pin_memory=device == "cuda")
    start = time.perf_counter()
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
        loss.item()
    return len(images) / (time.perf_counter() - start)


def main() -> None:
    """Measure and write ``benchmarks/results/fit_<device>.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--epochs", type=int, default=9, help="turns of each, the first of which is not counted")
    parser.add_argument("--steps", type=int, default=46, help="steps of a turn")
    parser.add_argument("--rows", nargs="+", default=list(ROWS)[:1], help="parts of the rows' names")
    parser.add_argument(
        "--option", action="append", default=[], help="one more option of fit, such as --option=--model.compile=true"
    )
    parser.add_argument("--released", action="store_true", help="time the released scripts' loop too, by the clock")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    rows = {}
    for name, (backbone, data, shape) in ROWS.items():
        if any(part in name for part in args.rows):
            row = rows[name] = measure(backbone, data, shape, args, args.option)
            print(f"{name:32}bare {row['bare_ms']:8.2f} ms   fit {row['fit_ms']:8.2f} ms   x{row['ratio']:.2f}")
    result = {"machine": describe(args.device), "options": args.option, "precision": args.precision, "results": rows}
    out = args.out or Path(__file__).parent / "results" / f"fit_{args.device}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
