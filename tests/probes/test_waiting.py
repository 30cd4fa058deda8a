"""A measured step waits for a device at most twice, whatever the number of sites, parameters and choices.

There is no device here. CPU tensors are taken for a device's, and a dispatch mode counts what would wait for one.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from nslightning import Jacobians, patch
from nslightning.callbacks import NonFiniteGuard, TieMonitor, WeightDivergence
from nslightning.callbacks.gradient_divergence import _coming_loss_scale, loss_scale, undisturbed
from nslightning.ops.autograd import native
from nslightning.ops.kernels import cpu
from nslightning.probes import (
    Recording,
    clarke_guarantee,
    counting,
    divergence,
    measure,
    measure_differences,
    propagation,
    recording,
    sums,
    ties,
    zone,
)
from nslightning.probes.branches import Branches


class Waits(TorchDispatchMode):
    """Counts the operations whose result the host needs, and copies of a tensor's values to the host."""

    NAMES = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "allclose")

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.NAMES or (name == "_to_copy" and (kwargs or {}).get("device") == torch.device("cpu")):
            self.met.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def device(monkeypatch):
    """Every tensor is as if it lay on a device."""
    parts = [sys.modules[f"nslightning.probes.{part}"] for part in ("divergence", "ties", "zone")]
    for module in (propagation, sums, *parts):
        monkeypatch.setattr(module, "waits", lambda device: True)
    for name in ("tolist", "cpu"):  # one transfer each, whatever the dispatcher would see of it on a CPU
        stock = getattr(torch.Tensor, name)

        def once(t, stock=stock, name=name):
            waits = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Waits)]
            if waits:
                waits[-1].met.append(name)
            with _disable_current_modes():
                return stock(t)

        monkeypatch.setattr(torch.Tensor, name, once)


def network(sites, tied):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1)]
    for _ in range(sites):
        layers += [nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(4, 4, 3, padding=1)]
    model = nn.Sequential(*layers)
    if tied:
        with torch.no_grad():
            for m in model:
                if isinstance(m, nn.BatchNorm2d):
                    m.weight[0] = m.bias[0] = 0
    patch(model, Jacobians())
    return model


CHOICES = {str(relu): Jacobians(relu=relu, max_pool="minimal") for relu in (0.25, 0.5, 1.0, 2.0, -1.0)}


def measured(model, choices):
    """What a measured step does behind its training forward and backward, and how often it waits."""
    x = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    loss = model(x).square().mean()
    named = dict(model.named_parameters())
    with Waits() as waits:
        with recording(model) as met:
            met.backward(loss)
        base = {name: p.grad for name, p in named.items()}
        with undisturbed(model, 0):
            norms = measure_differences(met.carried(choices, named, retain_graph=False), base)
    return norms, waits.met


@pytest.mark.parametrize("tied", [True, False])
def test_a_measured_step_waits_twice_at_most(device, tied):
    for sites, choices in ((1, dict(list(CHOICES.items())[:1])), (5, CHOICES)):
        measurements, met = measured(network(sites, tied), choices)
        assert len(met) <= 2, met
        assert all(bool(d.l2) is tied or d.l2 > 0 for d in measurements.values())


@pytest.mark.parametrize("tied", [False, True])
def test_no_difference_is_formed_where_no_entry_ties(tied, device, monkeypatch):
    """A flag for each site serves all choices: their number takes nothing where there are no ties."""
    monkeypatch.setattr(native, "_library", lambda: None)
    monkeypatch.setattr(cpu, "any_zero", lambda x: True)  # a device is not asked, so each ReLU has a node
    formed, changes = set(), propagation._Met.changes

    def noted(record, choice):
        formed.add(record)
        return changes(record, choice)

    monkeypatch.setattr(propagation._Met, "changes", noted)
    relus = {str(relu): Jacobians(relu=relu) for relu in (0.25, 0.5, 1.0)}
    norms, met = measured(network(3, tied), relus)
    assert len(met) <= 2
    assert len(formed) == (3 if tied else 0)
    assert all((d.l2 > 0) is tied for d in norms.values())


@pytest.mark.parametrize("sites", [1, 3])  # of one ReLU and its pooling the ReLU alone matters
def test_what_the_ties_start_is_the_same_on_the_device_s_way(sites, monkeypatch, request):
    def started():
        model = network(sites, True)
        loss = model(torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(1))).square().mean()
        with recording(model) as met:
            met.meet(loss, list(CHOICES.values()))
        choice, named = CHOICES["1.0"], list(model.parameters())
        return met.carry(met.starts(choice), choice, named)

    want = started()
    request.getfixturevalue("device")
    assert any(bool(d.any()) for d in want)
    assert all(torch.equal(a, b) for a, b in zip(want, started(), strict=True))


def test_the_device_s_way_gives_the_same_numbers(monkeypatch, request):
    want, _ = measured(network(3, True), CHOICES)
    request.getfixturevalue("device")
    measurements, met = measured(network(3, True), CHOICES)
    assert met  # it did go the device's way
    for choice, d in want.items():
        assert d.l2 > 0
        for name, part in d.per_layer.items():
            for norm, value in part.norms().items():
                assert measurements[choice].per_layer[name].norms()[norm] == pytest.approx(value, rel=1e-4, abs=1e-7)


def test_without_a_scaler_the_accumulation_alone_scales_the_loss():
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(), accumulate_grad_batches=4)
    assert loss_scale(trainer) == _coming_loss_scale(trainer)() == 0.25
    trainer.precision_plugin.scaler = None
    assert loss_scale(trainer) == _coming_loss_scale(trainer)() == 0.25


def test_subtraction_waits_once_for_all_parameters(device):
    a, b = ({str(i): torch.randn(5, i + 1) for i in range(20)} for _ in range(2))
    with Waits() as waits:
        norms = measure(a, b)
    assert len(waits.met) == 1
    assert norms.l2 == pytest.approx(float(sum((a[n].double() - b[n]).square().sum() for n in a)) ** 0.5, rel=1e-12)


def test_buffers_are_put_back_without_a_look():
    model = network(2, False)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with Waits() as waits, undisturbed(model, 0):
        model(torch.randn(2, 1, 12, 12))
    assert waits.met == []
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_recording_is_one_for_all_choices():
    model = network(1, True)
    assert isinstance(Recording(model), Recording)
    loss = model(torch.randn(2, 1, 12, 12)).square().mean()
    together = divergence(loss, model, CHOICES, method="propagate")
    for name, choice in CHOICES.items():
        assert divergence(loss, model, {name: choice}, method="propagate")[name] == together[name]


class OneProcess:
    """What a callback asks its trainer for in the middle of a training on one device."""

    global_step, world_size, is_global_zero, accumulate_grad_batches, loggers = 0, 1, True, 1, ()
    precision_plugin = None

    def __init__(self):
        self.callback_metrics = {}
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))


@pytest.mark.parametrize("sites", [1, 5])
def test_weights_are_compared_with_one_wait(device, tmp_path, sites):
    model = network(sites, False)
    callback = WeightDivergence("initial", 1)
    callback._name, callback._file = "weights", tmp_path / "weights.csv"
    callback._start = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with Waits() as waits:
        callback._measure(OneProcess(), model)
    assert len(waits.met) == 1, waits.met
    rows = callback._file.read_text().splitlines()
    assert len(rows) == 2 + len(callback._start)  # a header and the total


@pytest.mark.parametrize("sites", [1, 5])
def test_a_guarded_step_waits_once(device, sites):
    model, guard = network(sites, False), NonFiniteGuard()
    model(torch.randn(2, 1, 12, 12)).square().mean().backward()
    guard._loss = torch.tensor(1.0)
    with Waits() as waits:
        guard.on_after_backward(OneProcess(), model)
    assert len(waits.met) == 1, waits.met
    assert guard.batches == 0


@pytest.mark.parametrize("sites", [1, 5])
def test_ties_are_counted_with_one_wait(device, monkeypatch, sites):
    x = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    model, monitor = network(sites, True), TieMonitor(1)
    module = sys.modules[TieMonitor.__module__]
    logged = {}
    monkeypatch.setattr(module, "log_step", lambda trainer, metrics: logged.update(metrics))
    monitor._counts = monitor._open.enter_context(counting(model))
    with Waits() as waits:
        model(x)
    assert waits.met == []
    with Waits() as waits:
        counts = monitor._counts
        monitor._open.close()
    assert len(waits.met) == 1, waits.met
    monitor._counts = counts
    monitor.on_before_backward(OneProcess(), model, torch.tensor(0.0))
    assert len(logged) == 2 * sites + 1
    assert logged["ties/total"] > 0


def test_the_device_s_way_counts_the_same_ties(request):
    x = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    model = network(3, True)
    want = ties(model, x)
    request.getfixturevalue("device")
    assert ties(model, x) == want
    assert any(site.structural for site in want.values())


@pytest.mark.parametrize("function", ["guarantee", "agrees", "zone"])
def test_how_often_a_probe_waits_for_five_sites(device, function):
    x = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    choice = Jacobians(relu=1.0)

    def waits_of(sites):
        model = network(sites, True)
        with Waits() as waits:
            if function == "guarantee":
                clarke_guarantee(model, x)
            elif function == "agrees":
                divergence(model(x).square().mean(), model, {"relu1": choice}, method="propagate")
            else:
                zone(model, torch.sum, x, choice)
        return waits.met

    one, five = waits_of(1), waits_of(5)
    assert len(five) == len(one), (one, five)


def test_the_scale_of_a_loss_is_no_wait_of_its_own(device):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer = OneProcess()
    trainer.precision_plugin = SimpleNamespace(scaler=scaler)
    scaler.scale(torch.tensor(1.0))
    with Waits() as waits:
        scale = _coming_loss_scale(trainer)
        assert scale() == 8.0 == loss_scale(trainer)
    assert waits.met == ["_local_scalar_dense"]  # of the one that may wait


@pytest.mark.parametrize("sites", [1, 5])
def test_a_regular_zone_waits_twice(device, sites):
    x, model = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(1)), network(sites, False)
    with Waits() as waits:
        assert zone(model, lambda y: y.square().mean(), x, Jacobians(relu=1.0)).kind == "regular"
    assert len(waits.met) == 2, waits.met


def test_poolings_that_are_off_their_branch_are_moved_on_a_device_too(request, monkeypatch):
    """In bfloat16 windows tie that tie in no other precision."""
    held = []
    stock = Branches.holds
    monkeypatch.setattr(Branches, "holds", lambda self: held.append(stock(self)) or held[-1])
    model, x = network(3, True).bfloat16(), torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(1))

    def measured():
        held.clear()
        return zone(model, lambda y: y.float().square().mean(), x.bfloat16(), Jacobians(max_pool="minimal"))

    on_cpu = measured()
    assert held == [True, True]  # the replays in float32 and in float64
    request.getfixturevalue("device")
    on_device = measured()
    assert held == [False, True, False, True]  # each is made again
    assert on_device.kind == on_cpu.kind == "bifurcation"
    assert on_device.difference == on_cpu.difference
