"""The fast ImageNet recipe beside timm's parts: ``python -m benchmarks.against_timm IMAGES --out FILE``.

The pip package of timm has no ``train.py``. One side therefore puts together what that script does for the same
settings: ``create_dataset`` and ``create_loader`` without prefetching, ``create_optimizer_v2`` (its ``sgd`` has
Nesterov's momentum, no weight decay on norms and biases), ``create_scheduler_v2`` stepped by ``step_update`` after each
step, ``LabelSmoothingCrossEntropy``, autocast around network and loss, one pass over the validation images after the
last epoch. The other side is ``nslightning fit`` with ``configs/resnet_imagenet_fast.yaml``. Both leave parts of the
recipe out: images stay small, the network is timm's ResNet-18, ties and divergence are not watched. Both draw their own
weights, order and crops, so the accuracies are compared over seeds. The sides take turns, seed by seed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from lightning.pytorch import Callback, Trainer
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, random_seed

from benchmarks.machine import describe
from nslightning.cli import main as nslightning

NETWORK, SIZE, BATCH, EPOCHS, WORKERS = "resnet18", 64, 50, 2, 1
RATE = 2.0 * BATCH / 1024
DECAY, SMOOTHING, WARMUP, SCALE = 5e-5, 0.1, 0.11, (0.35, 1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def cpu_seconds() -> float:
    """Seconds that this process and its finished children computed."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


class Clock(Callback):
    """The time of the training epochs, without start and validation, and the learning rate of each step."""

    reads_step_metrics = False
    seconds = 0.0
    rates: list[float] = []  # noqa: RUF012 # the callback that ran last fills it for the one who reads

    def on_train_start(self, *_: Any) -> None:
        """A new run."""
        Clock.seconds, Clock.rates = 0.0, []

    def on_train_epoch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Note the learning rate."""
        Clock.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Stop the clock at an epoch's last step: the validation comes after it."""
        if index + 1 == trainer.num_training_batches:
            Clock.seconds += time.perf_counter() - self.start


def ours(images: Path, seed: int) -> dict[str, Any]:
    """``nslightning fit`` with the fast recipe."""
    before = cpu_seconds()
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
        status = nslightning(
            [
                "fit", "--config=configs/resnet_imagenet_fast.yaml", f"--output={output}", "--name=run",
                f"--seed_everything={seed}", f"--model.backbone=timm/{NETWORK}", f"--model.optimizer.lr={RATE}",
                "--data=ImageFolder", f"--data.root={images}", f"--data.image_size={SIZE}",
                f"--data.batch_size={BATCH}", f"--data.workers={WORKERS}", "--data.augmentation.sizes=[]",
                "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto",
                f"--trainer.max_epochs={EPOCHS}", f"--trainer.check_val_every_n_epoch={EPOCHS}",
                "--trainer.num_sanity_val_steps=0", "--trainer.enable_progress_bar=false", "--trainer.logger=true",
                "--trainer.enable_checkpointing=false", "--trainer.callbacks=[benchmarks.against_timm.Clock]",
            ]
        )  # fmt: skip
        if status:  # its message says why
            raise SystemExit(status)
        rows = pd.read_csv(Path(output, "run", "001", "metrics.csv"))
    from benchmarks.against_timm import Clock as Ran  # run as a program, this module is another one

    count = len(Ran.rates) * BATCH
    return {
        "accuracy": float(rows["val/acc1"].dropna().iloc[-1]),
        "images_per_second": count / Ran.seconds,
        "images_per_cpu_second": count / (cpu_seconds() - before),
        "rates": Ran.rates,
    }


def theirs(images: Path, seed: int) -> dict[str, Any]:
    """The parts of timm, as its script puts them together."""
    before = cpu_seconds()
    random_seed(seed, 0)
    model = timm.create_model(NETWORK, num_classes=10).to(memory_format=torch.channels_last)
    shared = {
        "input_size": (3, SIZE, SIZE), "batch_size": BATCH, "use_prefetcher": False, "interpolation": "bilinear",
        "mean": MEAN, "std": STD, "num_workers": WORKERS,
    }  # fmt: skip
    train = create_loader(
        create_dataset("", root=images, split="train", is_training=True), **shared, is_training=True,
        scale=SCALE, hflip=0.5, color_jitter=None,
    )  # fmt: skip
    val = create_loader(
        create_dataset("", root=images, split="val"), **shared, is_training=False, crop_pct=224 / 256
    )  # fmt: skip
    optimizer = create_optimizer_v2(
        model, opt="sgd", lr=RATE, weight_decay=DECAY, momentum=0.9, filter_bias_and_bn=True
    )
    warmup = WARMUP * EPOCHS
    schedule, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=EPOCHS - warmup, warmup_epochs=warmup, warmup_prefix=True, warmup_lr=0.0,
        min_lr=0.0, step_on_epochs=False, updates_per_epoch=len(train),
    )  # fmt: skip
    criterion, losses, rates, updates, seconds = LabelSmoothingCrossEntropy(SMOOTHING), AverageMeter(), [], 0, 0.0
    for epoch in range(EPOCHS):
        model.train()
        start = time.perf_counter()
        for x, y in train:
            rates.append(optimizer.param_groups[0]["lr"])
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            losses.update(loss.item(), x.shape[0])
            schedule.step_update(updates, metric=losses.avg)
        seconds += time.perf_counter() - start
        schedule.step(epoch + 1)
    model.eval()
    top1 = AverageMeter()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for x, y in val:
            top1.update(accuracy(model(x.contiguous(memory_format=torch.channels_last)), y)[0].item() / 100, len(x))
    del train, val  # their workers' time counts once they have ended
    count = updates * BATCH
    return {
        "accuracy": top1.avg,
        "images_per_second": count / seconds,
        "images_per_cpu_second": count / (cpu_seconds() - before),
        "rates": rates,
    }


def compared(runs: dict[str, list[dict[str, Any]]], val_images: int) -> dict[str, Any]:
    """Means over the seeds, and whether the accuracies differ by more than the draw of the images lets expect."""
    means = {
        side: {
            key: statistics.mean(run[key] for run in of_side)
            for key in ("accuracy", "images_per_second", "images_per_cpu_second")
        }
        for side, of_side in runs.items()
    }
    a, b = (means[side]["accuracy"] for side in ("nslightning", "timm"))
    both = (a + b) / 2
    noise = math.sqrt(2 * both * (1 - both) / (val_images * len(runs["timm"])))
    rates = [run.pop("rates") for of_side in runs.values() for run in of_side]
    return {
        "means": means,
        "accuracy_difference": a - b,
        "standard_error": noise,
        "within_two_standard_errors": abs(a - b) <= 2 * noise,
        "largest_difference_of_learning_rates": max(
            abs(x - y) for other in rates[1:] for x, y in zip(rates[0], other, strict=True)
        ),
    }


def main() -> None:
    """Run both sides in turn and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path, help="a folder with train and val, one folder a class in each")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"nslightning": [], "timm": []}
    for seed in range(arguments.seeds):
        for side, work in (("nslightning", ours), ("timm", theirs)):
            runs[side].append(work(arguments.images, seed))
            print(seed, side, {k: v for k, v in runs[side][-1].items() if k != "rates"}, flush=True)
    count = {split: sum(1 for f in (arguments.images / split).rglob("*") if f.is_file()) for split in ("train", "val")}
    settings = {
        "network": NETWORK, "size": SIZE, "batch": BATCH, "epochs": EPOCHS, "workers": WORKERS, "images": count,
        "timm": timm.__version__,
    }  # fmt: skip
    result = {"machine": describe("cpu"), "settings": settings, **compared(runs, count["val"]), "runs": runs}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
