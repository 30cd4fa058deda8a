"""The memory of a training step under each choice, against stock PyTorch: ``python -m benchmarks.memory``.

Two figures for forward, loss, backward and an SGD step of a torchvision network in training mode. ``kept`` is what the
forward keeps for the backward: the bytes of all distinct storages that autograd saves, beside the parameters. ``peak``
is the most that is allocated at once, parameters included: on a CPU summed from the allocator's events in a profile,
on CUDA as the caching allocator counts. Both are exact counts, not samples, so that no quiet machine is needed.

Fresh weights hardly ever put a ReLU at 0, so each network is also measured with ``dead`` channels: the weights and
biases of half the channels, in each layer that feeds a ReLU, are 0, and with them half of all its inputs.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks.machine import describe
from nslightning import Jacobians, patch

CHOICES = {
    "stock": None,
    "patched, reference choice": Jacobians(),
    "relu=1": Jacobians(relu=1.0),
    "max_pool=minimal": Jacobians(max_pool="minimal"),
    "relu=1, max_pool=minimal": Jacobians(relu=1.0, max_pool="minimal"),
}


def kill_half(model: nn.Module) -> None:
    """Make the even output channels 0, of the normalisations, or of the layers where there are none."""
    normalised = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    kinds = (nn.BatchNorm2d,) if normalised else (nn.Conv2d, nn.Linear)
    for m in model.modules():
        if isinstance(m, kinds):
            for p in m.parameters(recurse=False):
                p.data[::2] = 0


def kept(f: Callable[[Tensor], Any], x: Tensor, parameters: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that a forward keeps for the backward, beside the parameters and the input."""
    own = {t.untyped_storage().data_ptr() for t in (*parameters, x)}
    sizes: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = f(x)
    del output
    return sum(sizes.values())


def peak(step: Callable[[], None], before: int, device: str) -> int:
    """The most bytes that are allocated at once in a step, with those that were before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        return int(torch.cuda.max_memory_allocated())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes: Iterator[int] = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return before + max(itertools.accumulate(changes))


def measure(name: str, batch: int, size: int, dead: bool, choice: Jacobians | None, device: str) -> dict[str, int]:
    """One network's step under one choice."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).to(device).train()
    if dead:
        kill_half(model)
    if choice is not None:
        patch(model, choice)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = torch.randn(batch, 3, size, size, device=device), torch.zeros(batch, dtype=torch.long, device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    tensors = (*model.parameters(), *model.buffers(), x, y)
    before = sum(t.numel() * t.element_size() for t in tensors)
    return {"kept": kept(model, x, model.parameters()), "peak": peak(step, before, device)}


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    machine = result["machine"]
    lines = [
        f"# Memory of a training step on {machine['gpu'] or 'cpu'}",
        "",
        f"{machine['cpu']}, torch {machine['torch']}, `python -m benchmarks.memory`. MB kept for the backward and at"
        " the peak; the ratios are to stock. *Dead* are networks of which half the channels are 0 in each layer.",
    ]
    for case in result["cases"]:
        dead = ", dead" if case["dead"] else ""
        lines += ["", f"## {case['network']}, batch {case['batch']} at {case['size']}x{case['size']}{dead}", ""]
        lines += ["| choice | kept | ratio | peak | ratio |", "|---|---|---|---|---|"]
        stock = case["figures"]["stock"]
        for choice, got in case["figures"].items():
            cells = (f"{got[k] / 1e6:.1f} | {got[k] / stock[k]:.4f}" for k in ("kept", "peak"))
            lines.append(f"| {choice} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table and write it, with all figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["vgg11", "resnet50"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    a = parser.parse_args()
    cases = []
    for network, dead in itertools.product(a.networks, (False, True)):
        figures = {name: measure(network, a.batch, a.size, dead, choice, a.device) for name, choice in CHOICES.items()}
        cases.append({"network": network, "batch": a.batch, "size": a.size, "dead": dead, "figures": figures})
        print(network, "dead" if dead else "", figures, flush=True)
    result = {"machine": describe(a.device), "cases": cases}
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / f"memory_{a.device}.json").write_text(json.dumps(result, indent=1) + "\n")
    (a.out / f"memory_{a.device}.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
