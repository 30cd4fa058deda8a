"""Every operation as a module: the function's result and gradient, a repr that shows the choice, copies and pickles."""

import copy
import pickle

import pytest
import torch
from bits import bits
from torch import nn

from nslightning import Jacobians, UnreachedError, ops, patch
from nslightning.ops.record import MODULES

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")

X = torch.tensor([[[0.0, 0.0, 6.0, -0.5], [3.0, -3.0, 0.5, 0.5], [1.0, -1.0, 1.0, 0.0]]])  # (1, 3, 4): on every kink
T = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]])  # ties along every dimension
IMAGE = torch.zeros(1, 1, 4, 4)
SIGNS = torch.tensor([[[1.0], [-1.0], [-1.0]]])
Y = torch.tensor([[[0.0, 1.0, 6.0, -1.5], [3.0, 0.0, 0.5, 0.0], [0.0, -1.0, 1.0, 0.0]]])
BOTH = (0.25, 0.75)
MODULE_NAMES = {
    name for name in ops.__all__ if isinstance(cls := getattr(ops, name), type) and issubclass(cls, nn.Module)
} - {"EmbeddingBag"}  # of integers, in tests/ops/test_groups.py

# The module, the function that it is, its inputs.
CASES = {
    "ReLU": (ops.ReLU(at_zero=0.5), lambda x: ops.relu(x, 0.5), X),
    "ReLU published": (
        ops.ReLU(at_zero=0.5, rule="published"),
        lambda x: ops.relu(x, 0.5, rule="published"),
        X,
    ),
    "ReLU6": (ops.ReLU6(at_kinks=BOTH), lambda x: ops.relu6(x, BOTH), X),
    "LeakyReLU": (ops.LeakyReLU(0.1, at_zero=0.5), lambda x: ops.leaky_relu(x, 0.1, 0.5), X),
    "PReLU": (ops.PReLU(3, at_zero=0.5), lambda x: ops.prelu(x, torch.full((3,), 0.25), 0.5), X),
    "RReLU": (ops.RReLU(0.1, 0.1, at_zero=0.5), lambda x: ops.rrelu(x, 0.1, 0.1, at_zero=0.5), X),
    "Hardtanh": (ops.Hardtanh(at_kinks=BOTH), lambda x: ops.hardtanh(x, -1, 1, BOTH), X),
    "Hardtanh 6": (ops.Hardtanh(0.0, 6.0, at_kinks=BOTH), lambda x: ops.relu6(x, BOTH), X),
    "Hardswish": (ops.Hardswish(at_kinks=BOTH), lambda x: ops.hardswish(x, BOTH), X),
    "Hardsigmoid": (ops.Hardsigmoid(at_kinks=BOTH), lambda x: ops.hardsigmoid(x, BOTH), X),
    "Hardshrink": (ops.Hardshrink(at_kinks=BOTH), lambda x: ops.hardshrink(x, 0.5, BOTH), X),
    "Softshrink": (ops.Softshrink(at_kinks=BOTH), lambda x: ops.softshrink(x, 0.5, BOTH), X),
    "Threshold": (ops.Threshold(0.5, 7.0, at_threshold=0.5), lambda x: ops.threshold(x, 0.5, 7.0, 0.5), X),
    "ELU": (ops.ELU(0.5, at_zero=0.75), lambda x: ops.elu(x, 0.5, 0.75), X),
    "SELU": (ops.SELU(at_zero=1.0), lambda x: ops.selu(x, 1.0), X),
    "Abs": (ops.Abs(at_zero=1.0), lambda x: ops.abs(x, 1.0), X),
    "Clamp": (ops.Clamp(-1, 1, at_bounds=BOTH), lambda x: ops.clamp(x, -1, 1, BOTH), X),
    "MaxPool1d": (ops.MaxPool1d(2, jacobian="minimal"), lambda x: ops.max_pool1d(x, 2, jacobian="minimal"), X),
    "MaxPool2d": (ops.MaxPool2d(2, jacobian="last"), lambda x: ops.max_pool2d(x, 2, jacobian="last"), IMAGE),
    "MaxPool3d": (
        ops.MaxPool3d(2, jacobian=3.0),
        lambda x: ops.max_pool3d(x, 2, jacobian=3.0),
        IMAGE.expand(1, 2, 4, 4),
    ),
    "AdaptiveMaxPool1d": (
        ops.AdaptiveMaxPool1d(2, jacobian="sum"),
        lambda x: ops.adaptive_max_pool1d(x, 2, jacobian="sum"),
        X,
    ),
    "AdaptiveMaxPool2d": (
        ops.AdaptiveMaxPool2d((1, None), jacobian="minimal"),
        lambda x: ops.adaptive_max_pool2d(x, (1, None), jacobian="minimal"),
        IMAGE,
    ),
    "AdaptiveMaxPool3d": (
        ops.AdaptiveMaxPool3d(1, jacobian="minimal"),
        lambda x: ops.adaptive_max_pool3d(x, 1, jacobian="minimal"),
        IMAGE.expand(1, 2, 4, 4),
    ),
    "FractionalMaxPool2d": (
        ops.FractionalMaxPool2d(2, output_size=1, _random_samples=torch.zeros(1, 2, 2), jacobian="sum"),
        lambda x: ops.fractional_max_pool2d(x, 2, 1, _random_samples=torch.zeros(1, 2, 2), jacobian="sum"),
        torch.zeros(1, 2, 3, 3),
    ),
    "FractionalMaxPool3d": (
        ops.FractionalMaxPool3d(2, output_size=1, _random_samples=torch.zeros(1, 2, 3), jacobian="minimal"),
        lambda x: ops.fractional_max_pool3d(x, 2, 1, _random_samples=torch.zeros(1, 2, 3), jacobian="minimal"),
        torch.zeros(1, 2, 3, 3, 3),
    ),
    "Max": (ops.Max(jacobian="last"), lambda x: ops.max(x, jacobian="last"), T),
    "Min": (ops.Min(2, jacobian="last"), lambda x: ops.min(x, 2, jacobian="last"), T),
    "Amax": (ops.Amax((0, 1), jacobian="sum"), lambda x: ops.amax(x, (0, 1), jacobian="sum"), Y),
    "Amin": (ops.Amin(2, True, jacobian="first"), lambda x: ops.amin(x, 2, True, jacobian="first"), T),
    "Aminmax": (ops.Aminmax(dim=2, jacobian="last"), lambda x: ops.aminmax(x, 2, jacobian="last"), X),
    "Maximum": (ops.Maximum(jacobian="first"), lambda x, y: ops.maximum(x, y, jacobian="first"), X, Y),
    "Minimum": (ops.Minimum(jacobian="last"), lambda x, y: ops.minimum(x, y, jacobian="last"), X, Y),
    "Fmax": (ops.Fmax(jacobian="last"), lambda x, y: ops.fmax(x, y, jacobian="last"), X, Y),
    "Fmin": (ops.Fmin(jacobian="last"), lambda x, y: ops.fmin(x, y, jacobian="last"), X, Y),
    "Norm": (ops.Norm((2, 3), at_zero=0.5), lambda x: ops.norm(x, (2, 3), at_zero=0.5), IMAGE),
    "Normalize": (
        ops.Normalize(dim=2, eps=1.5, at_eps=0.25),
        lambda x: ops.normalize(x, dim=2, eps=1.5, at_eps=0.25),
        torch.tensor([[[1.5, 0.0], [1.0, 2.0]]]),
    ),
    "NormPool2d": (ops.NormPool2d(2, at_zero=1.0), lambda x: ops.norm_pool2d(x, 2, at_zero=1.0), IMAGE),
    "L1Loss": (ops.L1Loss(at_zero=1.0), lambda x, y: ops.l1_loss(x, y, at_zero=1.0), X, Y),
    "HingeEmbeddingLoss": (
        ops.HingeEmbeddingLoss(at_zero=0.25),
        lambda x, y: ops.hinge_embedding_loss(x, y, at_zero=0.25),
        X,
        SIGNS.expand_as(X),
    ),
    "ScatterReduce": (
        ops.ScatterReduce(2, "amax", jacobian="last"),
        lambda x, i, y: ops.scatter_reduce(x, 2, i, y, "amax", jacobian="last"),
        X,
        torch.zeros(1, 3, 4, dtype=torch.long),
        torch.full_like(X, 3.0),
    ),
    "IndexReduce": (
        ops.IndexReduce(2, "amin", jacobian="last"),
        lambda x, i, y: ops.index_reduce(x, 2, i, y, "amin", jacobian="last"),
        torch.zeros(1, 3, 4),
        torch.zeros(4, dtype=torch.long),
        torch.zeros(1, 3, 4),
    ),
    "SegmentReduce": (
        ops.SegmentReduce("max", jacobian="last"),
        lambda x, n: ops.segment_reduce(x, "max", lengths=n, jacobian="last"),
        T[0, 0],
        torch.tensor([2, 2]),
    ),
    "MarginRankingLoss": (
        ops.MarginRankingLoss(at_zero=0.25),
        lambda x, y, t: ops.margin_ranking_loss(x, y, t, at_zero=0.25),
        X,
        Y,
        SIGNS,
    ),
    "CosineEmbeddingLoss": (
        ops.CosineEmbeddingLoss(at_zero=0.25),
        lambda x, y, t: ops.cosine_embedding_loss(x, y, t, at_zero=0.25),
        torch.eye(3),
        torch.eye(3).roll(1, 0),
        -torch.ones(3),
    ),
    "TripletMarginLoss": (
        ops.TripletMarginLoss(eps=0.0, at_zero=0.25),
        lambda x, p, n: ops.triplet_margin_loss(x, p, n, eps=0.0, at_zero=0.25),
        X[0],
        X[0],
        X[0] + torch.tensor([1.0, 0.0, 0.0, 0.0]),
    ),
    "MultiMarginLoss": (
        ops.MultiMarginLoss(at_zero=0.25),
        lambda x, t: ops.multi_margin_loss(x, t, at_zero=0.25),
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([0]),
    ),
}


def outputs(result):
    return [result] if isinstance(result, torch.Tensor) else [t for t in result if t.is_floating_point()]


def gradients(f, *inputs):
    x = inputs[0].clone().requires_grad_()
    results = outputs(f(x, *inputs[1:]))
    return results, torch.autograd.grad(sum(r.sum() for r in results), x)[0]


def test_there_is_a_module_for_each_operation():
    assert {type(module).__name__ for module, *_ in CASES.values()} == MODULE_NAMES
    missing = {cls.__name__ for cls in MODULES} - MODULE_NAMES - {"EmbeddingBag"}
    assert missing <= {"SmoothL1Loss", "PairwiseDistance"}, missing  # L1Loss with beta = 0; Norm of a difference


@pytest.mark.parametrize("name", CASES)
def test_module(name):
    module, function, *inputs = CASES[name]
    module.eval()
    want, gradient = gradients(function, *inputs)
    for made in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        got, mine = gradients(made, *inputs)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, want, strict=True))
        assert torch.equal(mine, gradient)
        assert repr(made) == repr(module)
    reference = copy.deepcopy(module)
    reference.selection.set(Jacobians())
    assert not torch.equal(gradients(reference, *inputs)[1], gradient)
    base = type(module).__mro__[2]
    if base.__module__.startswith("torch."):
        assert isinstance(module, base)


def test_a_random_choice_is_seeded_and_goes_on():
    def run(seed):
        pool = ops.MaxPool1d(4, jacobian="random", seed=seed)
        return [gradients(pool, torch.zeros(1, 64, 4))[1] for _ in range(2)]

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.filterwarnings("ignore:.* has nothing to patch")  # it is what is tested
def test_a_patch_leaves_their_choice_alone():
    for module, inputs in ((ops.ReLU(at_zero=0.5), X), (ops.Amax(2), Y), (ops.MaxPool1d(2, jacobian="last"), X)):
        model = nn.Sequential(module)
        want = gradients(model, inputs)[1]
        patch(model, Jacobians(relu=1.0, max="first", max_pool="minimal"))
        assert torch.equal(gradients(model, inputs)[1], want)

    class Called(nn.Module):
        def forward(self, x):
            y = ops.amax(x, 1, jacobian="first")
            return y * x.amax() if self.training else y + torch.sort(x).values.sum()

    x = torch.tensor([[2.0, 1.0]], requires_grad=True)
    model = Called()
    patch(model, Jacobians(max="first"))
    model(x)  # the call with its own choice is not named, nor is the one that takes the patch's
    with pytest.raises(UnreachedError, match="sort, which has no choice"):  # what stands beside it is
        model.eval()(x)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ops.ReLU(at_kinks=1.0), TypeError),
        (lambda: ops.ReLU(at_zero="half"), ValueError),
        (lambda: ops.MaxPool2d(2, jacobian="firts"), ValueError),
        (lambda: ops.Clamp(), ValueError),
        (lambda: ops.Amax(at_zero=1.0), TypeError),
    ],
)
def test_mistakes(make, error):
    with pytest.raises(error):
        make()
