"""Probes and the surgery take a choice however it may be written; mistakes are named in one sentence."""

import pytest
import torch
from torch import nn

from nslightning import Jacobians, Plan, patch, using
from nslightning.probes import differences, divergence, gradients, worst_choice, zone


def tied(choice=Jacobians()):  # noqa: B008 # frozen
    """A patched network that meets a tie, and its loss."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    patch(model, choice)
    return model, model(torch.ones(1, 2)).sum()


SPELLINGS = [Jacobians(relu=1.0), {"relu": 1}, "relu=1", Plan([Jacobians(relu=1.0)])]


@pytest.mark.parametrize("choice", SPELLINGS, ids=["Jacobians", "fields", "word", "plan"])
def test_a_choice_in_every_spelling(choice):
    model, loss = tied()
    assert divergence(loss, model, {"one": choice})["one"].l1 == 6.0
    assert divergence(loss, model, {"zero": "pytorch"}, choice)["zero"].l1 == 6.0
    assert gradients(loss, model, {"one": choice})["one"]["0.bias"].tolist() == [1.0, 1.0]
    with using(model, choice):
        assert torch.autograd.grad(loss, model[0].bias)[0].tolist() == [1.0, 1.0]
    other, loss = tied(choice)
    assert torch.autograd.grad(loss, other[0].bias)[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("choice", SPELLINGS[:3], ids=["Jacobians", "fields", "word"])
def test_a_choice_for_all_sites_in_every_spelling(choice):
    model, loss = tied()
    assert divergence(loss, model, {"one": choice}, method="propagate")["one"].l1 == 6.0
    assert differences(loss, model, {"one": choice})[1]["one"]["0.bias"].tolist() == [1.0, 1.0]
    assert zone(model, torch.sum, torch.ones(1, 2), choice).kind == "bifurcation"
    assert worst_choice(model, torch.sum, torch.ones(1, 2), choice).value == 6**0.5


def test_choices_as_words():
    model, loss = tied()
    assert list(divergence(loss, model, ["one:relu=1", "jax"])) == ["one", "jax"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, loss: Jacobians(maxpool=1), TypeError, "no field 'maxpool'; did you mean 'max_pool'"),
        (lambda m, loss: Jacobians(rleu=1), TypeError, "no field 'rleu'; did you mean 'relu'"),
        (lambda m, loss: patch(nn.ReLU(), {"rleu": 1}), ValueError, "no field 'rleu'; did you mean 'relu'"),
        (lambda m, loss: patch(nn.ReLU(), "jaxx"), ValueError, "did you mean 'jax'"),
        (lambda m, loss: patch(nn.ReLU(), 1.0), TypeError, "a choice is a Jacobians, .*; given 1.0"),
        (lambda m, loss: using(m, None).__enter__(), TypeError, "a choice is a Jacobians, .*; given None"),
        (lambda m, loss: divergence(loss, m, Jacobians(relu=1.0)), TypeError, "choices are a mapping of names"),
        (lambda m, loss: divergence(loss, m, [Jacobians()]), TypeError, "choices are a mapping of names to choices"),
        (lambda m, loss: divergence(loss, m, {"a": 1}), TypeError, "choice 'a': a choice is a Jacobians"),
        (lambda m, loss: gradients(loss, m, {"a": {"rleu": 1}}), ValueError, "choice 'a': there is no field 'rleu'"),
        (lambda m, loss: divergence(m, loss, {"a": "jax"}), TypeError, "the loss comes first, then the model"),
        (lambda m, loss: gradients(m, loss, {"a": "jax"}), TypeError, "the loss comes first, then the model"),
        (lambda m, loss: divergence(m(torch.ones(1, 2)), m, {"a": "jax"}), ValueError, "a loss is one number"),
        (lambda m, loss: divergence(torch.ones(()), m, {"a": "jax"}), ValueError, "the loss has no graph"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(*tied())


def test_a_loss_whose_graph_is_gone_is_named():
    model, loss = tied()
    loss.backward()
    with pytest.raises((ValueError, RuntimeError), match=r"retain_graph=True"):
        divergence(loss, model, {"a": "jax"})
