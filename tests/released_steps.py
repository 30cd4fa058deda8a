"""Twenty training steps of the papers' released code, recorded once: ``released_steps.json`` beside this file.

The code of both papers is public and not part of this project. To record again, check out
``github.com/deel-ai/relu-prime`` and ``github.com/ryanboustany/MaxPool-numerical`` and call

    python tests/released_steps.py RELU_PRIME MAXPOOL_NUMERICAL

Their networks and operations are imported as they are; the loop is the one of their ``train.py``: cross-entropy of the
network's own output, SGD with momentum and weight decay. In 16 bits on a CPU their linear layers and convolutions run
under :class:`nslightning.arithmetic.HalfProducts`, as ours do. Weights and images are those of :func:`start`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_suffix(".json")
STEPS, RATE = 20, 0.01

#: The trainings, by name: settings of a cell.
CASES: dict[str, dict[str, Any]] = {
    "lenet5, 32 bit": {"backbone": "paper/lenet5", "precision": 32},
    "lenet5, 16 bit": {"backbone": "paper/lenet5", "precision": 16},
    "vgg11, 32 bit": {"backbone": "paper/vgg11", "precision": 32, "batch_norm": False},
    "lenet5, beta = 10^4, 32 bit": {"backbone": "paper/lenet5", "max_pool": 1e4, "precision": 32},
    "lenet5, beta = 10^3, 16 bit": {"backbone": "paper/lenet5", "max_pool": 1e3, "precision": 16},
    "vgg11, beta = 10^4, 32 bit": {"backbone": "paper/vgg11", "max_pool": 1e4, "precision": 32, "batch_norm": False},
    "vgg11, alpha = 0.1, 32 bit": {"backbone": "paper/vgg11", "relu": 0.1, "precision": 32, "batch_norm": False},
}


def start(network: nn.Module, backbone: str) -> None:
    """Draw weights that any machine draws alike; the first layer has no bias, so that a black patch meets a tie."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for i, p in enumerate(network.parameters()):
            fan_in = p[0].numel() if p.dim() > 1 else 100
            p.copy_((torch.rand(p.shape, generator=g) * 2 - 1) * (3 / fan_in) ** 0.5 * (0.0 if i == 1 else 1.0))


def batches(backbone: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The images, each with a black patch, and their labels."""
    g = torch.Generator().manual_seed(11)
    count, shape = (32, (1, 28, 28)) if "lenet" in backbone else (4, (3, 32, 32))
    for _ in range(STEPS):
        x = torch.rand((count, *shape), generator=g)
        x[:, :, :10] = 0
        yield x, torch.randint(0, 10, (count,), generator=g)


def _released(case: dict[str, Any], relus: Path, pools: Path) -> list[float]:
    from nslightning.arithmetic import HalfProducts

    sys.path.insert(0, str(pools))
    modules = {}
    for name, file in (("maxpool", pools / "maxpool.py"), ("theirs", relus / "relu.py")):
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    lenet, vgg = (importlib.import_module(f"models.{name}") for name in ("lenet", "vgg"))
    pool, relu = modules["maxpool"].MaxPool2DBeta, modules["theirs"].ReLUAlpha
    made = {"maxpool_fn": lambda: pool(case.get("max_pool", 0)), "relu_fn": lambda: relu(case.get("relu", 0))}
    network = lenet.LeNet5(**made) if "lenet" in case["backbone"] else vgg.VGG("VGG11", **made)
    start(network, case["backbone"])
    half = case["precision"] == 16
    if half:
        network.half()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    criterion, losses = nn.CrossEntropyLoss(), []
    for x, y in batches(case["backbone"]):
        optimizer.zero_grad()
        if half:
            with HalfProducts():
                loss = criterion(network(x.half()), y)
        else:
            loss = criterion(network(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    recorded = {name: _released(case, Path(sys.argv[1]), Path(sys.argv[2])) for name, case in CASES.items()}
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")
