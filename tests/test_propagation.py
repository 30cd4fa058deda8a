"""Differences carried down from the ties equal the subtraction of two backward passes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nslightning import Jacobians, patch
from nslightning.models import create_backbone
from nslightning.probes import differences, divergence, gradients

CHOICES = {
    "relu1": Jacobians(relu=1.0),
    "minimal": Jacobians(max_pool="minimal"),
    "beta10": Jacobians(max_pool=10.0, relu=-3.0, relu6=(1.0, 1.0), leaky_relu=5.0),
    "published": Jacobians(relu=2.0, rule="published"),
    "same": Jacobians(),
}


def plant_ties(model):
    """Zero one channel of every second convolution and linear layer: its ReLU inputs are then exactly 0."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))][:-1]
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight[0].zero_()
            if layer.bias is not None:
                layer.bias[0].zero_()
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


MODELS = {
    "everything": (lambda: Everything(), (3, 16, 16)),
    "lenet5": (lambda: create_backbone("paper/lenet5", 10, (1, 28, 28)), (1, 28, 28)),
    "vgg11": (lambda: create_backbone("paper/vgg11", 10, (3, 32, 32), batch_norm=True), (3, 32, 32)),
    "resnet18": (lambda: create_backbone("paper/resnet18", 10, (3, 32, 32)), (3, 32, 32)),
    "fc": (lambda: create_backbone("paper/fc", 10, (1, 28, 28), hidden=[32, 32]), (1, 28, 28)),
    "mobilenet": (lambda: create_backbone("torchvision/mobilenet_v2", 10, (3, 32, 32)), (3, 32, 32)),
    "googlenet": (lambda: create_backbone("torchvision/googlenet", 10, (3, 64, 64)), (3, 64, 64)),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_subtraction_in_float64(name):
    build, shape = MODELS[name]
    model = plant_ties(build()).double()
    patch(model, Jacobians())
    x = torch.randint(-1, 2, (4, *shape)).double()
    loss = model(x).logsumexp(1).sum()
    base, found = differences(loss, model, CHOICES, retain_graph=True)
    want = gradients(loss, model, {"": Jacobians(), **CHOICES})
    differing = 0
    largest = max(g.abs().max().item() for gradient in want.values() for g in gradient.values())
    for n in base:
        assert torch.equal(base[n], want[""][n])
        for choice in CHOICES:
            d = want[choice][n] - want[""][n]
            assert (found[choice][n] - d).abs().max() <= 1e-13 * largest, (n, choice)
            differing += bool(d.abs().max() > 1e-9 * largest)
    assert differing >= 2  # the test is about differences
    assert all(not d.any() for d in found["same"].values())


def test_both_methods_of_divergence_agree():
    model = plant_ties(Everything()).double()
    patch(model, Jacobians())
    loss = model(torch.randint(-1, 2, (4, 3, 16, 16)).double()).square().sum()
    a = divergence(loss, model, CHOICES, method="subtract", retain_graph=True)
    b = divergence(loss, model, CHOICES, method="propagate")
    for choice in CHOICES:
        for norm, value in a[choice].norms().items():
            assert b[choice].norms()[norm] == pytest.approx(value, rel=1e-9, abs=1e-12), (choice, norm)


def test_no_tie_costs_no_backward():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1))
    patch(model, Jacobians())
    loss = model(torch.randn(8, 5)).sum()
    passes = []
    model[0].weight.register_hook(lambda g: passes.append(1))
    _, found = differences(loss, model, {"relu1": Jacobians(relu=1.0), "relu2": Jacobians(relu=2.0)})
    assert all(torch.equal(d, torch.zeros_like(d)) for choice in found.values() for d in choice.values())
    assert len(passes) == 1  # the reference's own


def test_nothing_above_the_highest_tie_is_visited():
    model = plant_ties(create_backbone("paper/lenet5", 10, (1, 28, 28)))
    patch(model, Jacobians())
    loss = model(torch.randn(2, 1, 28, 28)).sum()
    _, found = differences(loss, model, {"minimal": Jacobians(max_pool="minimal")})
    last = list(found["minimal"])[-1]
    assert torch.equal(found["minimal"][last], torch.zeros_like(found["minimal"][last]))


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
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="subtract"):
        divergence(model(torch.ones(1, 2)).sum(), model, CHOICES, method="propagate")


def test_recorders_are_removed_after_an_exception():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    patch(model, Jacobians())
    loss = model(torch.ones(1, 2)).sum()
    loss.backward()
    with pytest.raises(RuntimeError):
        differences(loss, model, CHOICES)
    from nslightning.surgery import selections

    assert all(s.recorder is None for s in selections(model).values())
