"""Measures the cost of a gradient: time, memory and operations relative to evaluating the loss once.

The nonsmooth cheap gradient principle (Bolte, Boustany, Pauwels, Pesquet-Popescu, *On the complexity of
nonsmooth automatic differentiation*, ICLR 2023) bounds ``cost(loss and gradient) / cost(loss)`` by a constant
that depends on the elementary operations alone, about 5 for ReLU networks, whatever Jacobian is chosen at the
ties. Forward mode pays one Jacobian-vector product per parameter instead.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.arithmetic.record import processor
from nslightning.jacobians import Jacobians
from nslightning.probes.cost_data import STOCK, ChoiceCost, CostReport, CostScaling, ModuleCost, Timing
from nslightning.probes.ties import ties
from nslightning.surgery import PatchWarning, chooses, patch, selections, surgeries, unpatch

__all__ = ["BOUND", "cost_ratio", "cost_scaling"]

BOUND = 5.0  # for {+, x, affine, inverse, exp, log, ReLU, max} at unit costs
_MODEL = "(model)"


def cost_ratio(
    model: nn.Module,
    batch: tuple[Any, Any],
    choices: Mapping[str, Jacobians],
    *,
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    repetitions: int = 20,
    warmup: int = 2,
    per_module: bool = True,
    memory: bool = True,
    bound: float = BOUND,
    name: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> CostReport:
    """Measure what the gradient of a loss costs relative to the loss, under several Jacobian choices.

    Everything is measured on copies, in the model's training or evaluation mode, on its device and in its
    dtype: the model's parameters, buffers, ``grad`` fields and flags and torch's random streams stay as they
    are. A patched model keeps its patch (its ``only`` and ``skip``) under each choice; any other is patched whole. The
    computations are interleaved in random order, round by round, so that a disturbance meets all of them
    alike. On a CPU they run on one thread and the clock is that thread's own time, on CUDA it is CUDA's
    events.

    The row ``"stock"`` is the unpatched model; a choice that equals ``Jacobians()`` is added as ``"native"``
    where none is given: its distance from stock is the price of the patched operation, its distance from the
    others that of the choice. The Jacobian-vector product is of the stock model, as patched operations have
    no forward mode.

    Args:
        model: The model, patched or not.
        batch: ``(inputs, targets)``; the inputs are a tensor, a tuple of positional or a dict of keyword
            arguments. Floating tensors are cast to the model's dtype, all are moved to its device.
        choices: The choices by name.
        loss: ``(output, targets) -> 0-d tensor``.
        repetitions: Measured rounds.
        warmup: Rounds before these, not measured.
        per_module: Measure the modules one by one too; needs the memory of all their inputs.
        memory: Measure peak memory too.
        bound: The largest ratio that the theory allows, for the verdict.
        name: Name of the model in the report; its class by default.
        progress: Called with a line before each part of the work, and in the measured rounds.

    Returns:
        The report.

    Raises:
        ValueError: If a choice is named ``"stock"``, no parameter requires a gradient, the loss is not a 0-d
            tensor with a gradient, or a number of rounds is not admissible.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batch = torch.zeros(2, 4), torch.tensor([0, 2])
        >>> report = cost_ratio(net, batch, {"relu1": Jacobians(relu=1.0)}, repetitions=2)
        >>> [c.name for c in report.choices], report.parameters
        (['stock', 'native', 'relu1'], 67)
    """
    _check(model, batch, choices, repetitions, warmup)
    tell = progress or (lambda line: None)
    choices = dict(choices)
    if Jacobians() not in choices.values():
        free = next(n for n in ("native", "reference", "Jacobians()") if n not in choices)
        choices = {free: Jacobians(), **choices}
    parameter = next(p for p in model.parameters() if p.requires_grad)
    device, dtype = parameter.device, parameter.dtype
    inputs, targets = (_to(part, device, dtype) for part in batch)

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _one_thread(device),
        _random_state(device),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", PatchWarning)  # the report shows it: 0 evaluations
        work = copy.deepcopy(model)
        stock = _variant(work, None)
        variants = {STOCK: stock} | {n: _variant(work, jacobians) for n, jacobians in choices.items()}
        trainable = [p for p in work.parameters() if p.requires_grad]  # shared by all variants
        buffers = {id(b): (b, b.clone()) for b in work.buffers()}

        def same_start() -> None:
            _seed(device)
            with torch.no_grad():
                for buffer, value in buffers.values():
                    buffer.copy_(value)

        def loss_of(m: nn.Module) -> Tensor:
            return loss(_call(m, inputs), targets)

        def forward() -> Any:
            with torch.no_grad():
                return loss_of(stock)

        def gradient(m: nn.Module) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss_of(m), trainable, allow_unused=True, materialize_grads=True)

        _check_loss(loss_of(stock))
        same_start()
        tell("the choices' gradients, ties and operations")
        reference = gradient(stock)
        difference = {}
        for choice, variant in variants.items():
            same_start()
            difference[choice] = _max_difference(gradient(variant), reference)
        same_start()
        tied = _count_ties(_variant(work, Jacobians()), inputs)
        flops, flop_ratio = _flops(forward, partial(gradient, stock))
        jvp, note = _jvp(stock, inputs, targets, loss)

        kept = [*work.parameters(), *work.buffers(), *_tensors((inputs, targets))]
        resident = sum(t.numel() * t.element_size() for t in kept)
        peaks: dict[str, int | None] = dict.fromkeys(["", *variants])
        method = "nothing: not asked for"
        if memory:
            tell("peak memory")
            peaks[""], method = _peak(forward, resident, device)
            for choice, variant in variants.items():
                peaks[choice], _ = _peak(partial(gradient, variant), resident, device)

        recorded = partial(loss_of, stock)
        closures: dict[str, Callable[[], Any]] = {"forward": forward, "recorded": recorded}
        closures |= {f"choice {c}": partial(gradient, variant) for c, variant in variants.items()}
        if jvp is not None:
            closures["jvp"] = jvp
        times = _interleaved(closures, repetitions, warmup, device, tell)
        modules: list[ModuleCost] = []
        unmeasured: dict[str, str] = {}
        if per_module:
            same_start()
            tell("modules one by one")
            modules, unmeasured = _modules(variants, recorded, repetitions, warmup, device)

        return CostReport(
            model=name or type(stock).__name__,
            parameters=sum(p.numel() for p in trainable),
            batch=next((t.shape[0] for t in _tensors(inputs) if t.dim()), 1),
            dtype=str(dtype).removeprefix("torch."),
            training=model.training,
            environment=_environment(device),
            forward=Timing.of(times["forward"]),
            recorded=Timing.of(times["recorded"]),
            jvp=Timing.of(times["jvp"]) if jvp is not None else None,
            jvp_note=note,
            flops=flops,
            flop_ratio=flop_ratio,
            peak_bytes=peaks[""],
            memory_method=method,
            ties=tied[0],
            evaluations=tied[1],
            bound=bound,
            choices=tuple(
                ChoiceCost(
                    choice,
                    None if choice == STOCK else choices[choice].to_dict(),
                    Timing.of(times[f"choice {choice}"]),
                    _spread(times[f"choice {choice}"], times["forward"]),
                    peaks[choice],
                    difference[choice],
                )
                for choice in variants
            ),
            modules=tuple(modules),
            unmeasured=unmeasured,
        )


def cost_scaling(
    make_model: Callable[[int], nn.Module],
    widths: Sequence[int],
    batch: tuple[Any, Any],
    choices: Mapping[str, Jacobians],
    **options: Any,
) -> CostScaling:
    """Measure a family of models at several widths, one after the other.

    Args:
        make_model: Builds the model of a width.
        widths: At least two widths.
        batch: As :func:`cost_ratio` takes it, the same for all widths.
        choices: The choices by name.
        **options: Handed to :func:`cost_ratio`.

    Returns:
        The reports, with :meth:`CostScaling.slopes`.

    Raises:
        ValueError: If fewer than two widths are given, and as :func:`cost_ratio` does.
    """
    if len(set(widths)) < 2:
        raise ValueError(f"a scaling needs at least two widths, such as 256, 512, 1024; given {list(widths)}")
    reports = tuple(cost_ratio(make_model(width), batch, choices, **options) for width in widths)
    return CostScaling(tuple(widths), reports)


# ----------------------------------------------------------------------------------------------- parts
def _variant(work: nn.Module, jacobians: Jacobians | None) -> nn.Module:
    """A copy that shares all parameters and buffers, patched with a choice, or unpatched for None."""
    variant = copy.deepcopy(work, {id(t): t for t in [*work.parameters(), *work.buffers()]})
    variant_selections = selections(variant)
    if jacobians is None:
        for name in surgeries(variant):
            unpatch(variant.get_submodule(name))
    elif variant_selections:
        for selection in variant_selections.values():
            selection.set(jacobians)
    else:
        patch(variant, jacobians, strict=False)
    return variant


def _call(model: nn.Module, inputs: Any) -> Any:
    args, kwargs = _arguments(inputs)
    return model(*args, **kwargs)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _count_ties(model: nn.Module, inputs: Any) -> tuple[int, int]:
    args, kwargs = _arguments(inputs)
    counts = ties(model, *args, **kwargs).values()
    return sum(t.tied for t in counts), sum(t.total for t in counts)


def _max_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    maxima = [(x.double() - y.double()).abs().max() for x, y in zip(a, b, strict=True) if x.numel()]
    return float(torch.stack(maxima).max()) if maxima else 0.0  # NaN passes through both maxima


def _flops(forward: Callable[[], Any], gradient: Callable[[], Any]) -> tuple[int, float | None]:
    from torch.utils.flop_counter import FlopCounterMode

    # PyTorch's own formula takes the weights' gradient of a grouped convolution for that of an ungrouped one.
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    counted = []
    for run in (forward, gradient):
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            run()
        counted.append(counter.get_total_flops())
    return counted[0], counted[1] / counted[0] if counted[0] else None


def _convolution_backward_flops(
    above: Sequence[int], inputs: Sequence[int], weight: Sequence[int], *settings: Any, **_: Any
) -> int:
    """Count the operations of a convolution's backward: each gradient takes as many products as the forward."""
    transposed, needed = settings[4], settings[7]
    places = (inputs if transposed else above)[2:]
    once = 2 * inputs[0] * math.prod(places) * math.prod(weight)
    return once * (int(needed[0]) + int(needed[1]))


def _jvp(
    stock: nn.Module, inputs: Any, targets: Any, loss: Callable[[Any, Any], Tensor]
) -> tuple[Callable[[], Any] | None, str]:
    """One Jacobian-vector product in a random direction of the trainable parameters, or why there is none."""
    parameters = {n: p.detach() for n, p in stock.named_parameters() if p.requires_grad}
    fixed = {n: p.detach() for n, p in stock.named_parameters() if not p.requires_grad}
    buffers = dict(stock.named_buffers())
    direction = {n: torch.randn_like(p) for n, p in parameters.items()}
    args, kwargs = _arguments(inputs)

    def run() -> Any:
        # Running statistics are written inside the transform, which allows that for tensors made inside only.
        def program(p: dict[str, Tensor]) -> Tensor:
            state = p | fixed | {n: b.clone() for n, b in buffers.items()}
            return loss(torch.func.functional_call(stock, state, args, kwargs), targets)

        return torch.func.jvp(program, (parameters,), (direction,))

    try:
        run()
    except RuntimeError as error:
        return None, str(error).strip().splitlines()[0]
    return run, ""


def _peak(run: Callable[[], Any], resident: int, device: torch.device) -> tuple[int | None, str]:
    """Most memory in use while ``run`` runs: the resident tensors and what it allocates."""
    run()  # what is allocated once and kept is not the run's
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return resident + torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated"
    if device.type != "cpu":
        return None, f"nothing: not supported on {device.type}"
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    held = highest = 0
    changes = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    for event in sorted(changes, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        highest = max(highest, held)
    return resident + highest, "torch.profiler's allocation events"


def _modules(
    variants: Mapping[str, nn.Module],
    run: Callable[[], Any],
    repetitions: int,
    warmup: int,
    device: torch.device,
) -> tuple[list[ModuleCost], dict[str, str]]:
    costs, unmeasured = [], {}
    for name, (args, kwargs, calls) in _innermost_calls(variants[STOCK], run).items():
        for choice, variant in variants.items():
            module = variant.get_submodule(name)
            if choice != STOCK and not chooses(module):
                continue  # nothing to choose: its cost is the stock one's
            try:
                timed = _module(module, args, kwargs, repetitions, warmup, device)
            except RuntimeError as error:
                unmeasured[name or _MODEL] = str(error).strip().splitlines()[0]
                break
            if timed is not None:
                costs.append(ModuleCost(name or _MODEL, type(module).__name__, choice, calls, *timed))
    return costs, unmeasured


def _innermost_calls(model: nn.Module, run: Callable[[], Any]) -> dict[str, tuple[Any, Any, int]]:
    """The first call's arguments, and the number of calls, of each module that calls no other."""
    stack: list[str] = []
    inner: dict[str, tuple[Any, Any, int]] = {}
    outer: set[str] = set()

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if stack:
                outer.add(stack[-1])
                inner.pop(stack[-1], None)
            stack.append(name)
            if name in inner:
                inner[name] = (*inner[name][:2], inner[name][2] + 1)
            elif name not in outer:
                inner[name] = (_fresh(args), _fresh(kwargs), 1)

        return hook

    def after(*_: Any) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(before(name), with_kwargs=True),
            module.register_forward_hook(after, always_call=True),
        ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return inner


def _fresh(value: Any) -> Any:
    """Copies of the tensors, which in-place operations will overwrite, needing a gradient where they did."""
    return _map(lambda t: t.detach().clone().requires_grad_(t.requires_grad), value)


def _module(
    module: nn.Module, args: Any, kwargs: Any, repetitions: int, warmup: int, device: torch.device
) -> tuple[Timing, Timing] | None:
    """Time one module's forward and gradient; None where it takes no part in the backward."""
    if getattr(module, "inplace", False):
        # A leaf cannot be overwritten, and a second call would see the first one's result.
        module.__dict__["inplace"] = False
        try:
            return _module(module, args, kwargs, repetitions, warmup, device)
        finally:
            module.__dict__["inplace"] = True
    wanted = [t for t in [*module.parameters(), *_tensors((args, kwargs))] if t.requires_grad]
    outputs = [t for t in _tensors(module(*args, **kwargs)) if t.requires_grad]
    if not wanted or not outputs:
        return None
    ones = [torch.ones_like(t) for t in outputs]

    def forward() -> Any:
        with torch.no_grad():
            return module(*args, **kwargs)

    def gradient() -> Any:
        results = [t for t in _tensors(module(*args, **kwargs)) if t.requires_grad]
        return torch.autograd.grad(results, wanted, ones, allow_unused=True)

    times = _interleaved({"F": forward, "B": gradient}, repetitions, warmup, device)
    return Timing.of(times["F"]), Timing.of(times["B"])


def _interleaved(
    closures: Mapping[str, Callable[[], Any]],
    repetitions: int,
    warmup: int,
    device: torch.device,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, list[float]]:
    """Milliseconds of each computation in each round, whose order is drawn from a private stream."""
    times: dict[str, list[float]] = {name: [] for name in closures}
    order, shuffle = list(closures), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(warmup + repetitions):
            tell(f"round {r + 1} of {warmup + repetitions}, {len(order)} computations each")
            shuffle(order)
            for name in order:
                taken = _milliseconds(closures[name], device)
                if r >= warmup:
                    times[name].append(taken)
    finally:
        if collecting:
            gc.enable()
    return times


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.thread_time_ns()
        run()
        return (time.thread_time_ns() - start) / 1e6
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record(torch.cuda.current_stream(device))
        run()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        return float(begin.elapsed_time(end))
    torch.accelerator.synchronize()
    start = time.perf_counter_ns()
    run()
    torch.accelerator.synchronize()
    return (time.perf_counter_ns() - start) / 1e6


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices=devices, device_type=kind):
        _seed(device)
        yield


def _seed(device: torch.device) -> None:
    """Seed the streams that `_random_state` restores, where torch.manual_seed would reach every device's."""
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(0)
    elif device.type != "cpu":
        torch.get_device_module(device.type).manual_seed(0)


def _environment(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    clocks = {"cpu": "thread time", "cuda": "CUDA events"}
    return {
        "machine": torch.cuda.get_device_name(device) if cuda else processor(),
        "cores": os.cpu_count(),
        "device": device.type,
        "clock": clocks.get(device.type, "wall clock"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


# --------------------------------------------------------------------------------------------- helpers
def _check(model: nn.Module, batch: Any, choices: Mapping[str, Jacobians], repetitions: int, warmup: int) -> None:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"batch is (inputs, targets), the latter for the loss; given {type(batch).__name__}")
    if STOCK in choices:
        raise ValueError(f"the name {STOCK!r} is the unpatched model's; call the choice something else")
    if repetitions < 1 or warmup < 0:
        raise ValueError(f"needs repetitions >= 1 and warmup >= 0; given {repetitions} and {warmup}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"no parameter of {type(model).__name__} requires a gradient: there is none to measure; "
            "call requires_grad_() on what is trained"
        )


def _check_loss(value: Any) -> None:
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        description = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss(output, targets) must be a 0-d tensor that depends on the parameters; given {description}"
            + (" without a gradient" if isinstance(value, Tensor) and not value.requires_grad else "")
        )


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: _map(change, v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_map(change, v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [t for part in parts for t in _tensors(part)]


def _to(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    return _map(lambda t: t.detach().to(device, dtype if t.is_floating_point() else None), value)


def _spread(gradient: Sequence[float], forward: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the ratio of two computations, round by round."""
    timing = Timing.of([g / f if f else float("inf") for g, f in zip(gradient, forward, strict=True)])
    return timing.lower, timing.median, timing.upper
