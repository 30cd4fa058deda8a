"""Every spelling of every operation keeps its chosen derivative under torch.compile."""

import math
import operator
import re
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves
from torch_samples import no_derivative_of_aminmax

from nslightning import Jacobians, patch
from nslightning.ops.record import FUNCTIONS

aten = torch.ops.aten
TWO = (0.3, 0.6)
CHOICE = Jacobians(
    relu=0.3, relu6=TWO, leaky_relu=0.3, prelu=0.3, rrelu=0.3, hardtanh=TWO, clamp=TWO, hardswish=TWO,
    hardsigmoid=TWO, hardshrink=TWO, softshrink=TWO, threshold=0.3, elu=0.3, selu=0.3, abs=0.3, norm=0.3, hinge=0.3,
    max="last", maximum="last", max_pool="last", scatter_max="last", segment_max="last", bag_max="last",
)  # fmt: skip
X = torch.tensor([[0.0, -1, 1, 0, 3, -3, 0.5, -0.5], [0.0] * 8, [6.0] * 8, [-3.0] * 8])
Y = X.roll(1, 0)
EPS = torch.full_like(X, 1e-6)  # a pairwise distance is that of x1 - x2 + 1e-6
FAR = EPS - 2 * torch.eye(4, 8)
# What each function takes beside x, so that X holds its kinks.
ARGUMENTS = {
    "hardtanh": (-1.0, 1.0), "clamp": (0.0, 6.0), "clip": (0.0, 6.0), "clamp_min": (0.0,), "clamp_max": (6.0,),
    "prelu": (torch.tensor([0.25]),), "hardshrink": (0.5,), "threshold": (0.0, 0.0), "_threshold": (0.0, 0.0),
    "elu": (0.5,), "amax": (1,), "amin": (1,), "l1_loss": (Y,), "smooth_l1_loss": (Y, None, None, "mean", 0.0),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), (Y,)),
    **dict.fromkeys(("norm", "linalg_norm", "linalg_vector_norm"), (2, 1)),
    "dist": (X,), "pairwise_distance": (X + EPS,), "normalize": (2.0, 1, X[2].norm().item()),
    "hinge_embedding_loss": (-torch.ones_like(X),), "margin_ranking_loss": (Y, torch.ones_like(X)),
    "cosine_embedding_loss": (X, -torch.ones(4), 1.0), "multi_margin_loss": (torch.zeros(4, dtype=torch.long),),
    "triplet_margin_loss": (EPS, FAR, F.pairwise_distance(X[1:2], FAR[1:2]).item()),
}  # fmt: skip

# Maxima over groups take x among their arguments, and what says to which group an entry belongs.
PLACES, ROWS = torch.tensor([0, 0, 1, 0, 1, 2, 2, 2]), torch.tensor([[0, 2, 3], [4, 5, 4]])
GROUPED = {
    "scatter_reduce": ((4, 8), lambda f, x: f(torch.zeros(4, 3), 1, PLACES.expand(4, 8), x, "amax", include_self=True)),
    "index_reduce": ((4, 8), lambda f, x: f(torch.zeros(4, 3), 1, PLACES, x, "amin", include_self=False)),
    "segment_reduce": ((8, 4), lambda f, x: f(x, "max", lengths=torch.tensor([4, 4]))),
    "embedding_bag": ((8, 4), lambda f, x: f(ROWS, x, mode="max")),
}

# By dimension: the input, the windows and their size.
POOLED = {1: ((4, 8), (4,), (2,)), 2: ((4, 2, 4), (2, 2), (1, 2)), 3: ((4, 2, 2, 2), (2, 2, 1), (1, 1, 2))}


def _positional(function, x, beside):
    return function(x, *beside)


def spellings():
    """By operation, and for pools by dimension: the name of each function of the registry, and a call of it."""
    calls = {}
    for function, operations in FUNCTIONS.items():
        if isinstance(function, torch._ops.OpOverload):  # its packet is there too
            continue
        name, operation = function.__name__, operations[0].name
        if name == "aminmax" and no_derivative_of_aminmax():
            continue
        if name.startswith("rnn_relu"):  # takes weights and a state too: no test here compiles it
            continue
        dims = re.search(r"max_pool(\d)d", name)
        beside, shape = ARGUMENTS.get(name, ARGUMENTS.get(name.rstrip("_"), ())), X.shape
        if dims:  # two entries a window, for a graph holds each place of a window by itself
            shape, windows, kernel = POOLED[int(dims[1])]
            beside = (windows if "adaptive" in name else kernel,)
            if "fractional" in name:
                shape, samples = (3,) * (int(dims[1]) + 1), torch.rand(1, 3, int(dims[1]))
                beside = (
                    (kernel, windows) if function.__module__ == "torch.nn.functional" else (kernel, windows, samples)
                )

        evaluate = partial(_positional, beside=beside)
        if name.rstrip("_") in GROUPED:
            shape, evaluate = GROUPED[name.rstrip("_")]

        def call(x, function=function, evaluate=evaluate, shape=shape):
            return evaluate(function, (x * 1.0).flatten().repeat(3)[: math.prod(shape)].view(shape))

        where = function.__module__ if hasattr(function, "__module__") else "Tensor"
        calls.setdefault(f"{operation}{dims[1] if dims else ''}", {})[f"{where}.{name}, {len(calls)}"] = call
    calls["abs"] |= {"abs(x)": lambda x: abs(x * 1.0), "operator.abs": lambda x: operator.abs(x * 1.0)}
    calls["abs"]["x.__abs__()"] = lambda x: (x * 1.0).__abs__()
    calls["abs"]["x.norm(1)"] = lambda x: (x * 1.0).norm(1, 1)
    calls["norm"]["x.norm()"] = lambda x: (x * 1.0).norm(dim=1)
    calls["relu"]["x.relu_()"] = lambda x: (x * 1.0).relu_()
    calls["relu"]["aten.relu_.default"] = lambda x: aten.relu_.default(x * 1.0)
    return calls


SPELLINGS = spellings()


class Calls(nn.Module):
    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def forward(self, x):
        return [f(x) for f in self.functions]


def gradients(model):
    """By call, the gradient of the sum of what it returns."""
    x = X.clone().requires_grad_()
    torch.manual_seed(0)
    totals = [sum(t.sum() for t in tree_leaves(y) if t.is_floating_point()) for y in model(x)]
    return [torch.autograd.grad(total, x, retain_graph=True)[0] for total in totals]


@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")
@pytest.mark.parametrize("group", SPELLINGS)
def test_every_spelling_takes_its_choice_when_compiled(group):
    torch._dynamo.reset()
    model = Calls(list(SPELLINGS[group].values()))
    stock = gradients(model)
    patch(model, CHOICE)
    want = gradients(model)
    got = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    for name, a, b, c in zip(SPELLINGS[group], stock, want, got, strict=True):
        assert not torch.equal(a, b), f"{name}: eager mode does not reach it"
        torch.testing.assert_close(c, b, rtol=1e-6, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


OVERWRITES = {
    "relu": torch.relu_,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.25, inplace=True),
    "elu": lambda x: F.elu(x, 2.0, inplace=True),
    "abs": torch.abs_,
    "clamp": lambda x: x.clamp_(0, 2),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
}


@pytest.mark.parametrize("part", [False, True], ids=["model", "part"])
def test_compiled_code_that_overwrites_its_input_takes_the_choice(part):
    """The compiler drops an autograd function that overwrites an input of the compiled code."""
    torch._dynamo.reset()
    for name, function in OVERWRITES.items():

        class Overwrites(nn.Module):
            def __init__(self, function):
                super().__init__()
                self.function = function

            def forward(self, x):
                return self.function(x)

        eager = Overwrites(function)
        patch(eager, CHOICE)
        x = X.clone().requires_grad_()
        (want,) = torch.autograd.grad(eager(x * 1).sum(), x)
        compiled = Overwrites(torch.compile(function, backend="aot_eager") if part else function)
        patch(compiled, CHOICE)
        y = x * 1
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="parts of the model are compiled by themselves")
            z = compiled(y) if part else torch.compile(compiled, backend="aot_eager")(y)
        assert z is y
        (got,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_abs_of_numbers_stays_what_it_is():
    """What the compiler is taught of abs holds for all that is compiled in the process."""
    patch(nn.ReLU(), Jacobians())
    torch._dynamo.reset()

    def f(x):
        return x * abs(-3) + abs(-x.shape[0]) * abs(1 - 2.5) + operator.abs(-x.shape[0]) + abs(True)

    for n in (2, 3, 5):
        x = torch.ones(n)
        assert torch.equal(torch.compile(f, backend="aot_eager", dynamic=True)(x), f(x))


SEEN = []


class Watch(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        SEEN.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_of_somebody_else_sees_what_it_sees_in_eager_mode():
    patch(nn.ReLU(), Jacobians())
    torch._dynamo.reset()

    def f(x):
        with Watch():
            return abs(torch.relu_(x * 1.0))

    f(X)
    eager = list(SEEN)
    SEEN.clear()
    torch.compile(f, backend="eager", fullgraph=True)(X)
    assert eager == SEEN == [torch.Tensor.mul, torch.relu_, torch.Tensor.abs]
