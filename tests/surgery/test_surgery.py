"""Surgery: what is reached, what stays as it was, what is named, and what is refused."""

import copy
import csv
import io
import itertools
import json
import pickle
import re
import subprocess
import sys
import threading
import warnings
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from bits import bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nslightning import Jacobians, PatchWarning, ops, patch, unpatch, using
from nslightning.probes import ties
from nslightning.surgery import UnreachedError, report, selections

ALT = Jacobians(relu=0.75, relu6=(0.5, 0.25), leaky_relu=0.5, max_pool="minimal")


# -------------------------------------------------------------------------------------- independent operation
class _Leaky(torch.autograd.Function):
    """A pointwise kink whose derivative is chosen, written from the definition."""

    @staticmethod
    def forward(ctx, x, y, slope, kinks):
        ctx.save_for_backward(slope, *(x == position for position, _ in kinks))
        ctx.values = [value for _, value in kinks]
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        slope, *ties = ctx.saved_tensors
        for tie, value in zip(ties, ctx.values, strict=True):
            slope = torch.where(tie, torch.full_like(slope, value), slope)
        return g * slope, None, None, None


def ref_relu(x, choice):
    return _Leaky.apply(x, x.clamp(min=0).detach(), (x > 0).to(x.dtype), [(0.0, choice.relu)])


def ref_relu6(x, choice):
    slope = ((x > 0) & (x < 6)).to(x.dtype)
    return _Leaky.apply(x, x.clamp(0, 6).detach(), slope, list(zip((0.0, 6.0), choice.relu6, strict=True)))


def ref_max_pool(x, choice, kernel, stride, padding=0):
    """Minimal-norm or native pooling as a weighted sum of the windows; the weights are constants."""
    p, k = padding, kernel
    padded = F.pad(x, (p, p, p, p), value=-torch.inf)
    windows = padded.unfold(2, k, stride).unfold(3, k, stride).flatten(-2)
    top = windows.amax(-1, keepdim=True).detach()
    tied = (windows == top).to(x.dtype)
    if choice.max_pool == "minimal":
        weight = tied / tied.sum(-1, keepdim=True)
    else:
        weight = F.one_hot(tied.argmax(-1), k * k).to(x.dtype)
    return torch.where(weight > 0, windows, 0.0).mul(weight).sum(-1)


# ------------------------------------------------------------------------------------------------ small model
class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return F.relu(self.act(self.conv(x)) - 0.1)


class Net(nn.Module):
    """Modules and functions, one activation shared between two names, a tie planted in channel 0."""

    def __init__(self, width=4, plant=True):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.act = self.again = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block = Block(width)
        self.fc = nn.Linear(width, 5)
        if plant:
            with torch.no_grad():
                self.bn.weight[0] = self.bn.bias[0] = 0
                self.block.conv.weight[1] = self.block.conv.bias[1] = 0

    def forward(self, x):
        x = self.pool(self.act(self.bn(self.conv(x))))
        x = self.again(self.block(x))
        return self.fc(x.mean((2, 3)))

    def reference(self, x, choice):
        """The same with the operations written above."""
        x = ref_max_pool(ref_relu(self.bn(self.conv(x)), choice), choice, 3, 2, 1)
        x = ref_relu(ref_relu(self.block.conv(x), choice) - 0.1, choice)
        return self.fc(ref_relu(x, choice).mean((2, 3)))


class Functional(nn.Module):
    """Every spelling of a call, through lambdas and closures."""

    def __init__(self, call):
        super().__init__()
        self.lin = nn.Conv2d(2, 2, 1)
        self.call = call

    def forward(self, x):
        return self.call(self.lin(x))


class OwnForward(nn.ReLU):
    def forward(self, x):
        return F.relu(x) + 1


class SuperForward(nn.ReLU):
    def forward(self, input):
        return super().forward(input) * 2


class NoForward(nn.ReLU):
    pass


class SameOut(nn.Module):
    """Pools whose indices are used again."""

    def __init__(self):
        super().__init__()
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.unpool(*self.pool(self.conv(x)))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))
        self.acts = nn.ModuleDict({"a": nn.LeakyReLU(0.2), "b": nn.Hardtanh(0, 6)})

    def forward(self, x):
        for conv, act in zip(self.convs, self.acts.values(), strict=True):
            x = act(conv(x))
        return x


def grads(model, out):
    return torch.autograd.grad(out.sum(), [p for p in model.parameters() if p.requires_grad], retain_graph=True)


def same(a, b):
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def logits(out):
    """One tensor of a model's output: torchvision's auxiliary heads come as a tuple in training."""
    return sum(o.sum() for o in out if o is not None) if isinstance(out, tuple) else out


def run(model, x, seed=3):
    torch.manual_seed(seed)  # dropout
    return logits(model(x))


# ------------------------------------------------------------------------------------------------ bit equalit
MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "googlenet": lambda: torchvision.models.googlenet(num_classes=5, init_weights=False, aux_logits=False),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5),
    "vgg11": lambda: nn.Sequential(torchvision.models.vgg11().features, nn.Flatten(), nn.Linear(512, 5)),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25),
    "timm_resnet10t": lambda: timm.create_model("resnet10t", num_classes=5),
    "net": Net,
    "sequential": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)),
    "indices": SameOut,
    "listed": Listed,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_reference_gradients_are_stock_bit_for_bit(name, dtype):
    stock = MODELS[name]().to(dtype)
    model = copy.deepcopy(stock)
    patch(model, Jacobians())
    x = torch.randn(2, 3, 32, 32).to(dtype)
    for training in (False, True):
        stock.train(training), model.train(training)
        with torch.no_grad():
            assert torch.equal(bits(run(stock, x)), bits(run(model, x)))
        a, b = run(stock, x), run(model, x)
        assert torch.equal(bits(a), bits(b))
        assert same(grads(stock, a), grads(model, b))
    assert same(
        [v for v in stock.state_dict().values() if v.is_floating_point()],
        [v for v in model.state_dict().values() if v.is_floating_point()],
    )


def test_timm_pool_with_same_padding_keeps_its_padding():
    from timm.layers.pool2d_same import MaxPool2dSame

    torch.manual_seed(1)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), MaxPool2dSame(3, 2), nn.Conv2d(4, 4, 1))
    model = copy.deepcopy(stock)
    x = torch.randint(-1, 2, (2, 3, 9, 9)).float()
    report = patch(model, Jacobians(max_pool="minimal"), example=x)
    assert [(s.name, s.how) for s in report.sites] == [("1", "functional")]
    out = model(x)
    assert torch.equal(out, stock(x))
    with torch.no_grad():
        stock[0].weight.zero_(), model[0].weight.zero_()
    out = model(x)
    # Every window of the constant image is tied; minimal and native differ, and the padding (-inf) is no tie.
    for choice in (Jacobians(), Jacobians(max_pool="minimal")):
        with using(model, choice):
            got = grads(model, out)[0]
        y = F.pad(stock[0](x), (1, 1, 1, 1) if stock[0](x).shape[-1] % 2 else (0, 1, 0, 1), value=-torch.inf)
        want = torch.autograd.grad(stock[2](ref_max_pool(y, choice, 3, 2)).sum(), stock[0].weight)[0]
        torch.testing.assert_close(got, want)


# ----------------------------------------------------------------------- gradients against another computatio
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("choice", [Jacobians(), ALT, Jacobians(relu=-2.0), Jacobians(max_pool="minimal")], ids=repr)
def test_gradients_agree_with_a_model_written_by_hand(choice, training):
    model = Net().double().train(training)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    want_out = model.reference(x, choice)
    want = grads(model, want_out)
    patch(model, choice)
    out = model(x)
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
    for a, b in zip(grads(model, out), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_choices_differ_exactly_where_ties_are():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    planted, free = Net().double(), Net(plant=False).double()
    for model in (planted, free):
        patch(model, Jacobians())
        out = model(x)
        base = grads(model, out)
        with using(model, Jacobians(relu=1.0)):
            other = grads(model, out)
        differing = {
            n for (n, _), a, b in zip(model.named_parameters(), base, other, strict=True) if not torch.equal(a, b)
        }
        # Without ties nothing moves; with them what feeds a tied channel. The last layer lies above.
        assert "fc.weight" not in differing
        assert bool(differing) == (model is planted)
    with using(planted, Jacobians(relu=1.0)):
        other = dict(zip(dict(planted.named_parameters()), grads(planted, planted(x)), strict=True))
    base = dict(zip(dict(planted.named_parameters()), grads(planted, planted(x)), strict=True))
    assert (other["bn.bias"] - base["bn.bias"]).nonzero().flatten().tolist() == [0]


def test_mobilenet_relu6_and_googlenet_functional_choices_are_reached():
    for name, choice in (("mobilenet_v2", Jacobians(relu6=(1.0, 0.0))), ("googlenet", Jacobians(relu=1.0))):
        model = MODELS[name]().eval()
        first = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        with torch.no_grad():
            first.weight[0] = first.bias[0] = 0
        patch(model, Jacobians())
        out = model(torch.randn(1, 3, 64, 64))
        base = torch.autograd.grad(out.sum(), first.bias, retain_graph=True)[0]
        with using(model, choice):
            other = torch.autograd.grad(out.sum(), first.bias, retain_graph=True)[0]
        assert base[0] == 0
        assert other[0] != 0
        assert torch.equal(base[1:], other[1:])


def _grad_at_zero(call, choice, shape=(1, 2, 4, 4)):
    """The patched gradient of a call's input at zero; the stock forward is compared on the way."""
    model = Functional(call)
    nn.init.dirac_(model.lin.weight), nn.init.zeros_(model.lin.bias)
    x = torch.zeros(shape, requires_grad=True)
    stock = call(x.clone())
    patch(model, Jacobians())
    out = model(x)
    first = out[0] if isinstance(out, tuple) else out
    assert torch.equal(first, stock[0] if isinstance(stock, tuple) else stock)
    if isinstance(out, tuple):
        assert torch.equal(out[1], stock[1])
    with using(model, choice):
        return torch.autograd.grad(first.sum(), x)[0], report(model)


RELU_CALLS = {
    "F.relu": lambda x: F.relu(x),
    "F.relu(input=)": lambda x: F.relu(input=x, inplace=False),
    "F.relu(inplace)": lambda x: F.relu(x, True),
    "F.relu_": lambda x: F.relu_(x),
    "torch.relu": lambda x: torch.relu(x),
    "torch.relu(input=)": lambda x: torch.relu(input=x),
    "torch.relu_": lambda x: torch.relu_(x),
    "x.relu": lambda x: x.relu(),
    "x.relu_": lambda x: x.relu_(),
    "aten": lambda x: torch.ops.aten.relu(x),
    "aten.default": lambda x: torch.ops.aten.relu.default(x),
    "functional passed on": lambda x, f=F.relu: f(x),
    "partial": partial(F.relu, inplace=True),
    "map": lambda x: next(map(torch.relu, [x])),
}


@pytest.mark.parametrize("call", RELU_CALLS.values(), ids=RELU_CALLS)
def test_every_spelling_of_relu(call):
    got, report = _grad_at_zero(call, Jacobians(relu=0.75))
    assert torch.equal(got, torch.full_like(got, 0.75))
    assert [(s.name, s.operation, s.how, s.calls) for s in report.sites] == [("", "relu", "functional", 1)]
    assert not report.unreached


RELU6_CALLS = {
    "F.relu6": lambda x: F.relu6(x),
    "F.relu6(inplace)": lambda x: F.relu6(input=x, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, 0, 6),
    "hardtanh kw": lambda x: F.hardtanh(x, max_val=6.0, min_val=0.0, inplace=True),
    "hardtanh_": lambda x: F.hardtanh_(x, 0.0, 6.0),
    "module": nn.ReLU6(),
    "module hardtanh": nn.Hardtanh(0, 6),
}


@pytest.mark.parametrize("call", RELU6_CALLS.values(), ids=RELU6_CALLS)
def test_every_spelling_of_relu6(call):
    got, _ = _grad_at_zero(call, Jacobians(relu6=(0.5, 0.25)))
    assert torch.equal(got, torch.full_like(got, 0.5))


LEAKY_CALLS = {
    "F": lambda x: F.leaky_relu(x),
    "slope": lambda x: F.leaky_relu(x, 0.3),
    "kw": lambda x: F.leaky_relu(input=x, negative_slope=0.3, inplace=True),
    "F_": lambda x: F.leaky_relu_(x, 0.3),
    "module": nn.LeakyReLU(0.3, inplace=True),
}


@pytest.mark.parametrize("call", LEAKY_CALLS.values(), ids=LEAKY_CALLS)
def test_every_spelling_of_leaky_relu(call):
    got, _ = _grad_at_zero(call, Jacobians(leaky_relu=0.5))
    assert torch.equal(got, torch.full_like(got, 0.5))


POOL_CALLS = {
    "F": lambda x: F.max_pool2d(x, 2),
    "F stride None": lambda x: F.max_pool2d(input=x, kernel_size=(2, 2), stride=None),
    "F positional": lambda x: F.max_pool2d(x, 2, 2, 0, 1, False, False),
    "F indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "F indices positional": lambda x: F.max_pool2d(x, 2, 2, 0, 1, False, True),
    "F with indices": lambda x: F.max_pool2d_with_indices(x, kernel_size=2),
    "torch": lambda x: torch.max_pool2d(x, 2),
    "torch kw": lambda x: torch.max_pool2d(input=x, kernel_size=[2, 2], stride=[2, 2]),
    "torch empty stride": lambda x: torch.max_pool2d(x, [2, 2], []),
    "torch 1-list": lambda x: torch.max_pool2d(x, [2]),
    "aten": lambda x: torch.ops.aten.max_pool2d(x, [2, 2]),
    "aten with indices": lambda x: torch.ops.aten.max_pool2d_with_indices.default(x, [2, 2], [2, 2]),
    "module": nn.MaxPool2d(2),
    "module indices": nn.MaxPool2d(kernel_size=2, return_indices=True),
}


@pytest.mark.parametrize("call", POOL_CALLS.values(), ids=POOL_CALLS)
def test_every_spelling_of_max_pool(call):
    got, _ = _grad_at_zero(call, Jacobians(max_pool="minimal"))
    assert torch.equal(got, torch.full_like(got, 0.25))


@pytest.mark.parametrize("kind", [OwnForward, SuperForward, NoForward])
def test_a_subclass_of_relu_is_reached_once(kind):
    # SuperForward doubles, so being patched twice would show as a wrong factor or as two rows.
    factor = 2.0 if kind is SuperForward else 1.0
    stock = nn.Sequential(nn.Conv2d(1, 1, 1), kind())
    model = copy.deepcopy(stock)
    x = torch.zeros(1, 1, 2, 2)
    nn.init.zeros_(model[0].bias)
    report = patch(model, Jacobians(relu=0.5), example=x)
    out = model(x)
    model[0].bias.grad = None
    out.sum().backward()
    assert model[0].bias.grad.item() == 4 * 0.5 * factor
    (site,) = report.sites
    assert (site.name, site.operation, site.how) == (
        "1",
        "relu",
        "module" if kind is NoForward else "functional",
    )
    assert site.calls == 1
    assert isinstance(model[1], kind)


@pytest.mark.parametrize("inner", [False, True])
def test_a_forward_replaced_on_the_instance(inner):
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU()) if inner else Net()
    if inner:
        model[1].forward = lambda x: F.relu(x) + 1
    else:
        conv = model.conv
        model.forward = lambda x: F.relu(conv(x))
        nn.init.zeros_(conv.weight), nn.init.zeros_(conv.bias)
    if inner:
        nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    x = torch.ones(1, 1) if inner else torch.ones(1, 3, 1, 1)
    before = dict(model.__dict__), dict(model[1].__dict__) if inner else None
    patch(model, Jacobians(relu=0.5))
    out = model(x)
    assert torch.equal(out, torch.ones(1, 1) if inner else torch.zeros(1, 4, 1, 1))
    bias = model[0].bias if inner else model.conv.bias
    assert torch.autograd.grad(out.sum(), bias)[0].unique().tolist() == [0.5]
    unpatch(model)
    assert (dict(model.__dict__), dict(model[1].__dict__) if inner else None) == before


def test_the_root_may_be_an_operation_itself():
    model = nn.ReLU()
    report = patch(model, Jacobians(relu=0.5))
    x = torch.zeros(2, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.tolist() == [0.5, 0.5]
    x.grad = None
    model(input=x).sum().backward()  # nn.ReLU.forward's own name for it
    assert x.grad.tolist() == [0.5, 0.5]
    assert [s.name for s in report.sites] == [""]
    assert repr(model) == "ReLU(jacobian=0.5)"
    unpatch(model)
    assert type(model) is nn.ReLU


def test_hardtanh_is_relu6_between_0_and_6():
    parts = [nn.Hardtanh(0, 6), nn.Hardtanh(-1, 6), nn.Hardtanh(), Functional(lambda x: F.hardtanh(x, -1, 6))]
    model, x = nn.Sequential(nn.Conv2d(1, 1, 1), *parts), torch.arange(-8.0, 8.0).view(1, 1, 4, 4)
    model[4].lin = nn.Identity()
    stock = [part(x) for part in parts]
    report = patch(model, ALT, example=x)
    assert [(s.name, s.operation, s.how, s.calls) for s in report.sites] == [
        ("1", "relu6", "module", 1),
        ("2", "hardtanh", "module", 1),
        ("3", "hardtanh", "module", 1),
        ("4", "hardtanh", "functional", 1),
    ]
    assert all(torch.equal(part(x), y) for part, y in zip(parts, stock, strict=True))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # what is tested goes with it
def test_integers_and_quantised_values_pass():
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    patch(model, ALT)
    x = torch.arange(-8, 8).view(1, 1, 4, 4)
    assert torch.equal(model[0](x), x.clamp(min=0))
    q = torch.quantize_per_tensor(x.float(), 0.5, 0, torch.qint8)
    assert torch.equal(model(q).dequantize(), F.max_pool2d(F.relu(q.dequantize()), 2))
    functional = Functional(lambda x: F.relu(x))
    functional.lin = nn.Identity()
    patch(functional, ALT)
    assert torch.equal(functional(x), x.clamp(min=0))


def test_modules_without_code_and_empty_models():
    class Empty(nn.Module):
        pass

    model = nn.ModuleDict({"e": Empty(), "r": nn.ReLU()})
    patch(model, ALT)
    assert isinstance(model["e"], Empty)
    unpatch(model)
    assert type(model["e"]) is Empty
    with pytest.warns(PatchWarning, match="nothing to patch"):
        patch(nn.ModuleList(), ALT)


# ---------------------------------------------------------------------------------- parts, threads, exception
def test_a_part_called_by_itself_takes_the_choice():
    model = Net()
    patch(model, Jacobians(relu=0.5))
    x = torch.zeros(1, 4, 2, 2)
    with torch.no_grad():
        model.block.conv.bias[:] = torch.tensor([0.1, 0.1, 0.1, 0.1])  # 0.1 - 0.1: the functional tie
    out = model.block(x)
    assert torch.autograd.grad(out.sum(), model.block.conv.bias)[0].tolist() == [2.0] * 4


def test_a_loss_module_like_lightnings_step_takes_the_choice():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = MODELS["googlenet"]().eval()

        def training_step(self, x):
            return self.backbone(x).sum()

    module = Module()
    bn = module.backbone.conv1.bn
    with torch.no_grad():
        bn.weight[0] = bn.bias[0] = 0
    patch(module, Jacobians(relu=1.0))
    loss = module.training_step(torch.randn(1, 3, 64, 64))
    assert torch.autograd.grad(loss, bn.bias)[0][0] != 0


def test_timm_forward_features_and_intermediates():
    model = timm.create_model("resnet10t", num_classes=3).eval()
    stock = copy.deepcopy(model)
    report = patch(model, ALT)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.forward_features(x), stock.forward_features(x))
    assert torch.equal(model.forward_head(model.forward_features(x)), stock(x))
    mids = model.forward_intermediates(x, intermediates_only=True)
    assert same(mids, stock.forward_intermediates(x, intermediates_only=True))
    assert not report.unreached
    assert all(s.calls for s in report.sites)


def test_using_reaches_a_patched_part_and_two_patched_parts():
    whole = nn.ModuleDict({"a": Net(), "b": Net()})
    patch(whole["a"], Jacobians())
    with pytest.raises(ValueError, match="its part 'a' is"):
        unpatch(whole)
    patch(whole["b"], Jacobians(relu=0.25))
    with using(whole, ALT):
        assert [s.jacobians for s in selections(whole).values()] == [ALT, ALT]
    assert [s.jacobians.relu for s in selections(whole).values()] == [0.0, 0.25]
    assert list(selections(whole)) == ["a", "b"]


def test_refusals_name_the_part_and_change_nothing():
    model = nn.Sequential(Net(), nn.ReLU())
    patch(model[0], Jacobians(relu=0.5))
    with pytest.raises(ValueError, match=r"part '0' is patched already.*using.*unpatch"):
        patch(model, ALT)
    assert type(model[1]) is nn.ReLU
    with pytest.raises(ValueError, match="the model is patched already"):
        patch(model[0], ALT)
    with pytest.raises(ValueError, match="'block' of a patched Net"):
        unpatch(model[0].block)
    unpatch(model[0])
    for call in (unpatch, report):
        with pytest.raises(ValueError, match="not patched"):
            call(model[0])
    with pytest.raises(ValueError, match="not patched"), using(model[0], ALT):
        pass
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        patch(F.relu, ALT)
    for bad in (3, int, ["a", 3]):
        with pytest.raises(TypeError, match="only takes a glob"):
            patch(model, ALT, only=bad)


def test_compiled_wrapped_and_scripted_models_are_refused():
    model = Net()
    with pytest.raises(TypeError, match="compiled already"):
        patch(torch.compile(model), ALT)
    model.compile()
    with pytest.raises(TypeError, match="compiled already"):
        patch(model, ALT)
    part = Net()
    part.block.compile()
    with pytest.raises(TypeError, match="'block' is compiled already"):
        patch(part, ALT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Net())
    with pytest.raises(TypeError, match="scripted"):
        patch(scripted, ALT)
    with pytest.raises(TypeError, match="DataParallel"):
        patch(nn.DataParallel(Net()), ALT)


def test_a_scripted_part_is_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.ReLU(), torch.jit.script(Net()))
    before = snapshot(model)
    with pytest.raises(UnreachedError, match=r"Sequential has .*: 1 is scripted\. Use the eager module.*skip=\['1'\]"):
        patch(model, ALT)
    assert snapshot(model) == before
    assert not patch(model, ALT, skip="1*").unreached
    unpatch(model)
    report = patch(model, ALT, strict=False)
    assert [(s.name, s.operation) for s in report.unreached] == [("1", "scripted")]
    unpatch(model)
    assert "_nonsmooth_part" not in model[1].__dict__


def test_ddp_wrapping_before_is_refused_and_after_works(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        patch(nn.parallel.DistributedDataParallel(Net()), ALT)
    model, twin = Net().double(), None
    twin = copy.deepcopy(model)
    patch(model, Jacobians()), patch(twin, ALT)
    wrapped = nn.parallel.DistributedDataParallel(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with using(wrapped, ALT):
        wrapped(x).sum().backward()
    twin(x).sum().backward()
    assert same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


def test_an_exception_in_the_forward_leaves_no_mode():
    model = Functional(lambda x: F.relu(x) if x.shape[0] == 1 else 1 / 0)
    patch(model, Jacobians(relu=0.5))
    nn.init.zeros_(model.lin.weight), nn.init.zeros_(model.lin.bias)
    with pytest.raises(ZeroDivisionError):
        model(torch.zeros(2, 2, 1, 1))
    assert torch._C._len_torch_function_stack() == 0
    model(torch.zeros(1, 2, 1, 1)).sum().backward()
    assert model.lin.bias.grad.tolist() == [0.5, 0.5]


def test_nested_using_and_exceptions_restore():
    model = Net()
    patch(model, Jacobians(relu=0.1))
    (selection,) = selections(model).values()
    with using(model, Jacobians(relu=0.2)):
        with using(model, Jacobians(relu=0.3)):
            assert selection.jacobians.relu == 0.3
            assert selection.kinks["relu"].item() == 0.3
        with pytest.raises(KeyError), using(model, Jacobians(relu=0.3)):
            raise KeyError
        assert selection.jacobians.relu == 0.2
    assert selection.jacobians.relu == 0.1
    assert selection.kinks["relu"].item() == 0.1


def test_the_published_rule_cannot_come_between_forward_and_backward():
    model = Net()
    patch(model, Jacobians())
    published = Jacobians(rule="published", max_pool=2.0)
    with pytest.raises(ValueError, match="Patch the model again"), using(model, published):
        pass
    with using(model, Jacobians(rule="published", relu=2.0)):  # beta = 0 leaves the forward alone
        pass
    for native in (None, 0.0, "native"):
        unpatch(model)
        patch(model, Jacobians(rule="published", max_pool=native))
        with using(model, Jacobians()):
            pass
    unpatch(model)
    patch(model, Jacobians(rule="published", max_pool=2.0))
    with using(model, Jacobians(rule="published", max_pool=2.0, relu=1.0)):
        pass
    with pytest.raises(ValueError, match="Patch the model again"), using(model, Jacobians(max_pool=2.0)):
        pass
    assert selections(model)[""].jacobians.relu == 0.0


def test_the_published_forward_is_that_of_an_evaluation_too():
    """Its arithmetic is part of a pooling's forward: a call without gradients computes it as well."""
    x = torch.randn(2, 2, 8, 8)
    model = Functional(lambda x: F.max_pool2d(x, 2))
    stock = model(x)
    patch(model, Jacobians(rule="published", max_pool=1e4))
    with torch.no_grad():
        first, second = model(x), model(x)
    assert torch.equal(first, model(x))
    assert torch.equal(second, first)
    assert not torch.equal(first, stock)


def test_a_random_choice_is_drawn_from_the_seed_of_the_patch():
    def drawn(**seed):
        model = nn.Sequential(nn.Linear(1, 64), nn.ReLU())
        nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
        patch(model, Jacobians(relu="random"), **seed)
        return torch.autograd.grad(model(torch.ones(1, 1)).sum(), model[0].bias)[0]

    x = torch.zeros(1, 64, requires_grad=True)
    (alone,) = torch.autograd.grad(ops.relu(x, "random", seed=3).sum(), x)
    assert torch.equal(drawn(seed=3), alone[0])
    assert torch.equal(drawn(), drawn(seed=0))
    assert not torch.equal(drawn(), alone[0])


def test_threads_running_one_model_and_two_models():
    barrier = threading.Barrier(2, timeout=20)

    def meet(x):
        barrier.wait()  # both threads are inside the forward before either calls relu
        return F.relu(x)

    def models():
        shared = Functional(meet)
        yield shared, shared
        yield Functional(meet), Functional(meet)

    for a, b in models():
        for m in {a, b}:
            nn.init.zeros_(m.lin.weight), nn.init.zeros_(m.lin.bias)
            patch(m, Jacobians(relu=0.5))
        got = {}

        def work(i, m, got=got):
            x = torch.zeros(1, 2, 1, 1, requires_grad=True)
            got[i] = torch.autograd.grad(m(x).sum(), m.lin.bias)[0].tolist()

        threads = [threading.Thread(target=work, args=(i, m)) for i, m in enumerate((a, b))]
        [t.start() for t in threads]
        [t.join(30) for t in threads]
        assert got == {0: [0.5, 0.5], 1: [0.5, 0.5]}
        assert len(report(a).sites) == 1


def test_backward_on_another_thread_reads_the_choice_in_force():
    model = Net().double()
    patch(model, Jacobians())
    out = model(torch.randn(1, 3, 8, 8, dtype=torch.float64))
    got = []
    with using(model, ALT):
        thread = threading.Thread(target=lambda: got.append(grads(model, out)))
        thread.start()
        thread.join()
        here = grads(model, out)
    assert same(got[0], here)
    assert not same(got[0], grads(model, out))


# ---------------------------------------------------------------------------------------------------- identit
def snapshot(model):
    """Everything that could tell a module from its former self."""
    return [
        (
            name,
            id(m),
            type(m),
            m.training,
            sorted(m.__dict__),
            id(m.__dict__.get("forward")),
            m._forward_hooks,
        )
        for name, m in model.named_modules(remove_duplicate=False)
    ]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", ["net", "googlenet", "densenet", "listed"])
def test_unpatch_gives_back_the_former_object(name, copied):
    model = MODELS[name]()
    model.eval()
    next(model.modules()).custom = [1]
    before, stored, text = snapshot(model), pickle.dumps(model), repr(model)
    patch(model, ALT)
    model(torch.randn(1, 3, 64, 64))
    assert pickle.dumps(model) != stored
    if copied:
        twin = copy.deepcopy(model)
        unpatch(twin)
        assert [(n, t, *r[:2]) for n, _, t, *r in snapshot(twin)] == [(n, t, *r[:2]) for n, _, t, *r in before]
        assert repr(twin) == text
        again = pickle.loads(pickle.dumps(model))
        unpatch(again)
        assert repr(again) == text
        assert all("_nonsmooth" not in key for m in again.modules() for key in m.__dict__)
    unpatch(model)
    assert snapshot(model) == before
    assert repr(model) == text
    assert pickle.dumps(model) == stored


def test_parameters_buffers_and_optimizers_are_untouched():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    keys, ids = list(model.state_dict()), [id(p) for p in (*model.parameters(), *model.buffers())]
    values = [v.clone() for v in model.state_dict().values()]
    patch(model, ALT, example=torch.randn(1, 3, 8, 8))
    assert list(model.state_dict()) == keys
    assert [id(p) for p in (*model.parameters(), *model.buffers())] == ids
    assert all(torch.equal(a, b) for a, b in zip(values, model.state_dict().values(), strict=True))
    assert model.training
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(values[0], model.conv.weight)
    assert isinstance(model, Net)
    assert isinstance(model.act, nn.ReLU)
    assert model.act is model.again


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # a module whose inputs need no gradient
def test_hooks_survive_and_fire_once():
    model = Net()
    fired = []

    def hooks(module, tag):
        module.register_forward_pre_hook(lambda m, a, k: fired.append((tag, "pre", sorted(k))), with_kwargs=True)
        module.register_forward_hook(lambda m, a, k, o: fired.append((tag, "post", sorted(k))), with_kwargs=True)
        module.register_full_backward_pre_hook(lambda m, g: fired.append((tag, "bpre")))
        module.register_full_backward_hook(lambda m, gi, go: fired.append((tag, "back")))

    hooks(model, "root"), hooks(model.pool, "pool")
    x = torch.randn(1, 3, 8, 8, requires_grad=True)

    def observe():
        fired.clear()
        model(x=x).sum().backward()
        return sorted(map(str, fired))

    before = observe()
    patch(model, ALT)
    assert observe() == before
    assert ("root", "pre", ["x"]) in fired
    assert len(fired) == 8
    hooks(model.bn, "late")
    assert len(observe()) == 12


@pytest.mark.parametrize("how", ["pickle", "torch", "deepcopy", "swa", "timm"])
def test_copies_are_patched_and_independent(how, tmp_path):
    model = Net().double()
    patch(model, Jacobians(relu=0.5), skip="pool")
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif how == "torch":
        torch.save(model, tmp_path / "m.pt")
        twin = torch.load(tmp_path / "m.pt", weights_only=False)
    elif how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "swa":
        twin = torch.optim.swa_utils.AveragedModel(model).module
    else:
        twin = timm.utils.ModelEmaV3(model).module.train()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    a, b = model(x), twin(x)
    assert torch.equal(a, b)
    assert same(grads(model, a), grads(twin, b))
    with using(twin, ALT):
        assert not same(grads(model, a), grads(twin, b))
        assert report(model).jacobians == Jacobians(relu=0.5)
        assert selections(model)[""].jacobians == Jacobians(relu=0.5)
    assert type(twin.act) is type(model.act)
    assert twin.act is twin.again
    # Functional calls of a copy are named, and decided, as the original's.
    assert [(s.name, s.how) for s in report(twin).sites] == [(s.name, s.how) for s in report(model).sites]
    assert report(twin).sites[-1].name == "block"


def test_a_copied_part_stays_patched():
    model = Net().double()
    patch(model, Jacobians(relu=0.5))
    part = copy.deepcopy(model.block)
    with torch.no_grad():
        part.conv.weight.zero_(), part.conv.bias.fill_(0.1)  # 0.1 - 0.1 is the functional call's tie
    out = part(torch.randn(1, 4, 2, 2, dtype=torch.float64))
    with using(part, Jacobians(relu=0.25)):
        assert selections(model)[""].jacobians.relu == 0.5
        assert grads(part, out)[1].tolist() == [4 * 0.25] * 4
    assert grads(part, out)[1].tolist() == [4 * 0.5] * 4
    assert len(pickle.dumps(part)) < len(pickle.dumps(model))


def test_a_slice_and_a_new_object_of_a_patched_class():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.ReLU())
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    patch(model, Jacobians(relu=0.5))
    part, made = model[:2], type(model[1])()
    part(torch.ones(1, 1)).sum().backward()
    assert model[0].bias.grad.item() == 0.5  # its modules are the patched ones
    with using(model, Jacobians(relu=3.0)):
        assert torch.autograd.grad(part(torch.ones(1, 1)).sum(), model[0].bias)[0].item() == 3.0
    zero = torch.zeros(1, requires_grad=True)
    assert torch.autograd.grad(made(zero).sum(), zero)[0].item() == 0.0  # a new one is not
    assert repr(made) == "ReLU()"
    assert "jacobian=0.5" in repr(part)


def test_a_patched_module_may_become_a_subclass():
    # FSDP2 and parametrize put a subclass on top of whatever class a module has.
    model = Net()
    patch(model, Jacobians(relu=0.5))
    x = torch.randn(2, 3, 4, 4)
    out = model(x)
    before = grads(model, out)
    for module in (model, model.act):
        cls = type(module)
        module.__class__ = type("Sharded" + cls.__name__, (cls,), {})
    assert torch.equal(model(x), out)
    assert same(grads(model, model(x)), before)
    assert "jacobian=0.5" in repr(model)
    unpatch(model)  # the class is not the surgery's business
    assert type(model).__name__ == "ShardedNet"
    assert torch.equal(model(x), out)
    assert not same(grads(model, model(x)), before)
    assert "jacobian" not in repr(model)


def test_parametrised_and_weight_normed_models():
    model = Net(plant=False)
    nn.utils.parametrizations.weight_norm(model.block.conv)
    nn.utils.parametrizations.spectral_norm(model.fc)
    stock = copy.deepcopy(model)
    patch(model, ALT)
    x = torch.randn(1, 3, 8, 8)
    for m in (stock, model):
        torch.manual_seed(0)
        m.eval()
    assert torch.equal(stock(x), model(x))
    unpatch(model)
    assert [sorted(m.__dict__) for m in model.modules()] == [sorted(m.__dict__) for m in stock.modules()]
    assert torch.equal(stock(x), model(x))


def test_fx_and_exported_graphs():
    from torch.fx import symbolic_trace

    x = torch.randn(1, 3, 8, 8)
    for make in (symbolic_trace, lambda m: torch.export.export(m, (x,)).module()):
        model = make(Net().eval())
        report = patch(model, Jacobians(relu=1.0))
        out = model(x)
        assert {s.operation for s in report.reached} == {"relu", "max_pool"}
        g = torch.autograd.grad(out.sum(), list(model.parameters()), retain_graph=True)
        with using(model, Jacobians()):
            h = torch.autograd.grad(out.sum(), list(model.parameters()), retain_graph=True)
        assert not same(g, h)
        unpatch(model)
        assert torch.equal(model(x), out)


# ---------------------------------------------------------------------------------------------- all or nothin
def test_a_patch_that_fails_changes_nothing():
    model = Net()
    before = snapshot(model)
    rng = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        patch(model, ALT, example=torch.randn(1, 7, 8, 8))
    assert snapshot(model) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PatchWarning):
            patch(model, ALT, only="nowhere.*")
    assert snapshot(model) == before
    torch.set_rng_state(rng)
    patch(model, ALT, example={"x": torch.randn(1, 3, 8, 8)})
    unpatch(model)
    assert snapshot(model) == before


def test_the_example_leaves_no_trace():
    model = nn.Sequential(Net(), nn.Dropout())
    model[0].block.eval()
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    x, drawing = torch.randn(1, 3, 8, 8), Functional(lambda x: F.dropout(x.relu()))  # in evaluation mode, too
    rng = torch.get_rng_state()
    patch(model, ALT, example=x)
    assert torch.equal(torch.get_rng_state(), rng)
    patch(drawing, ALT, example=x[:, :2])
    assert torch.equal(torch.get_rng_state(), rng)
    assert [row[3] for row in snapshot(model)] == [row[3] for row in before]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# ----------------------------------------------------------------------------------------------- only and ski
def sites(model, **kwargs):
    model = model()
    report = patch(model, ALT, example=torch.randn(1, 3, 8, 8), **kwargs)
    return sorted({(s.name, s.operation) for s in report.reached})


ACT, POOL, INNER, CALL = ("act", "relu"), ("pool", "max_pool"), ("block.act", "relu"), ("block", "relu")


@pytest.mark.parametrize(
    ("kwargs", "want"),
    [
        ({}, [ACT, CALL, INNER, POOL]),
        ({"only": "block.*"}, [INNER]),
        ({"only": ("block", "block.*")}, [CALL, INNER]),
        ({"only": "again"}, [ACT]),
        ({"skip": "again"}, [CALL, INNER, POOL]),
        ({"only": nn.MaxPool2d}, [POOL]),
        ({"skip": nn.ReLU}, [CALL, POOL]),
        ({"skip": Block}, [ACT, INNER, POOL]),
        ({"only": re.compile("^(act|block)$")}, [ACT, CALL]),
        ({"only": [nn.ReLU, ["pool"]], "skip": "block*"}, [ACT, POOL]),
    ],
    ids=str,
)
def test_only_and_skip(kwargs, want):
    assert sites(Net, **kwargs) == want


def test_a_selector_may_be_an_iterator():
    assert sites(Net, only=iter(["act", "block.act"])) == [ACT, INNER]


def test_what_is_skipped_keeps_the_stock_gradient():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for skip in (nn.ReLU, ["*act", "block", "again"]):
        model, stock = Net().double(), None
        stock = copy.deepcopy(model)
        patch(model, Jacobians(relu=1.0), skip=[skip, "block"])
        assert same(grads(model, model(x)), grads(stock, stock(x)))


def test_a_selector_that_matches_nothing_is_pointed_out():
    with pytest.warns(PatchWarning, match=r"'blok\.act' matches no module.*close names: block\.act"):
        patch(Net(), ALT, skip="blok.act")
    with pytest.warns(PatchWarning, match="'BatchNorm3d' matches no module"):
        patch(Net(), ALT, skip=nn.BatchNorm3d)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(Net(), ALT, only=["act", "block"])


def test_nothing_to_patch_warns():
    with pytest.warns(PatchWarning, match="Sequential has nothing to patch"):
        patch(nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU()), ALT)
    with pytest.warns(PatchWarning, match="among only=bn"):
        patch(Net(), ALT, only="bn", example=torch.randn(1, 3, 8, 8))
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
    stock, x = copy.deepcopy(vit).eval(), torch.randn(1, 3, 32, 32)
    with pytest.warns(PatchWarning, match="VisionTransformer has nothing to patch"):
        patch(vit, ALT, example=x)
    assert torch.equal(vit.eval()(x), stock(x))
    unpatch(vit)
    patch(vit, ALT)  # its code might call anything
    with pytest.warns(PatchWarning, match="VisionTransformer has nothing to patch"):
        vit(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit(x)


def test_fused_attention_without_gradients_is_stock():
    # Under a function mode nn.MultiheadAttention would leave its fused path.
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=F.relu).eval()
    stock, x = copy.deepcopy(layer), torch.randn(2, 3, 8)
    patch(layer, Jacobians(relu=0.5))
    with torch.no_grad():
        assert torch.equal(bits(layer(x)), bits(stock(x)))
    assert torch.equal(bits(layer(x)), bits(stock(x)))
    assert [(s.operation, s.how) for s in report(layer).sites] == [("relu", "functional")]


# ------------------------------------------------------------------------------------------------------ repor
class Mixed(nn.Module):
    """Reached and unreached, differentiable and not."""

    def __init__(self):
        super().__init__()
        self.hs, self.act, self.pool = nn.Hardswish(), nn.ReLU(), nn.LPPool2d(2, 2)

    def forward(self, x):
        x = self.act(self.act(self.hs(x)))
        x = torch.maximum(torch.ones(()), x).abs() + abs(x) + x.topk(4)[0].clamp_(min=0.5) + x.abs().median()
        with torch.no_grad():
            x.max()
            F.hardtanh(x)
        (x > 0).int().clamp(0, 1).max()
        x.detach().amin()
        x.mean().item()
        return self.pool(F.relu(x, inplace=True).relu())


def test_the_report_names_everything_once():
    model = Mixed()
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    patched = patch(model, Jacobians(relu=0.5), strict=False)
    assert [(s.name, s.how) for s in patched.sites] == [
        ("hs", "module"),
        ("act", "module"),
        ("pool", "unreached"),
    ]
    assert not patched.traced
    assert "listed after the first forward" in str(patched)
    for _ in range(2):
        model(x * 1)
    got = {(s.name, s.operation, s.kind, s.how, s.inplace): s.calls for s in patched.sites}
    assert got == {
        ("hs", "hardswish", "Hardswish", "module", False): 1,
        ("act", "relu", "ReLU", "module", False): 2,
        ("pool", "lp_pool2d", "LPPool2d", "unreached", False): 1,
        ("", "maximum", "maximum", "functional", False): 1,
        ("", "topk", "topk", "unreached", False): 1,
        ("", "abs", "abs", "functional", False): 3,
        ("", "hardtanh", "hardtanh", "functional", False): 1,
        ("", "clamp", "clamp_", "functional", True): 1,
        ("", "median", "median", "unreached", False): 1,
        ("", "max", "max", "functional", False): 1,
        ("", "max", "amin", "functional", False): 1,
        ("", "relu", "relu", "functional", True): 1,
        ("", "relu", "relu", "functional", False): 1,
    }
    assert report(model) is patched
    text = str(patched)
    assert "NOT REACHED" in text
    assert "listed after" not in text
    assert "3 sites keep PyTorch's own derivative" in text
    assert text.count("(model)") == 10
    with using(model, Jacobians(relu=0.125)):
        model(x * 1)
        assert "jacobian=0.125" in repr(model)
    assert {s.choice for s in patched.reached if s.operation == "relu"} == {0.5}


def test_a_functional_site_found_inside_using_shows_the_patched_choice():
    model = Functional(lambda x: F.relu(x))
    report = patch(model, Jacobians(relu=0.5))
    with using(model, Jacobians(relu=0.25)):
        model(torch.randn(1, 2, 1, 1))
    assert report.sites[0].choice == 0.5


def test_functional_sites_are_named_by_the_module_that_calls():
    model = MODELS["googlenet"]()
    report = patch(model, ALT, example=torch.randn(1, 3, 64, 64))
    functional = [s for s in report.sites if s.how == "functional"]
    assert len(functional) == 57
    convs = {
        n for n, m in model.named_modules() if isinstance(m, sys.modules["torchvision.models.googlenet"].BasicConv2d)
    }
    assert {s.name for s in functional} == convs
    assert all(s.calls == 1 and s.operation == "relu" and s.inplace for s in functional)
    dense = MODELS["densenet"]()
    report = patch(dense, ALT, example=torch.randn(1, 3, 64, 64))
    assert [(s.name, s.kind) for s in report.sites if s.how == "functional"] == [("", "relu")]


def test_shared_modules_are_listed_with_aliases_and_counted():
    model = torchvision.models.resnet18()
    report = patch(model, ALT, example=torch.randn(1, 3, 32, 32))
    assert sum(s.operation == "relu" for s in report.sites) == 9
    assert sum(s.calls for s in report.sites if s.operation == "relu") == 17  # counted by hand: 1 + 8 * 2
    (site,) = [s for s in patch(Net(), ALT, example=torch.randn(1, 3, 8, 8)).sites if s.aliases]
    assert (site.name, site.aliases, site.calls) == ("act", ("again",), 2)
    one = Functional(torch.relu)
    model, x = nn.Sequential(one, one), torch.ones(1, 2, 1, 1)
    (site,) = patch(model, ALT, example=x).sites
    assert (site.name, site.aliases) == ("0", ("1",))
    assert list(ties(model, x)) == ["0:relu"]


def test_report_files(tmp_path):
    model = Net()
    report = patch(model, Jacobians(relu6=(1.0, 0.0), leaky_relu=None, max_pool="minimal"), skip="block")
    model(torch.randn(1, 3, 8, 8))
    data = json.loads(report.save(tmp_path / "deep" / "r.json").read_text())
    assert data["fingerprint"] == report.fingerprint
    assert Jacobians(**data["jacobians"]) == report.jacobians
    assert data["skip"] == ["block"]
    assert [s["name"] for s in data["sites"]] == [s.name for s in report.sites]
    assert data == json.loads(json.dumps(report.to_dict()))
    rows = list(csv.DictReader(io.StringIO(report.save(tmp_path / "r.csv").read_bytes().decode(), newline="")))
    for row, site in zip(rows, report.sites, strict=True):
        assert row["name"] == site.name
        assert row["choice"] == ("" if site.choice is None else str(site.choice))
        assert tuple(row["aliases"].split()) == site.aliases
        assert (row["inplace"], row["calls"]) == (str(site.inplace), str(site.calls))
    with pytest.raises(ValueError, match=r"'r\.txt'"):
        report.save(tmp_path / "r.txt")
    assert not (tmp_path / "r.txt").exists()


def test_the_fingerprint_names_choice_selectors_and_sites():
    def mark(choice=ALT, **kwargs):
        return patch(Net(), choice, **kwargs).fingerprint

    base = mark()
    assert re.fullmatch("[0-9a-f]{12}", base)
    assert mark() == base
    assert mark(example=torch.randn(1, 3, 8, 8)) == base
    different = [
        base,
        mark(Jacobians()),
        mark(skip="act"),
        mark(skip="block"),
        mark(only="act"),
        mark(only=nn.ReLU),
    ]
    different.append(patch(nn.Sequential(nn.ReLU()), ALT).fingerprint)
    assert len(set(different)) == len(different)
    code = (
        "import torch.nn as nn; from nslightning import *;"
        "model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2));"
        "print(patch(model, Jacobians(relu=0.5), skip=['x*']).fingerprint)"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
    )
    with pytest.warns(PatchWarning):
        here = patch(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), Jacobians(relu=0.5), skip=["x*"]).fingerprint
    assert out.stdout.strip() == here


# ----------------------------------------------------------------------------------------- compile, checkpoin
# Behind a ReLU'(0) of 0 no gradient passes, and the pools' shares of tied zeros would not matter.
CHOICES = (
    Jacobians(),
    ALT,
    Jacobians(relu=1.0),
    Jacobians(relu=0.75, max_pool="last"),
    Jacobians(relu=1.0, max_pool=3.0),
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("style", ["function", "method"])
def test_one_compilation_serves_every_choice(training, style):
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    stock = Net().train(training)
    model = copy.deepcopy(stock)
    patch(model, Jacobians()), patch(stock, Jacobians())
    counter = CompileCounterWithBackend("aot_eager")
    if style == "function":
        compiled = torch.compile(model, backend=counter, fullgraph=True)
    else:
        model.compile(backend=counter, fullgraph=True)
        compiled = model
    for _ in range(2):
        x = torch.randn(2, 3, 8, 8)
        out, want = compiled(x), stock(x)
        torch.testing.assert_close(out, want)
        seen = []
        for choice in CHOICES:
            with using(compiled, choice), using(stock, choice):
                a, b = grads(model, out), grads(stock, want)
            for p, q in zip(a, b, strict=True):
                torch.testing.assert_close(p, q)
            seen.append(a)
        assert not any(same(a, b) for a, b in itertools.combinations(seen, 2))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_compiled_with_selectors():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2))
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    patch(model, Jacobians(relu=0.5, max_pool="minimal"), only=nn.ReLU)
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(torch.ones(1, 1, 2, 2))
    assert torch.autograd.grad(out.sum(), model[0].bias)[0].tolist() == [0.5, 0.5]
    for limits in ({"only": nn.ReLU}, {"skip": "pool"}):
        net = Net()
        patch(net, ALT, **limits)
        with pytest.raises(Exception, match="does not show which module calls"):  # the compiler's own class of error
            torch.compile(net, backend="aot_eager", fullgraph=True)(torch.ones(1, 3, 4, 4))
    torch._dynamo.reset()


class Checkpointed(nn.Module):
    """Net's block under a checkpoint: as a module, or as a closure whose call is its own."""

    def __init__(self, reentrant, closure):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 1), Block(4)
        self.reentrant, self.closure = reentrant, closure
        with torch.no_grad():
            self.block.conv.weight[1] = self.block.conv.bias[1] = 0
            self.stem.weight[1] = self.stem.bias[1] = 0

    def forward(self, x):
        def closure(y):
            return F.relu(self.block.conv(y))

        return checkpoint((self.closure and closure) or self.block, self.stem(x), use_reentrant=self.reentrant)


def test_nonreentrant_checkpoints():
    model = Checkpointed(reentrant=False, closure=False).double()
    with torch.no_grad():
        model.block.conv.bias[1] = 0.1  # the functional relu's tie
    plain = copy.deepcopy(model)
    plain.forward = lambda x: plain.block(plain.stem(x))
    patch(model, Jacobians()), patch(plain, Jacobians())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    a, b = model(x), plain(x)
    seen = []
    for choice in (Jacobians(), ALT, Jacobians(relu=1.0)):
        with using(model, choice), using(plain, choice):
            seen.append(grads(model, a))
            assert same(seen[-1], grads(plain, b))
    assert not any(same(a, b) for a, b in itertools.combinations(seen, 2))
    assert report(model).sites[-1].name == "block"


def test_reentrant_checkpoints_of_modules():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    model = Checkpointed(reentrant=True, closure=False).double()
    with torch.no_grad():
        model.block.conv.bias[1] = 0.1
    plain = copy.deepcopy(model)
    plain.forward = lambda x: plain.block(plain.stem(x))
    for m in (model, plain):
        patch(m, Jacobians(relu=0.5))
        m(x).sum().backward()
    assert same(*[[p.grad for p in m.parameters()] for m in (model, plain)])
    assert model.block.conv.bias.grad[1] != 0


def test_calls_in_a_reentrant_checkpoint_alone_are_listed_after_the_backward():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Functional(F.relu)

        def forward(self, x):
            return checkpoint(self.part, x, use_reentrant=True)

    model, x = Alone(), torch.randn(2, 2, 4, 4, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PatchWarning)  # no "has nothing to patch"
        patch(model, Jacobians())
        model(x).sum().backward()
    assert {site.name for site in report(model).sites} == {"part"}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant, without gradients
def test_a_functional_call_that_a_checkpoint_recomputes_is_refused(reentrant):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    model = Checkpointed(reentrant, closure=True)
    patch(model, ALT)
    with pytest.raises(UnreachedError, match=r"the model calls relu in a function.*Checkpoint an nn\.Module.*skip"):
        model(x)
    assert torch._C._len_torch_function_stack() == 0
    with torch.no_grad():
        model(x)  # nothing will be recomputed
    unpatch(model)
    stock = copy.deepcopy(model)
    for left in ({"skip": ""}, {"strict": False}):
        report = patch(model, ALT, **left)
        for m in (model, stock):
            m.zero_grad()
            m(x).sum().backward()
        assert same([p.grad for p in model.parameters()], [p.grad for p in stock.parameters()])
        assert [(s.name, s.kind) for s in report.unreached] == ([("", "relu")] if "strict" in left else [])
        unpatch(model)


def test_ties_are_counted_without_gradients_through_a_checkpointed_call():
    """Nothing will be computed again, so that a strict model has nothing to refuse."""
    model = Checkpointed(reentrant=False, closure=True)
    patch(model, ALT)
    with torch.no_grad():
        (counted,) = ties(model, torch.randn(2, 3, 4, 4)).values()
    assert (counted.tied, counted.total) == (2 * 4 * 4, 2 * 4 * 4 * 4)  # one of four channels is dead


def test_a_frozen_stem_without_gradients_is_no_checkpoint():
    def call(y):
        with torch.no_grad():
            return F.relu(y)

    model = Functional(call)
    patch(model, ALT)
    assert not model(torch.randn(1, 2, 1, 1)).requires_grad


def test_torch_func_and_export():
    model = Net().double().eval()
    patch(model, Jacobians(relu=0.75))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    params = dict(model.named_parameters())
    got = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(params)
    for g, want in zip(got.values(), grads(model, model(x)), strict=True):
        torch.testing.assert_close(g, want)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_memory_formats_and_autocast_are_stock():
    stock = torchvision.models.resnet18(num_classes=3).eval().to(memory_format=torch.channels_last)
    model = copy.deepcopy(stock)
    patch(model, Jacobians())
    x = torch.randn(1, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = stock(x), model(x)
    assert torch.equal(bits(a), bits(b))
    assert a.dtype == b.dtype
    assert same(grads(stock, a), grads(model, b))


def test_kept_type_information():
    model = Net()
    patch(model, ALT)
    assert type(model).__name__ == "Net"
    assert type(model).__module__ == Net.__module__
    assert "ReLU(inplace=True, jacobian=0.75)" in repr(model)
    assert "jacobian=minimal" in repr(model.pool)
    assert isinstance(model(torch.randn(1, 3, 8, 8)), Tensor)
