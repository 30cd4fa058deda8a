"""The host's time for a call, patched and stock: ``python -m benchmarks.host``.

Tensors are so small that the arithmetic costs nothing: the times are those of Python, autograd and starting kernels.
Calls are chained, and one forward and one backward through the chain are timed, so that the figure is microseconds a
call. ``module`` is a module inside a patched model, as networks call it; ``function`` a functional call inside one;
``step`` a whole training step of LeNet-5. Closures run in turn, and the smallest time of each is compared.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import describe, interleaved
from nslightning import Jacobians, patch
from nslightning.models import create_backbone
from nslightning.ops.autograd import native

CHAIN = 20  # ReLU, ReLU6 and the leaky one keep their ties from call to call
CHOICE = Jacobians(
    relu=1.0, relu6=(1.0, 1.0), leaky_relu=1.0, hardswish=(1.0, 1.0), hardsigmoid=(0.1, 0.1), max_pool="minimal"
)


def ties(position: float) -> Callable[[str], Tensor]:
    """64 entries, of which every other is on a kink."""

    def make(device: str) -> Tensor:
        x = torch.linspace(-4, 4, 64, device=device)
        x[::2] = position
        return x.requires_grad_()

    return make


MODULES: dict[str, tuple[nn.Module, Callable[[str], Tensor], int]] = {
    "relu": (nn.ReLU(), ties(0.0), CHAIN),
    "relu, no tie": (nn.ReLU(), lambda device: torch.ones(64, device=device, requires_grad=True), CHAIN),
    "relu6": (nn.ReLU6(), ties(0.0), CHAIN),
    "leaky_relu": (nn.LeakyReLU(), ties(0.0), CHAIN),
    "hardswish": (nn.Hardswish(), ties(3.0), CHAIN),
    "hardsigmoid": (nn.Hardsigmoid(), ties(3.0), 1),
    "max_pool, 64 windows": (nn.MaxPool2d(2), lambda d: torch.zeros(1, 1, 16, 16, device=d, requires_grad=True), 1),
}


def chained(call: Callable[[Tensor], Tensor], x: Tensor, length: int) -> Callable[[], None]:
    """One forward and backward through ``length`` calls."""

    def run() -> None:
        y = x
        for _ in range(length):
            y = call(y)
        torch.autograd.grad(y.sum(), x)

    return run


class Calls(nn.Module):
    """A chain of functional calls."""

    def forward(self, x: Tensor) -> Tensor:
        """Call ReLU again and again."""
        for _ in range(CHAIN):
            x = F.relu(x)
        return x


def step(model: Any, batch: int, device: str, shape: tuple[int, ...] = (1, 28, 28)) -> Callable[[], None]:
    """A training step with plain SGD."""
    x, y = torch.randn(batch, *shape, device=device), torch.arange(batch, device=device) % 10
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def ratio(stock: Callable[[], None], patched: Callable[[], None], calls: int, device: str, seconds: float) -> Any:
    """Microseconds a call of both, and their ratio, of the smallest times."""
    times = interleaved({"stock": stock, "patched": patched}, device, seconds, least=50)
    a, b = (float(times[name].min()) / calls * 1e6 for name in ("stock", "patched"))
    return {"stock_us": round(a, 2), "patched_us": round(b, 2), "ratio": round(b / a, 3)}


def main() -> None:
    """Measure and write ``benchmarks/results/host_<device>.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each closure")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device: str = args.device
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for name, (module, make, length) in MODULES.items():
        x, stock = make(device), copy.deepcopy(module)
        model = nn.Sequential(copy.deepcopy(module))
        patch(model, CHOICE)
        model(x)  # the first forward completes the report
        runs = (chained(stock, x, length), chained(model[0], x, length))
        rows[f"module: {name}"] = ratio(*runs, length, device, args.seconds)
    x = ties(0.0)(device)
    calls = Calls()
    patch(calls, CHOICE)
    rows["function: relu"] = ratio(chained(Calls(), x, 1), chained(calls, x, 1), CHAIN, device, args.seconds)
    for batch in (1, 16):
        nets = [create_backbone("paper/lenet5", 10, (1, 28, 28)).to(device) for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        patch(nets[1], CHOICE)
        steps = [step(net, batch, device) for net in nets]
        rows[f"step: LeNet-5, batch {batch}"] = ratio(*steps, 1, device, args.seconds)
    result = {"machine": describe(device), "threads": 1, "cpp_nodes": native.state(), "results": rows}
    out = args.out or Path(__file__).parent / "results" / f"host_{device}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name:28}stock {row['stock_us']:8.1f} us   patched {row['patched_us']:8.1f} us   x{row['ratio']:.2f}")


if __name__ == "__main__":
    main()
