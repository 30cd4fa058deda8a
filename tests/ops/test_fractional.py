"""Fractional max pooling: stock forward and random numbers, every choice at ties."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from bits import bits
from torch import nn

from nslightning import Jacobians, ops, patch, using
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.record import OPERATIONS

STOCK = {2: F.fractional_max_pool2d, 3: F.fractional_max_pool3d}
OURS = {2: ops.fractional_max_pool2d, 3: ops.fractional_max_pool3d}
SHAPES = {2: (2, 3, 9, 8), 3: (2, 2, 6, 7, 6)}
every_dim = pytest.mark.parametrize("dims", [2, 3])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def tied(dims, dtype=torch.float64, seed=0):
    return torch.randint(-2, 3, SHAPES[dims], generator=torch.Generator().manual_seed(seed)).to(dtype)


def normal(shape, seed, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@every_dim
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["tied", "untied", "special", "one image"])
@pytest.mark.parametrize("size", ["output_size", "output_ratio"])
def test_the_reference_choice_is_stock_to_the_bit(dims, dtype, kind, size):
    sizes = {size: 3 if size == "output_size" else (0.6,) * dims}
    x = normal(SHAPES[dims], 0, dtype) if kind == "untied" else tied(dims, dtype)
    if kind == "special":
        for i, value in enumerate((float("nan"), float("inf"), -float("inf"), -0.0)):
            x.view(-1)[i::17] = value
    x = (x[0] if kind == "one image" else x).requires_grad_()
    gradients = []
    for f in (STOCK[dims], OURS[dims]):
        torch.manual_seed(3)
        y, indices = f(x, 2, **sizes, return_indices=True)
        after = torch.rand(1)
        gradients.append((y, indices, torch.autograd.grad(y, x, normal(y.shape, 1, dtype))[0], after))
    (y, indices, g, after), (y2, indices2, g2, after2) = gradients
    assert torch.equal(bits(y), bits(y2))
    assert torch.equal(indices, indices2)
    assert torch.equal(bits(g), bits(g2))
    assert torch.equal(after, after2)  # the stream is where stock leaves it


def naive(x, g, corners, kernel, choice):
    """One window at a time, in float64: each tied entry's share of the window's gradient."""
    dims, sizes = len(kernel), x.shape[2:]
    gradient = torch.zeros_like(x)
    for at in itertools.product(*map(range, g.shape)):
        corner = torch.unravel_index(corners[at], sizes)
        places = [
            at[:2] + tuple(int(c) + o for c, o in zip(corner, offset, strict=True))
            for offset in itertools.product(*map(range, kernel))
        ]
        top = max(x[p].item() for p in places)
        winners = [p for p in places if x[p] == top]
        for i, p in enumerate(winners):
            k, first, last = len(winners), i == 0, i == len(winners) - 1
            share = {"minimal": 1 / k, "last": float(last), "sum": 1.0, "first": float(first)}
            beta = choice if isinstance(choice, float) else 0.0
            gradient[p] += g[at] * share.get(choice, beta / k + (1 - beta) * first)
    assert dims == x.dim() - 2
    return gradient


@every_dim
@pytest.mark.parametrize("choice", ["minimal", "first", "last", "sum", 10.0])
def test_ties_against_a_loop_over_windows(dims, choice):
    x = tied(dims).requires_grad_()
    kernel = (2, 3, 2)[:dims]
    samples = torch.rand(2, x.shape[1], dims, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    _, corners = STOCK[dims](torch.zeros_like(x), kernel, 3, return_indices=True, _random_samples=samples)
    y = OURS[dims](x, kernel, 3, _random_samples=samples, jacobian=choice)
    g = normal(y.shape, 1)
    (got,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(got, naive(x.detach(), g, corners, kernel, choice), rtol=1e-12, atol=1e-12)


@every_dim
def test_random_gives_all_to_one_tied_entry(dims):
    x = torch.zeros(SHAPES[dims], requires_grad=True)
    samples = torch.rand(2, x.shape[1], dims)
    total = [torch.zeros_like(x) for _ in range(2)]
    for i in (0, 1):
        state = torch.get_rng_state()
        y = OURS[dims](x, 2, 2, _random_samples=samples, jacobian="random", seed=7)
        total[i] = torch.autograd.grad(y.sum(), x)[0]
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*total)
    assert total[0].sum() == y.numel()


class Net(nn.Module):
    def __init__(self, dims, spelling):
        super().__init__()
        self.pool = {2: nn.FractionalMaxPool2d, 3: nn.FractionalMaxPool3d}[dims](2, output_size=3)
        kernel = getattr(torch.ops.aten, f"fractional_max_pool{dims}d")
        self.calls = {
            "module": self.pool,
            "function": lambda x: STOCK[dims](x, 2, output_ratio=(0.5,) * dims),
            "with indices": lambda x: STOCK[dims](x, 2, 3, return_indices=True)[0],
            "aten": lambda x: kernel(x, (2,) * dims, (3,) * dims, torch.rand(2, x.shape[1], dims, dtype=x.dtype))[0],
        }
        self.spelling = spelling

    def forward(self, x):
        return self.calls[self.spelling](x * 1.0)


@every_dim
@pytest.mark.parametrize("spelling", ["module", "function", "with indices", "aten"])
def test_patched_models(dims, spelling):
    x = tied(dims).requires_grad_()
    model = Net(dims, spelling)
    torch.manual_seed(0)
    want = model(x)
    state = torch.get_rng_state()
    (stock,) = torch.autograd.grad(want.sum(), x)
    report = patch(model, Jacobians(max_pool="minimal"))
    torch.manual_seed(0)
    y = model(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y, want)
    (got,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert not torch.equal(got, stock)
    torch.testing.assert_close(got.sum(), stock.sum())
    with using(model, Jacobians()):
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], stock)
    assert "max_pool" in {site.operation for site in report.reached}
    assert not report.unreached


@every_dim
def test_left_alone_it_draws_once(dims):
    x = tied(dims).requires_grad_()
    model = nn.Sequential(Net(dims, "function"), nn.ReLU())
    torch.manual_seed(0)
    want = model(x)
    after = torch.rand(1)
    patch(model, Jacobians(max_pool="minimal"), skip=Net)
    torch.manual_seed(0)
    assert torch.equal(model(x), want)
    assert torch.equal(torch.rand(1), after)


def test_counting_ties_leaves_the_stream_and_the_windows_alone():
    operation = OPERATIONS["max_pool"]
    x = tied(2).requires_grad_()
    torch.manual_seed(0)
    want = F.fractional_max_pool2d(x, 2, 3)
    after = torch.rand(1)
    torch.manual_seed(0)
    call = operation.functions[F.fractional_max_pool2d](x, 2, 3)
    ties, windows = operation.ties(call)
    assert 0 < ties < windows == want.numel()
    selection = Selection(Jacobians(max_pool="minimal"))
    assert torch.equal(operation.apply(selection, call), want)
    assert torch.equal(torch.rand(1), after)


@every_dim
def test_autocast(dims):
    x = tied(dims, torch.float32).requires_grad_()
    gradients = []
    for f in (STOCK[dims], lambda *a: OURS[dims](*a, jacobian="native")):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            gradients.append(f(x.bfloat16(), 2, 3))
    assert gradients[0].dtype == gradients[1].dtype
    assert torch.equal(*gradients)


@every_dim
def test_gradcheck_and_transforms(dims):
    n = torch.Size(SHAPES[dims]).numel()
    x = torch.randperm(n, generator=torch.Generator().manual_seed(0)).double().view(SHAPES[dims])[:1] / 10
    samples = torch.rand(1, x.shape[1], dims, dtype=x.dtype)

    def f(x):
        return OURS[dims](x, 2, 3, _random_samples=samples, jacobian=0.5)

    assert torch.autograd.gradcheck(f, (x.requires_grad_(),), check_forward_ad=True)
    x = tied(dims)[:1]
    (want,) = torch.autograd.grad(f(x.requires_grad_()).square().sum(), x)
    assert torch.equal(torch.func.grad(lambda x: f(x).square().sum())(x.detach()), want)


class Ratio(nn.Module):
    """Calls a function with a share of the input's size."""

    def __init__(self, dims, ratio):
        super().__init__()
        self.dims, self.ratio = dims, ratio

    def forward(self, x):
        return STOCK[self.dims](x * 1.0, 2, output_ratio=self.ratio)


@pytest.mark.parametrize("ratio", [0.5, 1, (0.5,), (0.5, 0.4), [0.5, 0.4], (0.5, 0.4, 0.6), None], ids=str)
@every_dim
def test_a_share_is_taken_or_refused_as_in_stock(dims, ratio):
    """Also where PyTorch's check contradicts its documentation: in two dimensions it takes no single number."""
    outcomes = []
    for patched in (False, True):
        model = Ratio(dims, ratio)
        if patched:
            patch(model, Jacobians())
        torch.manual_seed(0)
        try:
            outcomes.append(model(torch.randn(1, 1, *(8,) * dims, requires_grad=True)).tolist())
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]


def test_compiled():
    torch._dynamo.reset()
    x = tied(2).requires_grad_()
    model = Net(2, "function")
    patch(model, Jacobians(max_pool="minimal"))
    torch.manual_seed(0)
    want = model(x)
    torch.manual_seed(0)
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0])


def test_a_size_is_needed():
    with pytest.raises(ValueError, match="takes an output_size or an output_ratio"):
        ops.fractional_max_pool2d(torch.zeros(1, 4, 4), 2)


@every_dim
def test_the_results_are_no_views(dims):
    x = torch.zeros(SHAPES[dims], requires_grad=True)
    for function in (STOCK[dims], lambda *args, **kwargs: OURS[dims](*args, **kwargs, jacobian="minimal")):
        results = function(x * 1, 2, output_size=3, return_indices=True)
        assert [result._is_view() for result in results] == [False, False]
