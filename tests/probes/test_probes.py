"""Probes: gradients under many choices, their divergence, and ties, each against a separate computation."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nslightning import Jacobians, patch, unpatch
from nslightning.probes import (
    NORMS,
    Ties,
    counting,
    divergence,
    gradients,
    measure,
    measure_difference,
    measure_differences,
    sums,
    ties,
)
from nslightning.surgery import report, selections

RELU1 = Jacobians(relu=1.0)


class Net(nn.Module):
    """Ties at a module's ReLU, a functional ReLU and a pool; one parameter is frozen and one is not used."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.act, self.pool, self.drop = nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5)
        self.fc = nn.Linear(3, 2)
        self.unused = nn.Parameter(torch.ones(2))
        self.fc.bias.requires_grad_(False)
        with torch.no_grad():
            self.bn.weight[0] = self.bn.bias[0] = 0

    def forward(self, x):
        x = self.pool(self.act(self.bn(self.conv(x))))
        return self.fc(self.drop(F.relu(x)).mean((2, 3)))


def by_hand(model, x, alpha):
    """Gradients of the sum of outputs in evaluation mode, derived with pencil and written in numpy."""
    p = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
    x = x.double().numpy()  # (n, 1, h, w)
    w, b = p["conv.weight"][:, 0, 0, 0], p["conv.bias"]
    scale = 1 / np.sqrt(p["bn.running_var"] + model.bn.eps)
    z = x * w[:, None, None] + b[:, None, None]
    hat = (z - p["bn.running_mean"][:, None, None]) * scale[:, None, None]
    y = hat * p["bn.weight"][:, None, None] + p["bn.bias"][:, None, None]
    out = {k: np.zeros_like(p[k]) for k in ("conv.weight", "conv.bias", "bn.weight", "bn.bias", "fc.weight", "unused")}
    n, c, h, wd = y.shape
    windows = (h // 2) * (wd // 2)
    for i in range(n):
        for j in range(c):
            for r in range(0, h, 2):
                for s in range(0, wd, 2):
                    window = np.maximum(y[i, j, r : r + 2, s : s + 2], 0)
                    k, m = np.unravel_index(window.argmax(), (2, 2))  # the first maximum, as PyTorch
                    top, pre = window.max(), y[i, j, r + k, s + m]
                    out["fc.weight"][:, j] += top / windows
                    g = p["fc.weight"][:, j].sum() / windows
                    g *= 1.0 if top > 0 else alpha  # the functional ReLU
                    g *= 1.0 if pre > 0 else (alpha if pre == 0 else 0.0)  # the module
                    out["bn.bias"][j] += g
                    out["bn.weight"][j] += g * hat[i, j, r + k, s + m]
                    up = g * p["bn.weight"][j] * scale[j]
                    out["conv.bias"][j] += up
                    out["conv.weight"][j, 0, 0, 0] += up * x[i, 0, r + k, s + m]
    return out


@pytest.fixture
def net():
    model = Net().double().eval()
    patch(model, Jacobians())
    return model


@pytest.fixture
def x():
    return torch.randn(4, 1, 6, 6, dtype=torch.float64)


def test_gradients_agree_with_the_formulas(net, x):
    choices = {"a0": Jacobians(), "a1": RELU1, "a-2": Jacobians(relu=-2.0)}
    by_choice = gradients(net(x).sum(), net, choices)
    assert list(by_choice) == list(choices)
    for name, choice in choices.items():
        want = by_hand(net, x, choice.relu)
        assert list(by_choice[name]) == [n for n, p in net.named_parameters() if p.requires_grad]
        for key, value in by_choice[name].items():
            np.testing.assert_allclose(value.numpy(), want[key], rtol=1e-10, atol=1e-13, err_msg=key)
    assert "fc.bias" not in by_choice["a0"]
    assert torch.equal(by_choice["a0"]["unused"], torch.zeros(2, dtype=torch.float64))
    assert by_choice["a0"]["bn.bias"][0] == 0
    assert by_choice["a1"]["bn.bias"][0] != 0


def test_gradients_leave_grad_and_choice_alone_and_free_the_graph(net, x):
    net.conv.weight.grad = marker = torch.full_like(net.conv.weight, 7.0)
    loss = net(x).sum()
    gradients(loss, net, {"a": RELU1, "b": Jacobians()}, retain_graph=True)
    gradients(loss, net, {"a": RELU1}, retain_graph=False)
    assert net.conv.weight.grad is marker
    assert torch.equal(marker, torch.full_like(marker, 7.0))
    assert all(p.grad is None for n, p in net.named_parameters() if n != "conv.weight")
    assert selections(net)[""].jacobians == Jacobians()
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, net, {"a": RELU1})
    assert selections(net)[""].jacobians == Jacobians()


def test_gradients_say_what_is_missing(net, x):
    loss = net(x).sum()
    for call in (gradients, divergence):
        with pytest.raises(ValueError, match="at least one choice"):
            call(loss, net, {})
        with pytest.raises(ValueError, match="not patched"):
            call(loss, nn.Linear(1, 1), {"a": RELU1})
    frozen = copy.deepcopy(net).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of Net requires gradients"):
        gradients(loss, frozen, {"a": RELU1})
    divergence(loss, net, {"a": RELU1})  # the graph is still there


def numbers(a, b):
    """The five figures of two lists of arrays, from their definitions."""
    a, b = (np.concatenate([np.asarray(t, dtype=np.float64).ravel() for t in s]) for s in (a, b))
    d = a - b
    return {
        "l1": np.abs(d).sum(),
        "l2": math.sqrt((d * d).sum()),
        "linf": np.abs(d).max(),
        "relative": math.sqrt((d * d).sum() / (b * b).sum()),
        "cosine": (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()),
    }


def test_divergence_agrees_with_the_formulas(net, x):
    reference = Jacobians(relu=0.25)
    differences = divergence(net(x).sum(), net, {"one": RELU1, "same": reference}, reference)
    base, one = by_hand(net, x, 0.25), by_hand(net, x, 1.0)
    assert differences["one"].norms() == pytest.approx(numbers(list(one.values()), list(base.values())), rel=1e-9)
    assert set(differences["one"].norms()) == set(NORMS)
    assert list(differences["one"].per_layer) == [n for n, p in net.named_parameters() if p.requires_grad]
    for name in ("conv.weight", "bn.bias", "fc.weight"):
        got = differences["one"].per_layer[name]
        assert got.norms() == pytest.approx(numbers([one[name]], [base[name]]), rel=1e-9, abs=1e-13)
        assert got.per_layer == {}
    assert differences["one"].per_layer["unused"].norms() == {
        "l1": 0,
        "l2": 0,
        "linf": 0,
        "relative": 0,
        "cosine": 1,
    }
    assert differences["same"].norms() == {"l1": 0, "l2": 0, "linf": 0, "relative": 0, "cosine": 1}
    # The last layer lies above every tie.
    assert differences["one"].per_layer["fc.weight"].l1 == 0


def test_divergence_frees_or_keeps_the_graph(net, x):
    loss = net(x).sum()
    first = divergence(loss, net, {"a": RELU1})
    assert divergence(loss, net, {"a": RELU1}, retain_graph=False) == first
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_measure_against_float64(dtype):
    g = torch.Generator().manual_seed(0)
    a = {k: torch.randn(n, generator=g).to(dtype) * 100 for k, n in (("x", (3, 5)), ("y", (7,)), ("empty", (0, 2)))}
    # Half of y's difference would vanish if it were rounded to the gradients' own precision.
    b = {k: v * torch.randn(v.shape, generator=g).to(dtype) * 1e-3 for k, v in a.items()}
    norms = measure(a, b)
    wide = [[t.double().numpy() for t in s.values()] for s in (a, b)]
    assert norms.norms() == pytest.approx(numbers(*wide), rel=1e-12)
    assert norms.per_layer["x"].norms() == pytest.approx(numbers([wide[0][0]], [wide[1][0]]), rel=1e-12)
    assert norms.per_layer["empty"].norms() == {"l1": 0, "l2": 0, "linf": 0, "relative": 0, "cosine": 1}


def test_measure_where_norms_vanish():
    zero, one = {"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}
    assert measure(zero, zero).norms() == {"l1": 0, "l2": 0, "linf": 0, "relative": 0, "cosine": 1}
    assert measure(one, zero).norms() == {"l1": 7, "l2": 5, "linf": 4, "relative": math.inf, "cosine": 0}
    assert measure(zero, one).norms() == {"l1": 7, "l2": 5, "linf": 4, "relative": 1, "cosine": 0}
    assert measure({"w": -one["w"]}, one).norms() == {
        "l1": 14,
        "l2": 10,
        "linf": 8,
        "relative": 2,
        "cosine": -1,
    }
    assert measure({}, {}).norms() == {"l1": 0, "l2": 0, "linf": 0, "relative": 0, "cosine": 1}
    tiny = {"w": torch.tensor([1e-100, 0.0], dtype=torch.float64)}  # its square times its square is below 1e-308
    turned = {"w": torch.tensor([1e-100, 1e-100], dtype=torch.float64)}
    assert measure(turned, tiny).cosine == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_measure_does_not_hide_what_is_not_finite(bad):
    fine, broken = (
        {"v": torch.ones(1), "w": torch.ones(2)},
        {"v": torch.ones(1), "w": torch.tensor([1.0, bad])},
    )
    for measured in (measure(broken, fine), measure(broken, fine).per_layer["w"]):
        for name in ("l1", "l2", "linf", "relative"):
            assert getattr(measured, name) == math.inf or (math.isnan(bad) and math.isnan(getattr(measured, name)))
        assert math.isnan(measured.cosine)
    both = measure(broken, broken)
    assert math.isnan(both.l1)
    assert math.isnan(both.cosine)
    assert math.isnan(measure({"w": torch.tensor([math.nan])}, {"w": torch.zeros(1)}).relative)
    assert measure(broken, fine).per_layer["v"].l1 == 0


def test_measure_refuses_other_names_and_shapes():
    with pytest.raises(ValueError, match=r"different parameters: \['a', 'b'\]"):
        measure({"a": torch.ones(1)}, {"b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"w have shapes \(1,\) and \(3,\)"):
        measure({"w": torch.ones(1)}, {"w": torch.ones(3)})


def test_differences_are_measured_as_subtractions_are(monkeypatch):
    monkeypatch.setattr(sums, "_BLOCK", 8)  # several blocks, the last one short
    g = torch.Generator().manual_seed(0)
    reference = {n: torch.randn(k, generator=g).double() for n, k in (("a", (5, 5)), ("b", (3,)), ("none", (0, 2)))}
    differing = {n: torch.randn(t.shape, generator=g).double() for n, t in reference.items()}
    partly = {n: d if n == "a" else torch.zeros((), dtype=d.dtype).expand_as(d) for n, d in differing.items()}
    opposite = {n: -t for n, t in reference.items()}
    cases = {
        "differing": differing,
        "partly": partly,
        "opposite": opposite,
        "same": {n: 0 * t for n, t in partly.items()},
    }
    norms = measure_differences(cases.items(), reference)
    for choice, d in cases.items():
        by_hand = measure({n: t + d[n] for n, t in reference.items()}, reference)
        for got, want in [(norms[choice], by_hand), *((norms[choice].per_layer[n], by_hand.per_layer[n]) for n in d)]:
            assert got.norms() == pytest.approx(want.norms(), rel=1e-12, abs=1e-13)
        wide = [[(t + s * d[n]).numpy() for n, t in reference.items()] for s in (1, 0)]
        if choice != "opposite":
            assert norms[choice].norms() == pytest.approx(numbers(*wide), rel=1e-12, abs=1e-13)
    assert norms["opposite"].cosine == 0
    assert norms["same"].norms() == {"l1": 0, "l2": 0, "linf": 0, "relative": 0, "cosine": 1}


def test_the_reference_is_looked_at_once_and_only_where_something_differs(monkeypatch):
    module, squared = sys.modules["nslightning.probes.divergence"], []
    squares = module.squares
    monkeypatch.setattr(
        module, "squares", lambda gradients: squared.extend(g.shape for g in gradients) or squares(gradients)
    )
    reference = {"a": torch.ones(3), "b": torch.ones(4)}
    nothing = {n: torch.zeros(()).expand_as(t) for n, t in reference.items()}
    same = measure_differences([("x", nothing), ("y", nothing)], reference)
    assert [d.norms() for d in same.values()] == [{"l1": 0, "l2": 0, "linf": 0, "relative": 0, "cosine": 1}] * 2
    assert squared == []
    norms = measure_differences([(name, nothing | {"a": torch.ones(3)}) for name in "xyz"], reference)
    assert squared == [(3,), (4,)]
    assert norms["z"].l1 == 3
    assert norms["z"].per_layer["b"].norms() == {"l1": 0, "l2": 0, "linf": 0, "relative": 0, "cosine": 1}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_differences_to_what_is_not_finite_are_not_finite(bad):
    reference = {"v": torch.ones(1), "w": torch.tensor([1.0, bad])}
    nothing = {n: torch.zeros(()).expand_as(t) for n, t in reference.items()}
    for d in (nothing, {n: torch.ones_like(t) for n, t in reference.items()}):
        norms = measure_difference(d, reference)
        assert all(math.isnan(v) for v in norms.norms().values())
        assert all(math.isnan(v) for v in norms.per_layer["w"].norms().values())
        assert math.isfinite(norms.per_layer["v"].l1)


# -------------------------------------------------------------------------------------------------------- tie
def expected_ties(model, x):
    """Ties counted on the inputs that hooks see: a plain twin of the network, counted by loops."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, n=name: seen.update({n: a[0].detach().clone()})
        )
        for name in ("act", "pool", "drop")
    ]
    with torch.no_grad():
        model(x)
    [h.remove() for h in handles]
    pool = seen["pool"].numpy()
    n, c, h, w = pool.shape
    tied = sum(
        (window == window.max()).sum() > 1
        for i in range(n)
        for j in range(c)
        for r in range(0, h - 1, 2)
        for s in range(0, w - 1, 2)
        for window in [pool[i, j, r : r + 2, s : s + 2]]
    )
    # relu(v) == 0 at the functional site means v <= 0; its input comes from a ReLU, so v == 0.
    return {
        "act": ("relu", int((seen["act"] == 0).sum()), seen["act"].numel()),
        "pool": ("max_pool", int(tied), n * c * (h // 2) * (w // 2)),
        ":relu": ("relu", int((F.max_pool2d(seen["pool"], 2) == 0).sum()), n * c * (h // 2) * (w // 2)),
    }


@pytest.mark.parametrize("training", [False, True])
def test_ties_agree_with_counting_by_hand(training):
    model = Net().double().train(training)
    patch(model, Jacobians())
    x = torch.randn(4, 1, 7, 7, dtype=torch.float64)
    twin = copy.deepcopy(model)
    unpatch(twin)
    want = expected_ties(twin, x)
    counted = ties(model, x)
    assert {k: (t.operation, t.tied, t.total) for k, t in counted.items()} == want
    assert all(t.tied > 0 for t in counted.values())
    assert all(t.fraction == t.tied / t.total for t in counted.values())
    # Inside a training step too, with gradients, adding up over forwards.
    with counting(model) as counts:
        model(x).sum().backward()
        model(x)
    assert {k: (t.tied, t.total) for k, t in counts.items()} == {k: (2 * a, 2 * b) for k, (_, a, b) in want.items()}
    assert model.conv.weight.grad is not None
    assert Ties("relu").fraction == 0.0


def test_ties_leave_no_trace():
    model = Net()
    patch(model, Jacobians())
    x = torch.randn(2, 1, 6, 6)
    out = model(x)  # pending: its graph must survive
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    kept = [id(b) for b in model.buffers()]
    ties(model, x=x)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert kept == [id(b) for b in model.buffers()]
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    out.sum().backward()


def test_counting_changes_no_bit():
    results = []
    for watch in (False, True):
        torch.manual_seed(5)
        model = Net()
        patch(model, RELU1)
        x = torch.randn(2, 1, 6, 6)
        if watch:
            with counting(model) as counts:
                loss = model(x).sum()
            assert counts
        else:
            loss = model(x).sum()
        results.append([loss, *gradients(loss, model, {"": RELU1})[""].values(), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_observers_are_removed_after_exceptions_and_nest():
    model = Net().eval()
    patch(model, Jacobians())
    (selection,) = selections(model).values()
    with pytest.raises(RuntimeError):
        ties(model, torch.zeros(1, 2, 6, 6))
    assert selection.observer is None
    with pytest.raises(KeyError), counting(model):
        raise KeyError
    assert selection.observer is None
    with counting(model) as outer:
        inner = ties(model, torch.zeros(1, 1, 6, 6))
        assert not outer
        model(torch.zeros(1, 1, 6, 6))
    assert selection.observer is None
    assert outer == inner
    assert torch._C._len_torch_function_stack() == 0


def test_counting_does_not_invent_sites():
    # Counting a pool's ties pools itself; the model's function mode must not take that for the model's call.
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(3, 2, 1, dilation=1), nn.ReLU6(), nn.LeakyReLU(0.1))
    patch(model, Jacobians())
    counts = ties(model, torch.zeros(1, 1, 8, 8))
    model(torch.zeros(1, 1, 8, 8))
    assert sorted(counts) == ["1", "2", "3"]
    assert [s.name for s in report(model).sites] == ["1", "2", "3"]
    assert [s.calls for s in report(model).sites] == [1, 1, 1]


def test_ties_of_relu6_count_both_kinks():
    model = nn.Sequential(nn.ReLU6())
    patch(model, Jacobians())
    counts = ties(model, torch.tensor([-1.0, -0.0, 0.0, 3.0, 6.0, 7.0, math.nan]))["0"]
    assert (counts.tied, counts.total) == (3, 7)


def test_structural_ties_are_told_from_accidental_ones():
    """A dead channel and a constant background, and one tie by chance at each site."""
    model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)).eval()
    patch(model, Jacobians())
    with torch.no_grad():
        model[0].weight[0] = 0  # the channel is 0 everywhere
    x = torch.arange(1.0, 3 * 2 * 16 + 1).view(3, 2, 4, 4)
    x[1, 1, 0, 0] = 0  # a zero before the ReLU in one sample only
    x[0, 1, 2:, 2:] = 5.5  # a window of one value
    x[2, 1, 0, 2] = x[2, 1, 0, 3] = 1e4  # two equal entries in a window of one sample
    counts = ties(model, x)
    assert counts["1"] == Ties("relu", tied=48 + 1, total=96, structural=48, zero=0)
    assert counts["2"] == Ties("max_pool", tied=12 + 1 + 1, total=24, structural=12 + 1, zero=12)
    assert (counts["1"].accidental, counts["2"].accidental) == (1, 1)
    alone = ties(model, x[2:])  # one sample cannot tell a dead unit from chance
    assert (alone["1"].tied, alone["1"].structural) == (16, 0)
    assert (alone["2"].tied, alone["2"].structural) == (5, 4)


def test_structure_of_two_kinks_and_one_dimension():
    model = nn.Sequential(nn.ReLU6())
    patch(model, Jacobians())
    x = torch.tensor([[0.0, 6.0, 1.0, 0.0], [0.0, 6.0, 6.0, 6.0]])
    assert ties(model, x)["0"] == Ties("relu6", tied=7, total=8, structural=4)
    assert ties(model, x[0])["0"] == Ties("relu6", tied=3, total=4, structural=0)


def test_gradients_and_divergence_for_the_input():
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 1, bias=False))
    patch(model, Jacobians())
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[3.0, -4.0]]))
    x = torch.zeros(1, 2, requires_grad=True)
    loss, named = model(x).sum(), {"input": x}
    by_choice = gradients(loss, model, {"a1": RELU1}, inputs=named, retain_graph=True)["a1"]
    assert list(by_choice) == ["1.weight", "input"]
    assert torch.equal(by_choice["input"], torch.tensor([[3.0, -4.0]]))
    for method in ("subtract", "propagate"):
        d = divergence(loss, model, {"a1": RELU1}, method=method, inputs=named, retain_graph=True)["a1"]
        assert (d.l1, d.per_layer["input"].l2, d.per_layer["1.weight"].l1) == (7.0, 5.0, 0.0)
    with pytest.raises(ValueError, match="requires_grad_"):
        gradients(loss, model, {"a1": RELU1}, inputs={"input": x.detach()})
    with pytest.raises(ValueError, match="name of a parameter"):
        gradients(loss, model, {"a1": RELU1}, inputs={"1.weight": x})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_gradients_are_measured_by_their_absolute_values(dtype):
    g = torch.Generator().manual_seed(0)
    a, b = ({n: torch.randn(k, dtype=dtype, generator=g) for n, k in (("x", (3, 5)), ("y", (7,)))} for _ in range(2))
    a["y"] = a["y"].conj()  # put off, as backwards leave it
    norms = measure(a, b)
    wide = [np.concatenate([t.resolve_conj().numpy().astype(complex).ravel() for t in s.values()]) for s in (a, b)]
    d = wide[0] - wide[1]
    assert norms.l1 == pytest.approx(np.abs(d).sum(), rel=1e-12)
    assert norms.l2 == pytest.approx(np.linalg.norm(d), rel=1e-12)
    assert norms.linf == pytest.approx(np.abs(d).max(), rel=1e-12)
    assert norms.relative == pytest.approx(np.linalg.norm(d) / np.linalg.norm(wide[1]), rel=1e-12)
    lengths = np.linalg.norm(wide[0]) * np.linalg.norm(wide[1])
    assert norms.cosine == pytest.approx(np.vdot(wide[0], wide[1]).real / lengths, rel=1e-12)
    carried = measure_difference({n: a[n] - b[n] for n in a}, b)
    assert carried.norms() == pytest.approx(norms.norms(), rel=1e-5)


def test_complex_parameters_have_a_divergence():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((2,), 1 + 2j, dtype=torch.complex128))

        def forward(self, x):
            return F.relu((self.w * 0.5).imag - x).sum()

    model = Turned()
    patch(model, Jacobians())
    loss = model(torch.ones(2, dtype=torch.float64))
    for method in ("subtract", "propagate"):
        differences = divergence(loss, model, {"one": RELU1}, method=method)["one"]
        assert differences.method == method
        assert (differences.l1, differences.linf) == (1.0, 0.5)  # 0.5 i for each of the two
        assert differences.l2 == pytest.approx(0.5**0.5)


def test_what_probes_print_is_short():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    patch(model, Jacobians())
    differences = divergence(model(torch.ones(1, 2)).sum(), model, {"one": RELU1})["one"]
    lines = str(differences).splitlines()
    assert len(lines) == 7  # the header, its line, all, two parameters, two notes
    assert lines[0].split() == ["parameter", *NORMS]
    assert lines[-2] == "of 4 parameters, 2 that do not differ"
    assert lines[-1] == "relative is inf where the reference's gradient is 0"
    met = ties(model, torch.ones(1, 2))
    assert str(met) == "1  relu: 3 of 3 tie (100 %)\n0 of 1 sites met no tie"


def test_the_parameters_that_differ_most_are_printed():
    reference = {f"p{i}": torch.ones(1) for i in range(9)}
    other = {f"p{i}": torch.full((1,), 1.0 + i) for i in range(9)}
    lines = str(measure(other, reference)).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("p") and line[1].isdigit()] == [
        "p8", "p7", "p6", "p5", "p4",
    ]  # fmt: skip
    assert lines[-1] == "of 9 parameters, 3 more that differ less and 1 that do not differ"


def test_two_patched_parts_do_not_mix():
    pair = nn.ModuleDict({"a": nn.Sequential(nn.ReLU()), "b": nn.Sequential(nn.ReLU())})
    patch(pair["a"], Jacobians()), patch(pair["b"], Jacobians())
    with counting(pair) as counts:
        pair["a"](torch.zeros(3))
        pair["b"](torch.ones(5))
    assert {k: (t.tied, t.total) for k, t in counts.items()} == {"a.0": (3, 3), "b.0": (0, 5)}


def test_ties_need_a_patched_eager_model():
    with pytest.raises(ValueError, match="not patched"):
        ties(nn.ReLU(), torch.zeros(1))
    model = nn.Sequential(nn.ReLU())
    patch(model, Jacobians())
    with pytest.raises(TypeError, match="eager mode"):
        ties(torch.compile(model), torch.zeros(1))
    model.compile()
    with pytest.raises(TypeError, match="eager mode"):
        ties(model, torch.zeros(1))
