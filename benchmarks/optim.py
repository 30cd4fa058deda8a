"""Step time and state of INNA and INNAprop beside torch's AdamW.

    python -m benchmarks.optim --out benchmarks/results/optim_cpu.json

Only the shapes of the networks' parameters are used. The optimizers take turns, so that what else the machine
does falls on all of them; ratios to `AdamW foreach` are formed within a turn. On one CPU thread the clock is
the thread's own CPU time, otherwise it is wall time around a synchronised step.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.optim import AdamW, Optimizer

from nslightning.optim import INNA, INNAprop

REFERENCE = "AdamW foreach"
OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], Optimizer]] = {
    REFERENCE: lambda params: AdamW(params, foreach=True),
    "AdamW for-loop": lambda params: AdamW(params, foreach=False),
    "AdamW fused": lambda params: AdamW(params, fused=True),
    "INNAprop foreach": lambda params: INNAprop(params, foreach=True),
    "INNAprop for-loop": lambda params: INNAprop(params, foreach=False),
    "INNAprop fused": lambda params: INNAprop(params, fused=True),
    "INNAprop foreach, decoupled": lambda params: INNAprop(params, foreach=True, decay="decoupled"),
    "INNAprop foreach, alpha=beta=1": lambda params: INNAprop(params, foreach=True, alpha=1.0, beta=1.0),
    "INNA foreach": lambda params: INNA(params, foreach=True),
    "INNA for-loop": lambda params: INNA(params, foreach=False),
}


def parameters(network: str, device: torch.device) -> list[torch.nn.Parameter]:
    with torch.device("meta"):
        shapes = [param.shape for param in torchvision.models.get_model(network).parameters()]
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(0.02 * torch.randn(shape, device=device, generator=generator))
        param.grad = 1e-3 * torch.randn(shape, device=device, generator=generator)
        params.append(param)
    return params


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": low, "median": median, "q3": high}


def measure(network: str, device: torch.device, repetitions: int) -> dict[str, Any]:
    params = parameters(network, device)
    optimizers = {name: build(params) for name, build in OPTIMIZERS.items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(repetitions + 2):
        for name, optimizer in optimizers.items():
            elapsed = seconds(optimizer.step, device)
            if turn >= 2:  # the first turns create state and warm caches
                times[name].append(elapsed)
    rows = {}
    for name, optimizer in optimizers.items():
        state = [t for entry in optimizer.state.values() for t in entry.values()]
        ratios = [mine / reference for mine, reference in zip(times[name], times[REFERENCE], strict=True)]
        rows[name] = {
            "milliseconds": quartiles([1e3 * t for t in times[name]]),
            "ratio": quartiles(ratios),
            "state_bytes": sum(t.numel() * t.element_size() for t in state),
        }
    return {"parameters": sum(param.numel() for param in params), "tensors": len(params), "optimizers": rows}


def machine(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu,
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def table(result: dict[str, Any]) -> str:
    head = result["machine"]
    lines = [
        f"# Optimizer step on {head['device']}",
        "",
        f"{head['cpu']}, {head['cores']} cores, {head['threads']} thread(s), torch {head['torch']}, "
        f"{result['repetitions']} interleaved repetitions, clock: {result['clock']}. Median [quartiles]; the "
        f"ratio is to {REFERENCE}, the state in parameter-sized float32 buffers.",
    ]
    for network, values in result["networks"].items():
        size = 4 * values["parameters"]
        lines += [
            "",
            f"## {network}: {values['parameters'] / 1e6:.1f} M parameters in {values['tensors']} tensors",
            "",
            "| optimizer | step (ms) | ratio | state |",
            "|---|---|---|---|",
        ]
        for name, row in values["optimizers"].items():
            ms, ratio = row["milliseconds"], row["ratio"]
            lines.append(
                f"| {name} | {ms['median']:.1f} [{ms['q1']:.1f}, {ms['q3']:.1f}] "
                f"| {ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}] "
                f"| {row['state_bytes'] / size:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, timed in CPU time)")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vit_b_16"])
    parser.add_argument("--out", type=Path, help="write this JSON and the table beside it, as .md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "machine": machine(args.device),
        "repetitions": args.repetitions,
        "clock": "thread CPU time" if args.device.type == "cpu" and args.threads == 1 else "wall",
        "networks": {name: measure(name, args.device, args.repetitions) for name in args.networks},
    }
    print(table(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
        args.out.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
