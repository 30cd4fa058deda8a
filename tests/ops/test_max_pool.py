"""Max pooling: stock forward bits on every geometry; the gradient against a naive float64 loop over windows."""

import math

import pytest
import torch
import torch.nn.functional as F
from bits import bits
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nslightning import Jacobians
from nslightning.ops import max_pool2d
from nslightning.ops.autograd.pooling import pool, regular, tied_windows
from nslightning.ops.autograd.selection import Selection

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CHOICES = ["native", "first", "last", "minimal", "sum", 0.0, 0.3, 1.0, 10.0, -2.0]
# kernel, stride, padding, dilation, ceil_mode
GEOMETRIES = [
    (2, 2, 0, 1, False),
    (3, 2, 1, 1, False),
    (3, 1, 1, 1, False),
    (3, 2, 0, 1, True),
    ((2, 3), (1, 2), (1, 0), (2, 1), True),
    ((3, 1), (2, 3), (1, 0), 1, False),
    (2, 3, 1, 2, True),
    (4, 4, 2, 1, True),
]


def pair(v):
    return (v, v) if isinstance(v, int) else v


def naive(x, g, choice, kernel, stride, padding, dilation):
    """Loops over channels, windows and entries in Python floats; returns the gradient and the windows' tie counts."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = map(pair, (kernel, stride, padding, dilation))
    h, w = x.shape[-2:]
    images, grads = x.double().reshape(-1, h, w), g.double().reshape(-1, *g.shape[-2:])
    gradient, counts = torch.zeros_like(images), torch.zeros(grads.shape, dtype=torch.long)
    for c in range(images.shape[0]):
        for i in range(grads.shape[1]):
            for j in range(grads.shape[2]):
                entries = [
                    (r, s)
                    for r in range(i * sh - ph, i * sh - ph + kh * dh, dh)
                    for s in range(j * sw - pw, j * sw - pw + kw * dw, dw)
                    if 0 <= r < h and 0 <= s < w
                ]
                values = [images[c, r, s].item() for r, s in entries]
                if any(math.isnan(v) for v in values):  # stock sends the gradient to the last NaN
                    r, s = [e for e, v in zip(entries, values, strict=True) if math.isnan(v)][-1]
                    gradient[c, r, s] += grads[c, i, j]
                    continue
                tied = [e for e, v in zip(entries, values, strict=True) if v == max(values)]
                k = counts[c, i, j] = len(tied)
                beta = {"minimal": 1.0, "native": 0.0, "first": 0.0}.get(choice, choice)
                for n, (r, s) in enumerate(tied):
                    if k == 1:
                        coefficient = 1.0
                    elif choice == "last":
                        coefficient = float(n == k - 1)
                    elif choice == "sum":
                        coefficient = 1.0
                    else:
                        coefficient = beta / float(k) + (1 - beta) * (n == 0)
                    gradient[c, r, s] += coefficient * grads[c, i, j].item()
    return gradient.view(x.shape), counts.view(g.shape)


def tied_input(shape, dtype, seed=0, specials=False):
    """Small integers: most windows tie."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    if specials:
        x.view(-1)[:6] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), float("inf"), -float("inf")], dtype=dtype)
    return x


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_backward_against_naive_float64(geometry, choice):
    *shape, ceil_mode = geometry
    x = tied_input((2, 3, 9, 10), torch.float64).requires_grad_()
    y = max_pool2d(x, *geometry[:2], geometry[2], geometry[3], ceil_mode, jacobian=choice)
    g = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want, counts = naive(x.detach(), g, choice, *shape)
    assert (counts > 1).float().mean() > 0.15  # the test is about ties
    (got,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    assert torch.equal(tied_windows(x, regular(2, *geometry)).long(), counts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "unbatched"])
def test_forward_bits(geometry, dtype, layout):
    x = tied_input((2, 3, 9, 10), dtype, specials=True)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    x = x.transpose(2, 3)[:, :, ::1] if layout == "strided" else x
    x = x[0] if layout == "unbatched" else x
    x = x.detach().requires_grad_()
    stock, where = F.max_pool2d(x, *geometry, return_indices=True)
    for choice in ("minimal", 1000.0, "last", "native"):
        got, indices = max_pool2d(x, *geometry, return_indices=True, jacobian=choice)
        assert torch.equal(bits(got), bits(stock))
        assert torch.equal(indices, where)
    g = torch.randn(stock.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(torch.autograd.grad(got, x, g)[0], torch.autograd.grad(stock, x, g)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", ["minimal", 10.0, "last", "sum"])
def test_coefficients_are_rounded_once(dtype, choice):
    """Windows that do not overlap: each entry is g times one coefficient formed in float32 (float64), then rounded."""
    x = tied_input((2, 3, 8, 8), dtype).requires_grad_()
    y = max_pool2d(x, 2, jacobian=choice)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = torch.zeros_like(x)
    for n, c, i, j in torch.cartesian_prod(*map(torch.arange, y.shape)).tolist():
        window = x[n, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(-1)
        tied = (window == window.max()).nonzero().flatten().tolist()
        for rank, p in enumerate(tied):
            beta = {"minimal": 1.0}.get(choice, choice)
            if len(tied) == 1 or choice == "sum":
                coefficient = torch.ones((), dtype=wide)
            elif choice == "last":
                coefficient = torch.tensor(float(rank == len(tied) - 1), dtype=wide)
            else:
                coefficient = torch.tensor(beta, dtype=wide) / len(tied) + (1 - beta) * (rank == 0)
            want[n, c, 2 * i + p // 2, 2 * j + p % 2] = (g[n, c, i, j].to(wide) * coefficient).to(dtype)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_untied_windows_keep_the_stock_gradient_to_the_bit(dtype, geometry):
    x = torch.randperm(2 * 3 * 9 * 10, generator=torch.Generator().manual_seed(0)).view(2, 3, 9, 10).to(dtype)
    x[:, 0] = 1.0  # one channel of ties beside channels without
    if dtype == torch.bfloat16:
        x[:, 1:] = torch.arange(90, dtype=dtype).view(9, 10)  # bfloat16 holds no more distinct integers
    assert tied_windows(x, regular(2, *geometry))[:, 1:].max() == 1
    x.requires_grad_()
    g = torch.randn(F.max_pool2d(x, *geometry).shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = torch.autograd.grad(max_pool2d(x, *geometry, jacobian=1e4), x, g)[0]
    stock = torch.autograd.grad(F.max_pool2d(x, *geometry), x, g)[0]
    assert torch.equal(ours[:, 1:], stock[:, 1:])
    assert not torch.equal(ours[:, 0], stock[:, 0])


def test_nan_windows_are_no_ties():
    x = torch.zeros(1, 1, 2, 4)
    x[0, 0, 1, 0] = float("nan")
    x.requires_grad_()
    (g,) = torch.autograd.grad(max_pool2d(x, 2, jacobian="minimal").sum(), x)
    assert torch.equal(g, torch.tensor([[[[0.0, 0, 0.25, 0.25], [1, 0, 0.25, 0.25]]]]))


@pytest.mark.parametrize("rule", ["exact", "published"])
@pytest.mark.parametrize("beta", [0.5, 1.0, 10.0])
def test_a_window_with_a_nan_hands_down_what_stocks_does(beta, rule):
    x = torch.tensor([[[[0.0, float("nan")], [1.0, 1.0]]]], requires_grad=True)
    (got,) = torch.autograd.grad(max_pool2d(x, 2, jacobian=beta, rule=rule).sum(), x)
    assert got.flatten().tolist() == [0.0, 1.0, 0.0, 0.0]


def test_infinite_ties():
    x = torch.full((1, 1, 2, 2), -float("inf"), requires_grad=True)
    (g,) = torch.autograd.grad(max_pool2d(x, 2, jacobian="minimal").sum(), x)
    assert torch.equal(g, torch.full_like(g, 0.25))


def test_random_draws_vertices_from_its_own_stream():
    x = torch.zeros(1, 1, 40, 40, requires_grad=True)
    before = torch.get_rng_state()
    y = max_pool2d(x, 2, jacobian="random", seed=3)
    a, b = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(a, b)  # a fresh draw at each backward
    for g in (a, b):
        windows = g.view(20, 2, 20, 2).transpose(1, 2).reshape(400, 4)
        assert torch.equal(windows.sort(1).values, torch.tensor([0.0, 0, 0, 1]).expand(400, 4))
        assert (windows.sum(0) > 60).all()  # each of the four vertices about 100 times
    again = max_pool2d(x, 2, jacobian="random", seed=3)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], a)


def test_published_rule_is_the_two_branch_arithmetic():
    x = tied_input((2, 3, 8, 8), torch.float32).half() + torch.rand(2, 3, 8, 8).half()
    x[:, 0] = 1.5
    x.requires_grad_()
    beta = 100.0
    y = max_pool2d(x, 2, jacobian=beta, rule="published")
    stock = F.max_pool2d(x, 2)
    assert torch.equal(y, beta * stock + (1 - beta) * stock)
    assert not torch.equal(y, stock)
    g = torch.randn(y.shape).half()
    windows = x.view(2, 3, 4, 2, 4, 2).transpose(3, 4).reshape(2, 3, 4, 4, 4)
    reached = windows == stock[..., None]
    first = F.one_hot(reached.int().argmax(-1), 4).half()
    minimal = (beta * g)[..., None] / reached.sum(-1, keepdim=True) * reached
    want = minimal + ((1 - beta) * g)[..., None] * first
    want = want.view(2, 3, 4, 4, 2, 2).transpose(3, 4).reshape(x.shape)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], want, rtol=2e-3, atol=2e-3 * beta)


# Median relative forward error of beta * a + (1 - beta) * a on N(0, 1) inputs and 2x2 windows, as measured on the
# released arithmetic: dtype, beta, median.
@pytest.mark.parametrize(
    ("dtype", "beta", "median"),
    [
        (torch.float16, 100.0, 2.0e-2),
        (torch.float16, 1000.0, 0.20),
        (torch.bfloat16, 10.0, 1.4e-2),
        (torch.float32, 1e4, 2.4e-4),
        (torch.float64, 1e4, 4.6e-13),
    ],
)
def test_published_rule_has_the_published_error(dtype, beta, median):
    x = torch.randn(8, 16, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    true = F.max_pool2d(x, 2).double()
    got = max_pool2d(x, 2, jacobian=beta, rule="published").double()
    error = ((got - true).abs() / true.abs())[true != 0].median().item()
    assert error == pytest.approx(median, rel=0.25)
    assert torch.equal(max_pool2d(x, 2, jacobian=beta).double(), true)


def test_errors_name_what_is_allowed():
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="did you mean 'minimal'"):
        max_pool2d(x, 2, jacobian="minimum")
    with pytest.raises(ValueError, match="window without entries"):  # stock would index entry 6 of 4
        max_pool2d(torch.zeros(1, 2, 2, 2, requires_grad=True), 2, 1, 1, 3)
    with pytest.raises(ValueError, match="finite"):
        max_pool2d(x, 2, jacobian=float("nan"))
    with pytest.raises(ValueError, match="takes a number beta"):
        max_pool2d(x, 2, jacobian="last", rule="published")


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ceil_mode=st.booleans(),
    choice=st.sampled_from(CHOICES),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=150)
def test_any_geometry(size, kernel, stride, padding, dilation, ceil_mode, choice, seed):
    assume(all(2 * p <= k for p, k in zip(padding, kernel, strict=True)))
    assume(all(s + 2 * p >= d * (k - 1) + 1 for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    for n, k, p, d in zip(size, kernel, padding, dilation, strict=True):
        assume(d == 1 or p == 0 or n >= p + d * (k - 1))  # else a window may have no entry, which is refused
    x = tied_input((1, 2, *size), torch.float64, seed).requires_grad_()
    geometry = (kernel, stride, padding, dilation, ceil_mode)
    stock = F.max_pool2d(x, *geometry)
    y = max_pool2d(x, *geometry, jacobian=choice)
    assert torch.equal(y, stock)
    g = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    want, _ = naive(x.detach(), g, choice, *geometry[:4])
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("geometry", [((2, 2), (2, 2), (0, 0), (1, 1), False), ((3, 3), (2, 2), (1, 1), (1, 1), False)])
def test_one_compiled_graph_serves_every_choice(backend, geometry):
    torch._dynamo.reset()
    selection = Selection(Jacobians())

    def f(x):
        return pool(x * 1.0, selection, regular(2, *geometry)).square().sum()

    compiled = torch.compile(f, backend=backend, fullgraph=True)
    x = tied_input((2, 3, 8, 8), torch.float32).requires_grad_()
    loss = compiled(x)
    for choice in ("native", "minimal", 10.0, "last", "sum"):
        selection.set(Jacobians(max_pool=choice))
        (got,) = torch.autograd.grad(loss, x, retain_graph=True)
        (want,) = torch.autograd.grad(f(x), x)
        assert torch.equal(got, want), choice


@pytest.mark.parametrize(("v", "at_zero"), [((1.14,) * 4, None), ((1.0, 2.0, 3.0, 4.0), -1.5)])
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float16, 2**-12), (torch.float32, 2**-24), (torch.float64, 2**-53)])
def test_introduction_example_two_maxima(v, at_zero, dtype, eps):
    """max1 - max2 is 0; its derivative is rounding at equal values, and 1 - 2.5 at the true tie t = 0."""
    v = torch.tensor(v, dtype=dtype)
    for t0 in (0.0, 0.1, 1.0, -6.0):
        t = torch.tensor(t0, dtype=dtype, requires_grad=True)
        x = (t * v).view(1, 1, 2, 2)
        (d,) = torch.autograd.grad((max_pool2d(x, 2, jacobian="first") - max_pool2d(x, 2, jacobian="minimal")).sum(), t)
        if at_zero is None:
            assert abs(d.item()) <= 4 * eps
        else:
            assert d.item() == (at_zero if t0 == 0 else 0.0)
