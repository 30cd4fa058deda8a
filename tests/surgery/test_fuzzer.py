"""Random programs do in a patched model what they do in a stock one, and take the choice where the oracle says so."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from fuzzer import compare, program
from oracle import OTHER, Oracle
from torch import nn

from nslightning import Jacobians, patch, using

FAST, SLOW = range(400), range(1_000, 26_000)
# What the programs of the fast range come to with the versions of requirements.lock; others have other samples.
LEAST = {"ran": 300, "tied": 10, "named": 10}


@pytest.fixture
def _every_warning():
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # PyTorch shows some once in a process: the second of two equal runs would miss them
    yield
    torch.set_warn_always(before)


def run(seeds):
    differs, counts = {}, {"ran": 0, "tied": 0, "named": 0}
    for seed in seeds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = program(seed)
            if one is None:
                continue
            verdict = compare(one)
        if verdict.differs:
            differs[f"{seed}: {one.text} [{one.context}]"] = verdict.differs
        for name in counts:
            counts[name] += getattr(verdict, name)
    return differs, counts


@pytest.mark.usefixtures("_every_warning")
def test_programs_do_as_in_stock_and_as_the_oracle_says():
    differs, counts = run(FAST)
    assert differs == {}
    assert all(counts[name] >= least for name, least in LEAST.items()), counts


@pytest.mark.slow
@pytest.mark.usefixtures("_every_warning")
@pytest.mark.parametrize("part", range(5))
def test_many_programs_do_as_in_stock_and_as_the_oracle_says(part):
    differs, counts = run(SLOW[part::5])
    assert differs == {}
    assert all(count >= 5 * LEAST[name] for name, count in counts.items()), counts


# --------------------------------------------------------------------------------- the oracle, by values in one's head
def overwritten_row(x):
    y = x * 1
    y[1:].relu_()
    return y


def test_the_oracle_takes_the_choice_at_ties_alone():
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    for function, expected in {
        F.relu: [0.0, OTHER.relu, 1.0],
        torch.abs: [-1.0, OTHER.abs, 1.0],
        lambda x: (x * 1).relu_(): [0.0, OTHER.relu, 1.0],
        overwritten_row: [-1.0 + 2.0, OTHER.relu, 1.0],
        lambda x: F.max_pool1d(x[None] * 0, 3): [0.0, 0.0, 0.0],
        lambda x: torch.maximum(x, x.detach()): [1.0, 1.0, 1.0],
        lambda x: x.clamp(0, 2): [0.0, OTHER.clamp[0], OTHER.clamp[1]],
        lambda x: torch.linalg.vector_norm(x.detach() * 0 + x - x.detach()): [OTHER.norm] * 3,
    }.items():
        with Oracle() as oracle:
            y = function(x)
        assert oracle.attach(y) == []
        (g,) = torch.autograd.grad(y.sum(), x)
        assert g.tolist() == expected
    tied = torch.zeros(1, 4, requires_grad=True)
    with Oracle() as oracle:
        y = F.max_pool1d(tied, 2), tied.amax()
    assert oracle.attach(y) == []
    assert torch.autograd.grad(y[0].sum(), tied)[0].tolist() == [[0.0, 1.0, 0.0, 1.0]]
    assert torch.autograd.grad(y[1], tied)[0].tolist() == [[0.0, 0.0, 0.0, 1.0]]


def test_what_the_oracle_has_no_formula_for_is_named():
    x = torch.zeros(3, requires_grad=True)
    with Oracle() as oracle:
        y = x.sort().values.relu()
    assert [node.name() for node in oracle.attach(y)] == ["SortBackward0"]


def test_the_fuzzer_sees_a_wrong_choice():
    """A model that takes another choice than the oracle differs, so that the comparison can fail."""
    model = nn.ReLU()
    patch(model, Jacobians())
    x = torch.zeros(3, requires_grad=True)
    with Oracle() as oracle:
        stock = F.relu(x)
    oracle.attach(stock)
    (expected,) = torch.autograd.grad(stock.sum(), x)
    for alpha, equal in ((OTHER.relu, True), (0.5, False)):
        y = model(x)
        with using(model, Jacobians(relu=alpha)):
            assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected) is equal
