"""Where in a graph the gradients of two choices part, and that a backward may start there."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nslightning import Jacobians, patch
from nslightning.experiments.cells import ZoneCell
from nslightning.experiments.zones import difference_norm
from nslightning.ops.autograd.nodes import operation_of
from nslightning.probes import MethodWarning, UnseenError, differences, divergence, gradients, worst_choice, zone
from nslightning.probes.gradients import gradients_in_turn, wanted
from nslightning.probes.graph import bottleneck, opaque_nodes, operation_nodes, reachable

CHOICES = {"a": Jacobians(), "b": Jacobians(relu=1.0), "c": Jacobians(relu=-0.5)}


class Net(nn.Module):
    """A ReLU that ties between layers, and a way for gradients around it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.low, self.mid, self.high = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.ReLU()
        for p in self.low.parameters():
            nn.init.zeros_(p.data[:2])

    def forward(self, x):
        x = self.low(x)
        tied = F.relu(x)
        if self.kind == "residual":  # the tied ReLU alone carries not all that comes to low
            tied = tied + x
        if self.kind == "shared weight":
            return self.high(self.low(self.mid(tied)).tanh())
        if self.kind == "branches":  # ties in both; all of it passes the sum
            tied = self.mid(tied) + F.relu(x[:, :1])
            return self.high(tied.tanh())
        if self.kind == "several outputs":
            one, two = tied.split(2, 1)
            return self.high(torch.cat([two, one], 1))
        if self.kind == "checkpoint":
            return self.high(checkpoint(lambda t: self.mid(self.act(t)).tanh(), x, use_reentrant=False))
        return self.high(self.mid(tied).tanh())


#: The operation of the place's node, or what stock's is called, and how many backwards of three reach `high` and `low`.
KINDS = {
    "chain": ("relu", 1, 3),
    "residual": ("AddBackward0", 1, 3),
    "shared weight": ("AddmmBackward0", 1, 3),  # of the upper call, above which the weight is not
    "branches": ("AddBackward0", 1, 3),
    "several outputs": ("relu", 1, 3),
    "checkpoint": ("relu", 1, 3),
}


def test_the_loss_itself_is_no_place():
    x, y = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    one, other = x.relu(), y.relu()
    loss = one.dot(other)  # its own node alone is passed by all
    assert bottleneck(loss, {one.grad_fn, other.grad_fn}) is None
    assert bottleneck(loss, {loss.grad_fn}) is None
    assert bottleneck(loss, set()) is None
    assert bottleneck(loss.sin(), {one.grad_fn, other.grad_fn}).node is loss.grad_fn


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_backward_starts_where_choices_part(kind):
    torch.manual_seed(0)
    model = Net(kind)
    patch(model, Jacobians())
    loss = model(torch.randn(3, 4)).square().sum()
    name, *times = KINDS[kind]
    place = bottleneck(loss, set(operation_nodes(loss)))
    assert name == (operation_of(place.node) or place.node.name())
    if kind == "shared weight":
        assert [below.name() for below, _ in place.node.next_functions if below is not None][1] == "AddmmBackward0"
    seen = [0, 0]
    model.high.bias.register_hook(lambda g: seen.__setitem__(0, seen[0] + 1))
    model.low.bias.register_hook(lambda g: seen.__setitem__(1, seen[1] + 1))
    by_choice = gradients(loss, model, CHOICES)
    assert seen == times
    for choice, jacobians in CHOICES.items():
        (alone,) = gradients(loss, model, {choice: jacobians}).values()
        assert all(torch.equal(alone[n], g) for n, g in by_choice[choice].items())
    assert not torch.equal(by_choice["a"]["low.weight"], by_choice["b"]["low.weight"])
    assert by_choice["a"]["high.weight"] is by_choice["b"]["high.weight"]


def test_hooks_at_the_place_run_once_for_each_choice():
    model = Net("chain")
    patch(model, Jacobians())
    kept = []
    model.mid.register_forward_pre_hook(lambda m, inputs: kept.append(inputs[0]))
    loss = model(torch.randn(3, 4)).square().sum()
    kept[0].register_hook(lambda g: 2 * g)
    by_choice = gradients(loss, model, CHOICES)
    for choice, jacobians in CHOICES.items():
        (alone,) = gradients(loss, model, {choice: jacobians}).values()
        assert all(torch.equal(alone[n], g) for n, g in by_choice[choice].items())


def test_choices_that_cannot_matter_cost_one_backward():
    model = Net("chain")
    for p in model.low.parameters():
        nn.init.ones_(p)
    patch(model, Jacobians())
    loss = model(torch.ones(3, 4)).sum()
    seen = []
    model.low.bias.register_hook(seen.append)
    by_choice = gradients(loss, model, CHOICES, retain_graph=False)
    assert len(seen) == 1
    assert by_choice["a"]["low.bias"] is by_choice["c"]["low.bias"]
    with pytest.raises(RuntimeError, match="second time"):  # freed all the same
        loss.backward()


def test_random_choices_are_not_the_same_choice():
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU())
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    patch(model, Jacobians())
    loss = model(torch.ones(1, 40)).sum()
    by_choice = gradients(loss, model, {"a": Jacobians(relu="random"), "b": Jacobians(relu="random")})
    assert not torch.equal(by_choice["a"]["0.bias"], by_choice["b"]["0.bias"])


class Inside(torch.autograd.Function):
    """Differentiates by itself, as compiled functions do."""

    @staticmethod
    def forward(ctx, x, model):
        ctx.model = model
        ctx.save_for_backward(x)
        return model(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(ctx.model(x), x, g)[0], None


class TwoResults(nn.Module):
    """Two tied branches feed one operation that has two results, both of which the loss depends on."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(4, 1))
        self.relu = nn.ReLU()

    def forward(self, x):
        shift = torch.eye(4, 2, dtype=x.dtype)
        solved = torch.linalg.lstsq(self.relu(self.a * x) + shift, self.relu(self.b * x) + x, driver="gels")
        return solved.solution.square().sum() + solved.residuals.sum()


def test_no_backward_starts_at_one_of_several_results():
    model = TwoResults().double()
    patch(model, Jacobians())
    loss = model(torch.arange(1.0, 5.0, dtype=torch.float64).view(4, 1))
    assert same_as_alone(loss, model, CHOICES)
    by_choice = gradients(loss, model, CHOICES)
    assert all(not torch.equal(by_choice["a"][n], by_choice["b"][n]) for n in ("a", "b"))


def test_what_is_not_to_be_seen_may_matter():
    inner = nn.Sequential(nn.ReLU())
    patch(inner, Jacobians())
    lower = nn.Linear(2, 2)
    nn.init.zeros_(lower.weight), nn.init.zeros_(lower.bias)
    loss = Inside.apply(lower(torch.ones(1, 2)), inner).sum()
    assert not any(operation_nodes(loss))
    assert [node.name() for node in opaque_nodes(loss)] == ["InsideBackward"]
    model = nn.ModuleDict({"lower": lower, "inner": inner})
    by_choice = gradients(loss, model, CHOICES)
    assert [by_choice[c]["lower.bias"].tolist() for c in CHOICES] == [[0, 0], [1, 1], [-0.5, -0.5]]


@pytest.mark.parametrize("retain", [True, False])
def test_what_lies_above_is_freed_or_kept(retain):
    model = Net("chain")
    patch(model, Jacobians())
    loss = model(torch.randn(3, 4)).square().sum()
    gradients(loss, model, CHOICES, retain_graph=retain)
    if retain:
        loss.backward()
    else:
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            loss.backward()


def test_what_lies_above_is_freed_after_the_first_choice():
    model = Net("chain")
    patch(model, Jacobians())
    loss = model(torch.randn(3, 4)).square().sum()
    turns = gradients_in_turn(loss, model, CHOICES.values(), wanted(model), retain_graph=False)
    next(turns)
    with pytest.raises(RuntimeError, match="only the part below"):
        torch.autograd.grad(loss, model.high.weight)
    assert len(list(turns)) == len(CHOICES) - 1


def test_the_packages_own_functions_hide_nothing():
    class Overwriting(nn.Module):
        def forward(self, x):
            return (x * 1).abs_().sum()

    patch(model := Overwriting(), Jacobians(abs=0.5))
    loss = model(torch.zeros(3, requires_grad=True))
    assert "_PutBackward" in [node.name() for node in reachable([loss.grad_fn])]
    assert list(opaque_nodes(loss)) == []


def same_as_alone(loss, model, choices, **inputs):
    by_choice = gradients(loss, model, choices, **inputs)
    for choice, jacobians in choices.items():
        (alone,) = gradients(loss, model, {choice: jacobians}, **inputs).values()
        if not all(torch.equal(alone[n], g) for n, g in by_choice[choice].items()):
            return False
    return True


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.ReLU6(inplace=True)], ids=["relu", "relu6"])
def test_in_place_on_a_view_hides_no_operation(activation):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), activation, nn.Linear(8, 2))
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    stock = copy.deepcopy(model)
    patch(model, Jacobians())
    x, other = torch.randn(2, 1, 4, 4), Jacobians(relu=1.0, relu6=(1.0, 1.0))
    assert torch.equal(model(x), stock(x))
    loss = model(x).square().sum()
    assert same_as_alone(loss, model, {"a": Jacobians(), "b": other})
    subtracted, carried = (
        divergence(loss, model, {"b": other}, method=m, retain_graph=True)["b"] for m in ("subtract", "propagate")
    )
    assert subtracted.l2 > 0
    assert carried.l2 == pytest.approx(subtracted.l2)
    assert zone(model, lambda y: y.square().sum(), x, other).kind == "bifurcation"


def test_a_tensor_between_a_relu_and_a_pooling_sees_what_dies_below():
    conv = nn.Conv2d(1, 2, 3, padding=1)
    nn.init.zeros_(conv.weight), nn.init.constant_(conv.bias, -1.0)
    model = nn.ModuleList([conv, nn.ReLU(), nn.MaxPool2d(2), nn.Linear(8, 2)])
    patch(model, Jacobians())
    h = model[1](model[0](torch.randn(2, 1, 4, 4)))
    loss = model[3](model[2](h).flatten(1)).square().sum()
    choices = {"a": Jacobians(), "b": Jacobians(max_pool="last")}
    assert same_as_alone(loss, model, choices, inputs={"h": h})
    by_choice = gradients(loss, model, choices, inputs={"h": h})
    assert not torch.equal(by_choice["a"]["h"], by_choice["b"]["h"])
    assert by_choice["a"]["0.bias"].equal(by_choice["b"]["0.bias"])


def test_a_loss_that_nothing_was_computed_for():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    patch(model, Jacobians())
    by_choice = gradients(torch.ones((), requires_grad=True), model, CHOICES)
    assert all(not g.any() for choice in by_choice.values() for g in choice.values())
    with torch.no_grad():
        loss = model(torch.ones(1, 1)).sum()
    with pytest.raises(ValueError, match="the loss has no graph"):
        gradients(loss, model, CHOICES)


class Mapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.relu = nn.Linear(2, 2), nn.ReLU()
        nn.init.zeros_(self.linear.weight), nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return torch.vmap(self.relu)(self.linear(x))


def test_operations_under_vmap_are_subtracted_or_refused():
    model, x, one = Mapped(), torch.ones(3, 2), Jacobians(relu=1.0)
    patch(model, Jacobians())
    loss = model(x).sum()
    assert same_as_alone(loss, model, CHOICES)
    subtracted = divergence(loss, model, {"one": one})["one"]
    assert subtracted.l2 > 0
    with pytest.warns(MethodWarning, match="vmap"):
        measured = divergence(loss, model, {"one": one}, method="propagate")["one"]
    assert measured == subtracted
    assert measured.method == "subtract"
    cell = ZoneCell(backbone="paper/fc", against={"relu": 1}, norm="l1_sum")
    assert difference_norm(cell, (model,), x, torch.zeros(3, dtype=torch.long)) > 0
    for call in (
        lambda: differences(loss, model, {"one": one}),
        lambda: worst_choice(model, torch.sum, x),
    ):
        with pytest.raises(UnseenError, match="subtract"):
            call()
    with pytest.raises(ValueError, match="vmap"):
        zone(model, torch.sum, x, one)


def test_sparse_gradients_are_measured():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(6, 3, sparse=True)
            nn.init.zeros_(self.words.weight)

        def forward(self, x):
            return F.relu(self.words(x)).sum()

    model = Words()
    patch(model, Jacobians())
    loss = model(torch.tensor([0, 2, 2]))
    for method in ("subtract", "propagate"):
        measured = divergence(loss, model, {"one": Jacobians(relu=1.0)}, method=method, retain_graph=True)["one"]
        assert (measured.l1, measured.linf) == (9.0, 2.0)
    assert zone(model, lambda y: y, torch.tensor([0, 2, 2]), Jacobians(relu=1.0)).kind == "bifurcation"


def test_two_rules_never_agree():
    """The published rule writes alpha itself, the exact one multiplies the gradient by it."""
    model, x = nn.Sequential(nn.Linear(1, 1), nn.ReLU()), torch.zeros(1, 1)
    nn.init.zeros_(model[0].bias)
    patch(model, Jacobians(relu=2))
    loss = 3 * model(x).sum()
    published = {"published": Jacobians(relu=2, rule="published")}
    for method in ("propagate", "subtract"):
        measured = divergence(loss, model, published, reference=Jacobians(relu=2), method=method)["published"]
        assert measured.l2 == abs(2 * 3 - 2)  # of the bias; the weight's input is 0


def test_a_loss_of_another_thread_is_not_taken_for_an_older_one():
    """Each thread counts its own backward nodes."""
    model, measured = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), []

    def patched():
        for _ in range(50):
            model(torch.ones(1, 2))
        patch(model, Jacobians())

    def measure():
        loss = model[0](torch.ones(1, 2)).sum()  # it meets no site, and its thread has counted to 2
        measured.append(divergence(loss, model, {"one": Jacobians(relu=1)})["one"].l2)

    for work in (patched, measure):  # one after the other: the second may get the first one's number
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert measured == [0]


def test_a_hook_that_only_turns_the_difference_is_not_linear():
    """The norm of what is carried down is right, its sign is not."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
    patch(model, Jacobians())
    h = model[0](torch.ones(1, 1))
    h.register_hook(torch.abs)
    loss = -3 * h.sum() + 2 * model[1](h - h.detach()).sum()  # the hook gets -3 under 0, and -1 under 1
    with pytest.raises(UnseenError, match="not linear"):
        differences(loss, model, {"one": Jacobians(relu=1)})
