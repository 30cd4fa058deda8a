"""A layer may overwrite the output of the operation before it: whatever stock PyTorch allows works patched."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nslightning import Jacobians, patch

OPERATIONS = {
    "relu6": (F.relu6, Jacobians(relu6=(0.25, 0.75))),
    "hardtanh": (F.hardtanh, Jacobians(hardtanh=(0.25, 0.75))),
    "hardswish": (F.hardswish, Jacobians(hardswish=(0.25, 0.75))),
    "hardsigmoid": (F.hardsigmoid, Jacobians(hardsigmoid=(0.25, 0.75))),
    "softshrink": (F.softshrink, Jacobians(softshrink=(0.25, 0.75))),
    "threshold": (lambda x: F.threshold(x, 0.0, 0.0), Jacobians(threshold=0.5)),
    "elu": (lambda x: F.elu(x, 0.5), Jacobians(elu=0.75)),
    "selu": (F.selu, Jacobians(selu=0.75)),
    "abs": (torch.abs, Jacobians(abs=0.5)),
    "leaky_relu": (F.leaky_relu, Jacobians(leaky_relu=0.5)),
    "max_pool": (lambda x: F.max_pool2d(x, 2), Jacobians(max_pool="minimal")),
    "overlapping max_pool": (lambda x: F.max_pool2d(x, 3, 1, 1), Jacobians(max_pool="minimal")),
}


class Net(nn.Module):
    def __init__(self, first, then):
        super().__init__()
        self.scale, self.first, self.then = nn.Parameter(torch.ones(())), first, then

    def forward(self, x):
        return self.then(self.first(x * self.scale))


def gradient(first, then, jacobians, x):
    model = Net(first, then)
    if jacobians is not None:
        patch(model, jacobians)
    return torch.autograd.grad((model(x) * torch.linspace(-1, 1, 1)).sum(), x)[0]


@pytest.mark.parametrize("nodes", ["C++", "Python"])
@pytest.mark.parametrize("view", [True, False])
@pytest.mark.parametrize("function", [torch.relu_, torch.selu_, lambda y: F.elu(y, 0.5, inplace=True)])
def test_a_result_in_place_that_was_overwritten_is_refused_as_in_stock(function, view, nodes, monkeypatch):
    """Its backward reads its result, whatever memory the package's own nodes read."""
    if nodes == "Python":
        monkeypatch.setattr("nslightning.ops.autograd.native._library", lambda: None)

    class Overwriting(nn.Module):
        def forward(self, x):
            y = x * 1
            function(y[:, :2] if view else y)
            y.mul_(2)
            return y.sum()

    x = torch.tensor([[-1.0, 0.0, 1.0]], requires_grad=True)
    patch(patched := Overwriting(), Jacobians(relu=1.0, selu=1.5, elu=0.75))
    for model in (Overwriting(), patched):
        loss = model(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", OPERATIONS)
def test_overwritten_output(name, layout):
    first, other = OPERATIONS[name]
    torch.manual_seed(0)
    kinks = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 6.0])  # everyone's
    x = kinks[torch.randint(len(kinks), (2, 3, 8, 8))].to(memory_format=layout).requires_grad_()
    for jacobians in (None, Jacobians(), other):
        kept = gradient(first, lambda y: y * 3, jacobians, x)
        assert torch.equal(gradient(first, lambda y: y.mul_(3), jacobians, x), kept)
        if jacobians == Jacobians():
            assert torch.equal(kept, gradient(first, lambda y: y * 3, None, x))
    assert not torch.equal(kept, gradient(first, lambda y: y * 3, Jacobians(), x))  # ties were met


def test_max_pool_before_relu_in_place():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.ReLU(inplace=True))
    patch(model, Jacobians(relu=1.0, max_pool="minimal"))
    model(torch.randn(1, 3, 8, 8)).sum().backward()
