"""Maxima and minima: stock forward bits, stock gradients by default, chosen ones against a naive float64 loop."""

import itertools

import pytest
import torch
from bits import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_samples import no_derivative_of_aminmax

from nslightning import Jacobians, ops
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.maxima import pair, reduction, tied_pairs, tied_reductions
from nslightning.ops.record import FUNCTIONS, named

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CHOICES = ["native", "first", "last", "minimal", "sum", 0.0, 0.3, 1.0, 10.0, -2.0]
DIGITS = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-14}
REDUCTIONS = [
    (name, dim, keepdim)
    for name in ("max", "min", "amax", "amin", "aminmax")
    for dim in (None, 0, 1, -1, (0, 2), (2, 1, 0), (-1,))
    for keepdim in (False, True)
    if (name in ("amax", "amin") or not isinstance(dim, tuple)) and (dim is not None or not keepdim or name[0] == "a")
]
PAIRS = ["maximum", "minimum", "fmax", "fmin"]
DIFFERENTIABLE = ["max", "min", "amax", "amin", *(() if no_derivative_of_aminmax() else ("aminmax",))]


def stock(name, x, dim=None, keepdim=False):
    if name == "aminmax":
        return torch.aminmax(x, dim=dim, keepdim=keepdim)
    if name in ("max", "min") and dim is None:
        return getattr(torch, name)(x)
    return getattr(torch, name)(x, () if dim is None else dim, keepdim)


def ours(name, x, dim, keepdim, choice):
    return getattr(ops, name)(x, dim, keepdim, jacobian=choice)


def outputs(result):
    """What of a result has a gradient."""
    return [result] if isinstance(result, torch.Tensor) else [t for t in result if t.is_floating_point()]


def backward(result, x, seed=0):
    results = outputs(result)
    gs = [torch.randn(r.shape, dtype=r.dtype, generator=torch.Generator().manual_seed(seed)) for r in results]
    return torch.autograd.grad(results, x, gs, retain_graph=True)[0], gs


def weights(choice, k, native):
    """What k tied entries receive, by definition; `native` is what they receive from stock."""
    each = {
        "native": native,
        "first": [1.0] + [0.0] * (k - 1),
        "last": [0.0] * (k - 1) + [1.0],
        "minimal": [1 / k] * k,
        "sum": [1.0] * k,
    }
    if isinstance(choice, str):
        return each[choice]
    return [choice * m + (1 - choice) * n for m, n in zip(each["minimal"], native, strict=True)]


def naive(name, x, dim, gs, choice):
    """Loops over results and entries, in Python floats."""
    by_index = name in ("max", "min") and dim is not None
    dims = range(x.dim()) if dim is None else [d % x.dim() for d in (dim if isinstance(dim, tuple) else (dim,))]
    kept = [d for d in range(x.dim()) if d not in dims]
    gradient = torch.zeros(x.shape, dtype=torch.float64)
    ends = {"max": [max], "amax": [max], "min": [min], "amin": [min], "aminmax": [min, max]}[name]
    for end, g in zip(ends, gs, strict=True):
        g = g.double().reshape([x.shape[d] for d in kept])
        for where in itertools.product(*(range(x.shape[d]) for d in kept)):
            entries = []
            for inside in itertools.product(*(range(x.shape[d]) for d in sorted(dims))):
                at = [0] * x.dim()
                for d, i in (*zip(kept, where, strict=True), *zip(sorted(dims), inside, strict=True)):
                    at[d] = i
                entries.append(tuple(at))
            best = end(x[e].item() for e in entries)
            tied = [e for e in entries if x[e].item() == best]
            k = len(tied)
            native = [1.0] + [0.0] * (k - 1) if by_index else [1 / k] * k
            for e, w in zip(tied, weights(choice, k, native) if k > 1 else [1.0], strict=True):
                gradient[e] += w * g[where].item()
    return gradient


def tied_tensor(dtype, shape=(3, 4, 5), seed=0):
    x = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[0] += torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed)).to(dtype)
    entries = x.view(-1)
    entries[[1, -1]], entries[[0, 2]] = 6.0, -6.0
    assert int((x == x.max()).sum()) == int((x == x.min()).sum()) == 2  # tied over all dimensions, too
    return x.requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "dim", "keepdim"), REDUCTIONS)
def test_reductions(name, dim, keepdim, dtype):
    x = tied_tensor(dtype)
    want = outputs(stock(name, x, dim, keepdim))
    for choice in CHOICES:
        got = ours(name, x, dim, keepdim, choice)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(outputs(got), want, strict=True))
        gradient, gs = backward(got, x)
        if choice in ("native", 0.0):
            assert torch.equal(gradient, torch.autograd.grad(want, x, gs, retain_graph=True)[0])
        if dtype in (torch.float32, torch.float64) or name != "aminmax":  # two outputs add up in the working precision
            reference = naive(name, x.detach(), dim, gs, choice)
            tolerance = DIGITS[dtype] * max(1, *(abs(c) for c in CHOICES if not isinstance(c, str)))
            assert torch.allclose(gradient.double(), reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["max", "min"])
def test_indices_come_as_in_stock(name):
    x = tied_tensor(torch.float32)
    for got, want in ((ours(name, x, 1, False, "last"), stock(name, x, 1)),):
        assert type(got) is type(want)
        assert torch.equal(got.indices, want.indices)
        assert not got.indices.requires_grad


SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    shape=st.sampled_from([(), (0,), (1,), (6,), (2, 3), (2, 0), (2, 3, 2)]),
    case=st.sampled_from([(n, d) for n in DIFFERENTIABLE for d in (None, 0, -1)]),
    dtype=st.sampled_from(DTYPES),
)
def test_reference_is_stock_whatever_the_values(data, shape, case, dtype):
    """NaN, infinities, signed zeros, no entries, no dimensions; the errors of stock too."""
    numel = int(torch.tensor(shape).prod())
    values = data.draw(st.lists(st.sampled_from(SPECIAL), min_size=numel, max_size=numel))
    x = torch.tensor(values, dtype=dtype).reshape(shape).requires_grad_()
    name, dim = case
    try:
        want = outputs(stock(name, x, dim))
    except (RuntimeError, IndexError) as error:
        with pytest.raises(type(error)):
            ours(name, x, dim, False, None)
        return
    got = outputs(ours(name, x, dim, False, None))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(bits(a), bits(b))
    gs = [torch.full_like(w, 0.7) for w in want]
    a, b = (torch.autograd.grad(result, x, gs)[0] for result in (got, want))
    assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    # Under any other choice the results where nothing is tied keep stock's gradient.
    c = torch.autograd.grad(outputs(ours(name, x, dim, False, "last")), x, gs)[0]
    if tied_reductions(name, x.detach(), dim)[0] == 0:
        assert torch.equal(c.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name, dtype):
    a, b = tied_tensor(dtype, seed=1), tied_tensor(dtype, (4, 1), seed=2)  # broadcasts
    want = getattr(torch, name)(a, b)
    zeros = torch.zeros(2, requires_grad=True)
    native = torch.autograd.grad(getattr(torch, name)(*zeros), zeros)[0].tolist()  # 1, 0 for fmax in torch 2.11
    for choice in CHOICES:
        got = getattr(ops, name)(a, b, jacobian=choice)
        assert torch.equal(bits(got), bits(want))
        g = torch.randn(got.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        gradients = torch.autograd.grad(got, (a, b), g, retain_graph=True)
        if choice in ("native", 0.0):
            for x, y in zip(gradients, torch.autograd.grad(want, (a, b), g, retain_graph=True), strict=True):
                assert torch.equal(x, y)
        to_a, to_b = weights(choice, 2, native)
        tied, taken = a == b, got == a
        ga = torch.where(tied, to_a * g.double(), torch.where(taken, g.double(), 0))
        gb = torch.where(tied, to_b * g.double(), torch.where(taken, 0, g.double())).sum((0, 2)).reshape(4, 1)
        assert torch.allclose(gradients[0].double(), ga, rtol=DIGITS[dtype])
        assert torch.allclose(gradients[1].double(), gb, rtol=20 * DIGITS[dtype], atol=20 * DIGITS[dtype])


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_special_values_and_mixed_dtypes(name):
    a, b = (torch.tensor(v) for v in zip(*itertools.product(SPECIAL, SPECIAL), strict=True))
    for kinds in itertools.product(DTYPES, DTYPES):
        x, y = a.to(kinds[0]).requires_grad_(), b.to(kinds[1]).requires_grad_()
        want, got = getattr(torch, name)(x, y), getattr(ops, name)(x, y)
        assert got.dtype == want.dtype
        assert torch.equal(bits(got), bits(want))
        for choice in (None, "last"):
            got = getattr(ops, name)(x, y, jacobian=choice)
            pairs = zip(*(torch.autograd.grad(r.sum(), (x, y), retain_graph=True) for r in (got, want)), strict=True)
            for mine, theirs in pairs:
                differs = mine.nan_to_num(7.0) != theirs.nan_to_num(7.0)
                assert not (differs & (a != b)).any() if choice else not differs.any()
                assert mine.dtype == theirs.dtype


@pytest.mark.parametrize("function", [*PAIRS, "max", "amin"])
def test_random_gives_all_to_one_entry_and_is_seeded(function):
    x = torch.zeros(1000, 2, requires_grad=True)
    before = torch.get_rng_state()

    def run(seed):
        if function in PAIRS:
            y = getattr(ops, function)(x[:, 0], x[:, 1], jacobian="random", seed=seed)
        else:
            y = outputs(getattr(ops, function)(x, 1, jacobian="random", seed=seed))[0]
        return torch.autograd.grad(y.sum(), x, retain_graph=True)[0]

    first = run(0)
    assert torch.equal(first.sum(1), torch.ones(1000))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert 400 < first[:, 0].sum() < 600
    assert torch.equal(run(0), first)
    assert not torch.equal(run(1), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_choice_is_read_when_the_backward_runs():
    selection = Selection(Jacobians())
    x = torch.tensor([2.0, 2.0, 1.0], requires_grad=True)
    y = reduction("amax", x, selection) + reduction("max", x, selection, 0)[0] + pair("maximum", x, 2 * x, selection)[2]
    gradients = {}
    for choice in (None, "first", "last", "sum"):
        selection.set(Jacobians(max=choice))
        gradients[choice] = torch.autograd.grad(y, x, retain_graph=True)[0].tolist()
    assert gradients == {
        None: [1.5, 0.5, 2.0],
        "first": [2.0, 0.0, 2.0],
        "last": [0.0, 2.0, 2.0],
        "sum": [2.0, 2.0, 2.0],
    }


def test_results_may_be_overwritten_where_stocks_may():
    x = torch.tensor([[2.0, 2.0, 1.0]], requires_grad=True)
    for f in (lambda: ops.max(x, 1, jacobian="last")[0], lambda: ops.maximum(x, x.flip(1), jacobian="first")):
        y = f()
        y.mul_(3.0)
        assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()
    y = ops.amax(x, jacobian="last")
    y.mul_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # as in stock
        y.backward()


@pytest.mark.parametrize("choice", ["first", "minimal", 0.3])
def test_away_from_ties_and_twice(choice):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for f in (lambda x: ops.amax(x, 1, jacobian=choice), lambda x: ops.max(x, 1, jacobian=choice)[0]):
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)
    assert torch.autograd.gradgradcheck(lambda x, z: ops.maximum(x, z, jacobian=choice), (x, z))
    # At ties the map g -> gradient is linear, and its derivative is the chosen Jacobian.
    tied = torch.ones(4, dtype=torch.float64, requires_grad=True)
    g = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.amax(tied, jacobian=choice), tied, g, create_graph=True)
    back = torch.autograd.grad(gradient, g, torch.arange(4, dtype=torch.float64))[0]
    assert back.item() == pytest.approx(0.0 if choice == "first" else 1.5)


def test_func_transforms():
    x = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 2.0]])
    f = lambda row: ops.amax(row, jacobian="last") + ops.max(row, 0, jacobian="last")[0]  # noqa: E731 # one line says it
    want = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    assert torch.equal(torch.func.vmap(torch.func.grad(f))(x), want)
    pairs = torch.func.grad(lambda a, b: ops.maximum(a, b, jacobian="first").sum(), argnums=(0, 1))
    ga, gb = torch.func.vmap(pairs)(x, x)
    assert torch.equal(ga, torch.ones(2, 3))
    assert torch.equal(gb, torch.zeros(2, 3))


@pytest.mark.parametrize("choice", [None, "first", "minimal", "sum", 0.3])
def test_forward_mode_is_the_transpose_of_the_backward(choice):
    """<g, J t> = <J^T g, t>, by dual numbers and by `torch.func.jvp`, at ties and elsewhere."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, (4, 5), generator=generator).double().requires_grad_()
    t = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    c = None if choice is None else 0.25
    for f in (
        lambda x: ops.amax(x, jacobian=choice),
        lambda x: ops.amax(x, 1, jacobian=choice),
        lambda x: ops.max(x, 0, True, jacobian=choice)[0],
        lambda x: ops.maximum(x, x.flip(0), jacobian=choice),
        lambda x: ops.norm(x * (x > 0), 1, at_zero=c),
        lambda x: ops.l1_loss(x, x.detach().flip(0), at_zero=c),
        lambda x: ops.margin_ranking_loss(x, x.detach().flip(1), torch.ones_like(x), reduction="none", at_zero=c),
    ):
        y = f(x)
        g = torch.randn(y.shape, dtype=torch.float64, generator=generator)
        (gradient,) = torch.autograd.grad(y, x, g)
        _, forward = torch.func.jvp(f, (x.detach(),), (t,))
        assert (g * forward).sum().item() == pytest.approx((gradient * t).sum().item(), rel=1e-12)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, t)
            assert torch.allclose(torch.autograd.forward_ad.unpack_dual(f(dual)).tangent, forward, rtol=1e-14)


def test_compiled_backward_serves_every_choice():
    selection = Selection(Jacobians())

    def eager(x):
        values = reduction("max", x, selection, 1)[0].sum()
        return values + reduction("amax", x, selection, (0, 1)) + pair("maximum", x, 2 * x, selection).sum()

    x = torch.randint(-1, 2, (5, 6), generator=torch.Generator().manual_seed(0)).float().requires_grad_()
    y, z = torch.compile(eager, backend="aot_eager", fullgraph=True)(x), eager(x)
    assert torch.equal(y, z)
    for choice in (None, "first", "last", "minimal", "sum", 0.3, 10.0):
        selection.set(Jacobians(max=choice, maximum=choice))
        got, want = (torch.autograd.grad(r, x, retain_graph=True)[0] for r in (y, z))
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)
        if choice is None:
            assert torch.equal(got, want)


def test_counts():
    x = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    assert tied_reductions("max", x, 1) == (1, 2)
    assert tied_reductions("aminmax", x, 0) == (2 + 2, 6)
    assert tied_reductions("aminmax", torch.tensor([1.0, 1.0, 2.0]), 0) == (1, 2)  # the minimum alone
    assert tied_reductions("amin", x) == (1, 1)
    assert tied_pairs(x, torch.tensor(1.0)) == (3, 6)
    assert tied_reductions("max", torch.tensor(1.0)) == (0, 1)


def test_numpys_words_for_the_dimensions_are_understood():
    (operation,) = FUNCTIONS[torch.amax]
    for function in (torch.amax, torch.Tensor.amax):
        call = operation.functions[function](torch.ones(2, 3), **named(function, {"axis": 1, "keepdims": True}))
        assert call.parameters == ("amax", 1, True)


WHOLE = slice(None)


@pytest.mark.parametrize("choice", ["first", "last"])
@pytest.mark.parametrize(
    ("dims", "first", "last"),
    [
        ((0, 1), (0, 2, WHOLE), (1, 0, WHOLE)),
        ((1, 0), (0, 2, WHOLE), (1, 0, WHOLE)),
        ((2, 0), (0, WHOLE, 3), (1, WHOLE, 0)),
        ((0, 2, 1), (0, 0, 3), (0, 1, 0)),
    ],
    ids=str,
)
def test_the_first_and_the_last_are_counted_in_the_order_of_the_entries(dims, first, last, choice):
    """In whatever order the dimensions are named."""
    x = torch.full((2, 3, 4), -1.0)
    x[first] = x[last] = 0.0
    x.requires_grad_()
    ops.amax(x, dims, jacobian=choice).sum().backward()
    want = torch.zeros(2, 3, 4)
    want[first if choice == "first" else last] = 1.0
    assert torch.equal(x.grad, want)
