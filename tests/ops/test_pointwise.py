"""The pointwise operations: stock forward bits; at ties the chosen derivative; elsewhere the stock gradient."""

import pytest
import torch
import torch.nn.functional as F
from bits import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from nslightning import Jacobians, ops, patch
from nslightning.ops import leaky_relu, relu, relu6
from nslightning.ops.autograd.pointwise import pointwise
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.kernels import cpu as cpu_kernels
from nslightning.ops.record import OPERATIONS

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SPECIAL = [-0.0, 0.0, 6.0, float("nan"), float("inf"), -float("inf"), 1e-7, -1e-7, 5.996, -3.0, 2.0, 3.0, -2.0]


def slope_for(x):
    """PReLU wants its weight in the input's dtype."""
    return torch.tensor([0.125], dtype=x.dtype)


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
    "prelu": (
        lambda x: ops.prelu(x, slope_for(x), 0.5), lambda x: F.prelu(x, slope_for(x)), (0.125, 1.0), (0.0,), (0.5,)
    ),
    "rrelu": (
        lambda x, **k: ops.rrelu(x, 0.125, 0.375, False, 0.5, **k),
        lambda x: F.rrelu(x, 0.125, 0.375), (0.25, 1.0), (0.0,), (0.5,),
    ),
    "clamp": (
        lambda x, **k: ops.clamp(x, -3, 2, (0.25, 4.0), **k),
        lambda x: torch.clamp(x, -3, 2), (0.0, 1.0, 0.0), (-3.0, 2.0), (0.25, 4.0),
    ),
    "clamp_min": (
        lambda x, **k: ops.clamp_min(x, -3, 0.25, **k), lambda x: x.clamp_min(-3), (0.0, 1.0), (-3.0,), (0.25,)
    ),
    "clamp_max": (
        lambda x, **k: ops.clamp_max(x, 2, 4.0, **k), lambda x: x.clamp_max(2), (1.0, 0.0), (2.0,), (4.0,)
    ),
    "hardshrink": (
        lambda x: ops.hardshrink(x, 2.0, (0.5, 0.25)),
        lambda x: F.hardshrink(x, 2.0), (1.0, 0.0, 1.0), (-2.0, 2.0), (0.5, 0.25),
    ),
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
    "prelu": lambda x: ops.prelu(x, slope_for(x)),
    "rrelu": lambda x: ops.rrelu(x, 0.125, 0.375),
    "clamp": lambda x: ops.clamp(x, -3, 2),
    "clamp_min": lambda x: ops.clamp_min(x, -3),
    "clamp_max": lambda x: ops.clamp_max(x, 2),
    "hardshrink": lambda x: ops.hardshrink(x, 2.0),
}
# In place stock forms their derivative from the output.
FROM_OUTPUT = {"elu": lambda x: F.elu(x, 0.5, inplace=True), "selu": lambda x: F.selu(x, inplace=True)}
NOT_IN_PLACE = ("softshrink", "hardshrink", "prelu")  # PyTorch has none


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


@pytest.mark.parametrize("name", [n for n in OPS if n not in ("prelu", "rrelu")])  # theirs depend on the entry
def test_the_reference_derivatives_of_the_table_are_those_of_the_installed_torch(name):
    _, stock, _, kinks, _ = OPS[name]
    x = torch.tensor(kinks, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(stock(x).sum(), x)
    parameters = {
        "leaky": (0.125,), "hardtanh": (-3, 2), "softshrink": (2.0,), "hardshrink": (2.0,), "threshold": (2.0, 5.0),
        "elu": (0.5,), "clamp": (-3, 2), "clamp_min": (-3, None), "clamp_max": (None, 2),
    }  # fmt: skip
    field = {"leaky": "leaky_relu", "clamp_min": "clamp", "clamp_max": "clamp"}.get(name, name)
    record, values = OPERATIONS[field], parameters.get(name, ())
    table = [k for k in zip(record.positions(*values), record.stock(*values), strict=True) if k[0] == k[0]]
    assert torch.equal(torch.tensor(table, dtype=torch.float64), torch.stack([x.detach(), g], 1))


@pytest.mark.parametrize("compiled", [False, True], ids=["composed", "kernels"])
def test_no_tie_leaves_the_stock_operation_in_the_graph(compiled, monkeypatch):
    if compiled and not cpu_kernels.available():
        pytest.skip("there was no C++ compiler when the package was installed")
    if not compiled:
        monkeypatch.setattr("nslightning.ops.autograd.fused.kernels_for", lambda device: None)
    monkeypatch.setattr("nslightning.ops.autograd.native._library", lambda: None)
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    assert type(relu(x, 7.0).grad_fn).__name__ == "ReluBackward0"
    x = torch.tensor([1.0, 0.0], requires_grad=True)
    assert type(relu(x, 7.0).grad_fn).__name__ == ("_ReLUBackward" if compiled else "_KinkedBackward")


@pytest.mark.parametrize("many", [False, True], ids=["few ties", "many ties"])
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


@pytest.mark.parametrize("name", [n for n in OPS if n not in NOT_IN_PLACE])
def test_inplace_matches_and_overwrites(name):
    ours, stock, *_ = OPS[name]
    leaf = torch.tensor([0.0, -0.0, 6.0, 3.0, -3.0, 2.0, 1.0, -1.0], requires_grad=True)
    kept = leaf * 1.0
    (want,) = torch.autograd.grad(ours(kept).sum(), leaf)
    if name in FROM_OUTPUT:  # to the bits of stock in place, which are others
        (overwritten,) = torch.autograd.grad(FROM_OUTPUT[name](leaf * 1.0).sum(), leaf)
        torch.testing.assert_close(overwritten[leaf != 0], want[leaf != 0])
        want = torch.where(leaf == 0, want, overwritten)
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


@pytest.mark.parametrize("ties", [1, 3, 70_000, 300_001])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_ties_in_several_blocks_and_the_rest_untouched(ties, dtype):
    """300 001 entries are three blocks of one thread, the last one not a multiple of 8."""
    generator = torch.Generator().manual_seed(ties)
    x = torch.randn(300_001, generator=generator).abs().add(0.1).to(dtype) * (
        1 - 2 * torch.arange(300_001).remainder(2)
    )
    x[torch.randperm(300_001, generator=generator)[:ties]] = 0.0
    x.requires_grad_()
    g = torch.randn(300_001, generator=generator).to(dtype)
    g[::5], g[1::5], g[2::5] = float("nan"), -float("inf"), -0.0
    (got,) = torch.autograd.grad(ops.relu6(x, (-2.0, 3.0)), x, g)
    (stock,) = torch.autograd.grad(F.relu6(x), x, g)
    assert torch.equal(bits(got), bits(torch.where(x == 0, g * -2.0, stock)))


@pytest.mark.parametrize("g_layout", ["contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
def test_the_layouts_of_input_and_gradient_may_differ(layout, g_layout):
    x = torch.randint(-1, 2, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0)).float()
    g = torch.arange(120.0).view(2, 3, 4, 5)
    x = {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3).contiguous().transpose(0, 3),
        "strided": torch.stack([x, x], 2)[:, :, 0],
    }[layout].requires_grad_()
    g = {
        "contiguous": g,
        "channels_last": g.to(memory_format=torch.channels_last),
        "expanded": g[0, 0, 0, 1].expand(2, 3, 4, 5),
    }[g_layout]
    for create_graph in (False, True):
        (got,) = torch.autograd.grad(relu(x, 0.5), x, g, create_graph=create_graph)
        assert torch.equal(got, torch.where(x == 0, g * 0.5, torch.where(x > 0, g, 0.0)))


def test_a_default_device_does_not_matter():
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    with torch.device("meta"):
        for create_graph in (False, True):
            (g,) = torch.autograd.grad(relu(x, 0.5), x, torch.ones_like(x), create_graph=create_graph)
            assert g.tolist() == [0.0, 0.5, 1.0]


def test_what_is_kept_for_the_backward(monkeypatch):
    """Beside stock's one tensor: nothing without a tie, else at most a bit per entry (composed: of some)."""

    def kept(x):
        sizes = []

        def note(t):
            sizes.append(t.numel() * t.element_size())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = relu(x.requires_grad_(), 1.0)
        assert y.grad_fn is not None
        return sum(sizes) - y.numel() * y.element_size()

    x = torch.ones(1 << 20)
    assert kept(x.clone()) == 0
    assert kept(torch.zeros(1 << 20)) <= (1 << 20) // 8 + 8 * 8  # 3.1 % of the activation, and the blocks' numbers
    x[12345] = 0.0
    assert kept(x) <= (1 << 20) // 8
    monkeypatch.setattr("nslightning.ops.autograd.fused.kernels_for", lambda device: None)
    monkeypatch.setattr("nslightning.ops.autograd.native._library", lambda: None)
    assert kept(x) <= (1 << 20) // 64 + 8


def test_prelu_has_a_slope_per_channel_and_its_gradient_is_stock():
    x = torch.randint(-2, 3, (4, 3, 5), generator=torch.Generator().manual_seed(0)).float().requires_grad_()
    for weight in (torch.tensor([0.5, -0.25, 2.0]), torch.tensor([0.5]), torch.tensor(0.5)):
        weight.requires_grad_()
        g = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1))
        y, stock = ops.prelu(x, weight, at_zero=7.0), F.prelu(x, weight)
        assert torch.equal(y, stock)
        (gx, gw), (sx, sw) = (torch.autograd.grad(out, (x, weight), g) for out in (y, stock))
        assert torch.equal(gw, sw)
        assert torch.equal(gx, torch.where(x == 0, g * 7.0, sx))
        (gw,) = torch.autograd.grad(ops.prelu(x.detach(), weight, at_zero=7.0), weight, g)
        assert torch.equal(gw, sw)
    for odd in (x, torch.ones(4, 1, 2)):  # two slopes fit three channels, or one, as little as two columns
        with pytest.raises(RuntimeError) as ours:
            ops.prelu(odd, torch.ones(2))
        with pytest.raises(RuntimeError) as theirs:
            F.prelu(odd, torch.ones(2))
        assert str(ours.value) == str(theirs.value)


def test_prelu_under_autocast_is_stock():
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    weight = torch.tensor([0.1], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, stock = ops.prelu(x, weight, at_zero=0.5), F.prelu(x, weight)
    assert y.dtype == stock.dtype
    (gx, gw), (sx, sw) = (torch.autograd.grad(out.sum(), (x, weight)) for out in (y, stock))
    assert torch.equal(gw, sw)
    assert torch.equal(gx, torch.where(x == 0, 0.5, sx))


@pytest.mark.parametrize("inplace", [False, True])
def test_rrelu_draws_the_slopes_that_stock_draws(inplace):
    leaf = torch.randint(-2, 3, (7, 11), generator=torch.Generator().manual_seed(0)).float().requires_grad_()
    g = torch.randn(7, 11, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    stock, after = F.rrelu(leaf * 1.0, training=True, inplace=inplace), torch.rand(1)
    (want,) = torch.autograd.grad(stock, leaf, g)
    for at_zero in (None, 0.5, (1 / 8 + 1 / 3) / 2):  # the last is the slope of an evaluation alone
        torch.manual_seed(3)
        y = ops.rrelu(leaf * 1.0, training=True, at_zero=at_zero, inplace=inplace)
        assert torch.equal(torch.rand(1), after)
        assert torch.equal(y, stock)
        (got,) = torch.autograd.grad(y, leaf, g)
        assert torch.equal(got, want if at_zero is None else torch.where(leaf == 0, g * at_zero, want))


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, -2), (None, float("nan"))])
def test_clamp_to_a_point_or_to_nothing_is_stock(low, high):
    x = torch.tensor(SPECIAL, requires_grad=True)
    y, stock = ops.clamp(x, low, high, (5.0, 7.0)), torch.clamp(x, low, high)
    assert torch.equal(bits(y), bits(stock))
    a, b = (torch.autograd.grad(out.sum(), x)[0] for out in (y, stock))
    assert torch.equal(a, b)


def test_celu_is_smooth_for_every_alpha():
    for alpha in (0.1, 1.0, 3.0):
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, alpha=alpha: F.celu(x, alpha), x, eps=1e-6, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_random_draws_once_per_tie_from_a_stream_of_its_own(layout):
    x = torch.randint(-1, 2, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0)).float()
    x = x.to(memory_format=layout).requires_grad_()
    g = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    y = relu(x, "random", seed=5)
    first, second = (torch.autograd.grad(y, x, g, retain_graph=True)[0] for _ in range(2))
    again, differentiable = (
        torch.autograd.grad(relu(x, "random", seed=5), x, g, create_graph=c)[0] for c in (False, True)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert torch.equal(first, differentiable)
    tied = x == 0
    assert torch.equal(first[~tied], torch.where(x > 0, g, 0.0)[~tied])
    # In the order of the memory, from the generator seeded with the seed; the next backward goes on in it.
    order = (0, 1, 2, 3) if layout == torch.contiguous_format else (0, 2, 3, 1)
    stream = torch.Generator().manual_seed(5)
    for got in (first, second):
        draws = torch.rand(int(tied.sum()), generator=stream)
        assert torch.equal(got.permute(order)[tied.permute(order)], g.permute(order)[tied.permute(order)] * draws)
    assert 0 <= float(draws.min()) < float(draws.max()) < 1


@pytest.mark.parametrize("field", ["relu", "max_pool", "max", "maximum"])
def test_a_compiled_backward_refuses_to_draw(field):
    torch._dynamo.reset()

    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.maximum(F.max_pool2d(F.relu(x), 2), torch.zeros(())).amax(-1)

    model = Model()
    patch(model, Jacobians(**{field: "random"}))
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(torch.zeros(1, 1, 2, 2, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match="compiled backward"):
        loss.backward()


def test_random_is_refused_where_ties_are_not_known():
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"torch\.func.*Choose a number"):
        torch.func.grad(lambda x: relu(x, "random").sum())(x)
    torch._dynamo.reset()
    selection = Selection(Jacobians(relu="random"))
    y = torch.compile(lambda x: pointwise("relu", x, selection), backend="aot_eager", fullgraph=True)(x)
    with pytest.raises(RuntimeError, match="compiled backward"):
        y.sum().backward(retain_graph=True)
    selection.set(Jacobians(relu=0.5))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 0.5))


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


@pytest.mark.parametrize("shape", [(64,), ()])
def test_a_compiled_half_precision_gradient_has_the_bits_of_the_eager_one(shape):
    torch._dynamo.reset()
    selection = Selection(Jacobians(relu=0.1))  # which no binary format holds
    x = torch.zeros(shape, dtype=torch.float16, requires_grad=True)
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    compiled = torch.compile(lambda x: pointwise("relu", x, selection), backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(x), x, g)[0] for f in (compiled, lambda x: pointwise("relu", x, selection)))
    assert got.dtype == torch.float16
    assert torch.equal(bits(got), bits(want))
    assert not torch.equal(got, g * torch.tensor(0.1, dtype=torch.float16)) or not shape


def test_introduction_example_zero_function():
    """relu(-t) + t - relu(t) is 0 everywhere; autodiff at 0 gives 1 - 2 alpha (facts of Bertoin et al. 2021)."""
    for alpha, want in ((0.0, 1.0), (0.5, 0.0), (1.0, -1.0)):
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(relu(-t, alpha) + t - relu(t, alpha), t)
        assert g.item() == want


@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_a_tangent_takes_the_exact_rule(name):
    """The published rule drops the incoming gradient; a tangent comes from below and has none."""
    choice = 0.5 if name == "relu" else (0.5, 0.25)
    x, tangent = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])
    operation = lambda x: getattr(ops, name)(x, choice, rule="published")  # noqa: E731 # one line reads better
    for value, change in (torch.func.jvp(operation, (x,), (tangent,)), forward_ad_of(operation, x, tangent)):
        assert torch.equal(value, x.relu())
        assert torch.equal(change, torch.tensor([0.0, 2.0, 5.0]))


def forward_ad_of(operation, x, tangent):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(operation(torch.autograd.forward_ad.make_dual(x, tangent)))


@pytest.mark.parametrize("native_nodes", [True, False], ids=["C++", "Python"])
@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0)])
def test_a_clamp_to_a_point_is_constant(low, high, native_nodes, monkeypatch):
    if not native_nodes:
        monkeypatch.setattr("nslightning.ops.autograd.native._library", lambda: None)
    x = torch.tensor([0.0, 1.0, 2.0, 3.0], requires_grad=True)
    y = ops.clamp(x, low, high, at_bounds=(0.5, 0.25))
    (want,) = torch.autograd.grad(x.clamp(low, high).sum(), x)
    assert torch.equal(y, x.clamp(low, high))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)
