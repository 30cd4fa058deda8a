"""clamp, PReLU, RReLU and Hardshrink in every spelling of PyTorch's, and clamp between tensors."""

import pytest
import torch
import torch.nn.functional as F
from bits import bits
from torch import nn

from nslightning import Jacobians, ops, patch, using
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.clamps import clamped

aten = torch.ops.aten
CHOICE = Jacobians(clamp=(0.625, 0.375), prelu=0.625, rrelu=0.625, hardshrink=(0.625, 0.625))
W = torch.tensor([0.3])
ZERO = torch.zeros(2)
# Each has its kink, the lower one of two, at 0; the derivative in (0, 1) is not asked for.
SPELLINGS = {
    "x.clamp": lambda x: x.clamp(0, 1),
    "torch.clamp": lambda x: torch.clamp(x, min=0.0),
    "keywords": lambda x: torch.clamp(input=x, min=0.0, max=1.0),
    "torch.clip": lambda x: torch.clip(x, 0.0, 1.0),
    "x.clip": lambda x: x.clip(min=0.0),
    "x.clamp_": lambda x: (x * 1.0).clamp_(0, 1),
    "torch.clamp_": lambda x: torch.clamp_(x * 1.0, 0, 1),
    "x.clip_": lambda x: (x * 1.0).clip_(0.0, 1),
    "torch.clamp_min": lambda x: torch.clamp_min(x, 0.0),
    "x.clamp_min": lambda x: x.clamp_min(0.0),
    "x.clamp_min_": lambda x: (x * 1.0).clamp_min_(0.0),
    "torch.clamp_min_": lambda x: torch.clamp_min_(x * 1.0, 0.0),
    "aten.clamp": lambda x: aten.clamp(x, 0.0, 1.0),
    "aten.clamp.default": lambda x: aten.clamp.default(x, 0.0, 1.0),
    "tensor bounds": lambda x: x.clamp(ZERO, ZERO + 1),
    "tensor bound": lambda x: torch.clamp_min(x, torch.tensor(0.0)),
    "tensor bounds in place": lambda x: (x * 1.0).clamp_(min=ZERO),
    "F.prelu": lambda x: F.prelu(x, W),
    "torch.prelu": lambda x: torch.prelu(x, W),
    "x.prelu": lambda x: x.prelu(W),
    "F.rrelu": lambda x: F.rrelu(x, 0.1, 0.2, True),
    "F.rrelu in place": lambda x: F.rrelu(x * 1.0, 0.1, 0.2, True, inplace=True),
    "F.rrelu_": lambda x: F.rrelu_(x * 1.0),
    "torch.rrelu": lambda x: torch.rrelu(x),
    "F.hardshrink": lambda x: F.hardshrink(x, 0.0),
    "torch.hardshrink": lambda x: torch.hardshrink(x, 0.0),
    "x.hardshrink": lambda x: x.hardshrink(0.0),
    "nn.PReLU": nn.PReLU(),
    "nn.RReLU": nn.RReLU(),
    "nn.Hardshrink": nn.Hardshrink(0.0),
}


class Calls(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_reached(spelling):
    model = Calls(SPELLINGS[spelling])
    x = torch.tensor([0.0, 5.0], requires_grad=True)
    torch.manual_seed(0)
    want = model(x)
    (stock,) = torch.autograd.grad(want.sum(), x)
    patch(model, CHOICE)
    torch.manual_seed(0)
    y = model(x)
    assert torch.equal(y, want)
    (got,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert got.tolist() == [0.625, stock[1]]
    with using(model, Jacobians()):
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], stock)


def test_the_upper_bound_takes_the_second_number():
    for f in (
        lambda x: x.clamp_max(0.0), lambda x: torch.clamp(x, max=0.0), lambda x: (x * 1.0).clamp_max_(0.0),
        lambda x: torch.clamp(x, None, torch.zeros(2)), lambda x: aten.clamp_max(x, 0.0),
    ):  # fmt: skip
        model = Calls(f)
        patch(model, CHOICE)
        x = torch.tensor([0.0, 0.0], requires_grad=True)
        assert torch.autograd.grad(model(x).sum(), x)[0].tolist() == [0.375, 0.375]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("which", ["both", "low", "high"])
def test_between_tensors_the_bound_receives_the_rest(which, dtype):
    generator = torch.Generator().manual_seed(0)
    inf, nan = float("inf"), float("nan")
    x = torch.cat([torch.randint(-2, 3, (60,), generator=generator).float(), torch.tensor([nan, inf, -inf, -0.0])])
    x = x.view(4, 16).to(dtype).requires_grad_()
    low = torch.randint(-2, 1, (16,), generator=generator).to(dtype).requires_grad_() if which != "high" else None
    high = torch.randint(-1, 3, (4, 1), generator=generator).to(dtype).requires_grad_() if which != "low" else None
    inputs = [t for t in (x, low, high) if t is not None]
    g = torch.randn(4, 16, generator=generator).to(dtype)
    selection = Selection(Jacobians())
    y, stock = clamped(x, selection, low, high), torch.clamp(x, low, high)
    assert torch.equal(bits(y), bits(stock))
    reference = torch.autograd.grad(stock, inputs, g, retain_graph=True)
    for a, b in zip(torch.autograd.grad(y, inputs, g, retain_graph=True), reference, strict=True):
        assert torch.equal(bits(a), bits(b))

    # One entry at a time, from the definition, in float64; away from ties as stock.
    selection.set(Jacobians(clamp=(0.25, 4.0)))
    got = dict(zip(("x", *(n for n, t in (("low", low), ("high", high)) if t is not None)),
                   torch.autograd.grad(y, inputs, g), strict=True))  # fmt: skip
    want = {name: torch.zeros(4, 16, dtype=torch.float64) for name in got}
    for i in range(4):
        for j in range(16):
            at, g_at = x[i, j].item(), g[i, j].item()
            l_at = -inf if low is None else low[j].item()
            h_at = inf if high is None else high[i, 0].item()
            single = [t.detach()[k].double().requires_grad_() for t, k in
                      ((x, (i, j)), (low, (j,)), (high, (i, 0))) if t is not None]  # fmt: skip
            bounds = iter(single[1:])
            out = torch.clamp(single[0], next(bounds) if low is not None else None, next(bounds, None))
            parts = dict(zip(got, torch.autograd.grad(out, single), strict=True))
            if l_at < h_at and (low is not None and at == l_at):
                parts |= {"x": 0.25, "low": 0.75}
            elif l_at < h_at and (high is not None and at == h_at):
                parts |= {"x": 4.0, "high": -3.0}
            for name, part in parts.items():
                want[name][i, j] = float(part) * g_at
    assert torch.equal(got["x"].nan_to_num(), want["x"].to(dtype).nan_to_num())
    for name, dim in (("low", 0), ("high", 1)):
        if name in got:
            total = want[name].sum(dim, keepdim=dim == 1)
            close = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
            torch.testing.assert_close(got[name].double(), total, rtol=close, atol=close)


def test_tensor_bounds_compile_and_take_batches():
    torch._dynamo.reset()
    selection = Selection(Jacobians(clamp=(0.25, 0.75)))
    low = torch.tensor([0.0, 0.0, -1.0])

    def f(x):
        return clamped(x, selection, low, low + 1)

    x = torch.tensor([0.0, 1.0, 3.0], requires_grad=True)
    want = torch.tensor([0.25, 0.75, 0.0])
    assert torch.equal(torch.autograd.grad(f(x).sum(), x)[0], want)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(torch.autograd.grad(compiled.sum(), x, retain_graph=True)[0], want)
    selection.set(Jacobians())
    assert torch.equal(torch.autograd.grad(compiled.sum(), x)[0], torch.autograd.grad(f(x).sum(), x)[0])
    selection.set(Jacobians(clamp=(0.25, 0.75)))
    rows = torch.stack([x.detach(), x.detach() + 1])
    got = torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(rows)
    assert torch.equal(got, torch.tensor([[0.25, 0.75, 0.0], [0.75, 0.0, 0.0]]))


def test_the_function_takes_tensors_too():
    x = torch.tensor([0.0, 1.0], requires_grad=True)
    ops.clamp(x, torch.tensor(0.0), torch.tensor([1.0, 1.0]), (0.25, 0.75)).sum().backward()
    assert x.grad.tolist() == [0.25, 0.75]
