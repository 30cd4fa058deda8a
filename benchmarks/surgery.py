"""The cost of reaching functional calls: training steps of a patched network against the stock one.

``python -m benchmarks.surgery --batch=32`` times one forward and backward of ResNet-50 (modules only), Inception-v3 and
GoogLeNet (functional calls), and the papers' VGG11 and ResNet-18 on images of CIFAR's size, all in training mode with
two-class labels on random images, in turn as

- ``stock``: the network as torchvision makes it;
- ``mode``: with a `TorchFunctionMode` that does nothing but call, entered once around the forward: what watching calls
  costs at the very least;
- ``skipped``: patched with every site left alone: our mode, its look-up and the search for the caller;
- ``native``: patched under the reference choice: all of it, and the search for ties;
- ``minimal``: patched with ReLU'(0) = 1 and equal shares in max pooling.

The order changes from round to round. ``--evaluation`` times a forward without gradients instead. Printed are the
fastest steps and the median over the rounds of the ratio to the stock step of the same round, which a busy machine
disturbs less.
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from benchmarks.machine import describe
from nslightning import Jacobians, patch
from nslightning.models.backbones import create_backbone

NETWORKS = {
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=10), 224),
    "inception_v3": (
        lambda: torchvision.models.inception_v3(num_classes=10, init_weights=False, aux_logits=False),
        299,
    ),
    "vgg11, 32x32": (lambda: create_backbone("paper/vgg11", 10, (3, 32, 32)), 32),
    "resnet18, 32x32": (lambda: create_backbone("paper/resnet18", 10, (3, 32, 32)), 32),
    "googlenet": (lambda: torchvision.models.googlenet(num_classes=10, init_weights=False, aux_logits=False), 224),
}


class Watched(nn.Module):
    """A network under a mode that does nothing."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with BaseTorchFunctionMode():
            return self.network(x)


def variants(network: nn.Module) -> dict[str, nn.Module]:
    """The network under every treatment; all share the parameters."""
    memo = {id(t): t for t in (*network.parameters(), *network.buffers())}
    made = {name: copy.deepcopy(network, dict(memo)) for name in ("skipped", "native", "minimal")}
    patch(made["skipped"], Jacobians(), skip="*")
    patch(made["native"], Jacobians())
    patch(made["minimal"], Jacobians(relu=1.0, max_pool="minimal"))
    return {"stock": network, "mode": Watched(network), **made}


def step(network: nn.Module, x: Tensor, y: Tensor, synchronize: Callable[[], None], autocast: bool = False) -> float:
    """The seconds of one forward and, of a network in training, backward."""
    network.zero_grad()
    synchronize()
    start = time.perf_counter()
    if network.training:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(network(x), y)
        loss.backward()
    else:
        with torch.inference_mode():
            network(x)
    synchronize()
    return time.perf_counter() - start


def measure(
    name: str, batch: int, rounds: int, device: torch.device, training: bool, autocast: bool = False
) -> dict[str, list[float]]:
    """The seconds of every round by treatment."""
    build, size = NETWORKS[name]
    torch.manual_seed(0)
    layout = torch.channels_last if autocast else torch.contiguous_format
    network = build().to(device, memory_format=layout)
    models = {treatment: model.train(training) for treatment, model in variants(network).items()}
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
    y = torch.arange(batch, device=device) % 10
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {treatment: [] for treatment in models}
    order = list(models)
    for i in range(rounds + 1):
        random.Random(i).shuffle(order)
        for treatment in order:
            taken = step(models[treatment], x, y, synchronize, autocast)
            if i:  # the first round warms up
                seconds[treatment].append(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--evaluation", action="store_true", help="time forwards in evaluation, without gradients")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 by autocast, in channels_last memory")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    machine, precision = describe(args.device.type), ", bfloat16 by autocast, channels_last" if args.autocast else ""
    lines = [
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} thread(s), torch {machine['torch']}, commit "
        f"{machine['commit']}, batch {args.batch}, {args.rounds} rounds{precision}",
        "",
        "| network | treatment | fastest step (s) | over stock, fastest | over stock, median of rounds |",
        "|---|---|--:|--:|--:|",
    ]
    print("\n".join(lines))
    for name in args.networks:
        seconds = measure(name, args.batch, args.rounds, args.device, not args.evaluation, args.autocast)
        for treatment, taken in seconds.items():
            fastest = min(taken) / min(seconds["stock"]) - 1
            median = statistics.median(a / b for a, b in zip(taken, seconds["stock"], strict=True)) - 1
            lines.append(f"| {name} | {treatment} | {min(taken):.4f} | {fastest:+.1%} | {median:+.1%} |")
            print(lines[-1], flush=True)
    if args.out:
        args.out.write_text(
            "\n".join([f"# {'Evaluation' if args.evaluation else 'Training steps'} of patched networks", "", *lines])
            + "\n"
        )


if __name__ == "__main__":
    main()
