"""Maxima, norms and losses in a patched model: every spelling is reached, and does what the function of `ops` does."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from bits import bits
from torch import nn

from nslightning import Jacobians, ops, patch, unpatch, using
from nslightning.ops.record import FUNCTIONS, MODULES, Call
from nslightning.ops.unreached import UNREACHED, UNSUPPORTED_FUNCTIONS, UNSUPPORTED_MODULES
from nslightning.probes import divergence, ties
from nslightning.probes.propagation import differences

X = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, -1.0, 2.0], [-3.0, -3.0, -3.0]])
Y = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, -1.0], [3.0, -1.0, 2.0], [-3.0, 0.0, -3.0]])
SIGNS = torch.tensor([1.0, -1.0, -1.0, -1.0])
CHOICE = Jacobians(max="last", maximum="last", norm=0.5, hinge=0.25, abs=-0.5)
CLASSES = torch.tensor([0, 1, 2, 0])
A = {"at_zero": 0.25}


def half_at_zero(x):
    """The 1.5-norms of rows, of which each entry of a zero row has the derivative 0.5."""
    norms = torch.linalg.vector_norm(x, 1.5, 1)
    return norms + torch.where(norms.detach() == 0, 0.5 * (x - x.detach()).sum(1), 0.0)


# What a model may write, and what ops writes for it under CHOICE.
SPELLINGS = {
    "max": (lambda x: torch.max(x), lambda x: ops.max(x, jacobian="last")),
    "method max": (lambda x: x.max(1)[0], lambda x: ops.max(x, 1, jacobian="last")[0]),
    "min by keyword": (lambda x: torch.min(x, dim=-1).values, lambda x: ops.min(x, -1, jacobian="last").values),
    "keepdim": (lambda x: x.max(dim=1, keepdim=True)[0], lambda x: ops.max(x, 1, True, jacobian="last")[0]),
    "numpy's": (lambda x: torch.max(x, axis=0)[0], lambda x: ops.max(x, 0, jacobian="last")[0]),
    "amax": (lambda x: x.amax((0, 1)), lambda x: ops.amax(x, (0, 1), jacobian="last")),
    "amin": (lambda x: torch.amin(x, dim=1), lambda x: ops.amin(x, 1, jacobian="last")),
    "aminmax": (lambda x: x.aminmax(dim=1).max, lambda x: ops.aminmax(x, 1, jacobian="last").max),
    "max of two": (lambda x: torch.max(x, Y), lambda x: ops.maximum(x, Y, jacobian="last")),
    "min of two": (lambda x: x.min(other=Y), lambda x: ops.minimum(x, Y, jacobian="last")),
    "maximum": (lambda x: torch.maximum(x, Y), lambda x: ops.maximum(x, Y, jacobian="last")),
    "maximum of integers": (lambda x: torch.maximum(Y.long(), x), lambda x: ops.maximum(Y, x, jacobian="last")),
    "fmin": (lambda x: x.fmin(Y), lambda x: ops.fmin(x, Y, jacobian="last")),
    "norm": (lambda x: x.norm(), lambda x: ops.norm(x, at_zero=0.5)),
    "norms": (lambda x: torch.norm(x, dim=1), lambda x: ops.norm(x, 1, at_zero=0.5)),
    "frobenius": (lambda x: torch.norm(x, "fro", dim=(0, 1)), lambda x: ops.norm(x, (0, 1), at_zero=0.5)),
    "linalg.norm": (lambda x: torch.linalg.norm(x, dim=1), lambda x: ops.norm(x, 1, at_zero=0.5)),
    "vector_norm": (
        lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True),
        lambda x: ops.norm(x, 1, True, at_zero=0.5),
    ),
    "1-norm": (lambda x: x.norm(1, 1), lambda x: ops.abs(x, -0.5).sum(1)),
    "1.5-norm": (lambda x: torch.norm(x, 1.5, 1), lambda x: half_at_zero(x)),
    "linalg's 1.5-norm": (lambda x: torch.linalg.norm(x, 1.5, 1), lambda x: half_at_zero(x)),
    "distance by a 1.5-norm": (lambda x: F.pairwise_distance(x, Y, 1.5, 0.0), lambda x: half_at_zero(x - Y)),
    "normalize": (lambda x: F.normalize(x), lambda x: ops.normalize(x)),
    "normalize by a 1.5-norm": (lambda x: F.normalize(x, 1.5), lambda x: ops.normalize(x, 1.5)),
    "distance": (lambda x: F.pairwise_distance(x, Y, eps=0.0), lambda x: ops.norm(x - Y, -1, at_zero=0.5)),
    "dist": (lambda x: torch.dist(x[1], X[1]), lambda x: ops.norm(x[1] - X[1], at_zero=0.5)),
    "l1": (lambda x: F.l1_loss(x, Y), lambda x: ops.l1_loss(x, Y, at_zero=-0.5)),
    "l1 summed": (lambda x: nn.L1Loss(reduction="sum")(x, Y), lambda x: ops.l1_loss(x, Y, "sum", at_zero=-0.5)),
    "smooth l1": (lambda x: F.smooth_l1_loss(x, Y, beta=0.0), lambda x: ops.l1_loss(x, Y, at_zero=-0.5)),
    "hinge": (
        lambda x: F.hinge_embedding_loss(x, -torch.ones_like(x)),
        lambda x: ops.hinge_embedding_loss(x, -torch.ones_like(x), **A),
    ),
    "ranking": (
        lambda x: F.margin_ranking_loss(x, Y, torch.ones_like(x), reduction="none"),
        lambda x: ops.margin_ranking_loss(x, Y, torch.ones_like(x), reduction="none", **A),
    ),
    "ranking, legacy": (
        lambda x: F.margin_ranking_loss(x, Y, torch.ones_like(x), 0.0, False),
        lambda x: ops.margin_ranking_loss(x, Y, torch.ones_like(x), reduction="sum", **A),
    ),
    "ranking of torch": (
        lambda x: torch.margin_ranking_loss(x, Y, torch.ones_like(x), 0.0, 2),
        lambda x: ops.margin_ranking_loss(x, Y, torch.ones_like(x), reduction="sum", **A),
    ),
    "cosine": (
        lambda x: F.cosine_embedding_loss(x, Y, SIGNS),
        lambda x: ops.cosine_embedding_loss(x, Y, SIGNS, **A),
    ),
    "triplet": (
        lambda x: F.triplet_margin_loss(x, X, Y, eps=0.0),
        lambda x: ops.triplet_margin_loss(x, X, Y, eps=0.0, **A),
    ),
    "multi margin": (lambda x: F.multi_margin_loss(x, CLASSES), lambda x: ops.multi_margin_loss(x, CLASSES, **A)),
}


class Model(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.f = f

    def forward(self, x):
        return self.f(x * self.scale)


def gradient(y, x):
    return torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(spelling):
    written, meant = SPELLINGS[spelling]
    model, x = Model(written), X.clone().requires_grad_()
    want, stock = meant(x), gradient(model(x), x)
    report = patch(model, CHOICE)
    y = model(x)
    assert torch.equal(bits(y), bits(written(X)))
    assert torch.equal(y, want)
    assert torch.equal(gradient(y, x), gradient(want, x))
    assert len(report.reached) == 1
    assert not report.unreached
    y = model(x)
    with using(model, Jacobians()):
        assert torch.equal(gradient(y, x), stock)
    counted = ties(model, x.detach())
    unpatch(model)
    assert torch.equal(gradient(model(x), x), stock)
    if spelling in ("normalize", "normalize by a 1.5-norm", "smooth l1", "min by keyword", "keepdim"):
        return
    (count,) = counted.values()
    assert (count.tied > 0) == (not torch.equal(gradient(meant(x), x), stock))


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.filterwarnings("ignore:Model has nothing to patch")  # of what the patch knows before a forward
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_autocast(spelling):
    """Stock's precision, bits and reference gradients from inputs in half precision; the chosen gradients at ties."""
    written, _ = SPELLINGS[spelling]

    def run(choice):
        x = X.bfloat16().requires_grad_()
        model = Model(written).bfloat16()
        if choice is not None:
            patch(model, choice, strict=False)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        return y, gradient(y.float(), x)

    (want, stock), (got, mine), (_, chosen) = run(None), run(Jacobians()), run(CHOICE)
    assert got.dtype == want.dtype
    assert torch.equal(bits(got), bits(want))
    assert torch.equal(bits(mine), bits(stock))
    if spelling in ("maximum", "l1", "ranking", "norms", "amax", "triplet"):
        assert not torch.equal(chosen, stock)


@pytest.mark.parametrize(
    ("module", "others"),
    [
        (nn.L1Loss(), (Y,)),
        (nn.SmoothL1Loss(beta=0.0), (Y,)),
        (nn.HingeEmbeddingLoss(reduction="sum"), (-torch.ones_like(X),)),
        (nn.MarginRankingLoss(), (Y, torch.ones_like(X))),
        (nn.CosineEmbeddingLoss(), (Y, SIGNS)),
        (nn.TripletMarginLoss(eps=0.0, swap=True), (X, Y)),
        (nn.MultiMarginLoss(weight=torch.tensor([1.0, 2.0, 0.5])), (CLASSES,)),
        (nn.PairwiseDistance(eps=0.0), (X,)),
        (nn.PairwiseDistance(p=1.0, eps=0.0), (X,)),
        (nn.PairwiseDistance(p=1.5, eps=0.0), (X,)),
    ],
)
def test_modules(module, others):
    module, x = copy.deepcopy(module), X.clone().requires_grad_()
    want = module(x, *others)
    stock = gradient(want, x)
    report = patch(module, CHOICE)
    assert [site.how for site in report.sites] == ["module"]
    got = module(x, *others)
    assert torch.equal(bits(got), bits(want))
    assert not torch.equal(gradient(got, x), stock)
    got = pickle.loads(pickle.dumps(module))(x, *others)
    assert not torch.equal(gradient(got, x), stock)
    unpatch(module)
    assert torch.equal(gradient(module(x, *others), x), stock)


@pytest.mark.parametrize("module", [nn.SmoothL1Loss(), nn.HuberLoss(), nn.MultiMarginLoss(p=2)])
def test_smooth_losses_are_left_alone_and_not_named(module):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = copy.deepcopy(module)

        def forward(self, x):
            return self.loss(x, CLASSES if isinstance(module, nn.MultiMarginLoss) else Y)

    x = X.clone().requires_grad_()
    model = Loss()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = patch(model, CHOICE)
        model(x)
    assert not report.sites


@pytest.mark.filterwarnings("ignore:Model has nothing to patch")  # of what the patch knows before a forward
@pytest.mark.parametrize(
    ("f", "named"),
    [
        (lambda x: x.norm(float("inf")), "norm"),
        (lambda x: torch.linalg.norm(x, 2), "norm"),
        (lambda x: torch.linalg.vector_norm(x, 0.5), "norm"),
        (lambda x: x.median(), "median"),
        (lambda x: x.cummax(1)[0], "cummax"),
        (lambda x: x.topk(2)[0], "topk"),
        (lambda x: F.normalize(x, p=float("inf")), "normalize"),
        (lambda x: torch.cdist(x, x), "cdist"),
    ],
)
def test_what_is_not_reached_is_named(f, named):
    model = Model(f)
    report = patch(model, CHOICE, strict=False)
    x = X.clone().requires_grad_()
    y = model(x)
    assert torch.equal(y, f(X))
    assert [site.operation for site in report.unreached] == [named]
    assert named in UNREACHED


def test_each_name_without_a_choice_has_a_reason():
    names = {*UNSUPPORTED_FUNCTIONS.values(), *UNSUPPORTED_MODULES.values()}
    assert {name.removesuffix("_with_indices") for name in names} <= set(UNREACHED)
    # Reached, and named only for the arguments with which they are something else.
    both = {UNSUPPORTED_FUNCTIONS[f] for f in FUNCTIONS if f in UNSUPPORTED_FUNCTIONS}
    both |= {UNSUPPORTED_MODULES[m] for m in MODULES if m in UNSUPPORTED_MODULES}
    assert all("reached" in UNREACHED[name] for name in both)


def test_a_call_is_positional_or_by_name():
    assert Call(X).within is None
    for f, operations in FUNCTIONS.items():
        assert callable(f)
        assert operations


def test_propagation_is_subtraction():
    """In float64, for one input, two inputs, and hinges; some of the ties are carried through others."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(3, 4, dtype=torch.float64)

        def forward(self, x):
            a, b = (layer(x).round(decimals=0) + layer(x) - layer(x).detach() for layer in (self.a, self.b))
            h = torch.maximum(a, b) + torch.minimum(a, a.detach())
            top = h.max(1)[0] + h.amax(1) + h.norm(dim=1)
            return (
                top.sum() + F.l1_loss(a, b) + F.margin_ranking_loss(a, b, torch.ones_like(a)) + (a - a.detach()).norm()
            )

    torch.manual_seed(0)
    model = Net()
    report = patch(model, Jacobians())
    x = torch.randn(64, 3, dtype=torch.float64)
    choices = {"a": CHOICE, "b": Jacobians(max="minimal", maximum="sum", hinge=1.0), "c": Jacobians(max=10.0, norm=1.0)}
    loss = model(x)
    assert len(report.reached) >= 7
    base, changes = differences(loss, model, choices, retain_graph=True)
    parameters = list(model.parameters())
    for name, choice in choices.items():
        with using(model, choice):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        for (key, reference), other in zip(base.items(), gradients, strict=True):
            assert torch.allclose(changes[name][key], other - reference, rtol=1e-12, atol=1e-12)
            assert changes[name][key].abs().max() > 1e-3
    measured = divergence(loss, model, choices)
    assert all(measured[name].l2 > 0 for name in choices)


def test_compiled_model():
    torch._dynamo.reset()

    def f(x):
        top = x.max(1)[0].sum() + x.amax(0).sum() + torch.maximum(x, Y).sum() + torch.min(x, dim=1).values.sum()
        return top + torch.norm(x, dim=1).sum() + F.l1_loss(x, Y) + F.margin_ranking_loss(x, Y, torch.ones_like(x))

    model, x = Model(f), X.clone().requires_grad_()
    patch(model, CHOICE)
    want = gradient(model(x), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert torch.equal(y, f(X))
    assert torch.allclose(gradient(y, x), want, rtol=1e-6)
