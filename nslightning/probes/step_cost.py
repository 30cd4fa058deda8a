"""Measures the time of a training step: its parts, and the additions of patching and of measuring."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.jacobians import Jacobians
from nslightning.probes.divergence import measure_differences
from nslightning.probes.propagation import recording
from nslightning.surgery import patch

__all__ = ["PARTS", "StepCost", "step_cost"]

#: The parts of a step, in their order.
PARTS = ("data", "forward", "backward", "optimizer")


@dataclass
class StepCost:
    """Milliseconds of a training step, medians over the rounds.

    Args:
        stock: The parts of a step of the network as it is.
        patched: The parts of the same step of the patched network.
        measured: The parts of a step on which the choices are measured; ``measuring`` is the time after its backward.
        host: Time that the host works on a patched step before the device has finished; None where there is no device
            beside the host.
    """

    stock: dict[str, float] = field(default_factory=dict)
    patched: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    host: float | None = None

    def __str__(self) -> str:
        """A table: parts, totals, and what patching and measuring add."""
        columns = {"stock": self.stock, "patched": self.patched, "measured": self.measured}
        lines = [f"{'ms':<10}" + "".join(f"{name:>10}" for name in columns)]
        for part in (*PARTS, "measuring"):
            values = (f"{times[part]:10.3f}" if part in times else f"{'':>10}" for times in columns.values())
            lines.append(f"{part:<10}" + "".join(values))
        stock, patched, measured = (sum(times.values()) for times in columns.values())
        lines.append(f"{'step':<10}{stock:10.3f}{patched:10.3f}{measured:10.3f}")
        lines.append(f"patching adds {_share(patched, stock)} to a step, measuring {_share(measured, patched)} to that")
        if self.host is not None:
            lines.append(f"the host works {self.host:.3f} ms on a patched step ({100 * self.host / patched:.0f} %)")
        return "\n".join(lines)


def _share(whole: float, base: float) -> str:
    return f"{100 * (whole / base - 1):+.1f} %"


def step_cost(
    build: Callable[[], nn.Module],
    data: Callable[[], tuple[Tensor, Tensor]],
    choices: Mapping[str, Jacobians],
    *,
    jacobians: Jacobians = Jacobians(),  # noqa: B008 # frozen
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    repetitions: int = 20,
    warmup: int = 3,
) -> StepCost:
    """Time the parts of a training step, stock, patched and measured in turn.

    On a device each part is timed until the device is done with it, so that the parts of a step together take longer
    than the step, in which the host runs ahead; ``host`` is timed without waiting.

    Args:
        build: Makes the network, on its device and in training mode.
        data: Makes a batch: inputs and labels of a classification, on the same device.
        choices: The choices that a measured step compares with ``jacobians``, by name.
        jacobians: The choice that the patched network trains under.
        optimizer: Makes the optimizer of ``(parameters, lr)``.
        repetitions: Rounds that count.
        warmup: Rounds before them.

    Returns:
        The times.

    Raises:
        ValueError: If no round is to count.

    Example:
        >>> images = torch.randn(4, 6), torch.arange(4) % 2
        >>> times = step_cost(lambda: nn.Sequential(nn.Linear(6, 2), nn.ReLU()), lambda: images,
        ...                   {"relu1": Jacobians(relu=1.0)}, repetitions=2)
        >>> sorted(times.measured)
        ['backward', 'data', 'forward', 'measuring', 'optimizer']
    """
    if repetitions < 1:
        raise ValueError(f"repetitions={repetitions}: at least one round has to count")
    networks = {"stock": build(), "patched": build(), "measured": build()}
    optimizers = {name: optimizer(network.parameters(), lr=1e-3) for name, network in networks.items()}
    for name in ("patched", "measured"):
        patch(networks[name], jacobians)
    device = next(networks["stock"].parameters()).device
    times: dict[str, dict[str, list[float]]] = {name: {} for name in networks}
    hosts: list[float] = []
    for turn in range(warmup + repetitions):
        for name, network in networks.items():
            clock = _Clock(device)
            _step(network, optimizers[name], data, clock, choices if name == "measured" else {})
            if turn >= warmup:
                for part, milliseconds in clock.parts.items():
                    times[name].setdefault(part, []).append(milliseconds)
        if device.type != "cpu":
            running = _Clock(device, waits=False)
            _step(networks["patched"], optimizers["patched"], data, running, {})
            hosts += [sum(running.parts.values())] if turn >= warmup else []
    medians = {
        name: {part: statistics.median(values) for part, values in parts.items()} for name, parts in times.items()
    }
    return StepCost(**medians, host=statistics.median(hosts) if hosts else None)


class _Clock:
    """Times the parts of a step.

    Args:
        device: The device on which the step runs.
        waits: Whether a part ends when the device is done with it.
    """

    def __init__(self, device: torch.device, waits: bool = True) -> None:
        self._device, self._waits = device, waits and device.type == "cuda"
        self.parts: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._last = time.perf_counter()

    def ends(self, part: str) -> None:
        """A part ends here, and the next one begins."""
        if self._waits:
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.parts[part] = (now - self._last) * 1e3
        self._last = now


def _step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Callable[[], tuple[Tensor, Tensor]],
    clock: _Clock,
    choices: Mapping[str, Jacobians],
) -> None:
    x, y = data()
    clock.ends("data")
    loss = F.cross_entropy(network(x).float(), y)
    clock.ends("forward")
    if choices:
        named = dict(network.named_parameters())
        with recording(network) as met:
            met.backward(loss)
        clock.ends("backward")
        measure_differences(met.carried(choices, named, retain_graph=False), _gradients(named))
        clock.ends("measuring")
    else:
        loss.backward()
        clock.ends("backward")
    optimizer.step()
    optimizer.zero_grad()
    clock.ends("optimizer")


def _gradients(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
