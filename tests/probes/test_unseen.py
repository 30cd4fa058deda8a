"""Losses whose graph does not show all that their backward runs: never a silent 0, always as by separate backwards."""

import contextlib
import copy
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import checkpoint

from nslightning import Jacobians, patch, unpatch, using
from nslightning.probes import (
    MethodWarning,
    UnseenError,
    clarke_guarantee,
    differences,
    divergence,
    gradients,
    recording,
    ties,
    worst_choice,
    zone,
)

ONE = {"one": Jacobians(relu=1.0)}


class Inside(torch.autograd.Function):
    """Runs a module that its graph does not show, and differentiates it by itself."""

    @staticmethod
    def forward(ctx, x, model):
        ctx.model = model
        ctx.save_for_backward(x)
        return model(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(ctx.model(x), x, g)[0], None


class Doubled(torch.autograd.Function):
    """Nothing inside, and linear."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Clipped(torch.autograd.Function):
    """A gradient that is clipped on its way."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.5, 0.5)


@torch.library.custom_op("nslightning_tests::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


triple.register_autograd(lambda ctx, g: 3 * g)


class Net(nn.Module):
    """Two linear layers around tied ReLUs, which run in one way or another."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.low, self.part, self.high = nn.Linear(3, 4), nn.Sequential(nn.ReLU()), nn.Linear(4, 1)
        with torch.no_grad():
            self.low.weight[:2], self.low.bias[:2] = 0, 0
        self.fast = torch.compile(self.part.forward, backend="aot_eager") if way == "compiled part" else None

    def forward(self, x):
        return self.high(self.middle(self.low(x)))

    def middle(self, x):
        match self.way:
            case "eager":
                return self.part(x)
            case "reentrant":
                return checkpoint(self.part, x, use_reentrant=True)
            case "checkpoint":
                return checkpoint(self.part, x, use_reentrant=False)
            case "vmap":
                return torch.vmap(self.part)(x)
            case "inside a function":
                return Inside.apply(x, self.part)
            case "compiled part":
                return self.fast(x)
            case "beside a function":
                return self.part(Doubled.apply(x))
            case "beside an operator":
                return self.part(triple(x))
            case "clipped by a function":
                return self.part(Clipped.apply(x))
        raise ValueError(self.way)


HIDDEN = ("reentrant", "vmap", "inside a function", "compiled part")
SHOWN = ("eager", "checkpoint", "beside a function", "beside an operator")


@pytest.fixture(autouse=True)
def several_backwards_of_compiled_parts():
    with torch._functorch.config.patch(donated_buffer=False):
        yield


def tied(way):
    torch.manual_seed(0)
    model = Net(way).double()
    model.high.weight.data *= 10
    patch(model, Jacobians(), strict=False)
    return model, torch.randn(5, 3, dtype=torch.float64)


def apart(model, x):
    """The norm of the difference of two whole backwards, each of its own forward."""
    results = []
    for choice in (ONE["one"], Jacobians()):
        with using(model, choice):
            model.zero_grad()
            model(x).square().sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    return float((results[0] - results[1]).norm())


@pytest.mark.parametrize("way", [*HIDDEN, *SHOWN])
def test_a_divergence_is_right_or_says_how_it_was_found(way):
    model, x = tied(way)
    want = apart(model, x)
    assert want > 0.1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", MethodWarning)
        measured = divergence(model(x).square().sum(), model, ONE, method="propagate")["one"]
    assert measured.l2 == pytest.approx(want, rel=1e-9)
    assert measured.method == ("subtract" if way in HIDDEN else "propagate")
    reasons = [str(w.message) for w in said if w.category is MethodWarning]
    assert len(reasons) == (way in HIDDEN)
    # An audit and a callback pass the warning on, and they have no such argument.
    assert all(reason.startswith("gradients are subtracted, ") and "method=" not in reason for reason in reasons)
    assert divergence(model(x).square().sum(), model, ONE)["one"].l2 == pytest.approx(want, rel=1e-9)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("way", HIDDEN)
def test_differences_are_refused(way):
    model, x = tied(way)
    with pytest.raises(UnseenError, match="subtract"):
        differences(model(x).square().sum(), model, ONE)


@pytest.mark.parametrize("way", [*HIDDEN, *SHOWN])
def test_a_zone_is_right_or_refused(way):
    model, x = tied(way)
    run = partial(zone, model, lambda y: y.square().sum(), x, ONE["one"])
    if way in ("vmap", "compiled part"):
        with pytest.raises(ValueError, match=r"subtract|torch\.compile"):
            run()
        return
    results = run()
    assert results.kind == "bifurcation"
    assert results.difference == pytest.approx(apart(model, x), rel=1e-9)
    assert results.method == ("subtract" if way in HIDDEN else "propagate")
    with torch.no_grad():
        model.low.bias[:2] = 1.0
    assert run().kind == "regular"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_hidden_may_be_rounding_too(dtype):
    """Slopes that cancel over the reals, whatever ReLU's is at 0, and are no binary numbers."""

    class Thirds(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.relu = nn.Parameter(torch.tensor([0.0, 0.7], dtype=dtype)), nn.ReLU()

        def part(self, w):
            return self.relu(w) * 0.15 + self.relu(w) * 0.7 - self.relu(w) * 0.85

        def forward(self, x):
            return checkpoint(self.part, self.w * 1.0, use_reentrant=True)

    model = Thirds()
    patch(model, Jacobians())
    located = zone(model, torch.sum, None, Jacobians(relu=0.3))
    assert located.kind == "compensation"
    assert located.method == "subtract"


@pytest.mark.parametrize("way", HIDDEN)
def test_worst_choice_refuses(way):
    model, x = tied(way)
    with pytest.raises(ValueError, match=r"subtract|without it"):
        worst_choice(model, torch.sum, x)


def test_no_tie_is_still_no_difference():
    model, x = tied("inside a function")
    with torch.no_grad():
        model.low.bias[:2] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error", MethodWarning)
        measured = divergence(model(x).sum(), model, ONE, method="propagate")["one"]
    assert (measured.l1, measured.method) == (0.0, "propagate")  # its own backward met none: there is none


def test_the_graph_decides_and_not_the_model():
    model, x = tied("eager")
    fast = torch.compile(model, backend="aot_eager")
    losses = [run(x).square().sum() for run in (model, fast, model)]
    with pytest.warns(MethodWarning, match=r"torch\.compile"):
        methods = [divergence(loss, model, ONE, method="propagate")["one"].method for loss in losses]
    assert methods == ["propagate", "subtract", "propagate"]


# ------------------------------------------------------------------------------------------------ what is not linear
def keep_largest(g):
    """Half of the entries, the largest: scaled gradients are treated alike, sums of them are not."""
    flat = g.flatten()
    return torch.where(flat.abs() >= flat.abs().median(), flat, 0).view(g.shape)


HOOKS = {
    "clipped": lambda g: g.clamp(-0.5, 0.5),
    "normalised": lambda g: g / g.norm(),
    "offset": lambda g: g + 1,
    "sparse": keep_largest,
    "signs": lambda g: g.sign(),
}


def hooked(how, where):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Identity(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-1, 2, p.shape))
    hook = HOOKS[how]
    if where == "pre":
        model[1].register_full_backward_pre_hook(lambda m, g: (hook(g[0]),))
    elif where == "full":
        model[1].register_full_backward_hook(lambda m, inputs, g: (hook(inputs[0]),))
    elif where == "tensor":
        model[1].register_forward_hook(lambda m, args, y: y.register_hook(hook) and None)
    else:
        model[0].weight.register_hook(hook)
    patch(model, Jacobians())
    return model, torch.randint(-2, 3, (5, 4)).double()


@pytest.mark.parametrize("where", ["pre", "full", "tensor", "parameter"])
@pytest.mark.parametrize("how", HOOKS)
def test_hooks_that_are_not_linear_are_noticed(how, where):
    model, x = hooked(how, where)
    loss = model(x).square().sum()
    with pytest.warns(MethodWarning, match="not linear"):
        measured = divergence(loss, model, ONE, method="propagate")["one"]
    want = divergence(loss, model, ONE)["one"]
    assert want.l2 > 0
    assert measured == want
    located = zone(model, lambda y: y.square().sum(), x, ONE["one"])
    assert (located.kind, located.difference) == ("bifurcation", pytest.approx(want.l2, rel=1e-9))


def test_a_loss_that_is_not_finite_has_no_divergence_of_zero_though_nothing_ties():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
    with torch.no_grad():
        [p.fill_(1) for p in model.parameters()]
    patch(model, Jacobians())
    loss = model(torch.tensor([[1e30]])).square().sum()
    measured = divergence(loss, model, ONE, method="propagate")["one"]
    assert math.isnan(measured.l2)
    assert math.isnan(measured.per_layer["0.weight"].l2)


def test_a_hook_is_noticed_beside_a_choice_that_changes_nothing():
    model, x = hooked("clipped", "full")
    loss, choices = model(x).square().sum(), {"none": Jacobians()} | ONE
    with pytest.warns(MethodWarning, match="not linear"):
        measured = divergence(loss, model, choices, method="propagate")
    assert measured == divergence(loss, model, choices)


@pytest.mark.parametrize("where", ["pre", "full", "tensor", "parameter"])
def test_linear_hooks_pass(where, monkeypatch):
    monkeypatch.setitem(HOOKS, "doubled", lambda g: 2 * g)
    model, x = hooked("doubled", where)
    loss = model(x).square().sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MethodWarning)
        measured = divergence(loss, model, ONE, method="propagate")["one"]
    assert measured.l2 == pytest.approx(divergence(loss, model, ONE)["one"].l2, rel=1e-12)


BACKWARD_HOOKS = {
    "doubled": lambda g: 2 * g,
    "clipped": lambda g: g.clamp(-0.01, 0.01),
    "seen": lambda g: None,
}


@pytest.mark.parametrize("how", BACKWARD_HOOKS)
def test_a_backward_hook_of_a_module_around_the_ties_counts(how):
    """PyTorch runs such a hook only where a backward comes in by the module's output: none may begin below it."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    model = nn.Sequential(nn.Linear(4, 4, bias=False), block, nn.Linear(8, 1)).double()
    with torch.no_grad():
        model[0].weight[:2] = block[0].bias[:4] = 0  # units 0 to 3 tie, and units 4 to 7 do not
        block[0].weight[:4, 2:] = 0

    def hook(module, inputs, outputs):
        gradient = BACKWARD_HOOKS[how](inputs[0])
        return None if gradient is None else (gradient,)

    block.register_full_backward_hook(hook)
    patch(model, Jacobians())
    x = torch.randint(-2, 3, (5, 4)).double()
    want = apart(model, x)
    assert want > 0.1
    loss = model(x).square().sum()
    reference, one = gradients(loss, model, {"zero": Jacobians(), **ONE}).values()
    assert sum((one[n] - reference[n]).square().sum() for n in one).sqrt() == pytest.approx(want, rel=1e-9)
    for method in ("subtract", "propagate"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MethodWarning)
            measured = divergence(loss, model, ONE, method=method)["one"]
        assert measured.l2 == pytest.approx(want, rel=1e-9)
    located = zone(model, lambda y: y.square().sum(), x, ONE["one"])
    assert (located.kind, located.difference) == ("bifurcation", pytest.approx(want, rel=1e-9))
    if how == "seen":
        _, carried = differences(loss, model, ONE)
        assert sum(d.square().sum() for d in carried["one"].values()).sqrt() == pytest.approx(want, rel=1e-9)
    else:
        with pytest.raises(UnseenError, match="not linear"):
            differences(loss, model, ONE)


def test_custom_backwards_that_are_not_linear_are_noticed():
    model, x = tied("clipped by a function")
    loss, half = model(x).square().sum(), Jacobians(relu=0.5)
    want = divergence(loss, model, ONE, half)["one"]
    with pytest.warns(MethodWarning, match="not linear"):
        assert divergence(loss, model, ONE, half, method="propagate")["one"] == want


# --------------------------------------------------------------------------------------------------- whole backwards
def test_gradients_through_a_reentrant_checkpoint_leave_no_trace():
    model, x = tied("reentrant")
    shown = copy.deepcopy(model)
    shown.way = "eager"
    steps = []
    for name, p in model.named_parameters():
        p.grad = torch.full_like(p, 7.0)
        p.register_post_accumulate_grad_hook(lambda p, name=name: steps.append(name))
    inputs = x.clone().requires_grad_()
    h = model.low(inputs)
    ours, want = (
        gradients(m.high(m.middle(h)).square().sum(), m, {"zero": Jacobians(), **ONE}, inputs={"h": h})
        for m in (model, shown)
    )
    # The twin's own parameters lie above: what comes to h is the same.
    assert all(torch.equal(ours[c]["h"], want[c]["h"]) for c in ours)
    assert all(torch.equal(ours[c]["high.weight"], want[c]["high.weight"]) for c in ours)
    assert not torch.equal(ours["one"]["h"], ours["zero"]["h"])
    assert steps == []
    assert inputs.grad is None
    assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) for p in model.parameters())
    model.zero_grad()
    model(x).sum().backward()
    assert set(steps) == {name for name, _ in model.named_parameters()}  # the hooks are there again


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_small_difference_that_is_hidden_is_one(dtype):
    """What float32 leaves of it is no measure of what float64 does."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.t, self.relu = nn.Parameter(torch.zeros((), dtype=dtype)), nn.ReLU()

        def part(self, t):
            return sum(self.relu(t) * c for c in (0.15 + 1e-6, 0.7, -0.85))

        def forward(self, _):
            return checkpoint(self.part, self.t * 1.0, use_reentrant=True)

    patch(model := Small(), Jacobians())
    located = zone(model, torch.sum, None, Jacobians(relu=0.3))
    assert (located.kind, located.method) == ("bifurcation", "subtract")
    assert located.difference == pytest.approx(0.3e-6, rel=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_that_come_to_a_tensor_twice_are_added(reentrant):
    """By the backward inside a reentrant checkpoint, for it is not among its arguments, and by the one around it."""
    patch(relu := nn.Sequential(nn.Linear(3, 3), nn.ReLU()), Jacobians())
    relu.requires_grad_(False)
    with torch.no_grad():
        relu[0].weight.copy_(torch.eye(3)), relu[0].bias.zero_()
    h = torch.zeros(2, 3, requires_grad=True).clone()  # whose backward may run twice
    loss = checkpoint(lambda x: relu(2 * x + h), h, use_reentrant=reentrant).sum()
    relu[0].bias.requires_grad_(True)
    by_choice = gradients(loss, relu, {"zero": Jacobians(), **ONE}, inputs={"h": h})
    assert torch.equal(by_choice["one"]["h"], torch.full((2, 3), 3.0))
    assert torch.equal(by_choice["zero"]["h"], torch.zeros(2, 3))


def test_a_graph_that_was_freed_says_so():
    model, x = tied("eager")
    loss = model(x).square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        divergence(loss, model, ONE, method="propagate")


def test_an_inner_gradient_keeps_the_choice_it_was_taken_under():
    """A gradient penalty: patched outright or by `using`, the inner gradient takes the choice in force."""
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def penalty(model):
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return g.square().sum()

    results = {}
    for relu in (0.0, 1.0):
        model, _ = tied("eager")
        with using(model, Jacobians(relu=relu)):
            inner = penalty(model)
        # Whatever the outer backward's choice is, the inner gradient is a number of this loss.
        results[relu] = gradients(inner, model, {"zero": Jacobians(), **ONE})
        assert all(torch.equal(g, results[relu]["one"][n]) for n, g in results[relu]["zero"].items())
    # |sum_k high_k slope_k low_k|^2 has for low_k the gradient 2 high_k slope_k (...): none for a slope of 0.
    assert not results[0.0]["zero"]["low.weight"][:2].any()
    assert results[1.0]["zero"]["low.weight"][:2].any()


def test_recording_names_strangers():
    model, x = tied("inside a function")
    loss = model(x).square().sum()
    with recording(model) as met:
        loss.backward(retain_graph=True)
    with pytest.raises(UnseenError, match="runs relu inside"):
        met.refuse_strangers(loss)


class Transformed(nn.Module):
    """Convolution, ReLU, pooling and a maximum, which run under a transform."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.conv, self.relu, self.pool = nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        with torch.no_grad():
            self.conv.weight[0] = self.conv.bias[0] = 0

    def inside(self, x):
        return self.pool(self.relu(self.conv(x))).amax(-1)

    def forward(self, x):
        match self.way:
            case "eager":
                return self.inside(x)
            case "vmap":
                return torch.vmap(self.inside, in_dims=1, out_dims=1)(x.transpose(0, 1))
            case "chunks":  # the last has one example
                return torch.vmap(self.inside, chunk_size=3)(x)
            case "nested":
                return torch.vmap(torch.vmap(self.inside))(x.unflatten(0, (2, 2))).flatten(0, 1)
            case "gradients":
                return torch.vmap(torch.func.grad(lambda t: self.inside(t).sum()))(x)
        raise ValueError(self.way)


@pytest.mark.parametrize("way", ["vmap", "chunks", "nested", "gradients"])
def test_ties_are_counted_inside_transforms(way):
    x = (torch.arange(64.0).view(4, 1, 4, 4) % 5 - 2).clone()
    counts = []
    for one in ("eager", way):
        torch.manual_seed(0)
        model = Transformed(one)
        patch(model, Jacobians())
        counts.append({site: (met.tied, met.total, met.zero) for site, met in ties(model, x).items()})
        assert all(not met.structural for met in ties(model, x).values()) == (one != "eager")
        guarantee = clarke_guarantee(model, x)
        assert not guarantee.holds
        with pytest.raises(ValueError, match="vmap") if one == way else contextlib.nullcontext():
            worst_choice(model, torch.sum, x, starts=0, rounds=1, evaluations=1)
    assert counts[0] == counts[1]
    assert counts[0]["relu"][0] > 0


def test_rounding_under_autocast_does_not_pass_for_a_nonlinear_backward():
    """The demo in bf16-mixed: gradients of float32 parameters, of which parts were rounded to 8 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(200, 10),
    )  # fmt: skip
    patch(model, Jacobians())
    x = torch.rand(32, 1, 28, 28).mul(4).round().div(4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().logsumexp(1).mean()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for beta in (10.0, 100.0):
            choice = {"beta": Jacobians(max_pool=beta)}
            result = divergence(loss, model, choice, method="propagate", retain_graph=True)["beta"]
            assert result.method == "propagate"
            assert result.l2 > 0


@pytest.mark.parametrize(
    "measure",
    [
        lambda loss, model: divergence(loss, model, ONE),
        lambda loss, model: divergence(loss, model, ONE, method="propagate"),
        lambda loss, model: gradients(loss, model, ONE),
        lambda loss, model: differences(loss, model, ONE),
    ],
    ids=["subtract", "propagate", "gradients", "differences"],
)
@pytest.mark.parametrize("again", [False, True], ids=["patched", "patched again"])
@pytest.mark.parametrize("example", [None, torch.ones(2, 3)], ids=["", "example"])
def test_a_loss_from_before_the_patch_is_refused(measure, again, example):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    if again:
        patch(model, Jacobians())
    loss = model(torch.ones(2, 3)).sum()
    if again:
        unpatch(model)
    patch(model, Jacobians(), example=example)
    with pytest.raises(ValueError, match="the loss was computed before the model was patched"):
        measure(loss, model)
    assert divergence(model(torch.ones(2, 3)).sum(), model, ONE)["one"].l2 > 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_loss_of_another_thread_or_of_a_copy_is_measured(tied):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, 0.0 if tied else 1.0)
    for _ in range(50):  # the numbers of this thread are ahead of those of a new one
        model(torch.ones(2, 3)).sum()
    patch(model, Jacobians())
    copied = copy.deepcopy(model)
    with ThreadPoolExecutor(1) as pool:
        loss = pool.submit(lambda: model(torch.ones(2, 3)).sum()).result()
    assert (divergence(loss, model, ONE)["one"].l2 > 0) == tied
    assert (divergence(copied(torch.ones(2, 3)).sum(), copied, ONE)["one"].l2 > 0) == tied
