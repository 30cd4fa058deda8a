"""Max pooling in one, two and three dimensions, regular and adaptive, against loops over windows in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from bits import bits
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nslightning import Jacobians, ops
from nslightning.ops.autograd import pooling as module
from nslightning.ops.autograd.pooling import adaptive, pool, regular, tied_windows
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.autograd.windows import Windows

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CHOICES = ["native", "first", "last", "minimal", "sum", 0.0, 0.3, 1.0, 10.0, -2.0]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
SIZES = (7, 9, 6)
# dims, the arguments after the input
REGULAR = [
    (1, (2,)),
    (1, (3, 2, 1, 1, True)),
    (1, ([4], [1], [2], [1], False)),
    (1, (3, 3, 0, 2, True)),
    (2, ((2, 3), (1, 2), (1, 0), (2, 1), True)),
    (2, (5, 1, 2)),  # too many places to be taken at once
    (3, (2,)),
    (3, (3, 2, 1, 1, False)),
    (3, ((1, 2, 3), (2, 1, 2), (0, 1, 1), (1, 2, 1), True)),
    (3, ([2], None, [1])),
]
ADAPTIVE = [
    (1, (3,)),
    (1, (12,)),  # more windows than entries
    (1, (1,)),
    (2, ((1, 1),)),
    (2, ((5, 3),)),
    (2, ((None, 4),)),
    (2, (8,)),
    (3, (1,)),
    (3, (3,)),
    (3, ((5, None, 4),)),
]
CASES = [("max_pool", *case) for case in REGULAR] + [("adaptive_max_pool", *case) for case in ADAPTIVE]


def ours(kind, dims):
    return getattr(ops, f"{kind}{dims}d")


def stock(kind, dims):
    return getattr(F, f"{kind}{dims}d")


def geometry(kind, dims, x, *args):
    return regular(dims, *args) if kind == "max_pool" else adaptive(dims, x, *args)


def each(dims, value):
    value = list(value) if isinstance(value, (tuple, list)) else [value]
    return value * dims if len(value) == 1 else value


def ranges(kind, dims, sizes, windows, args):
    """Per dimension, per window, the entries that it holds: written from the definitions."""
    if kind == "adaptive_max_pool":
        return [
            [range(math.floor(i * s / n), math.ceil((i + 1) * s / n)) for i in range(n)]
            for s, n in zip(sizes, windows, strict=True)
        ]
    kernel, stride, padding, dilation = (*args, *(None, None, 0, 1)[len(args) :])[:4]
    kernel = each(dims, kernel)
    stride = kernel if stride is None else each(dims, stride)
    return [
        [[e for e in (o * s - p + i * d for i in range(k)) if 0 <= e < size] for o in range(n)]
        for k, s, p, d, size, n in zip(
            kernel, stride, each(dims, padding), each(dims, dilation), sizes, windows, strict=True
        )
    ]


def naive(x, g, choice, held):
    """Python floats, one window after the other; the gradient and the tie counts."""
    dims = len(held)
    images = x.double().reshape(-1, *x.shape[-dims:])
    grads = g.double().reshape(-1, *g.shape[-dims:])
    gradient, counts = torch.zeros_like(images), torch.zeros(grads.shape, dtype=torch.long)
    for c in range(images.shape[0]):
        for window in itertools.product(*(range(n) for n in grads.shape[1:])):
            entries = list(itertools.product(*(held[d][o] for d, o in enumerate(window))))
            values = [images[(c, *e)].item() for e in entries]
            up = grads[(c, *window)].item()
            if any(math.isnan(v) for v in values):  # stock sends the gradient to the last NaN
                gradient[(c, *[e for e, v in zip(entries, values, strict=True) if math.isnan(v)][-1])] += up
                continue
            tied = [e for e, v in zip(entries, values, strict=True) if v == max(values)]
            k = counts[(c, *window)] = len(tied)
            beta = {"minimal": 1.0, "native": 0.0, "first": 0.0}.get(choice, choice)
            for n, e in enumerate(tied):
                if k == 1 or choice == "sum":
                    coefficient = 1.0
                elif choice == "last":
                    coefficient = float(n == k - 1)
                else:
                    coefficient = beta / float(k) + (1 - beta) * (n == 0)
                gradient[(c, *e)] += coefficient * up
    return gradient.view(x.shape), counts.view(g.shape)


def tied_input(shape, dtype=torch.float64, seed=0, specials=False):
    """Small integers: most windows tie."""
    x = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if specials:
        nan, inf = float("nan"), float("inf")
        x.view(-1)[:12] = torch.tensor([0.0, -0.0, nan, inf, inf, -inf, 1, -inf, -inf, -inf, -inf, nan], dtype=dtype)
    return x


def normal(shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_against_naive_float64(case):
    kind, dims, args = case
    x = tied_input((2, 2, *SIZES[:dims]), specials=True).requires_grad_()
    g = normal(stock(kind, dims)(x, *args).shape)
    held = ranges(kind, dims, x.shape[2:], g.shape[2:], args)
    for choice in CHOICES:
        want, counts = naive(x.detach(), g, choice, held)
        (got,) = torch.autograd.grad(ours(kind, dims)(x, *args, jacobian=choice), x, g)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert (counts > 1).any() or g.numel() >= x.numel()
    assert torch.equal(tied_windows(x, geometry(kind, dims, x, *args)).long(), counts)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "unbatched", "one channel"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stock_bits(case, dtype, layout):
    kind, dims, args = case
    if layout == "channels_last" and dims == 1:
        pytest.skip("one dimension has no such layout")
    x = tied_input((2, 3, *SIZES[:dims]), dtype, specials=True)
    x = x.to(memory_format=FORMATS[dims + 2]) if layout == "channels_last" else x
    x = torch.stack((x, x), -1)[..., 0] if layout == "strided" else x
    x = x[0] if layout == "unbatched" else x
    x = x[:, 1:2] if layout == "one channel" else x
    x = x.detach().requires_grad_()
    want, where = stock(kind, dims)(x, *args, return_indices=True)
    for choice in ("minimal", 1000.0, "last", "random", "native"):
        got, indices = ours(kind, dims)(x, *args, return_indices=True, jacobian=choice)
        assert torch.equal(bits(got), bits(want))
        assert torch.equal(indices, where)
        assert got.stride() == want.stride()
    g = normal(want.shape, dtype)
    assert torch.equal(torch.autograd.grad(got, x, g)[0], torch.autograd.grad(want, x, g)[0])
    with torch.no_grad():
        plain, ours_plain = stock(kind, dims)(x, *args), ours(kind, dims)(x, *args, jacobian="minimal")
        assert torch.equal(bits(ours_plain), bits(plain))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_untied_channels_keep_the_stock_gradient_to_the_bit(case, dtype):
    kind, dims, args = case
    n = math.prod(SIZES[:dims])
    if dtype == torch.bfloat16:
        n = min(n, 256)  # bfloat16 holds no more distinct integers
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    sizes = SIZES[:dims] if n == math.prod(SIZES[:dims]) else (6, 6, 7)
    x = order[: math.prod(sizes)].to(dtype).view(1, 1, *sizes).repeat(1, 3, *(1,) * dims)
    x[:, 0] = 1.0
    x.requires_grad_()
    g = normal(stock(kind, dims)(x, *args).shape, dtype)
    for choice in (1e4, "last", "minimal"):
        got = torch.autograd.grad(ours(kind, dims)(x, *args, jacobian=choice), x, g)[0]
        want = torch.autograd.grad(stock(kind, dims)(x, *args), x, g)[0]
        assert torch.equal(got[:, 1:], want[:, 1:])


@pytest.mark.parametrize("choice", ["minimal", 10.0, "last", "random"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("args", [(2,), (3, 2, 1), (5, 1, 2)], ids=str)
def test_parts_are_the_whole(monkeypatch, args, layout, choice):
    """Work in parts changes no bit, whether a part meets ties or not."""
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x[2, :, :4] = 1.0
    x[4] = 0.0
    x = x.to(memory_format=FORMATS[4] if layout == "channels_last" else torch.contiguous_format).requires_grad_()
    g = normal(F.max_pool2d(x, *args).shape, torch.float32)
    gradients = []
    for part in (1, 64 * 3 * 2, 2**18):
        monkeypatch.setattr(module, "_PART", part)
        gradients.append(torch.autograd.grad(ops.max_pool2d(x, *args, jacobian=choice), x, g)[0])
    if choice == "random":  # the draws come in another order; their sums over the windows do not
        gradients = [f.sum((2, 3)) for f in gradients]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(gradients[0], gradients[1])
        assert torch.equal(gradients[1], gradients[2])


@pytest.mark.parametrize("g", [float("inf"), float("nan"), -float("inf")])
@pytest.mark.parametrize(
    ("kind", "dims", "args", "size"),  # of the first window
    [
        ("max_pool", 2, (2,), 2),
        ("max_pool", 2, (3, 1, 1), 2),
        ("max_pool", 2, (5, 1, 2), 3),
        ("max_pool", 3, ((1, 2, 2),), 2),
        ("max_pool", 3, ((1, 3, 3), 1, (0, 1, 1)), 2),
        ("adaptive_max_pool", 2, (3,), 2),
        ("adaptive_max_pool", 2, (4,), 2),
    ],
    ids=str,
)
def test_infinite_gradients_stay_where_they_belong(kind, dims, args, size, g):
    """A gradient that is not finite reaches the entries of its window that tie, and no other."""
    x = torch.zeros(1, 1, *(1,) * (dims - 2), 6, 6)
    x[..., 0, 0] = -1.0
    x.requires_grad_()
    y = ours(kind, dims)(x, *args, jacobian="minimal")
    up = torch.ones_like(y)
    up[..., 0, 0] = g
    (got,) = torch.autograd.grad(y, x, up)
    reached = torch.zeros(6, 6, dtype=torch.bool)
    reached[:size, :size] = True
    reached[0, 0] = False
    assert torch.equal(~got.view(6, 6).isfinite(), reached)


@pytest.mark.parametrize("kind", ["max_pool", "adaptive_max_pool"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_empty_batch(kind, dims):
    x = torch.zeros(0, 2, *SIZES[:dims], requires_grad=True)
    y = ours(kind, dims)(x, 2, jacobian="minimal")
    assert y.shape == stock(kind, dims)(x, 2).shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@given(
    dims=st.integers(1, 3),
    data=st.data(),
    choice=st.sampled_from(CHOICES),
    seed=st.integers(0, 100),
    ceil_mode=st.booleans(),
    at_once=st.booleans(),
    last=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_any_regular_geometry(dims, data, choice, seed, ceil_mode, at_once, last):
    draw = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731 # local
    size, kernel, stride = draw(1, 7), draw(1, 4), draw(1, 4)
    padding, dilation = draw(0, 2), draw(1, 3)
    assume(all(2 * p <= k for p, k in zip(padding, kernel, strict=True)))
    assume(all(s + 2 * p >= d * (k - 1) + 1 for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    for n, k, p, d in zip(size, kernel, padding, dilation, strict=True):
        assume(d == 1 or p == 0 or n >= p + d * (k - 1))  # else a window may have no entry, which is refused
    args = (kernel, stride, padding, dilation, ceil_mode)
    compare_with_naive("max_pool", dims, size, args, choice, seed, at_once, last)


@given(
    dims=st.integers(1, 3),
    data=st.data(),
    choice=st.sampled_from(CHOICES),
    seed=st.integers(0, 100),
    at_once=st.booleans(),
    last=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_any_adaptive_geometry(dims, data, choice, seed, at_once, last):
    draw = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731 # local
    compare_with_naive("adaptive_max_pool", dims, draw(1, 7), (draw(1, 8),), choice, seed, at_once, last)


def compare_with_naive(kind, dims, size, args, choice, seed, at_once, last):
    x = tied_input((1, 2, *size), seed=seed)
    if last and dims > 1:
        x = x.to(memory_format=FORMATS[dims + 2])
    x.requires_grad_()
    want = stock(kind, dims)(x, *args)
    g = normal(want.shape, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nslightning.ops.autograd.windows.AT_ONCE", 10**9 if at_once else 0)
        y = ours(kind, dims)(x, *args, jacobian=choice)
        assert torch.equal(y, want)
        (got,) = torch.autograd.grad(y, x, g)
    held = ranges(kind, dims, size, g.shape[2:], args)
    torch.testing.assert_close(got, naive(x.detach(), g, choice, held)[0], rtol=1e-12, atol=1e-12)


def test_random_takes_one_tied_entry_each():
    x = torch.zeros(1, 1, 12, 12, 12, requires_grad=True)
    y = ops.max_pool3d(x, 2, jacobian="random", seed=1)
    g = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    windows = g.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).reshape(-1, 8)
    assert torch.equal(windows.sort(1).values, torch.eye(8)[7].expand(216, 8))
    assert (windows.sum(0) > 8).all()  # 27 each on average
    assert not torch.equal(torch.autograd.grad(y.sum(), x)[0], g)


def test_ranks_are_row_major():
    x = torch.tensor([[1.0, 0, 1], [1, 1, 0], [0, 1, 1]]).view(1, 3, 3, 1)
    windows = Windows(x, regular(2, 3), (1, 1))
    assert windows.count.item() == 6
    assert windows.last().item() == 8
    ranked = [windows.nth(torch.full((1, 1, 1, 1), float(r))).item() for r in range(6)]
    assert ranked == x.flatten().nonzero().flatten().tolist()


def test_places_are_exact_where_float32_is_not():
    n = 2**24 + 2
    windows = Windows(torch.zeros(1, n, 1), regular(1, 2), (n // 2,))
    assert windows.last()[0, -1, 0] == n - 1


def test_published_rule_is_refused_where_the_papers_have_none():
    x = torch.zeros(1, 2, 4, 4, 4, requires_grad=True)
    published = Selection(Jacobians(rule="published", max_pool=2.0))
    for geometry_, given_ in (
        (regular(3, 2), x),
        (regular(1, 2), x[0, 0]),
        (adaptive(2, x[0], 2), x[0]),
    ):
        with pytest.raises(ValueError, match="max_pool2d only"):
            pool(given_, published, geometry_)
        reference = Selection(Jacobians(rule="published"))  # published may be meant for ReLU
        assert torch.equal(pool(given_, reference, geometry_), pool(given_, Selection(Jacobians()), geometry_))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("with_indices", [False, True])
def test_autocast_is_stocks(case, with_indices):
    kind, dims, args = case
    x = tied_input((1, 2, *SIZES[:dims]), torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        want = stock(kind, dims)(x, *args, return_indices=with_indices)
        got = ours(kind, dims)(x, *args, return_indices=with_indices, jacobian="native")
    want, got = (r[0] if with_indices else r for r in (want, got))
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    g = normal(want.shape, want.dtype)
    assert torch.equal(torch.autograd.grad(got, x, g)[0], torch.autograd.grad(want, x, g)[0])
