"""Differences carried down from the ties equal the subtraction of two backward passes."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nslightning import Jacobians, patch
from nslightning.models import create_backbone
from nslightning.ops.autograd import fused
from nslightning.ops.kernels import cpu as cpu_kernels
from nslightning.probes import UnseenError, differences, divergence, gradients, recording, ties
from nslightning.probes.graph import operation_nodes
from nslightning.surgery import Plan

CHOICES = {
    "relu1": Jacobians(relu=1.0),
    "minimal": Jacobians(max_pool="minimal"),
    "beta10": Jacobians(
        max_pool=10.0, relu=-3.0, relu6=(1.0, 1.0), leaky_relu=5.0, hardswish=(-0.5, 1.5), hardsigmoid=(1.0, -1.0)
    ),
    "last": Jacobians(max_pool="last", relu=0.5),
    "published": Jacobians(relu=2.0, rule="published"),
    "same": Jacobians(),
}


def plant_ties(model):
    """Make channels of every second layer constant: exactly 0 for ReLU, exactly 3 for the hard activations."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))][:-1]
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight[0].zero_()
            if layer.bias is not None:
                layer.bias[0].zero_()
            if isinstance(layer, nn.BatchNorm2d) and len(layer.weight) > 2:
                layer.weight[1].zero_()
                layer.bias[1] = 3.0
    return model


class Everything(nn.Module):
    """Functional calls, in-place calls, residuals, a shared module, a concatenation, tied weights, a checkpoint."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.leaky, self.six = nn.LeakyReLU(0.25), nn.ReLU6()
        self.head = nn.Linear(16, 8)
        self.tied = nn.Linear(8, 16)
        self.tied.weight = nn.Parameter(self.head.weight.t().clone())

    def forward(self, x):
        x = self.pool(self.relu(self.a(x)))
        x = x + checkpoint(lambda t: self.leaky(self.b(self.relu(self.b(t)))), x, use_reentrant=False)
        x = F.max_pool2d(self.six(x), 2)
        x = torch.cat([x.mean((2, 3)), F.relu(x).square().mean((2, 3))], 1)
        return self.tied(self.head(x).relu_())


def paper(name, **options):
    shape = (1, 28, 28) if name in ("lenet5", "fc") else (3, 32, 32)
    return lambda: create_backbone(f"paper/{name}", 10, shape, **options), shape


def zoo(name, size=32, **options):
    return lambda: create_backbone(name, 10, (3, size, size), **options), (3, size, size)


MODELS = {
    "everything": (lambda: Everything(), (3, 16, 16)),
    "lenet5": paper("lenet5"),
    "vgg11": paper("vgg11", batch_norm=True),
    "resnet18": paper("resnet18"),
    "fc": paper("fc", hidden=[32, 32]),
    "fc relu6": paper("fc", hidden=[32, 32], activation="relu6"),
    "mobilenet": zoo("torchvision/mobilenet_v2"),
    "googlenet": zoo("torchvision/googlenet", 64),
}
SLOW_MODELS = {
    **{name: paper(name) for name in ("vgg13", "vgg16", "vgg19", "resnet34", "resnet50", "densenet121")},
    "hard activations": zoo("torchvision/mobilenet_v3_small"),
    "pools rounded up": zoo("torchvision/squeezenet1_1", 64),
    "checkpointed": zoo("torchvision/densenet121", memory_efficient=True),
    "channel shuffle": zoo("torchvision/shufflenet_v2_x0_5", 64),
    "timm resnet": zoo("timm/test_resnet", 64),
    "timm byobnet": zoo("timm/test_byobnet", 64),
}


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_MODELS)])
def test_equals_subtraction_in_float64(name):
    build, shape = (MODELS | SLOW_MODELS)[name]
    torch.manual_seed(0)
    model = plant_ties(build()).double()
    patch(model, Jacobians(), strict=False)
    x = torch.randint(-1, 2, (2, *shape)).double()
    loss = model(x).logsumexp(1).sum()
    base, changes = differences(loss, model, CHOICES, retain_graph=True)
    want = gradients(loss, model, {"": Jacobians(), **CHOICES})
    for choice, jacobians in CHOICES.items():  # started where they part, or from the loss
        (alone,) = gradients(loss, model, {choice: jacobians}).values()
        assert all(torch.equal(want[choice][n], g) for n, g in alone.items())
    differing = 0
    for n in base:
        assert torch.equal(base[n], want[""][n])
    for choice in CHOICES:
        largest = max(g.abs().max().item() for c in ("", choice) for g in want[c].values())
        for n in base:
            d = want[choice][n] - want[""][n]
            assert (changes[choice][n] - d).abs().max() <= 1e-13 * largest, (n, choice)
            differing += bool(d.abs().max() > 1e-9 * largest)
    assert differing >= 2  # the test is about differences
    assert all(not d.any() for d in changes["same"].values())


def test_both_methods_of_divergence_agree():
    model = plant_ties(Everything()).double()
    patch(model, Jacobians())
    loss = model(torch.randint(-1, 2, (4, 3, 16, 16)).double()).square().sum()
    a = divergence(loss, model, CHOICES, method="subtract", retain_graph=True)
    b = divergence(loss, model, CHOICES, method="propagate")
    for choice in CHOICES:
        for norm, value in a[choice].norms().items():
            assert b[choice].norms()[norm] == pytest.approx(value, rel=1e-9, abs=1e-12), (choice, norm)


def visits(*parameters):
    """How many backwards come to each parameter, counted on the way."""
    seen = [0] * len(parameters)

    def count(i):
        def hook(g):
            seen[i] += 1

        return hook

    for i, p in enumerate(parameters):
        p.register_hook(count(i))
    return seen


@pytest.mark.parametrize("method", ["subtract", "propagate"])
def test_the_reference_is_the_one_that_is_given(method):
    """It is neither PyTorch's nor the one that the model was patched with."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU())
    nn.init.zeros_(model[0].weight)
    patch(model, Jacobians(relu=0.125))
    loss, choices = model(torch.ones(1, 2)).sum(), {"half": Jacobians(relu=0.5), "zero": Jacobians()}
    measured = divergence(loss, model, choices, Jacobians(relu=1.0), method=method, control=True)
    assert [measured[name].l1 for name in ("half", "zero", "control")] == [1.0, 2.0, 0.0]
    assert {d.method for d in measured.values()} == {method}


def test_no_tie_costs_no_backward():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1))
    patch(model, Jacobians())
    loss = model(torch.randn(8, 5)).sum()
    seen = visits(model[0].weight)
    choices = {"relu1": Jacobians(relu=1.0), "relu2": Jacobians(relu=2.0)}
    measured = divergence(loss, model, choices, method="propagate", retain_graph=True)
    assert seen == [0]
    assert all(d.l1 == 0 and d.relative == 0 and d.cosine == 1 for d in measured.values())
    assert list(measured["relu1"].per_layer) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert measured == divergence(loss, model, choices, retain_graph=True)
    _, changes = differences(loss, model, choices)
    assert all(torch.equal(d, torch.zeros_like(d)) for choice in changes.values() for d in choice.values())
    assert seen == [1 + 1]  # one for the reference here, one in the subtraction, which serves all choices


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "composed"])
def test_windows_of_zeros_behind_a_relu_cost_no_backward(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(fused, "kernels_for", lambda device: None)
        monkeypatch.setattr("nslightning.ops.autograd.native._library", lambda: None)
    elif not cpu_kernels.available():
        pytest.skip("there was no C++ compiler when the package was installed")
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 2), nn.ReLU(), nn.MaxPool2d(2)
    )
    with torch.no_grad():
        model[0].bias[:2] = -100.0  # two channels are 0 everywhere
    patch(model, Jacobians())
    loss = model(torch.randn(3, 1, 14, 14)).square().sum()
    seen = visits(model[0].weight)
    pools = {str(c): Jacobians(max_pool=c) for c in ("minimal", 10.0, "last", "sum")}
    with recording(model) as met:
        loss.backward(retain_graph=True)
    assert seen == [1]
    assert ties(model, torch.randn(3, 1, 14, 14))["2"].zero > 0
    for choice in (*pools.values(), Jacobians(relu=1.0), Jacobians(relu=1.0, max_pool=7.0)):
        assert met.starts(choice) == []
    assert all(d.l1 == 0 for d in divergence(loss, model, pools, method="propagate", retain_graph=True).values())
    # The kernels saw in the forward that nothing matters; otherwise the reference's backward of this call must tell.
    assert any(operation_nodes(loss)) is not kernels
    assert seen == [1 if kernels else 2]
    assert all(d.l1 == 0 for d in divergence(loss, model, pools).values())


@pytest.mark.parametrize("reference", [Jacobians(), Jacobians(relu=1.0)], ids=["relu0", "relu1"])
def test_windows_of_zeros_behind_a_relu_that_ties_matter(reference):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 1))
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[0].bias[0] = 0.0
    patch(model, reference)
    loss = model(torch.randn(3, 1, 8, 8)).square().sum()
    choices = {"both": Jacobians(relu=1.0, max_pool="minimal"), "pool": replace(reference, max_pool="minimal")}
    ours, wanted = (
        divergence(loss, model, choices, reference, method=m, retain_graph=True) for m in ("propagate", "subtract")
    )
    assert ours["both"].l2 > 0
    assert (ours["pool"].l2 > 0) is (reference.relu == 1)
    for name in choices:
        assert ours[name].l2 == pytest.approx(wanted[name].l2, rel=1e-5)


def test_windows_tied_above_zero_behind_a_relu_matter():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
    patch(model, Jacobians())
    with torch.no_grad():
        model[0].weight.fill_(1.0), model[0].bias.fill_(1.0)
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    loss = model(x).sum()
    _, changes = differences(loss, model, {"minimal": Jacobians(max_pool="minimal")}, inputs={"x": x})
    assert torch.equal(changes["minimal"]["x"][0, 0, :2, :2], torch.tensor([[-0.75, 0.25], [0.25, 0.25]]))


def test_a_learned_slope_below_tied_windows_gets_its_difference():
    """A difference is taken through the gates right below its start, where a gate has one input only: this has two."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.PReLU(), nn.MaxPool2d(2))
    patch(model, Jacobians())
    with torch.no_grad():
        model[0].weight.fill_(1.0), model[0].bias.fill_(-1.0)
    x = torch.zeros(1, 1, 4, 4)
    x[..., :2, :2] = 1  # the slope's own tie
    loss, choice = model(x).sum(), {"sum": Jacobians(max_pool="sum")}
    _, changes = differences(loss, model, choice)
    assert changes["sum"]["1.weight"].tolist() == [-9.0]  # of three more entries in three windows


def test_refuses_what_was_computed():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
    patch(model, Jacobians())
    inner = model[:2](torch.zeros(1, 1, 4, 4))
    loss, choices = model[2](inner).sum(), {"minimal": Jacobians(max_pool="minimal")}
    for propagated in (differences, partial(divergence, method="propagate")):
        with pytest.raises(ValueError, match="input 'inner' was computed"):
            propagated(loss, model, choices, inputs={"inner": inner})
    assert divergence(loss, model, choices, inputs={"inner": inner}).keys() == {"minimal"}


def test_a_training_backward_serves_as_the_reference():
    model = plant_ties(Everything()).double()
    patch(model, Jacobians(relu=0.5))
    loss = model(torch.randint(-1, 2, (4, 3, 16, 16)).double()).square().sum()
    with recording(model) as met:
        loss.backward(retain_graph=True)
    parameters = list(model.parameters())
    in_use = Jacobians(relu=0.5)
    for name, choice in CHOICES.items():
        (_, changes) = differences(loss, model, {name: choice}, in_use, retain_graph=True)
        carried = met.carry(met.starts(choice), choice, parameters)
        assert all(torch.equal(a, b) for a, b in zip(carried, changes[name].values(), strict=True))
        assert any(d.any() for d in carried)  # also for CHOICES["same"], which is not in use here
    assert met.starts(in_use) == []


def test_several_choices_are_as_one_at_a_time_and_deterministic():
    results = []
    for together in (True, True, False):
        torch.manual_seed(0)
        model = plant_ties(create_backbone("paper/lenet5", 10, (1, 28, 28)))
        patch(model, Jacobians())
        loss = model(torch.randint(0, 2, (4, 1, 28, 28)).float()).logsumexp(1).sum()
        groups = [CHOICES] if together else [{name: choice} for name, choice in CHOICES.items()]
        changes = {}
        for group in groups:
            changes |= differences(loss, model, group, retain_graph=True)[1]
        results.append([d for choice in CHOICES for d in changes[choice].values()])
    assert sum(bool(d.any()) for d in results[0]) > 4
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_random_choice_has_no_difference():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(2))
    patch(model, Jacobians())
    with pytest.raises(ValueError, match="another choice at each backward"):
        divergence(model(torch.ones(1, 1, 2, 2)).sum(), model, {"r": Jacobians(max_pool="random")}, method="propagate")


def test_no_difference_is_carried_to_a_random_choice_in_use():
    """Its draws are over when differences are formed, which would be those to other draws."""
    model = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    patch(model, draws := Jacobians(relu="random"))
    loss, one = model(torch.ones(1, 2)).sum(), Jacobians(relu=1.0)
    with recording(model) as met:
        loss.backward(retain_graph=True)
    for measure in (
        lambda: met.starts(one),
        lambda: list(met.carried({"one": one}, dict(model.named_parameters()))),
        lambda: divergence(loss, model, {"one": one}, draws, method="propagate"),
        lambda: differences(loss, model, {"one": one}, draws),
    ):
        with pytest.raises(ValueError, match="another choice at each backward"):
            measure()


def test_nothing_above_the_highest_tie_is_visited():
    model = plant_ties(create_backbone("paper/lenet5", 10, (1, 28, 28)))
    patch(model, Jacobians())
    loss = model(torch.randn(2, 1, 28, 28)).sum()
    _, changes = differences(loss, model, {"minimal": Jacobians(max_pool="minimal")})
    last = list(changes["minimal"])[-1]
    assert torch.equal(changes["minimal"][last], torch.zeros_like(changes["minimal"][last]))


def test_exact_where_subtraction_leaves_rounding():
    """A constant image: every window of the first pool ties, with the same patch under each tied entry."""
    model = create_backbone("paper/lenet5", 10, (1, 28, 28))
    patch(model, Jacobians())
    torch.manual_seed(0)
    x = torch.zeros(64, 1, 28, 28)
    x[:, :, 8:20, 8:20] = torch.rand(64, 1, 12, 12)

    def both(dtype):
        model.to(dtype)
        loss = model(x.to(dtype)).logsumexp(1).sum()
        choices = {"minimal": Jacobians(max_pool="minimal")}
        return differences(loss, model, choices, retain_graph=True)[1]["minimal"], gradients(
            loss, model, {"a": Jacobians(), **choices}
        )

    with torch.random.fork_rng():
        truth, _ = both(torch.float64)
        single, g = both(torch.float32)
    for n, d in truth.items():
        subtracted = (g["minimal"][n] - g["a"][n]).double()
        assert (single[n].double() - d).abs().sum() <= (subtracted - d).abs().sum() + 1e-12


def test_refuses_a_compiled_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    patch(model, Jacobians())
    model.compile(backend="aot_eager")
    with pytest.raises(UnseenError, match="subtract"):
        differences(model(torch.ones(1, 2)).sum(), model, CHOICES)


def test_recorders_are_removed_after_an_exception():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    patch(model, Plan([Jacobians(), {"stage": "3", "relu": 0.5}]))  # two selections
    loss = model(torch.ones(1, 2)).sum()
    loss.backward()
    with pytest.raises(RuntimeError):
        differences(loss, model, CHOICES)
    from nslightning.surgery import selections

    assert all(s.recorder is None for s in selections(model).values())


def test_a_choice_that_says_the_same_in_other_words_hides_no_other():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 1))
    with torch.no_grad():
        model[0].weight[0] = 0  # its windows tie over different images
    minimal = Jacobians(max_pool="minimal")
    patch(model, minimal)
    loss = model(torch.randn(3, 1, 8, 8)).square().sum()
    choices = {"one": Jacobians(max_pool=1.0), "native": Jacobians(), "nearly": Jacobians(max_pool=1 + 1e-6)}
    ours, wanted = (
        divergence(loss, model, choices, minimal, method=m, retain_graph=True) for m in ("propagate", "subtract")
    )
    assert ours["one"].l2 == 0
    assert ours["native"].l2 == pytest.approx(wanted["native"].l2, rel=1e-5)
    assert ours["nearly"].l2 == pytest.approx(1e-6 * ours["native"].l2, rel=0.1)


def test_a_training_backward_keeps_only_what_differences_go_through():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2), nn.Softplus())
    with torch.no_grad():
        model[0].bias[0] = -100.0  # zeros for the first windows, and ones for the others: all tie
        model[0].weight[1], model[0].bias[1] = 0.0, 1.0
    patch(model, Jacobians())
    x, choice = torch.randn(3, 1, 12, 12), Jacobians(max_pool="minimal")
    parameters = list(model.parameters())

    def carried(backward):
        model.zero_grad()
        loss = model(x).square().sum()
        with recording(model) as met:
            backward(loss, met)
        return loss, [p.grad.clone() for p in parameters], met.carry(met.starts(choice), choice, parameters)

    _, grads, want = carried(lambda loss, met: loss.backward(retain_graph=True))
    loss, same, carried_change = carried(lambda loss, met: met.backward(loss))
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(want, carried_change, strict=True))
    assert carried_change[0].any()
    with pytest.raises(RuntimeError, match=r"loss.backward\(retain_graph=True\)"):
        loss.backward()


def test_a_training_backward_keeps_nothing_where_no_tie_was_met():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1))
    patch(model, Jacobians())
    loss = model(torch.randn(8, 5)).sum()
    with recording(model) as met:
        met.backward(loss)
    choice = Jacobians(relu=1.0)
    assert not any(d.any() for d in met.carry(met.starts(choice), choice, list(model.parameters())))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_training_backward_through_a_checkpoint_above_the_ties():
    model = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 1))
    patch(model, Jacobians())
    x = torch.ones(1, 1, 4, 4, requires_grad=True)
    loss = checkpoint(model[3], checkpoint(model[2], model[1](model[0](x)), use_reentrant=False), use_reentrant=False)
    with recording(model) as met:
        met.backward(loss.sum())
    choice = Jacobians(max_pool="minimal")
    (change,) = met.carry(met.starts(choice), choice, [x])
    assert change.any()
    assert torch.equal(change[0, 0, 0, 0] * -1 / 3, change[0, 0, 0, 1])
