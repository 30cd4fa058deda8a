"""The cost report: figures against independent references, nothing of the caller's changed."""

import csv
import gc
import json
import math
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nslightning import Jacobians, patch, unpatch
from nslightning.choices import named_choice
from nslightning.commands.cost import main
from nslightning.probes.cost import BOUND, _innermost_calls, _interleaved, cost_ratio, cost_scaling
from nslightning.probes.cost_data import ChoiceCost, CostReport, CostScaling, ModuleCost, Timing, slope
from nslightning.report.cost_figures import plot_cost, plot_scaling
from nslightning.report.cost_table import scaling_table, table
from nslightning.surgery import PatchWarning

QUICK = {"repetitions": 1, "warmup": 0, "per_module": False, "memory": False}
RELU1 = {"relu1": Jacobians(relu=1.0)}


def dead(layer: nn.Linear, rows: int) -> nn.Linear:
    """Units whose pre-activation is exactly 0 for every input."""
    with torch.no_grad():
        layer.weight[:rows] = 0
        layer.bias[:rows] = 0
    return layer


def mlp(width: int = 12) -> nn.Sequential:
    return nn.Sequential(dead(nn.Linear(6, width), 5), nn.ReLU(), nn.Linear(width, 3))


def batch_of(*shape: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*shape), torch.randint(classes, (shape[0],))


def test_each_choice_s_own_memory_is_measured(monkeypatch):
    """What a choice's backward allocates is its own: here what is measured is the gradient, which differs."""
    module = sys.modules["nslightning.probes.cost"]

    def peak(run, resident, device):
        events = run()
        return (
            0 if isinstance(events, torch.Tensor) else round(1e6 * sum(float(g.abs().sum()) for g in events))
        ), "test"

    monkeypatch.setattr(module, "_peak", peak)
    torch.manual_seed(0)
    report = cost_ratio(mlp(), batch_of(4, 6), RELU1 | {"half": Jacobians(relu=0.5)}, **QUICK | {"memory": True})
    peaks = {c.name: c.peak_bytes for c in report.choices}
    assert peaks["stock"] == peaks["native"] > 0
    assert len({peaks["stock"], peaks["half"], peaks["relu1"]}) == 3


# -------------------------------------------------------------------------- figures against references
@pytest.mark.parametrize(("depth", "ratio"), [(1, 2.01), (2, 2.56), (5, 2.84), (10, 2.92)])
def test_flop_ratio_of_mlps(depth, ratio):
    widths = [784, *[1000] * depth, 10]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    report = cost_ratio(nn.Sequential(*layers[:-1]), batch_of(2, 784, classes=10), {}, **QUICK)
    # By hand: a product costs the same forward, to its weights and to its input; the first skips the last.
    products = [a * b for a, b in pairwise(widths)]
    assert report.flops == 2 * 2 * sum(products)
    assert report.flop_ratio == pytest.approx(3 - products[0] / sum(products), abs=1e-12)
    assert round(report.flop_ratio, 2) == ratio
    assert report.parameters == sum(products) + sum(widths[1:])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_flops_of_grouped_convolutions(kind, groups):
    """By hand: each output place is a product of the kernel with the channels of its group; backward, two of them."""
    net = nn.Sequential(
        nn.Conv2d(4, 8, 1), kind(8, 12, 3, groups=groups), nn.Conv2d(12, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    report = cost_ratio(net, batch_of(2, 4, 5, 6), {}, **QUICK)
    places = 3 * 4 if kind is nn.Conv2d else 5 * 6  # of the output, and of the input of a transposed convolution
    seen = 3 * 4 if kind is nn.Conv2d else 7 * 8
    first, middle, last = 2 * 4 * 8 * 5 * 6, 2 * 9 * (8 // groups) * 12 * places, 2 * 12 * 3 * seen
    assert report.flops == 2 * (first + middle + last)
    # The first convolution's input needs no gradient.
    assert report.flop_ratio * report.flops == 2 * (2 * first + 3 * middle + 3 * last)


def test_flop_ratio_is_absent_without_products():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to patch is no news here: the report tells it
        norm = cost_ratio(nn.BatchNorm1d(3), batch_of(4, 3), {}, **QUICK)
    assert "0 ties in 0 evaluations" in table(norm)
    assert (norm.flops, norm.flop_ratio) == (0, None)


def test_max_difference_of_relu_is_the_directly_computed_one():
    network, (x, y) = mlp().double(), batch_of(7, 6)
    x = x.double()
    alpha = 0.75

    def gradients(at_zero):
        h = network[0](x)
        # ReLU with derivative `at_zero` at 0, from torch's own operations: adds a term of value 0.
        h = h.relu() + at_zero * torch.where(h == 0, h - h.detach(), 0.0)
        return torch.autograd.grad(F.cross_entropy(network[2](h), y), list(network.parameters()))

    expected = max(float((a - b).abs().max()) for a, b in zip(gradients(alpha), gradients(0.0), strict=True))
    report = cost_ratio(network, (x, y), {"a": Jacobians(relu=alpha)}, **QUICK)
    assert expected > 1e-3
    assert report["a"].max_difference == pytest.approx(expected, rel=1e-12)
    assert report["stock"].max_difference == report["native"].max_difference == 0.0
    assert (report.ties, report.evaluations) == (7 * 5, 7 * 12)


def test_max_difference_of_max_pool_is_the_directly_computed_one():
    # A dead convolution: all windows tie, and their entries depend on its weight differently.
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
    nn.init.zeros_(network[0].weight)
    x, y = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2])

    def gradients(pool):
        logits = network[3](network[2](pool(network[0](x))))
        return torch.autograd.grad(F.cross_entropy(logits, y), list(network.parameters()))

    def shared(h):  # torch.amax shares its gradient equally over ties
        return h.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))

    pairs = zip(gradients(shared), gradients(network[1]), strict=True)
    expected = max(float((a - b).abs().max()) for a, b in pairs)
    report = cost_ratio(network, (x, y), {"minimal": Jacobians(max_pool="minimal")}, **QUICK)
    assert expected > 1e-3
    assert report["minimal"].max_difference == pytest.approx(expected, rel=1e-12)
    assert (report.ties, report.evaluations) == (24, 24)


def test_patched_model_keeps_its_selectors():
    network = nn.Sequential(dead(nn.Linear(6, 8), 3), nn.ReLU(), dead(nn.Linear(8, 8), 3), nn.ReLU(), nn.Linear(8, 3))
    batch = batch_of(5, 6)
    everywhere = cost_ratio(network, batch, RELU1, **QUICK)
    patch(network, Jacobians(relu=0.5), only="3")
    second = cost_ratio(network, batch, RELU1, **QUICK)
    unpatch(network)
    with pytest.warns(PatchWarning, match="nothing to patch"):
        patch(network, Jacobians(relu=1.0), skip="*")
    nowhere = cost_ratio(network, batch, RELU1, **QUICK)
    assert nowhere["relu1"].max_difference == 0 < second["relu1"].max_difference
    assert second["native"].max_difference == 0  # the choice that the caller patched with is not in force
    assert (everywhere.ties, second.ties, nowhere.ties) == (30, 15, 0)


def test_published_max_pooling_can_be_a_choice():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    choices = {"published": Jacobians(max_pool=10.0, rule="published")}
    report = cost_ratio(network, batch_of(2, 1, 6, 6), choices, **QUICK)
    assert report["published"].jacobians["rule"] == "published"


def test_peak_memory_of_one_layer():
    layer = nn.Linear(4, 250_000, bias=False)
    batch = torch.randn(1, 4), torch.zeros(())
    report = cost_ratio(layer, batch, {}, loss=lambda out, _: out.sum(), **QUICK | {"memory": True})
    resident = 4_000_000 + 16 + 4
    assert report.peak_bytes == pytest.approx(resident + 1_000_000, rel=1e-3)  # the output
    # The weight's gradient (4 MB), and at most the output's twice (1 MB each).
    assert resident + 3_990_000 < report["stock"].peak_bytes < resident + 6_010_000
    assert report.memory_ratio() == report["stock"].peak_bytes / report.peak_bytes
    assert report.memory_method == "torch.profiler's allocation events"


def test_modules_are_the_innermost_ones_with_their_first_input():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)
            self.act = nn.ReLU(inplace=True)
            self.attention = nn.MultiheadAttention(6, 2)  # reads its child `out_proj` and never calls it
            self.block = nn.Sequential(nn.Linear(6, 3))

        def forward(self, x):
            h = self.act(self.act(self.lin(x)) - 1)
            return self.block(self.attention(h, h, h)[0])

    network, (x, y) = Net(), batch_of(5, 6)
    calls = _innermost_calls(network, lambda: network(x))
    assert {name: entry[2] for name, entry in calls.items()} == {
        "lin": 1,
        "act": 2,
        "attention": 1,
        "block.0": 1,
    }
    assert torch.equal(calls["act"][0][0], network.lin(x))  # as it was before it was overwritten
    assert not calls["lin"][0][0].requires_grad
    assert calls["block.0"][0][0].requires_grad
    assert not network._forward_hooks
    assert not network._forward_pre_hooks

    report = cost_ratio(network, (x, y), RELU1, repetitions=1, warmup=0, memory=False)
    measured = {(m.name, m.choice, m.calls) for m in report.modules}
    plain = {("lin", "stock", 1), ("attention", "stock", 1), ("block.0", "stock", 1)}
    assert plain | {("act", c, 2) for c in ("stock", "native", "relu1")} <= measured
    assert report.unmeasured == {}


def test_rounds_are_interleaved_and_shuffled_by_a_private_stream():
    seen = []
    closures = {name: lambda name=name: seen.append(name) for name in "abcd"}
    state = random.getstate()
    times = _interleaved(closures, repetitions=6, warmup=2, device=torch.device("cpu"))
    assert random.getstate() == state
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abcd", 6)
    rounds = [tuple(seen[i : i + 4]) for i in range(0, len(seen), 4)]
    assert len(rounds) == 8
    assert all(sorted(r) == list("abcd") for r in rounds)
    assert len(set(rounds)) > 1
    assert gc.isenabled()


def test_forward_mode_that_is_not_supported_is_told():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x**2

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    network = nn.Linear(6, 3)
    batch = batch_of(2, 6)
    report = cost_ratio(network, batch, {}, loss=lambda out, _: Square.apply(out).sum(), **QUICK)
    assert report.jvp is report.jvp_ratio is report.forward_mode_ratio is None
    assert "no JVP: " in table(report)
    assert report.jvp_note
    known = cost_ratio(network, batch, {}, **QUICK)
    assert known.forward_mode_ratio == known.parameters * known.jvp_ratio


# ----------------------------------------------------------------------- what is the caller's stays so
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_of_the_callers_changes(patched, grad):
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    network[1].eval()
    network[6].bias.requires_grad_(False)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    report = patch(network, Jacobians(relu=0.5)) if patched else None
    sites = report.to_dict() if report else None
    inputs, targets = batch_of(4, 1, 6, 6)
    kept = inputs.clone()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    objects = {name: id(p) for name, p in [*network.named_parameters(), *network.named_buffers()]}
    versions = [t._version for t in [*network.parameters(), *network.buffers()]]
    classes = [type(m) for m in network.modules()]
    flags = [m.training for m in network.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    torch.set_num_threads(2)
    streams, python = torch.get_rng_state(), random.getstate()

    with torch.set_grad_enabled(grad):
        cost = cost_ratio(network, (inputs, targets), RELU1, repetitions=2)

    assert torch.equal(torch.get_rng_state(), streams)
    assert random.getstate() == python
    assert torch.get_num_threads() == 2
    assert cost.environment["threads"] == 1
    assert torch.equal(inputs, kept)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert {n: id(p) for n, p in [*network.named_parameters(), *network.named_buffers()]} == objects
    assert [t._version for t in [*network.parameters(), *network.buffers()]] == versions
    assert [type(m) for m in network.modules()] == classes
    assert [m.training for m in network.modules()] == flags
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()] == hooks
    assert torch.equal(network[0].weight.grad, torch.ones_like(network[0].weight))
    assert [n for n, p in network.named_parameters() if p.grad is not None] == ["0.weight"]
    assert (report.to_dict() if report else None) == sites
    assert cost.parameters == sum(p.numel() for p in network.parameters()) - 3


def test_choices_meet_the_same_random_numbers_and_running_statistics():
    # No tie: any difference would come from dropout or from statistics that an earlier choice has moved.
    network = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    network[1].momentum = 0.9
    network.register_buffer("factor", torch.ones(()))

    def drift(module, args):
        module.factor.mul_(1.5)
        return args[0] * module.factor

    network.register_forward_pre_hook(drift)
    report = cost_ratio(network, batch_of(8, 6), RELU1, **QUICK)
    assert report.ties == 0
    assert [c.max_difference for c in report.choices] == [0.0, 0.0, 0.0]


def test_dtype_device_and_inputs_by_position_and_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 3)

        def forward(self, a, b):
            return self.lin(a + b)

    network = Two().double()
    x, y = batch_of(4, 6)
    by_position = cost_ratio(network, ((x, x), y), {}, name="two", **QUICK)
    by_name = cost_ratio(network, ({"a": x, "b": x}, y), {}, name="two", **QUICK)
    for report in (by_position, by_name):
        assert (report.dtype, report.batch, report.model, report.training) == ("float64", 4, "two", True)
        assert report.flops == 2 * 4 * 6 * 3
    half = cost_ratio(mlp().bfloat16().eval(), (x, y), RELU1, **QUICK)
    assert (half.dtype, half.training) == ("bfloat16", False)


@pytest.mark.cuda
def test_cuda():
    network, (x, y) = mlp().cuda(), batch_of(64, 6)
    before = torch.cuda.get_rng_state()
    report = cost_ratio(network, (x, y), RELU1, repetitions=3)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert report.environment["clock"] == "CUDA events"
    assert report.memory_method == "torch.cuda.max_memory_allocated"
    assert report.memory_ratio("relu1") >= 1
    assert report["relu1"].max_difference > 0
    assert report.ties == 64 * 5


# ------------------------------------------------------------------------------ what is not admissible
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": torch.zeros(2, 6)}, "inputs, targets"),
        ({"choices": {"stock": Jacobians()}}, "unpatched model's"),
        ({"repetitions": 0}, "repetitions >= 1"),
        ({"model": nn.ReLU()}, "no parameter of ReLU requires a gradient"),
        ({"loss": lambda out, _: out}, r"0-d tensor.*given shape \(2, 3\)"),
        ({"loss": lambda out, _: out.sum().detach()}, "without a gradient"),
        ({"loss": lambda out, _: 1.0}, "given float"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, message):
    recorded = {
        "model": mlp(),
        "batch": batch_of(2, 6),
        "choices": RELU1,
        "loss": F.cross_entropy,
        "repetitions": 1,
    }
    recorded |= changes
    with pytest.raises(ValueError, match=message):
        cost_ratio(recorded.pop("model"), recorded.pop("batch"), recorded.pop("choices"), **recorded)


def test_native_is_added_once():
    def names(choices):
        return [c.name for c in cost_ratio(mlp(), batch_of(2, 6), choices, **QUICK).choices]

    assert names(RELU1) == ["stock", "native", "relu1"]
    assert names({"ours": Jacobians()}) == ["stock", "ours"]
    assert names({"native": Jacobians(relu=1.0)}) == ["stock", "reference", "native"]


# ---------------------------------------------------------------------------------- fabricated reports
def timing(ms):
    return Timing(ms, ms, ms, ms, 3)


def fabricated(ratios, modules=(), parameters=100, jvp=3.0, forward=10.0, difference=0.0):
    return CostReport(
        model="Net", parameters=parameters, batch=4, dtype="float32", training=True,
        environment={"machine": "M", "cores": 2, "clock": "thread time", "threads": 1, "torch": "2"},
        forward=timing(forward), recorded=timing(forward), jvp=None if jvp is None else timing(forward * jvp),
        jvp_note="" if jvp is not None else "no rule", flops=8, flop_ratio=3.0, peak_bytes=100,
        memory_method="nothing", ties=1, evaluations=2, bound=5.0,
        choices=tuple(
            ChoiceCost(n, None if n == "stock" else Jacobians().to_dict(), timing(forward * r), (r, r, r),
                       150, difference)
            for n, r in ratios.items()
        ),
        modules=tuple(modules),
    )  # fmt: skip


def module(name, forward, gradient, choice="stock", calls=1):
    return ModuleCost(name, "Kind", choice, calls, timing(forward), timing(gradient))


def test_verdict_holds_up_to_the_bound():
    assert BOUND == 5.0
    report = fabricated({"stock": 5.0, "a": 5.001}, [module("m", 1.0, 6.0)])
    assert report.holds()
    assert report.responsible() == []
    assert report.verdict() == "stock: cheap gradient holds, 5.00 <= 5"
    assert not report.holds("a")
    assert "NO" in table(report)
    assert [row["holds"] for row in report.rows()] == [True, False]


def test_verdict_names_the_modules_responsible_by_their_excess():
    modules = [
        module("view", 0.001, 0.02),  # ratio 20, no time
        module("linear", 5.0, 15.0),  # within the bound
        module("pool", 1.0, 9.0),  # excess 4
        module("pool", 1.0, 25.0, choice="a"),  # excess 20
        module("pool", 1.0, 500.0, choice="other"),
        module("act", 0.2, 1.8, calls=3),  # excess 2.4 in three calls
        module("small", 0.2, 1.9),  # excess 0.9, less than a twentieth of 20
    ]
    report = fabricated({"stock": 3.0, "a": 7.0, "other": 4.0}, modules)
    assert [(m.name, m.choice) for m in report.responsible("a")] == [("pool", "a"), ("act", "stock")]
    text = "a: exceeds the bound, 7.00 > 5; responsible: pool (Kind, 25.0), act (Kind, 9.0, 3 calls)"
    assert report.verdict("a") == text
    assert text in table(report)
    assert report.to_dict()["verdicts"]["a"] == text


def test_verdict_when_no_module_is_to_blame():
    assert "operations called as functions" in fabricated({"stock": 9.0}, [module("m", 1.0, 2.0)]).verdict()
    assert "per_module=True" in fabricated({"stock": 9.0}).verdict()
    many = fabricated({"stock": 9.0}, [module(f"m{i}", 1.0, 15.0) for i in range(7)]).verdict()
    assert many.endswith("m4 (Kind, 15.0) and 2 more")


def test_ratios_of_a_report():
    report = fabricated({"stock": 3.0, "a": 4.0}, parameters=200, jvp=2.5)
    assert (report.ratio(), report.ratio("a"), report.jvp_ratio, report.forward_mode_ratio) == (
        3,
        4,
        2.5,
        500,
    )
    assert report.memory_ratio("a") == 1.5
    assert replace(report, peak_bytes=None).memory_ratio() is None
    with pytest.raises(KeyError, match="no choice 'b' in this report; it has stock, a"):
        report["b"]
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Timing(1.0, 2.0, 3.0, 4.0, 5)


def test_slopes():
    sizes = [100, 1_000, 30_000]
    reports = tuple(fabricated({"stock": 3.0, "a": 2.0 * p**0.25}, parameters=p, jvp=1.5 * p**0.5) for p in sizes)
    scaling = CostScaling((1, 2, 3), reports)
    assert scaling.slopes() == pytest.approx({"stock": 0.0, "a": 0.25, "forward mode": 1.5}, abs=1e-12)
    assert scaling_table(scaling).splitlines()[-2].split() == ["slope", "+0.00", "+0.25", "+1.50"]
    without = CostScaling((1, 2), (reports[0], replace(reports[1], jvp=None)))
    assert set(without.slopes()) == {"stock", "a"}
    # Least squares by hand: log2 of 1, 2, 8 against log2 of 1, 2, 4 gives 3 / 2.
    assert slope([1, 2, 4], [1, 2, 8]) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="at least two sizes"):
        slope([4, 4], [1, 2])
    with pytest.raises(ValueError, match="positive"):
        slope([1, 2], [0, 1])


@pytest.mark.parametrize("difference", [0.0, 0.125, math.nan, math.inf])
def test_json_round_trip(tmp_path, difference):
    report = fabricated({"stock": 3.0, "a": 4.0}, [module("m", 1.0, 2.0)], difference=difference)
    path = report.save(tmp_path / "new" / "cost.json")

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(path.read_text(), parse_constant=no_constant)
    again = CostReport.load(path)
    if math.isfinite(difference):
        assert again == report
    else:
        assert math.isnan(again["a"].max_difference)
    measured = cost_ratio(mlp(), batch_of(3, 6), RELU1, repetitions=2)
    assert CostReport.load(measured.save(tmp_path / "measured.json")) == measured
    scaling = CostScaling((1, 2), (measured, replace(measured, parameters=1000)))
    assert CostScaling.load(scaling.save(tmp_path / "scaling.json")) == scaling


def test_csv_has_a_row_per_choice(tmp_path):
    report = fabricated({"stock": 3.0, "a": 4.0})
    with report.save(tmp_path / "cost.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["choice"], float(r["ratio"]), r["machine"]) for r in rows] == [
        ("stock", 3.0, "M"),
        ("a", 4.0, "M"),
    ]
    scaling = CostScaling((8, 9), (report, replace(report, parameters=7)))
    with scaling.save(tmp_path / "scaling.csv").open() as file:
        assert [r["width"] for r in csv.DictReader(file)] == ["8", "8", "9", "9"]
    with pytest.raises(ValueError, match=r"\.json or \.csv"):
        report.save(tmp_path / "cost.txt")


def test_figures(tmp_path):
    report = fabricated({"stock": 3.0, "a": 6.0}, [module("m", 1.0, 2.0), module("m", 1.0, 3.0, choice="a")])
    scaling = CostScaling((1, 2), (report, replace(report, parameters=1000)))
    no_jvp = CostScaling((1, 2), tuple(replace(r, jvp=None) for r in scaling.reports))
    written = [
        plot_cost(report, tmp_path / "new" / "one.png"),
        plot_cost({"x": report, "y": fabricated({"stock": 2.0, "b": 2.0})}, tmp_path / "two.png"),
        plot_scaling(scaling, tmp_path / "three.png"),
        plot_scaling({"x": no_jvp, "y": no_jvp}, tmp_path / "four.png", published=(2.5, 4.9)),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_scaling_measures_each_width():
    scaling = cost_scaling(mlp, (8, 16), batch_of(2, 6), RELU1, **QUICK)
    assert [r.parameters for r in scaling.reports] == [7 * 8 + 9 * 3, 7 * 16 + 17 * 3]
    with pytest.raises(ValueError, match="at least two widths"):
        cost_scaling(mlp, (8, 8), batch_of(2, 6), RELU1)


# ----------------------------------------------------------------------------------------- the command
TINY = [
    "cost",
    "--backbone=paper/fc",
    "--image-shape=[1,4,4]",
    "--num-classes=3",
    "--batch-size=2",
    "--repetitions=1",
]


def test_command_end_to_end(tmp_path, capsys):
    before = torch.get_rng_state()
    options = ["--backbone-options.hidden=[5,6]", "--precision=64", "--choices", "relu1:relu=1", "jax"]
    assert main([*TINY, *options, "--output", str(tmp_path / "out")]) == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "cost.csv",
        "cost.json",
        "cost.pdf",
        "cost.png",
    ]
    report = CostReport.load(tmp_path / "out" / "cost.json")
    assert (report.model, report.dtype, report.batch) == ("paper/fc", "float64", 2)
    assert report.parameters == 17 * 5 + 6 * 6 + 7 * 3
    assert [c.name for c in report.choices] == ["stock", "native", "relu1", "jax"]
    out = capsys.readouterr().out
    assert table(report) in out
    assert "Written to" in out


def test_command_over_widths_from_a_config(tmp_path):
    (tmp_path / "cost.yaml").write_text(
        "backbone: paper/fc\nimage_shape: [1, 4, 4]\nnum_classes: 3\nbatch_size: 2\nrepetitions: 1\n"
        "backbone_options: {hidden: [1, 1]}\nchoices: ['half:relu=0.5']\nwidths: [4, 8]\noutput: out\n"
    )
    assert main(["cost", "--config", "cost.yaml"]) == 0
    scaling = CostScaling.load(Path("out/cost.json"))
    assert [r.parameters for r in scaling.reports] == [17 * w + (w + 1) * w + (w + 1) * 3 for w in (4, 8)]
    assert len(list(Path("out").iterdir())) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone=paper/fcc"], "did you mean paper/fc"),
        (["--choices", "relu1"], "write NAME:FIELD=VALUE"),
        (["--choices", "a:rely=1"], "did you mean 'relu'?"),
        (["--choices", "a:relu=x"], "relu 'x' is not known. Allowed: random, a number"),
        (["--choices", "a:relu=1", "a:relu=0.5"], "one name"),
        (["--backbone=paper/lenet5", "--widths", "8", "16"], "hidden layers of paper/fc"),
        (["--batch-size=0"], "at least 1"),
        (["--device=nowhere"], "--device=nowhere is not here; a GPU is named cuda"),
        (["--output=file"], "is a file"),
    ],
)
def test_command_tells_what_is_wrong(arguments, message, capsys):
    Path("file").write_text("")
    assert main([*TINY, "--output=out", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("nslightning cost: error: ")
    assert message in captured.err
    assert not Path("out").exists()


def test_command_refuses_unknown_arguments(capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*TINY, "--precision=8"])
    assert exit_.value.code == 2
    assert "precision" in capsys.readouterr().err


def test_choices_as_the_command_line_writes_them():
    assert named_choice("x:relu=0.5,relu6=[0,1],max_pool=minimal") == (
        "x",
        Jacobians(relu=0.5, relu6=(0.0, 1.0), max_pool="minimal"),
    )
    assert named_choice("x:max_pool=10,leaky_relu=null") == ("x", Jacobians(max_pool=10.0))
    assert named_choice("tensorflow") == ("tensorflow", Jacobians.preset("tensorflow"))


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom nslightning.commands.cost import main\n"
        "try: main(['cost', '--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--choices" in done.stdout
