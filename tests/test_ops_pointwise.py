"""ReLU, ReLU6 and LeakyReLU: stock forward bits; at ties the chosen derivative; elsewhere the stock gradient."""

import pytest
import torch
import torch.nn.functional as F
from bits import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from nslightning import Jacobians, ops
from nslightning.ops import leaky_relu, relu, relu6
from nslightning.ops.pointwise import POINTWISE, pointwise
from nslightning.ops.selection import Selection

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SPECIAL = [-0.0, 0.0, 6.0, float("nan"), float("inf"), -float("inf"), 1e-7, -1e-7, 5.996, -3.0, 2.0, 3.0, -2.0]

# name -> (ours with its choice, stock, derivatives between the kinks where these are constant, kinks, choice)
OPS = {
    "relu": (lambda x, **k: relu(x, 0.75, **k), F.relu, (0.0, 1.0), (0.0,), (0.75,)),
    "relu6": (lambda x, **k: relu6(x, (0.25, -2.0), **k), F.relu6, (0.0, 1.0, 0.0), (0.0, 6.0), (0.25, -2.0)),
    "leaky": (
        lambda x, **k: leaky_relu(x, 0.125, 0.5, **k), lambda x: F.leaky_relu(x, 0.125), (0.125, 1.0), (0.0,), (0.5,)
    ),
    "hardtanh": (
        lambda x, **k: ops.hardtanh(x, -3, 2, (0.25, 4.0), **k),
        lambda x: F.hardtanh(x, -3, 2), (0.0, 1.0, 0.0), (-3.0, 2.0), (0.25, 4.0),
    ),
    "hardswish": (lambda x, **k: ops.hardswish(x, (-0.5, 1.5), **k), F.hardswish, None, (-3.0, 3.0), (-0.5, 1.5)),
    "hardsigmoid": (
        lambda x, **k: ops.hardsigmoid(x, (0.125, 2.0), **k), F.hardsigmoid, None, (-3.0, 3.0), (0.125, 2.0)
    ),
    "softshrink": (
        lambda x: ops.softshrink(x, 2.0, (0.5, 0.25)),
        lambda x: F.softshrink(x, 2.0), (1.0, 0.0, 1.0), (-2.0, 2.0), (0.5, 0.25),
    ),
    "threshold": (
        lambda x, **k: ops.threshold(x, 2.0, 5.0, 0.5, **k),
        lambda x: F.threshold(x, 2.0, 5.0), (0.0, 1.0), (2.0,), (0.5,),
    ),
    "elu": (lambda x, **k: ops.elu(x, 0.5, 0.75, **k), lambda x: F.elu(x, 0.5), None, (0.0,), (0.75,)),
    "selu": (lambda x, **k: ops.selu(x, 1.25, **k), F.selu, None, (0.0,), (1.25,)),
    "abs": (lambda x, **k: ops.abs(x, -0.5, **k), torch.abs, (-1.0, 1.0), (0.0,), (-0.5,)),
}  # fmt: skip
# The same without a choice, to be the stock operation to the bit.
REFERENCES = {
    "relu": relu,
    "relu6": relu6,
    "leaky": lambda x: leaky_relu(x, 0.125),
    "hardtanh": lambda x: ops.hardtanh(x, -3, 2),
    "hardswish": ops.hardswish,
    "hardsigmoid": ops.hardsigmoid,
    "softshrink": lambda x: ops.softshrink(x, 2.0),
    "threshold": lambda x: ops.threshold(x, 2.0, 5.0),
    "elu": lambda x: ops.elu(x, 0.5),
    "selu": ops.selu,
    "abs": ops.abs,
}


def naive_gradient(x, g, slopes, kinks, choice):
    """One entry at a time, in Python floats."""
    out = []
    for xi, gi in zip(x.double().flatten().tolist(), g.double().flatten().tolist(), strict=True):
        piece = slopes[sum(xi > k for k in kinks)]
        d = choice[kinks.index(xi)] if xi in kinks else piece
        out.append(gi * d)
    return torch.tensor(out, dtype=torch.float64).view(x.shape)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "scalar", "empty"])
def test_forward_bits_and_gradient(name, dtype, layout):
    ours, stock, slopes, kinks, choice = OPS[name]
    generator = torch.Generator().manual_seed(0)
    if layout in ("scalar", "empty"):
        x = torch.tensor(0.0, dtype=dtype) if layout == "scalar" else torch.empty(0, 3, dtype=dtype)
    else:
        x = torch.randn(4, 3, 5, 6, generator=generator).to(dtype)
        x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=dtype)
        x.view(-1)[100:150:3] = 0.0
        x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
        x = x.transpose(1, 3)[:, ::2] if layout == "strided" else x
    x = x.detach().requires_grad_()
    y = ours(x)
    assert torch.equal(bits(y), bits(stock(x)))
    g = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(dtype)
    (gradient,) = torch.autograd.grad(y, x, g)
    assert gradient.dtype == dtype
    if slopes is not None:
        finite = ~x.isnan()
        assert torch.equal(gradient[finite], naive_gradient(x, g, slopes, kinks, choice).to(dtype)[finite])
    for kink, derivative in zip(kinks, choice, strict=True):
        assert torch.equal(gradient[x == kink], (g[x == kink].double() * derivative).to(dtype))
    (stock_gradient,) = torch.autograd.grad(stock(x), x, g)
    off = ~torch.isin(x.double(), torch.tensor(kinks, dtype=torch.float64))
    assert torch.equal(bits(gradient[off]), bits(stock_gradient[off]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_reference_choice_is_stock_to_the_bit(dtype, name):
    x = torch.tensor(SPECIAL * 3, dtype=dtype, requires_grad=True)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    a, b = (torch.autograd.grad(f(x), x, g)[0] for f in (REFERENCES[name], OPS[name][1]))
    assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("name", OPS)
def test_the_reference_derivatives_of_the_table_are_those_of_the_installed_torch(name):
    _, stock, _, kinks, _ = OPS[name]
    x = torch.tensor(kinks, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(stock(x).sum(), x)
    parameters = {"leaky": (0.125,), "hardtanh": (-3, 2), "softshrink": (2.0,), "threshold": (2.0, 5.0), "elu": (0.5,)}
    table = POINTWISE[{"leaky": "leaky_relu"}.get(name, name)].kinks(*parameters.get(name, ()))
    assert torch.equal(torch.tensor(table, dtype=torch.float64), torch.stack([x.detach(), g], 1))


def test_no_tie_leaves_the_stock_operation_in_the_graph():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    assert type(relu(x, 7.0).grad_fn).__name__ == "ReluBackward0"
    x = torch.tensor([1.0, 0.0], requires_grad=True)
    assert type(relu(x, 7.0).grad_fn).__name__ == "_KinkedBackward"


@pytest.mark.parametrize("many", [False, True], ids=["few ties, as indices", "many ties, as a mask"])
def test_choice_is_read_when_the_backward_runs(many):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    x[:: 2 if many else 1000] = 0.0
    x.requires_grad_()
    selection = Selection(Jacobians())
    loss = pointwise("relu", x, selection).mul(3.0).sum()
    for alpha in (0.0, 0.5, -2.0, 1e4):
        selection.set(Jacobians(relu=alpha))
        (g,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(g, torch.where(x > 0, 3.0, torch.where(x == 0, 3.0 * alpha, 0.0)))


@pytest.mark.parametrize("name", [n for n in OPS if n != "softshrink"])  # PyTorch has none in place
def test_inplace_matches_and_overwrites(name):
    ours, stock, *_ = OPS[name]
    leaf = torch.tensor([0.0, -0.0, 6.0, 3.0, -3.0, 2.0, 1.0, -1.0], requires_grad=True)
    kept = leaf * 1.0
    (want,) = torch.autograd.grad(ours(kept).sum(), leaf)
    x = leaf * 1.0
    y = ours(x, inplace=True)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y, stock(leaf))
    assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], want)
    view = (leaf * 1.0).view(2, 4)
    assert torch.equal(torch.autograd.grad(ours(view, inplace=True).sum(), leaf)[0], want)


def test_inplace_leaky_relu_refuses_a_negative_slope():
    with pytest.raises(ValueError, match="slope >= 0"):
        leaky_relu(torch.zeros(2, requires_grad=True) * 1.0, -0.5, 0.0, inplace=True)


def test_published_rule_drops_the_incoming_gradient():
    x = torch.tensor([0.0, 2.0, -1.0], requires_grad=True)
    g = torch.tensor([1e-3, 5.0, 5.0])
    assert torch.equal(torch.autograd.grad(relu(x, 4.0, rule="published"), x, g)[0], torch.tensor([4.0, 5.0, 0.0]))
    assert torch.equal(torch.autograd.grad(relu(x, 4.0), x, g)[0], torch.tensor([4e-3, 5.0, 0.0]))
    six = torch.tensor([0.0, 6.0], requires_grad=True)
    got = torch.autograd.grad(relu6(six, (1.0, 3.0), rule="published"), six, torch.tensor([9.0, 9.0]))[0]
    assert torch.equal(got, torch.tensor([1.0, 3.0]))


def test_double_backward():
    x = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad((relu(x, 0.5) * x.exp()).sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.sum(), x)
    # d/dx [relu'(x) e^x + relu(x) e^x], the derivative of relu' being 0 and that of relu at 0 being 0.5.
    e = torch.exp(torch.tensor(1.0, dtype=torch.float64))
    want = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    want[1] = 3 * e
    torch.testing.assert_close(gg, want)


@pytest.mark.parametrize("name", OPS)
def test_gradcheck_away_from_kinks(name):
    x = torch.linspace(-3.7, 9, 50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: OPS[name][0](x), x)


@given(
    values=st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=40),
    alpha=st.floats(-100, 100, width=32),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=60)
def test_relu_over_patterns(values, alpha, dtype):
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    y = relu(x, alpha)
    assert torch.equal(bits(y), bits(F.relu(x)))
    (g,) = torch.autograd.grad(y.sum(), x)
    want = torch.where(
        x == 0, torch.tensor(alpha, dtype=torch.float64).to(dtype), torch.autograd.grad(F.relu(x).sum(), x)[0]
    )
    assert torch.equal(g, want)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_compiled_graph_serves_every_choice(backend):
    torch._dynamo.reset()
    selection = Selection(Jacobians(relu=1.0))

    def f(x):
        return (
            (pointwise("relu", x * 1.0, selection) + pointwise("leaky_relu", x * 2.0, selection, 0.25)).square().sum()
        )

    compiled = torch.compile(f, backend=backend, fullgraph=True)
    x = torch.randint(-2, 3, (64,), generator=torch.Generator().manual_seed(0)).float().requires_grad_()
    loss = compiled(x)
    choices = [
        Jacobians(),
        Jacobians(relu=3.0),
        Jacobians(leaky_relu=0.5),
        Jacobians(relu=2.0, rule="published"),
    ]
    for choice in choices:
        selection.set(choice)
        (got,) = torch.autograd.grad(loss, x, retain_graph=True)
        (want,) = torch.autograd.grad(f(x), x)
        assert torch.equal(got, want), choice


def test_introduction_example_zero_function():
    """relu(-t) + t - relu(t) is 0 everywhere; autodiff at 0 gives 1 - 2 alpha (facts of Bertoin et al. 2021)."""
    for alpha, want in ((0.0, 1.0), (0.5, 0.0), (1.0, -1.0)):
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(relu(-t, alpha) + t - relu(t, alpha), t)
        assert g.item() == want
