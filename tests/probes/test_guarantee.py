"""When theorems promise an element of the Clarke subdifferential, against the subdifferential itself."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nslightning
from nslightning import Jacobians
from nslightning.models.paper import lenet5
from nslightning.probes import clarke, clarke_guarantee
from nslightning.probes.audit import Audit, audit
from nslightning.probes.guarantee import machine_numbers
from nslightning.probes.same_functions import SameFunctions
from nslightning.probes.ties import observing
from nslightning.report.audit_text import advice


class Lemma2(nn.Module):
    """relu(w x) - relu(-w x), which is w x: no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(torch.cat([x * self.w, -x * self.w], 1))
        return y[:, :1] - y[:, 1:]


class Lemma3(nn.Module):
    """hardsigmoid(x + b), summed over the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(1))
        self.kink = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.kink(x + self.b)


class Lemma7(nn.Module):
    """max(u + b, b) - max(-u + b, b), which is u: max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.pool = nn.MaxPool1d(2)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.ones_like(x)
        y = torch.cat([x * self.u, 0 * one, -x * self.u, 0 * one], 1) + self.b
        p = self.pool(y[:, None])[:, 0]
        return p[:, :1] - p[:, 1:]


def gradient(model: nn.Module, x: Tensor) -> list[float]:
    return [float(v) for g in torch.autograd.grad(model(x).sum(), list(model.parameters())) for v in g.flatten()]


def hardsigmoid(x: Any) -> Any:
    return min(max(x / 6 + 0.5, 0), 1)


def patched(model: nn.Module, jacobians: Jacobians | None = None) -> nn.Module:
    nslightning.patch(model, jacobians or Jacobians())
    return model


@pytest.mark.parametrize(
    ("model", "x", "program", "inputs"),
    [
        (Lemma2(), [[1.0]], lambda p: max(0, p[0]) - max(0, -p[0]), 1),
        (Lemma3(), [[3.0], [-3.0]], lambda p: hardsigmoid(3 + p[0]) + hardsigmoid(p[0] - 3), 1),
        (Lemma7(), [[1.0]], lambda p: max(p[0] + p[1], p[1]) - max(-p[0] + p[1], p[1]), 2),
    ],
)
def test_the_published_counterexamples_are_not_covered_and_are_no_elements(
    model: nn.Module, x: Any, program: Any, inputs: int
) -> None:
    """Park, Chun and Lee 2024, lemmas 2, 3 and 7."""
    guarantee = clarke_guarantee(patched(model), torch.tensor(x))
    assert not guarantee.holds
    assert not guarantee.always
    assert guarantee.missing[0].tied > 0
    subdifferential = clarke(program, [0] * inputs)
    assert subdifferential.contains(gradient(model, torch.tensor(x)), tolerance=1e-6) is False


def test_one_side_for_both_kinks_mends_the_third_lemma() -> None:
    model, x = patched(Lemma3(), Jacobians(hardsigmoid=(0.0, 1 / 6))), torch.tensor([[3.0], [-3.0]])
    choice = Jacobians(hardsigmoid=(0.0, 1 / 6))
    guarantee = clarke_guarantee(model, x, jacobians=choice)
    assert guarantee.always
    assert "theorem 6" in guarantee.sites[0].reason
    subdifferential = clarke(lambda p: hardsigmoid(3 + p[0]) + hardsigmoid(p[0] - 3), [0])
    assert subdifferential.contains(gradient(model, x), tolerance=1e-6)


def test_a_batch_of_one_is_covered_whatever_the_shares() -> None:
    model = patched(Lemma3())
    guarantee = clarke_guarantee(model, torch.tensor([[3.0]]))
    assert (guarantee.holds, guarantee.always) == (True, False)
    assert "theorem 1" in guarantee.sites[0].reason


def mlp(sizes: Sequence[int], bias: bool, seed: int) -> nn.Sequential:
    """Small whole numbers for weights, so that ties are frequent and floats exact."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    draw = random.Random(seed)
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.tensor([draw.randint(-1, 1) for _ in range(p.numel())], dtype=p.dtype).view_as(p))
    return model


def program_of(model: nn.Sequential, x: Tensor) -> Callable[[Sequence[Any]], Any]:
    """The sum of a network's outputs over a batch, as a function of its parameters."""
    shapes = [p.shape for p in model.parameters()]
    bias = model[0].bias is not None

    def program(flat: Sequence[Any]) -> Any:
        rest, total = list(flat), 0
        blocks = []
        for shape in shapes:
            blocks.append([rest.pop(0) for _ in range(shape.numel())])
        for sample in x.tolist():
            h = [int(v) for v in sample]
            layers = len(shapes) // (1 + bias)
            for i in range(layers):
                weight, offset = blocks[i * (1 + bias)], blocks[i * 2 + 1] if bias else None
                rows = len(weight) // len(h)
                y = [sum(weight[r * len(h) + c] * v for c, v in enumerate(h)) for r in range(rows)]
                y = [v + offset[r] for r, v in enumerate(y)] if offset is not None else y
                h = [max(0, v) for v in y] if i + 1 < layers else y
            total = total + sum(h)
        return total

    return program


def flat(model: nn.Module) -> list[float]:
    return [float(v) for p in model.parameters() for v in p.detach().flatten()]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_networks_with_biases_return_elements(seed: int, alpha: float) -> None:
    """Theorem 6 on one hidden layer, batches of three, against the enumerated subdifferential."""
    choice = Jacobians(relu=alpha)
    model = patched(mlp([2, 2, 1], bias=True, seed=seed), choice)
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    guarantee = clarke_guarantee(model, x, jacobians=choice)
    assert guarantee.always
    subdifferential = clarke(program_of(model, x), flat(model))
    assert subdifferential.contains(gradient(model, x)) is True


def test_ties_are_met_in_these_networks() -> None:
    tied = [clarke_guarantee(patched(mlp([2, 2, 1], True, s)), torch.eye(2)).sites[0].tied for s in range(4)]
    assert sum(map(bool, tied)) >= 2


def test_without_biases_independent_samples_are_enough() -> None:
    """Theorem 5: relu at 0 with weights alone."""
    model = patched(mlp([2, 2, 1], bias=False, seed=0))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        model[2].weight.copy_(torch.tensor([[1.0, -1.0]]))
    independent, dependent = torch.eye(2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    guarantee = clarke_guarantee(model, independent)
    assert (guarantee.holds, guarantee.always, guarantee.sites[0].tied) == (True, False, 2)
    assert "theorem 5" in guarantee.sites[0].reason
    assert clarke(program_of(model, independent), flat(model)).contains(gradient(model, independent)) is True
    guarantee = clarke_guarantee(model, dependent)
    assert not guarantee.holds
    assert "no trainable bias" in guarantee.sites[0].reason


def test_dependent_samples_may_leave_the_subdifferential() -> None:
    """Without biases, samples 1 and -1: relu(w) - relu(-w) is w, and stock returns 0 at w = 0."""
    net = patched(nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU()))
    with torch.no_grad():
        net[0].weight.zero_()
    x = torch.tensor([[1.0], [-1.0]])
    assert not clarke_guarantee(net, x).holds
    loss = net(x)[0] - net(x)[1]
    (g,) = torch.autograd.grad(loss, net[0].weight)
    assert clarke(lambda p: max(0, p[0]) - max(0, -p[0]), [0]).contains(g.flatten()) is False


def test_without_a_tie_every_gradient_is_an_element() -> None:
    guarantee = clarke_guarantee(patched(nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU6())), torch.randn(4, 2))
    assert (guarantee.holds, guarantee.always) == (True, False)
    assert "differentiable" in guarantee.sites[0].reason


class Residual(nn.Module):
    """Two units that add what lies below, as in a ResNet."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(2, 2, 3, padding=1, bias=not norm) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(2) if norm else nn.Identity() for _ in range(2)])
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.relu(norm(conv(x)) + x)
        return x.mean((2, 3))


@pytest.mark.parametrize("norm", [True, False])
def test_residual_networks_have_their_biases(norm: bool) -> None:
    guarantee = clarke_guarantee(patched(Residual(norm)), torch.zeros(2, 2, 4, 4))
    assert guarantee.always
    assert len(guarantee.sites) == 2


def test_frozen_and_shared_biases_do_not_count() -> None:
    x = torch.zeros(2, 3)
    frozen = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    nn.init.zeros_(frozen[0].bias)
    frozen[0].bias.requires_grad_(False)
    assert not clarke_guarantee(patched(frozen), x).holds
    layer = nn.Linear(3, 3)
    nn.init.zeros_(layer.bias)
    twice = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU())
    assert not clarke_guarantee(patched(twice), x).holds
    layer = nn.Linear(2, 2, bias=False)  # nor does a shared weight, though the samples are independent
    nn.init.zeros_(layer.weight)
    assert not clarke_guarantee(patched(nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU())), torch.eye(2)).sites[0].holds


def test_the_published_rule_and_choices_outside_are_not_covered() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    nn.init.zeros_(model[0].bias)
    patched(model)
    beyond = Jacobians(relu=-0.5), Jacobians(relu=2.0), Jacobians(relu="random")
    for choice in (Jacobians(relu=1.0, rule="published"), *beyond):
        assert not clarke_guarantee(model, torch.zeros(2, 3), jacobians=choice).holds, choice


def test_pools_that_tie_at_zero_behind_a_relu_are_covered() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2))
    x = torch.zeros(1, 1, 4, 4)
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-1.0, 0.0]))
    patched(model)
    guarantee = clarke_guarantee(model, x)
    assert guarantee.holds
    assert "theorem 8" in guarantee.sites[1].reason


def test_pools_that_tie_at_zero_behind_a_relu_of_another_choice_are_not_covered() -> None:
    """A weight of 0: the entries of a window are 0, and other functions of the weight, which ReLU'(0) lets through."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.MaxPool2d(2))
    nn.init.zeros_(model[0].weight)
    patched(model)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    for share, covered in ((None, True), (0.0, True), (1.0, False)):
        pool = clarke_guarantee(model, x, jacobians=Jacobians(relu=share)).sites[1]
        assert (pool.operation, pool.holds) == ("max_pool", covered), share


def test_pools_over_copies_of_one_function_are_covered_whatever_their_maximum() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1.0)
    patched(model)
    background = torch.zeros(1, 1, 4, 4)
    guarantee = clarke_guarantee(model, background)
    assert guarantee.holds
    assert not guarantee.always
    assert guarantee.sites[1].reason.startswith("its tied entries are one function of the parameters in each window")
    different = background.clone()
    different[0, 0, 0, 0] = 2.0  # the same value, since the weight is 0, of another function: 2 w + b
    guarantee = clarke_guarantee(model, different)
    assert not guarantee.holds
    assert guarantee.missing[0].reason == "8 evaluations compare equal entries"
    for choice, holds in (("minimal", True), (10.0, True), ("random", True), ("sum", False)):
        assert clarke_guarantee(model, background, jacobians=Jacobians(max_pool=choice)).holds is holds, choice


class Branches(nn.Module):
    """Convolutions, poolings, batch norm and a sum, on images with a background."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.first, self.branch, self.last = nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2)
        self.tanh = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.norm(self.stem(x)))
        self.high = self.tanh(self.branch(h)) + h
        return self.last(self.high).flatten(1)


def test_positions_that_are_numbered_alike_have_the_same_value_and_gradients() -> None:
    """Against gradients of each position, one by one."""
    torch.manual_seed(0)
    model = patched(Branches().double())
    x = torch.zeros(2, 2, 12, 12).double()
    x[:, :, 8:, 7:] = torch.randn(2, 2, 4, 5).double()
    numbered = SameFunctions()
    with observing(model, lambda site, operation, call: numbered.meet(call) if operation.name == "max_pool" else None):
        model(x)
    functions = numbered.of(model.high.grad_fn)
    assert functions is not None
    assert functions.shape == (2, 6, 6)
    known: dict[int, tuple[Tensor, list[Tensor]]] = {}
    copies = 0
    parameters = [p for p in model.parameters() if p.dim() > 1]
    for place in itertools.product(range(2), range(6), range(6)):
        entry = model.high[place[0], :, place[1], place[2]]
        value = entry.detach()
        gradient = torch.autograd.grad(entry.sum(), parameters, retain_graph=True)
        number = int(functions[place])
        if number in known:
            copies += 1
            assert torch.allclose(value, known[number][0], rtol=0, atol=1e-12)
            for one, other in zip(gradient, known[number][1], strict=True):
                assert torch.allclose(one, other, rtol=0, atol=1e-12)
        else:
            known[number] = value, list(gradient)
    assert len({tuple(value.tolist()) for value, _ in known.values()}) > 8
    assert copies > 8
    guarantee = clarke_guarantee(model, x)
    assert {s.site for s in guarantee.missing} == set()
    assert sum(s.tied for s in guarantee.sites if s.operation == "max_pool") > 0


def test_what_lies_below_a_pool_and_is_not_followed_is_not_covered() -> None:
    x = torch.zeros(2, 1, 4, 4)

    class Placed(nn.Module):
        """Adds a separate number to each position."""

        def __init__(self, made: Callable[[], Tensor]) -> None:
            super().__init__()
            self.conv, self.pool, self.places = nn.Conv2d(1, 1, 1), nn.MaxPool2d(2), made()

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.conv(x) + self.places)

    for made in (lambda: torch.zeros(4, 4), lambda: nn.Parameter(torch.zeros(4, 4))):
        assert not clarke_guarantee(patched(Placed(made)), x).holds
    ceiled = nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(3, ceil_mode=True))
    assert not clarke_guarantee(patched(ceiled), x).holds
    overwritten = nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(2))
    assert clarke_guarantee(patched(overwritten), x).holds


def test_a_pool_whose_input_is_overwritten_later_is_not_covered() -> None:
    """The pool compared two functions; by what lies in its input afterwards, one of them alone is the greatest."""

    class Overwrites(nn.Module):
        def __init__(self, value: float | None) -> None:
            super().__init__()
            self.conv, self.pool, self.value = nn.Conv2d(1, 1, 1), nn.MaxPool2d(2), value
            nn.init.zeros_(self.conv.weight)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            y: Tensor = self.pool(h)
            if self.value is not None:
                h.detach()[0, 0, 0, 0] = self.value
            return y

    x = torch.zeros(1, 1, 4, 4)
    assert clarke_guarantee(patched(Overwrites(None)), x).holds
    x[0, 0, 0, 0] = 2.0
    for value in (None, 5.0, -5.0):
        assert not clarke_guarantee(patched(Overwrites(value)), x).holds, value


@pytest.mark.parametrize("share", [0.0, 1.0, "last"])
def test_what_is_covered_lies_in_the_subdifferential(share: float | str) -> None:
    """Small whole numbers, so that windows tie at 0, above 0, over copies and over functions that differ."""
    choice = Jacobians(max_pool=share)
    model = patched(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2)), choice)
    draw, covered, above = random.Random(0), 0, 0
    for _ in range(60):
        weight, bias = draw.randint(-1, 1), draw.randint(-1, 1)
        image = [[draw.choice((0, 0, 1, 2)) for _ in range(4)] for _ in range(2)]
        with torch.no_grad():
            model[0].weight.fill_(weight)
            model[0].bias.fill_(bias)
        x = torch.tensor(image).float()[None, None]

        def program(p: Sequence[Any], image: Any = image) -> Any:
            return sum(max(max(0, p[0] * image[i][j + k] + p[1]) for i in range(2) for k in range(2)) for j in (0, 2))

        guarantee = clarke_guarantee(model, x, jacobians=choice)
        if guarantee.holds:
            covered += 1
            above += "one function" in guarantee.sites[1].reason
            assert clarke(program, [weight, bias]).contains(gradient(model, x)) is True
    assert 0 < above < covered < 60


def test_lenet_on_a_background_is_covered() -> None:
    model = patched(lenet5(10, (1, 28, 28)))
    x = torch.zeros(4, 1, 28, 28)
    x[:, :, 10:18, 12:16] = torch.rand(4, 1, 8, 4, generator=torch.Generator().manual_seed(0))
    guarantee = clarke_guarantee(model, x)
    assert sum(s.tied for s in guarantee.sites if s.operation == "max_pool") > 0
    assert guarantee.holds, guarantee.missing


def test_the_bound_counts_values_of_the_biases() -> None:
    model = patched(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU6()))
    guarantee = clarke_guarantee(model, torch.randn(5, 2))
    assert guarantee.bound == (5 * 3 + 2 * 5 * 4) / machine_numbers(torch.float32)
    free = patched(nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU()))
    assert clarke_guarantee(free, torch.randn(5, 2)).bound is None


def test_the_bound_is_kept_and_reached() -> None:
    """One unit in float16: of all its biases, exactly one a sample puts it on the kink."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite() & ~((every == 0) & torch.signbit(every))]
    assert len(every) == machine_numbers(torch.float16)
    f = torch.tensor([0.5, -1.25, 3.0], dtype=torch.float16)
    on_kink = (f[:, None] + every == 0).any(0).double().mean()
    assert float(on_kink) == 3 / machine_numbers(torch.float16)


def test_nothing_is_left_behind() -> None:
    model = patched(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.ReLU()))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.random.get_rng_state()
    clarke_guarantee(model, torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_the_audit_says_it_of_ones_own_network() -> None:
    covered = audit(mlp([2, 3, 2], True, 0), [(torch.ones(4, 2), None)], dtypes=["32", "64"])
    check = covered.clarke["32"]
    assert (check.holds, check.always, check.missing) == (True, True, {})
    assert check.bound == 12 / machine_numbers(torch.float32)
    assert any("is an element of the Clarke subdifferential on every batch" in line for line in advice(covered))
    assert any("put such a batch on a kink" in line for line in advice(covered))
    assert Audit.from_dict(json.loads(json.dumps(covered.to_dict()))) == covered
    for sizes in ((4, 8), (8, 4)):  # the largest of the batches
        several = audit(mlp([2, 3, 2], True, 0), [(torch.ones(n, 2), None) for n in sizes], dtypes=["32"])
        assert several.clarke["32"].bound == 24 / machine_numbers(torch.float32)
    free = audit(mlp([2, 3, 2], False, 0), [(torch.zeros(4, 2), None)], dtypes=["32"])
    assert not free.clarke["32"].holds
    assert free.clarke["32"].bound is None
    assert list(free.clarke["32"].missing) == ["1"]
    assert any(line.startswith("In 32: No theorem promises") and "1 (relu," in line for line in advice(free))


def test_findings_of_before_can_be_read() -> None:
    covered = audit(mlp([2, 3, 2], True, 0), [(torch.ones(4, 2), None)], dtypes=["32"])
    plain = json.loads(json.dumps(covered.to_dict()))
    del plain["clarke"]
    assert Audit.from_dict(plain).clarke == {}
