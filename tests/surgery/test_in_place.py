"""What the random programs of the fuzzer met: memory that is shared or overwritten, numbers without dimensions."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from bits import bits
from torch import nn

from nslightning import Jacobians, PatchWarning, patch, using

# ------------------------------------------------------------------- in place, where memory is shared or overwritten
IN_PLACE = {
    "relu": F.relu_,
    "leaky_relu": lambda t: F.leaky_relu_(t, 0.25),
    "rrelu": lambda t: F.rrelu_(t, 0.25, 0.25),
    "elu": lambda t: F.elu(t, 2.0, inplace=True),
    "selu": lambda t: F.selu(t, inplace=True),
    "hardtanh": F.hardtanh_,
    "hardswish": lambda t: F.hardswish(t, inplace=True),
    "abs": torch.abs_,
    "clamp": lambda t: t.clamp_(0, 1.5),
    "clamp by tensors": lambda t: t.clamp_(torch.zeros(()), torch.ones(())),
    "scatter_reduce": lambda t: t.scatter_reduce_(0, torch.zeros(t.shape, dtype=torch.int64), t.detach() * 2, "amax"),
    "index_reduce": lambda t: t.index_reduce_(0, torch.arange(t.shape[0]), t.detach() - 1, "amax"),  # without a tie
}
PLACES = {
    "whole": lambda t: t,
    "row": lambda t: t[:1],
    "column": lambda t: t[..., :1],
    "windows": lambda t: t.unfold(0, 3, 2),
    "transposed windows": lambda t: t.unfold(0, 3, 2).mT,
}


class InPlace(nn.Module):
    def __init__(self, function, place, afterwards):
        super().__init__()
        self.function, self.place, self.afterwards = function, place, afterwards

    def forward(self, x):
        y = self.place(x * 1)
        self.function(y)
        if self.afterwards:
            y.mul_(2)
        return y


@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")
@pytest.mark.parametrize("compiled", [False, True], ids=["Python nodes", "C++ nodes"])
@pytest.mark.parametrize("afterwards", [False, True], ids=["", "overwritten afterwards"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_the_gradient_or_the_refusal_is_stocks(name, place, afterwards, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr("nslightning.ops.autograd.native._library", lambda: None)
    outcomes = []
    for patched in (False, True):
        model = InPlace(IN_PLACE[name], PLACES[place], afterwards)
        if patched:
            patch(model, Jacobians())
        x = torch.arange(-12, 13.0).reshape(5, 5).div(2).requires_grad_()
        try:
            outcomes.append(str(torch.autograd.grad(model(x).sum(), x)[0].tolist()))  # NaN as NaN
        except RuntimeError as error:
            outcomes.append("modified by an inplace operation" in str(error))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] is not False


@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")
@pytest.mark.parametrize("turned", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_overwriting_adds_nothing_to_the_gradient(name, turned):
    """Not even zeros, which would take signs of zeros and strides from it."""
    gradients = []
    for patched in (False, True):
        model = InPlace(IN_PLACE[name], PLACES["whole"], False)
        if patched:
            patch(model, Jacobians())
        x = torch.arange(-12, 13.0).reshape(5, 5).div(2)
        incoming = torch.tensor([-1.0, -0.0, 0.0, 1.0, -2.0]).repeat(5, 1)
        if turned:
            x, incoming = (t.mT.contiguous().mT for t in (x, incoming))
        x.requires_grad_()
        y = model(x)
        gradients.append((y._version, *torch.autograd.grad(y, x, incoming)))
    (version, stock), (other_version, ours) = gradients
    assert version == other_version
    assert ours.stride() == stock.stride()
    assert torch.equal(bits(ours), bits(stock))


class Part(nn.Module):
    """Overwrites a part of a tensor, and returns the whole of it."""

    def __init__(self, function, place):
        super().__init__()
        self.function, self.place = function, place

    def forward(self, x):
        y = x * 1
        self.function(self.place(y))
        return y


@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")
@pytest.mark.parametrize("place", ["row", "column"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_overwriting_a_part_leaves_the_rest_its_gradient(name, place):
    gradients = []
    for patched in (False, True):
        model = Part(IN_PLACE[name], PLACES[place])
        if patched:
            patch(model, Jacobians())
        x = torch.arange(-12, 13.0).reshape(5, 5).div(2).requires_grad_()
        y = model(x)
        gradients.append((y.detach(), torch.autograd.grad(y, x, torch.arange(1.0, 26.0).reshape(5, 5))[0]))
    (want, stock), (result, ours) = gradients
    assert torch.equal(result, want)
    assert torch.equal(ours, stock)
    assert torch.equal(ours[1:, 1:], torch.arange(1.0, 26.0).reshape(5, 5)[1:, 1:])


class Inside(nn.Module):
    """Overwrites a part of a tensor, and goes on with the whole of it."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        y = (x * 1).unfold(1, 3, 1)
        self.part(y).relu_()
        return F.hardtanh(y)


@pytest.mark.parametrize("part", [lambda y: y, lambda y: y[:1], lambda y: y[..., 1:]], ids=["all", "row", "columns"])
def test_in_place_on_shared_memory_another_choice_is_refused(part):
    """Also where the gradient comes by another view of the memory than the one that was overwritten."""
    model = Inside(part)
    patch(model, Jacobians(relu=0.5))
    with using(model, Jacobians()):
        model(torch.zeros(5, 5, requires_grad=True)).sum().backward()
    with pytest.raises(RuntimeError, match="whose entries share memory, in place, has PyTorch's own derivative only"):
        model(torch.zeros(5, 5, requires_grad=True)).sum().backward()


@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")
@pytest.mark.parametrize("view", [lambda t: t, lambda t: t[:1].expand(2, 2)], ids=["leaf", "expanded view of a leaf"])
@pytest.mark.parametrize(
    "function",
    [
        F.hardtanh_,
        lambda t: t.clamp_(torch.zeros(())),
        lambda t: t.index_reduce_(0, torch.zeros(1).long(), t[:1], "amax"),
    ],
    ids=["hardtanh", "clamp by a tensor", "index_reduce"],
)
def test_what_stock_refuses_to_overwrite_is_refused_in_its_words(function, view):
    def said(patched):
        model = InPlace(lambda t: function(t), lambda t: t, False)
        model.forward = lambda x: function(view(x))
        if patched:
            patch(model, Jacobians())
        x = torch.zeros(2, 2, requires_grad=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(RuntimeError) as raised:
                model(x)
        return str(raised.value), len(caught)

    assert said(True) == said(False)


@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")
@pytest.mark.parametrize("dims", [0, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_a_maximum_over_an_index_that_is_overwritten_is_refused(tied, dims):
    """As in stock, whose backward compares the entries with it."""

    class Overwrites(nn.Module):
        def forward(self, x):
            entries = x.detach() if tied else x.detach() - 1
            return x.index_reduce(0, torch.zeros(1).long(), entries, "amax").mul_(2)

    model, x = Overwrites(), torch.zeros((1,) * dims, requires_grad=True)
    for patched in (False, True):
        if patched:
            patch(model, Jacobians())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model(x).backward()


@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")
def test_results_without_dimensions_are_no_views():
    for function in (
        lambda t: t.scatter_reduce(0, torch.zeros((), dtype=torch.long), t * 1, "amax"),
        lambda t: torch.index_reduce(t, 0, torch.zeros((), dtype=torch.long), t * 1, "amax"),
    ):
        model = InPlace(function, lambda t: t, False)
        model.forward = function
        patch(model, Jacobians(scatter_max="first"))
        assert not model(torch.zeros((), requires_grad=True))._is_view()


def test_the_norm_of_a_number_takes_the_choice():
    model = InPlace(F.relu, lambda t: t, False)
    model.forward = lambda x: torch.linalg.vector_norm(x, dim=-1)
    patch(model, Jacobians(norm=0.5))
    x = torch.zeros((), requires_grad=True)
    assert torch.autograd.grad(model(x), x)[0].item() == 0.5


def test_the_l1_loss_of_complex_numbers_is_stocks_under_autocast():
    x, target = torch.tensor([3 + 4j, 0j], requires_grad=True), torch.zeros(2, dtype=torch.complex64)
    for model, arguments in ((nn.L1Loss(), (x, target)), (InPlace(F.relu, lambda t: t, False), (x,))):
        if not isinstance(model, nn.L1Loss):
            model.forward = lambda x: F.l1_loss(x, target)
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", PatchWarning)  # nothing to patch
            stock = model(*arguments)
            patch(model, Jacobians(), strict=False)
            assert torch.equal(model(*arguments), stock)
