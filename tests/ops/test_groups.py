"""Maxima over groups: stock forward bits, stock gradients by default, chosen ones against loops in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from bits import bits
from torch import nn

from nslightning import Jacobians, ops, patch, using
from nslightning.probes import divergence, ties

CHOICES = ["native", 0.0, "first", "last", "minimal", "sum", 0.3, 10.0, -2.0]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
DIGITS = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.15}

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")


def weights(choice, k, native):
    """What k tied entries receive, by definition."""
    minimal = [1 / k] * k
    named = {
        "native": native, "first": [1.0] + [0.0] * (k - 1), "last": [0.0] * (k - 1) + [1.0], "minimal": minimal,
        "sum": [1.0] * k,
    }  # fmt: skip
    if isinstance(choice, str):
        return named[choice]
    return [choice * m + (1 - choice) * n for m, n in zip(minimal, native, strict=True)]


def whole_numbers(shape, seed, dtype):
    """Few values, so that many entries are equal."""
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradient_of(shape, dtype, seed=7):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -------------------------------------------------------------------------------------------------- scattered entries
def scatter_case(kind, dim, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    base, src = whole_numbers((4, 3, 2), seed, dtype), whole_numbers((4, 3, 2), seed + 100, dtype)
    size = base.shape[dim]
    index = torch.randint(0, size, src.shape if kind == "scatter" else (src.shape[dim],), generator=generator)
    return base.requires_grad_(), index, src.requires_grad_()


def scatter_loops(kind, base, dim, index, src, reduce, included, g, choice):
    """Loops over places and entries in Python floats."""
    to_base, to_src = torch.zeros(base.shape, dtype=torch.float64), torch.zeros(src.shape, dtype=torch.float64)
    best_of = max if reduce == "amax" else min
    for place in itertools.product(*map(range, base.shape)):
        members = []
        for k in range(src.shape[dim]):
            at = (*place[:dim], k, *place[dim + 1 :])
            if int(index[at] if kind == "scatter" else index[k]) == place[dim]:
                members.append(at)
        if not members:
            to_base[place] += g[place].item()
            continue
        stands = base[place].item()
        best = best_of([src[at].item() for at in members] + ([stands] if included else []))
        tied = [at for at in members if src[at].item() == best]
        takes_part = included and stands == best
        k = len(tied) + takes_part
        native = [1 / (k + (not included and stands == best))] * k
        shares = weights(choice, k, native)
        if takes_part:
            to_base[place] += shares.pop(0) * g[place].item()
        for at, share in zip(tied, shares, strict=True):
            to_src[at] += share * g[place].item()
    return to_base, to_src


@pytest.mark.parametrize("included", [True, False])
@pytest.mark.parametrize("reduce", ["amax", "amin"])
@pytest.mark.parametrize("dim", [0, -2])
@pytest.mark.parametrize("kind", ["scatter", "index"])
def test_scattered(kind, dim, reduce, included):
    ours, stock = getattr(ops, f"{kind}_reduce"), getattr(torch, f"{kind}_reduce")
    for seed, dtype in itertools.product(range(3), DTYPES):
        base, index, src = scatter_case(kind, dim, seed, dtype)
        want = stock(base, dim, index, src, reduce, include_self=included)
        g = gradient_of(want.shape, dtype)
        by_stock = torch.autograd.grad(want, (base, src), g)
        for choice in CHOICES:
            got = ours(base, dim, index, src, reduce, include_self=included, jacobian=choice)
            assert torch.equal(bits(got), bits(want))
            gradients = torch.autograd.grad(got, (base, src), g)
            if choice in ("native", 0.0):
                assert all(torch.equal(a, b) for a, b in zip(gradients, by_stock, strict=True))
            loops = scatter_loops(kind, base, dim % 3, index, src, reduce, included, g.double(), choice)
            for a, b in zip(gradients, loops, strict=True):
                assert a.dtype == dtype
                torch.testing.assert_close(a.double(), b, rtol=DIGITS[dtype], atol=DIGITS[dtype])


def test_no_dimension_no_entry_and_values_that_are_no_numbers():
    x = torch.tensor(1.0, requires_grad=True)
    for choice, want in (("first", (1.0, 0.0)), ("last", (0.0, 1.0)), (None, (0.5, 0.5))):
        src = torch.tensor(1.0, requires_grad=True)
        y = ops.scatter_reduce(x, 0, torch.tensor(0), src, "amax", jacobian=choice)
        assert y.shape == ()
        assert tuple(map(float, torch.autograd.grad(y, (x, src)))) == want
    base = torch.zeros(3, requires_grad=True)
    none = ops.scatter_reduce(base, 0, torch.zeros(0, dtype=torch.long), torch.zeros(0), "amax", jacobian="last")
    assert torch.autograd.grad(none.sum(), base)[0].tolist() == [1.0] * 3
    for value in (float("nan"), float("inf"), -float("inf")):
        src = torch.full((4,), value, requires_grad=True)
        args = (torch.tensor([0, 0, 1, 1]), src, "amax")
        got = [f(base, 0, *args) for f in (ops.scatter_reduce, torch.scatter_reduce)]
        a, b = (torch.autograd.grad(y.nan_to_num().sum(), (base, src)) for y in got)
        assert all(torch.equal(p.nan_to_num(7), q.nan_to_num(7)) for p, q in zip(a, b, strict=True))


def test_a_single_maximum_over_an_equal_base_that_takes_no_part():
    """PyTorch gives it half; every other choice gives it what there is."""
    model = Lambda(lambda x: torch.zeros(1).scatter_reduce(0, torch.tensor([0, 0]), x, "amax", include_self=False))
    patch(model, Jacobians())
    x = torch.tensor([0.0, -1.0], requires_grad=True)
    y = model(x)
    shares = {None: 0.5, "first": 1.0, "last": 1.0, "minimal": 1.0, "sum": 1.0, "random": 1.0, 1.0: 1.0, 0.5: 0.75}
    for choice, share in shares.items():
        with using(model, Jacobians(scatter_max=choice)):
            assert torch.autograd.grad(y, x, retain_graph=True)[0].tolist() == [share, 0.0]


# ----------------------------------------------------------------------------------------------------------- segments
@pytest.mark.parametrize("reduce", ["max", "min"])
@pytest.mark.parametrize(
    ("shape", "axis", "how"),
    [
        ((7,), 0, {"lengths": [2, 0, 5]}), ((7, 2), 0, {"lengths": [3, 4]}), ((7,), 0, {"offsets": [0, 3, 3, 7]}),
        ((7,), 0, {"offsets": [1, 4, 6]}), ((2, 5, 2), 1, {"lengths": [[2, 3], [1, 4]]}),
    ],
)  # fmt: skip
def test_segments(shape, axis, how, reduce):
    how = {name: torch.tensor(value) for name, value in how.items()}
    for seed, dtype in itertools.product(range(3), DTYPES[:2]):
        x = whole_numbers(shape, seed, dtype).requires_grad_()
        want = torch.segment_reduce(x, reduce, axis=axis, **how)
        g = gradient_of(want.shape, dtype)
        by_stock = torch.autograd.grad(want, x, g)[0]
        for choice in CHOICES:
            got = ops.segment_reduce(x, reduce, axis=axis, **how, jacobian=choice)
            assert torch.equal(bits(got), bits(want))
            gradient = torch.autograd.grad(got, x, g)[0]
            if choice in ("native", 0.0):
                assert torch.equal(gradient, by_stock)
            loops = segment_loops(x, axis, how, reduce, g.double(), choice)
            torch.testing.assert_close(gradient.double(), loops, rtol=DIGITS[dtype], atol=DIGITS[dtype])


def segment_loops(x, axis, how, reduce, g, choice):
    gradient = torch.zeros(x.shape, dtype=torch.float64)
    for batch in itertools.product(*map(range, x.shape[:axis])):
        shares = next(iter(how.values()))[batch].tolist()
        ends = shares if "offsets" in how else [0, *itertools.accumulate(shares)]
        for segment, (start, end) in enumerate(itertools.pairwise(ends)):
            for rest in itertools.product(*map(range, x.shape[axis + 1 :])):
                entries = {k: x[(*batch, k, *rest)].item() for k in range(start, end)}
                best = (max if reduce == "max" else min)(entries.values(), default=0.0)
                tied = [k for k, v in entries.items() if v == best]
                k = len(tied)
                incoming = g[(*batch, segment, *rest)].item()
                native = [1 / k if incoming > 0 else 1.0] * k if k else []  # PyTorch divides positive gradients only
                for at, share in zip(tied, weights(choice, k, native) if k else [], strict=True):
                    gradient[(*batch, at, *rest)] += share * incoming
    return gradient


# ---------------------------------------------------------------------------------------------------------------- bags
BAGS = [
    {"indices": [[0, 1, 2], [3, 3, 5]]}, {"indices": [4, 0, 1, 2, 5, 3], "offsets": [0, 2, 2]},
    {"indices": [4, 0, 1, 2, 5, 3], "offsets": [0, 3, 6], "include_last_offset": True},
    {"indices": [[0, 1, 2], [2, 2, 1]], "padding_idx": 2}, {"indices": [[0, 5, 2], [5, 5, 5]], "padding_idx": -1},
]  # fmt: skip


def bag_loops(weight, indices, offsets, last, padding, g, choice):
    gradient = torch.zeros(weight.shape, dtype=torch.float64)
    if offsets is None:
        bags = indices.tolist()
    else:
        ends = offsets.tolist() + ([] if last else [len(indices)])
        bags = [indices.tolist()[a:b] for a, b in itertools.pairwise(ends)]
    for b, rows in enumerate(bags):
        rows = [r for r in rows if padding is None or r != padding % len(weight)]
        for column in range(weight.shape[1]):
            best = max((weight[r, column].item() for r in rows), default=0.0)
            tied = [r for r in rows if weight[r, column].item() == best]
            k = len(tied)
            native = [1.0] + [0.0] * (k - 1)
            for r, share in zip(tied, weights(choice, k, native) if k else [], strict=True):
                gradient[r, column] += share * g[b, column].item()
    return gradient


@pytest.mark.parametrize("case", BAGS, ids=str)
def test_bags(case):
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in case.items()}
    indices = options.pop("indices")
    parts = (options.get("offsets"), options.get("include_last_offset"), options.get("padding_idx"))
    for seed, dtype in itertools.product(range(3), DTYPES[:2]):
        weight = whole_numbers((6, 3), seed, dtype).requires_grad_()
        want = F.embedding_bag(indices, weight, mode="max", **options)
        g = gradient_of(want.shape, dtype)
        by_stock = torch.autograd.grad(want, weight, g)[0]
        for choice in CHOICES:
            got = ops.embedding_bag(indices, weight, **options, jacobian=choice)
            assert torch.equal(bits(got), bits(want))
            gradient = torch.autograd.grad(got, weight, g)[0]
            if choice in ("native", 0.0):
                assert torch.equal(gradient, by_stock)
            loops = bag_loops(weight, indices, *parts, g.double(), choice)
            torch.testing.assert_close(gradient.double(), loops, rtol=DIGITS[dtype], atol=DIGITS[dtype])


# ------------------------------------------------------------------------------------------------------------ in models
class Lambda(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


INDEX = torch.tensor([0, 0, 1, 1])
ROWS = INDEX[:, None].expand(4, 3)
SPELLINGS = {
    "torch.scatter_reduce": ("scatter_max", lambda x: torch.scatter_reduce(x.new_zeros(2, 3), 0, ROWS, x, "amax")),
    "by name": (
        "scatter_max",
        lambda x: torch.scatter_reduce(input=x.new_ones(2, 3), dim=0, index=ROWS, src=x, reduce="amin"),
    ),
    "Tensor.scatter_reduce": ("scatter_max", lambda x: x.new_zeros(2, 3).scatter_reduce(0, ROWS, x, "amax")),
    "as PyTorch Geometric": (
        "scatter_max",
        lambda x: x.new_zeros(2, 3).scatter_reduce_(0, ROWS, x, reduce="amax", include_self=False),
    ),
    "into a view": (
        "scatter_max", lambda x: (x * 1).narrow(0, 0, 2).scatter_reduce_(0, ROWS, x, "amax"),
    ),
    "torch.index_reduce": (
        "scatter_max", lambda x: torch.index_reduce(x.new_zeros(2, 3), 0, INDEX, x, "amax"),
    ),
    "Tensor.index_reduce_": (
        "scatter_max", lambda x: x.new_ones(2, 3).index_reduce_(0, INDEX, source=x, reduce="amin"),
    ),
    "segment_reduce": ("segment_max", lambda x: torch.segment_reduce(x, "max", lengths=torch.tensor([3, 1]))),
    "segment_reduce by name": (
        "segment_max", lambda x: torch.segment_reduce(data=x, reduce="min", offsets=torch.tensor([0, 2, 4])),
    ),
    "embedding_bag": ("bag_max", lambda x: F.embedding_bag(INDEX.view(1, 4), x, mode="max")),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_patched_model_takes_the_choice(name):
    operation, call = SPELLINGS[name]
    stock, model = Lambda(call), Lambda(call)
    x = torch.ones(4, 3, requires_grad=True)
    report = patch(model, Jacobians(), example=x)
    assert [(s.operation, s.how) for s in report.sites] == [(operation, "functional")]
    want, got = stock(x), model(x)
    assert torch.equal(bits(got), bits(want))
    for fact in ("_version", "is_leaf", "_is_view"):
        mine, theirs = (getattr(t, fact) for t in (got, want))
        assert (mine() == theirs()) if callable(mine) else mine == theirs
    assert got.stride() == want.stride()
    g = gradient_of(got.shape, torch.float32)
    a, b = (torch.autograd.grad(y, x, g, retain_graph=True)[0] for y in (got, want))
    assert torch.equal(a, b)
    with using(model, Jacobians(**{operation: "sum"})):
        assert not torch.equal(torch.autograd.grad(got, x, g)[0], b)
    assert sum(t.tied for t in ties(model, x).values()) > 0


def test_a_module_of_bags():
    bag = nn.EmbeddingBag(5, 3, mode="max", include_last_offset=True)
    nn.init.zeros_(bag.weight)
    model = nn.Sequential(bag)
    report = patch(model, Jacobians(bag_max="last"))
    assert [(s.operation, s.how, s.name) for s in report.sites] == [("bag_max", "module", "0")]
    loss = bag(torch.tensor([0, 1, 2]), torch.tensor([0, 3])).sum()
    assert torch.autograd.grad(loss, bag.weight)[0][:3].sum(1).tolist() == [0.0, 0.0, 3.0]
    alone = ops.EmbeddingBag(5, 3, mode="max", jacobian="last")
    nn.init.zeros_(alone.weight)
    alone(input=torch.tensor([[0, 1, 2]])).sum().backward()
    assert alone.weight.grad[:3].sum(1).tolist() == [0.0, 0.0, 3.0]
    mean = ops.EmbeddingBag(5, 3, jacobian="last")
    assert mean(torch.tensor([[0, 1]])).shape == (1, 3)


def test_modules_of_functions():
    x = torch.ones(4, 3, requires_grad=True)
    for module, args in (
        (ops.ScatterReduce(0, "amax", include_self=False, jacobian="last"), (torch.zeros(2, 3), ROWS, x)),
        (ops.IndexReduce(0, "amax", include_self=False, jacobian="last"), (torch.zeros(2, 3), INDEX, x)),
        (ops.SegmentReduce("max", jacobian="last"), (x, torch.tensor([2, 2]))),
    ):
        assert torch.autograd.grad(module(*args).sum(), x)[0].sum(1).tolist() == [0.0, 3.0, 0.0, 3.0]
    with pytest.raises(ValueError, match="amax"):
        ops.scatter_reduce(torch.zeros(1), 0, torch.tensor([0]), torch.zeros(1), "sum")
    with pytest.raises(ValueError, match="lengths or offsets"):
        ops.segment_reduce(torch.zeros(1), "max")


@pytest.mark.parametrize("name", ["as PyTorch Geometric", "segment_reduce", "embedding_bag", "torch.index_reduce"])
def test_random_gives_all_to_one_entry(name):
    operation, call = SPELLINGS[name]
    model, x = Lambda(call), torch.ones(4, 3, requires_grad=True)
    patch(model, Jacobians(**{operation: "random"}), seed=3)
    y = model(x)
    seen = set()
    for _ in range(20):
        (g,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert set(g.flatten().tolist()) <= {0.0, 1.0}
        assert g.sum() == y.numel()
        seen.add(tuple(g.flatten().tolist()))
    assert len(seen) > 3


@pytest.mark.parametrize("name", SPELLINGS)
def test_compiled_backwards_read_the_choice(name):
    operation, call = SPELLINGS[name]
    torch._dynamo.reset()
    x = torch.ones(4, 3, requires_grad=True)
    model, eager = Lambda(call), Lambda(call)
    for one in (model, eager):
        patch(one, Jacobians())
    compiled = torch.compile(model, backend="aot_eager")
    for choice in (None, "last", "minimal", 0.5):
        with using(model, Jacobians(**{operation: choice})), using(eager, Jacobians(**{operation: choice})):
            a, b = (torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, eager))
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_transforms_and_second_derivatives():
    x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    for name in ("as PyTorch Geometric", "torch.scatter_reduce"):
        operation, call = SPELLINGS[name]
        model = Lambda(lambda x, call=call: call(x * x) ** 2)
        patch(model, Jacobians(**{operation: "last"}))
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        assert torch.equal(torch.func.grad(lambda x, m=model: m(x).sum())(x), g)
        second = torch.autograd.grad(g.sum(), x)[0]
        # y = x^4 of the entry that is taken: 12 x^2; the others receive nothing.
        assert second[[1, 3]].tolist() == [[12.0] * 3] * 2
        assert second[[0, 2]].abs().max() == 0


def test_a_difference_is_carried_down_from_tied_groups():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, x):
            return SPELLINGS["as PyTorch Geometric"][1](self.lin(x).relu())

    torch.manual_seed(0)
    model = Graph().double()
    patch(model, Jacobians())
    loss = (model(torch.zeros(4, 3, dtype=torch.float64)) * torch.arange(1.0, 7.0).view(2, 3)).sum()
    choices = {"first": Jacobians(scatter_max="first"), "sum": Jacobians(scatter_max="sum")}
    carried = divergence(loss, model, choices, method="propagate")
    subtracted = divergence(loss, model, choices)
    for name in choices:
        assert carried[name].method == "propagate"
        assert carried[name].l2 == pytest.approx(subtracted[name].l2, abs=1e-12)
    assert carried["sum"].l2 > 0.1
