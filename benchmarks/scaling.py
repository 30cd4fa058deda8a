"""A training's need of storage, processors and network as devices are added: ``python -m benchmarks.scaling``.

A model on paper. Measured here: the parameters of the network, how many images one core reads, crops and flips a
second (of the folder that ``--images`` names), how long a checkpoint takes, and what a measured step adds to what two
processes send each other. Assumed, and listed as such: what one device computes a second, and what storage and network
carry. Overlap is assumed perfect: the all-reduce of gradients hides behind the backward, two thirds of a step, and only
the rest of it takes time. The sums that a measured step adds hide behind nothing.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.machine import describe
from nslightning import runs


@dataclass(frozen=True)
class Machine:
    """One device's share of a machine, and what all devices share.

    Attributes:
        images_per_second: Images that one device trains on a second, with its data ready.
        cores: Processor cores beside one device.
        images_per_core: Images that one core prepares a second.
        network: Bytes a second into and out of one device, in an all-reduce.
        storage: Bytes a second of the storage that all devices read from.
        image_bytes: Bytes of an image's file.
    """

    images_per_second: float
    cores: float
    images_per_core: float
    network: float
    storage: float
    image_bytes: float


def needs(machine: Machine, parameters: int, batch: int, devices: int, choices: int, every: int) -> dict[str, float]:
    """The needs of a training on several devices, and its bound.

    Args:
        machine: Rates.
        parameters: Trained parameters of the network, of four bytes each.
        batch: Images per step of one device.
        devices: The number of devices.
        choices: Jacobian choices that a measured step compares. It sums one set of gradients for each, and one for
            the reference.
        every: Steps from one measured step to the next.

    Returns:
        Seconds and rates by name; ``images_per_second`` is that of all devices together, as the slowest part limits it.
    """
    step = batch / machine.images_per_second
    reduced = 2 * (devices - 1) / devices * 4 * parameters  # ring: each device sends and receives that many bytes
    all_reduce = reduced / machine.network
    with_network = step + max(0.0, all_reduce - 2 / 3 * step)
    measured = (
        (choices + 1) * all_reduce / every if choices else 0.0
    )  # the arithmetic of a measured step is the same on one device
    rates = {
        "devices": devices * batch / (with_network + measured),
        "cores": devices * machine.cores * machine.images_per_core,
        "storage": machine.storage / machine.image_bytes,
    }
    slowest = min(rates, key=lambda name: rates[name])
    return {
        "all_reduce_bytes": reduced,
        "all_reduce_seconds": all_reduce,
        "measured_steps_share": measured / (with_network + measured),
        **{f"rate_{name}": rate for name, rate in rates.items()},
        "images_per_second": rates[slowest],
        "efficiency": rates[slowest] / (devices * machine.images_per_second),
        "bound": slowest,  # type: ignore[dict-item] # a word
    }


def images_per_core(folder: Path, seconds: float) -> tuple[float, float]:
    """Images that one core reads, crops and flips a second, and the mean bytes of a file."""
    from nslightning.data import Augmentation
    from nslightning.data.images import FileImages
    from nslightning.data.preprocessing import HE2016

    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in (".jpeg", ".jpg", ".png"))
    data = FileImages([(str(f), 0) for f in files], HE2016, Augmentation())
    torch.set_num_threads(1)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        data.__getitems__([(done + i) % len(files) for i in range(16)])
        done += 16
    return done / (time.perf_counter() - start), sum(f.stat().st_size for f in files) / len(files)


def checkpoint(network: torch.nn.Module, times: int = 5) -> dict[str, float]:
    """The bytes of a checkpoint with SGD's momentum, and the median seconds until it is safe on this disk."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    content = {"state_dict": network.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    seconds = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        file = Path(folder, "last.ckpt")
        for _ in range(times):
            start = time.perf_counter()
            runs.WholeCheckpoints().save_checkpoint(content, file)
            seconds.append(time.perf_counter() - start)
        return {"bytes": file.stat().st_size, "seconds": statistics.median(seconds)}


class Sums(Callback):
    """Counts what a process sums with the others besides DDP's own buckets, which never pass through Python.

    Args:
        file: File to which the first process writes bytes and seconds of each step.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self.rows.append({"bytes": 0, "seconds": 0.0})

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Put the count around PyTorch's function."""
        stock = torch.distributed.all_reduce

        def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = stock(tensor, *arguments, **options)
            if self.rows and tensor.is_floating_point():
                self.rows[-1]["bytes"] += tensor.numel() * tensor.element_size()
                self.rows[-1]["seconds"] += time.perf_counter() - start
            return result

        torch.distributed.all_reduce = counted  # type: ignore[assignment] # of these processes, which end with the training

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the rows."""
        if trainer.is_global_zero:
            self.file.write_text(json.dumps(self.rows))


def measured_step(network: str, choices: int, size: int = 64) -> dict[str, float]:
    """The bytes that a measured step sums over two processes of this machine, beyond those of another step.

    Args:
        network: A backbone's name.
        choices: Jacobian choices that are compared.
        size: Height and width of the images; gradients do not depend on it.

    Returns:
        Bytes that each process hands over to be summed, and the seconds that takes.
    """
    from nslightning import Jacobians
    from nslightning.callbacks import GradientDivergence
    from nslightning.data import Synthetic
    from nslightning.models import ImageClassifier

    named = {f"relu{i}": Jacobians(relu=float(i)) for i in range(1, choices + 1)}
    data = Synthetic(image_shape=(3, size, size), num_classes=1000, images=32, eval_images=4, batch_size=4)
    with tempfile.TemporaryDirectory() as folder:
        sums = Sums(Path(folder, "sums.json"))
        Trainer(
            accelerator="cpu", devices=2, strategy="ddp_spawn", max_steps=4, logger=False, enable_checkpointing=False,
            callbacks=[GradientDivergence(named, every_n_steps=2), sums], default_root_dir=folder,
            enable_progress_bar=False, limit_val_batches=0, num_sanity_val_steps=0,
        ).fit(ImageClassifier(network, num_classes=1000, image_shape=(3, size, size)), data)  # fmt: skip
        rows = json.loads(sums.file.read_text())
    # The first measured step checks once that differences add up; from the next on it is as all that follow.
    return {name: rows[2][name] - rows[3][name] for name in ("bytes", "seconds")}


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a folder of images, to time their preparation")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--network", default="resnet50", help="of torchvision (default: resnet50)")
    parser.add_argument("--batch", type=int, default=128, help="images per step of one device")
    parser.add_argument("--device-rate", type=float, default=2000, help="images a second of one device (default: 2000)")
    parser.add_argument("--cores", type=float, default=16, help="cores beside one device (default: 16)")
    parser.add_argument("--link", type=float, default=12.5e9, help="bytes a second of one device's network share")
    parser.add_argument("--storage", type=float, default=10e9, help="bytes a second that storage serves to all")
    parser.add_argument("--image-bytes", type=float, default=110e3, help="bytes of a file (ImageNet: 110,000)")
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    arguments = parser.parse_args()

    rate, size = images_per_core(arguments.images, arguments.seconds)
    network = torchvision.models.get_model(arguments.network, weights=None)
    parameters = sum(p.numel() for p in network.parameters())
    machine = Machine(
        arguments.device_rate, arguments.cores, rate, arguments.link, arguments.storage, arguments.image_bytes
    )
    rows: list[dict[str, Any]] = [
        {"devices": n, **needs(machine, parameters, arguments.batch, n, arguments.choices, arguments.every)}
        for n in (1, 8, 64, 512)
    ]
    content: dict[str, Any] = {
        "machine": describe("cpu"),
        "measured": {
            "images_per_core": rate,
            "bytes_of_the_timed_files": size,
            "parameters": parameters,
            "checkpoint": checkpoint(network),
            "measured_step": measured_step(f"torchvision/{arguments.network}", arguments.choices),
        },
        "assumed": {
            **asdict(machine),
            "batch": arguments.batch,
            "choices": arguments.choices,
            "every": arguments.every,
        },
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    saved, summed = content["measured"]["checkpoint"], content["measured"]["measured_step"]
    print(
        f"{rate:.0f} images a second per core; a checkpoint of {saved['bytes'] / 1e6:.0f} MB in "
        f"{saved['seconds']:.2f} s; a measured step sums "
        f"{summed['bytes'] / 1e6:.0f} MB more, in {summed['seconds']:.2f} s"
    )
    for row in rows:
        print(
            f"{row['devices']:4} devices: {row['images_per_second']:12,.0f} images/s, {row['efficiency']:4.0%} of all"
            f" devices' own, bound by {row['bound']}; all-reduce {row['all_reduce_seconds'] * 1e3:.1f} ms a step,"
            f" measured steps {row['measured_steps_share']:.3%}"
        )


if __name__ == "__main__":
    main()
