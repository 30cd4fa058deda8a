"""What a training needs of storage, processors and network as devices are added: ``python -m benchmarks.scaling``.

A model on paper. Measured here: the parameters of the network, and how many images one core reads, crops and flips a
second (of the folder that ``--images`` names). Assumed, and listed as such: what one device computes a second, and
what storage and network carry. Overlap is assumed perfect: the all-reduce of gradients hides behind the backward, two
thirds of a step, and only what is longer is paid for.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision

from benchmarks.machine import describe


@dataclass(frozen=True)
class Machine:
    """One device's share of a machine, and what all devices share.

    Attributes:
        images_per_second: What one device trains on, with its data ready.
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
    """What a training on several devices needs, and what bounds it.

    Args:
        machine: Rates.
        parameters: Trained parameters of the network, of four bytes each.
        batch: Images per step of one device.
        devices: The number of devices.
        choices: Jacobian choices that a measured step compares; each adds an all-reduce.
        every: Steps from one measured step to the next.

    Returns:
        Seconds and rates by name; ``images_per_second`` is what the slowest part leaves of all devices.
    """
    step = batch / machine.images_per_second
    reduced = 2 * (devices - 1) / devices * 4 * parameters  # ring: each device sends and receives that many bytes
    all_reduce = reduced / machine.network
    with_network = step + max(0.0, all_reduce - 2 / 3 * step)
    measured = choices * all_reduce / every  # the arithmetic of a measured step is the same on one device
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
    content = {
        "machine": describe("cpu"),
        "measured": {"images_per_core": rate, "bytes_of_the_timed_files": size, "parameters": parameters},
        "assumed": {
            **asdict(machine),
            "batch": arguments.batch,
            "choices": arguments.choices,
            "every": arguments.every,
        },
        # Weights, and SGD's one buffer of momentum: four bytes each.
        "checkpoint_bytes": 8 * parameters,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{rate:.0f} images a second per core; checkpoint {8 * parameters / 1e6:.0f} MB")
    for row in rows:
        print(
            f"{row['devices']:4} devices: {row['images_per_second']:12,.0f} images/s, {row['efficiency']:4.0%} of all"
            f" devices' own, bound by {row['bound']}; all-reduce {row['all_reduce_seconds'] * 1e3:.1f} ms a step,"
            f" measured steps {row['measured_steps_share']:.3%}"
        )


if __name__ == "__main__":
    main()
