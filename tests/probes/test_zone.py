"""Zones against the truth over the reals, worked out in rational arithmetic."""

import copy
import math
from fractions import Fraction
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nslightning import Jacobians, patch, using
from nslightning.models import create_backbone
from nslightning.probes import NoZoneError, differs_bitwise, l1_sum, linf_sum, zone
from nslightning.surgery import selections

MINIMAL, RELU1 = Jacobians(max_pool="minimal"), Jacobians(relu=1.0)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Scalar(nn.Module):
    """A function of one parameter t, made of nonsmooth pieces."""

    def __init__(self, function, t, dtype):
        super().__init__()
        self.function, self.t = function, nn.Parameter(torch.tensor(t, dtype=dtype))
        self.pool = nn.MaxPool2d(2)

    def forward(self, _):
        return self.function(self, self.t)


def scalar_zone(function, t, dtype, a, b=Jacobians()):  # noqa: B008 # frozen
    model = Scalar(function, t, dtype)
    patch(model, Jacobians())
    return zone(model, torch.sum, None, a, b)


def largest(v):
    """The maximum of t v, every product on its own, so that the derivatives are added one by one."""
    return lambda m, t: m.pool(torch.stack([t * x for x in v]).view(1, 1, 2, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, -1e-4, -6.0])
def test_maximum_of_four(t, dtype):
    same = [scalar_zone(largest([1.14] * 4), t, dtype, Jacobians(max_pool=beta)) for beta in (1.0, 0.3, 7.7, 10.1)]
    for zone_of_shares in same:  # shares of 1.14 that add up to 1.14 over the reals
        assert zone_of_shares.kind == ("compensation" if zone_of_shares.observed.l1 > 0 else "regular")
        assert zone_of_shares.difference <= 2.0**-48
    assert any(each.kind == "compensation" for each in same)
    other = scalar_zone(largest([1.0, 2.0, 3.0, 4.0]), t, dtype, MINIMAL)
    assert other.kind == ("bifurcation" if t == 0 else "regular")
    assert other.observed.l1 == (1.5 if t == 0 else 0)
    assert other.noise is None or other.noise.l1 == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_from_relus(dtype):
    relu2 = lambda t: F.relu(-t) + t  # noqa: E731 # short
    functions = {
        "zero": lambda m, t: relu2(t) - F.relu(t),
        "relu3": lambda m, t: (F.relu(t) + relu2(t)) / 2,
        "thirds": lambda m, t: F.relu(t / 3) + F.relu(t / 3) + F.relu(t / 3) - F.relu(t),
    }
    for alpha in (0.25, 0.5, 1.0):
        zones = {name: scalar_zone(f, 0.0, dtype, Jacobians(relu=alpha)) for name, f in functions.items()}
        # zero'(0) = 1 - 2 alpha against 1, relu3'(0) = 1/2 for each alpha.
        assert zones["zero"].kind == "bifurcation"
        assert zones["zero"].difference == 2 * alpha
        assert zones["relu3"].kind == "regular"
        assert zones["thirds"].kind != "bifurcation"
        assert all(scalar_zone(f, 0.7, dtype, Jacobians(relu=alpha)).kind == "regular" for f in functions.values())


# ------------------------------------------------------------------------------------------------ a small network
class Small(nn.Module):
    """Convolution, ReLU, max pooling, linear, ReLU: 5 x 5 images, two channels, three outputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu1, self.pool = nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2)
        self.fc, self.relu2 = nn.Linear(8, 3), nn.ReLU()
        self.register_buffer("c", torch.tensor([1.0, -0.5, 0.75]))

    def forward(self, x):
        return self.relu2(self.fc(self.pool(self.relu1(self.conv(x))).flatten(1))) @ self.c


def rational(t):
    return [rational(u) for u in t] if t.dim() else Fraction(t.item())


def exact_gradient(model, x, choice):
    """The gradient over the reals, on the branches that the network takes in its own precision."""
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, a, n=n: seen.update({n: a[0].detach().clone()}))
        for n, m in model.named_children()
        if n in ("relu1", "pool", "relu2")
    ]
    model(x)
    [hook.remove() for hook in hooks]
    w, b, v, u = (rational(p.detach()) for p in (model.conv.weight, model.conv.bias, model.fc.weight, model.fc.bias))
    c, image = rational(model.c), rational(x)
    alpha, beta = Fraction(choice.relu), Fraction(1 if choice.max_pool == "minimal" else choice.max_pool)

    def slope(value):
        return alpha if value == 0 else Fraction(int(value > 0))

    del u  # the branches are given: no forward value but those below is needed
    dw = [[[Fraction(0)] * 2 for _ in range(2)] for _ in range(2)]
    db, dv, du = [Fraction(0)] * 2, [[Fraction(0)] * 8 for _ in range(3)], [Fraction(0)] * 3
    for n in range(len(image)):
        g = [c[k] * slope(seen["relu2"][n, k].item()) for k in range(3)]
        for k in range(3):
            du[k] += g[k]
        for channel, i, j in product(range(2), range(2), range(2)):
            entry = channel * 4 + i * 2 + j
            cells = [(2 * i + p, 2 * j + q) for p in range(2) for q in range(2)]
            values = [seen["pool"][n, channel, p, q].item() for p, q in cells]
            winners = [cell for cell, value in zip(cells, values, strict=True) if value == max(values)]
            p, q = winners[0]
            patch_at = lambda p, q, n=n: [[image[n][0][p + r][q + s] for s in range(2)] for r in range(2)]  # noqa: E731 # one line reads better
            pre = b[channel] + sum(w[channel][0][r][s] * patch_at(p, q)[r][s] for r in range(2) for s in range(2))
            active = seen["relu1"][n, channel, p, q].item() > 0
            for k in range(3):
                dv[k][entry] += g[k] * (pre if active else 0)
            down = sum(g[k] * v[k][entry] for k in range(3))
            for number, (p, q) in enumerate(winners):
                share = beta / len(winners) + (1 - beta if number == 0 else 0)
                here = down * share * slope(seen["relu1"][n, channel, p, q].item())
                db[channel] += here
                for r, s in product(range(2), range(2)):
                    dw[channel][r][s] += here * patch_at(p, q)[r][s]
    flat = [dw[a][r][s] for a in range(2) for r in range(2) for s in range(2)]
    return flat + db + [d for row in dv for d in row] + du


IMAGES = {
    "constant": lambda: torch.full((3, 1, 5, 5), 0.3),
    "half constant": lambda: torch.cat([torch.full((3, 1, 5, 3), 0.3), torch.rand(3, 1, 5, 2)], 3),
    "integers": lambda: torch.randint(-1, 2, (3, 1, 5, 5)).float(),
    "anything": lambda: torch.randn(3, 1, 5, 5),
}


def small(seed, dtype, image):
    torch.manual_seed(seed)
    model = Small()
    if image == "integers":  # zeros before the ReLUs, too
        for p in model.parameters():
            p.data = torch.randint(-1, 2, p.shape).float()
    if seed % 3 == 0:
        model.conv.weight.data[0] = 0
        model.conv.bias.data[0] = 0
    return model.to(dtype), IMAGES[image]().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_networks_against_rational_arithmetic(dtype):
    met = {"regular": 0, "compensation": 0, "bifurcation": 0}
    for image, seed, choice in product(IMAGES, range(4), (RELU1, MINIMAL, Jacobians(relu=0.3, max_pool=10.0))):
        model, x = small(seed, dtype, image)
        a, b = exact_gradient(model, x, choice), exact_gradient(model, x, Jacobians())
        patch(model, Jacobians())
        loss = model(x).sum()
        computed = []
        for j in (choice, Jacobians()):
            with using(model, j):
                computed.append(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
        if all(torch.equal(s, t) for s, t in zip(*computed, strict=True)):
            truth = "regular"
        else:
            truth = "compensation" if a == b else "bifurcation"
        located = zone(model, torch.sum, x, choice)
        assert located.kind == truth, (image, seed, choice, located)
        if truth == "bifurcation":
            norm = float(sum((s - t) ** 2 for s, t in zip(a, b, strict=True))) ** 0.5
            assert located.difference == pytest.approx(norm, rel=1e-9)
            assert located.difference > 1e6 * located.rounding
        met[truth] += 1
    assert all(met.values()), met


# Losses of three numbers per sample that tie at every sample, the rows of the weight that they tie by, and how the
# gradient of the loss at the tie is made of the choice: by row, as a multiple of the input.
KINKED_LOSSES = {
    "margin ranking": (
        lambda y: F.margin_ranking_loss(y[:, 0], y[:, 1], torch.ones(len(y)), reduction="none"), "equal", (-1, 1, 0)
    ),
    "hinge embedding": (
        lambda y: F.hinge_embedding_loss(y[:, 0], -torch.ones(len(y)), margin=0.0, reduction="none"), "zero", (-1, 0, 0)
    ),
    "multi margin": (
        lambda y: F.multi_margin_loss(y, torch.zeros(len(y)).long(), margin=0.0, reduction="none"), "equal",
        (Fraction(-1, 3), Fraction(1, 3), 0),
    ),
    "norm": (lambda y: y.norm(dim=1), "zero", (1, 1, 1)),
    "norm of order 3": (lambda y: torch.linalg.vector_norm(y[:, :2], 3, dim=1), "zero", (1, 1, 0)),
    "distance": (lambda y: F.pairwise_distance(y, y.detach(), eps=0.0), "zero", (1, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in KINKED_LOSSES for dtype in (torch.float32, torch.bfloat16)
     if name != "multi margin" or dtype == torch.float32],  # PyTorch has no bfloat16 kernel of it for a CPU
)  # fmt: skip
def test_hinges_and_norms_against_rational_arithmetic(name, dtype):
    """In every other network the weights of the samples cancel over the reals, and not as float32 rounds."""
    loss, tie, coefficients = KINKED_LOSSES[name]
    a, b = Jacobians(hinge=0.75, norm=0.75), Jacobians(hinge=0.25, norm=0.25)
    kinds = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Linear(4, 3, bias=False)
        with torch.no_grad():
            model.weight[:2] = model.weight[0]
            if tie == "zero":
                model.weight.zero_()
        model = nn.Sequential(model, Applied(loss)).to(dtype)
        x = torch.randn(1, 4).expand(5, 4).to(dtype) if seed % 2 else torch.randn(5, 4).to(dtype)
        weights = torch.tensor([0.1, 0.37, -0.59, 0.83, 0.0]).to(torch.bfloat16).double()
        weights[4] = -weights.sum()  # exact in float64
        if dtype == torch.bfloat16:
            weights = torch.tensor([3.0, 5.0, 7.0, -11.0, -4.0]).double() / 16
        patch(model, Jacobians())
        located = zone(model, lambda y, w=weights: (y * w.to(y.dtype)).sum(), x, a, b)
        exact = [
            [Fraction(1, 2) * c * sum(Fraction(w) * v for w, v in zip(weights.tolist(), column, strict=True))
             for column in zip(*rational(x), strict=True)]
            for c in coefficients
        ]  # fmt: skip
        size = math.sqrt(float(sum(v * v for row in exact for v in row)))
        assert (size == 0) == bool(seed % 2)
        if size:
            assert (located.kind, located.difference) == ("bifurcation", pytest.approx(size, rel=1e-9))
        else:
            assert located.kind in ("regular", "compensation")
        kinds.append(located.kind)
    assert kinds.count("bifurcation") == 4
    assert "compensation" in kinds or dtype == torch.bfloat16  # whose products are summed up in float32, exactly


class Applied(nn.Module):
    """A function of the last layer's output."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, y):
        return self.function(y)


def test_rational_gradient_is_the_gradient():
    for image, choice in product(IMAGES, (RELU1, MINIMAL)):
        model, x = small(0, torch.float64, image)
        want = exact_gradient(model, x, choice)
        patch(model, choice)
        got = torch.cat([g.flatten() for g in torch.autograd.grad(model(x).sum(), list(model.parameters()))])
        torch.testing.assert_close(got, torch.tensor([float(q) for q in want], dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------- the replay
class Everything(nn.Module):
    """Batch norm, dropout, a residual, a shared module, functional calls, a checkpoint, tied weights."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.drop, self.head = nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head.weight

    def part(self, x):
        return self.relu(self.b(self.relu(self.bn(x))))

    def forward(self, x):
        x = F.max_pool2d(self.relu(self.a(x)), 3, 2, 1)
        x = x + checkpoint(self.part, x, use_reentrant=False)
        return self.tied(self.relu(self.head(self.drop(x).mean((2, 3))))).square().mean()


def network(dtype, seed=0):
    torch.manual_seed(seed)
    model = Everything().to(dtype)
    patch(model, Jacobians())
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_network_with_everything(dtype):
    model = network(dtype)
    x = torch.randn(4, 1, 12, 12).to(dtype)
    x[:, :, :, :7] = 0.1  # a constant background: the pool ties on equal patches
    x[:, :, :2] = 0.0
    state, rng, ids = copy.deepcopy(model.state_dict()), torch.get_rng_state(), [id(b) for b in model.buffers()]
    first = zone(model, lambda y: y, x, MINIMAL)
    assert first.kind != "regular"
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert ids == [id(b) for b in model.buffers()]
    assert all(p.grad is None for p in model.parameters())
    assert all(s.observer is None and s.recorder is None for s in selections(model).values())
    assert zone(model, lambda y: y, x, MINIMAL) == first  # deterministic
    # In float64 the same network, whose ties are the same here, has the difference that was carried down.
    if dtype == torch.float32:
        wide = copy.deepcopy(model).double()
        assert zone(wide, lambda y: y, x.double(), MINIMAL).difference == pytest.approx(first.difference, rel=1e-4)


def test_the_branches_are_those_of_the_low_precision():
    """x = 1 + 2^-12 rounds to 1 in half precision, where 1 - x ties; in float64 it would not."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, bias=False), nn.ReLU())
    with torch.no_grad():
        net[0].weight.fill_(2.0**-12), net[0].bias.fill_(1.0), net[1].weight.fill_(1.0)
    model = nn.Sequential(net[0], Shift(-1.0), net[2]).half()
    patch(model, Jacobians())
    x = torch.ones(1, 1, dtype=torch.float16)
    assert model(x).item() == 0
    located = zone(model, torch.sum, x, RELU1)
    assert located.kind == "bifurcation"
    assert located.difference == pytest.approx(2**0.5)  # the weight's and the bias's derivatives are both 1
    assert zone(copy.deepcopy(model).double(), torch.sum, x.double(), RELU1).kind == "regular"


class Shift(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x + self.by


class Noisy(torch.autograd.Function):
    """A backward whose rounding is another one each time, as of kernels that add up in no fixed order."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * (1 + torch.finfo(g.dtype).eps * torch.randint(0, 3, g.shape))


class NoisyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.relu(Noisy.apply(self.conv(x)))).square().sum()


def test_noise_is_measured_and_is_no_difference():
    model = NoisyNet()
    with torch.no_grad():
        model.conv.bias.fill_(-10.0)  # windows of zeros: they tie, and do not matter
        model.conv.bias[0] = 1.0
    patch(model, Jacobians(), strict=False)  # its own autograd function is named as not reached
    x = torch.randn(2, 1, 12, 12)
    assert zone(model, lambda y: y, x, MINIMAL).kind == "regular"
    x[:, :, :8] = 0.5  # windows of a constant: they matter to rounding only
    located = zone(model, lambda y: y, x, MINIMAL)
    assert located.kind == "compensation"
    assert located.noise.l1 > 0


def test_autocast_and_module_losses_and_keywords():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 3))
    patch(model, Jacobians())
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    labels = torch.tensor([0, 1, 2])
    x = torch.rand(3, 1, 12, 12)
    x[:, :, :6] = 0.5
    with torch.autocast("cpu", torch.bfloat16):
        located = zone(model, lambda y: loss(y.float(), labels), {"input": x}, MINIMAL)
    assert located.kind in ("bifurcation", "compensation")

    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = loss

        def forward(self, y):
            return self.criterion(y, labels)

    assert zone(model, Labelled(), x, MINIMAL).kind in ("bifurcation", "compensation")
    assert loss.weight.dtype == torch.float32


def test_no_tie_runs_no_backward_and_same_choice_is_regular():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    patch(model, Jacobians())
    passes = []
    model[2].register_full_backward_hook(lambda *_: passes.append(1))
    located = zone(model, torch.sum, torch.randn(5, 3), RELU1)
    assert (located.kind, located.observed.l1, located.noise, passes) == ("regular", 0.0, None, [])
    assert list(located.observed.per_layer) == [n for n, _ in model.named_parameters()]
    small_model, x = small(0, torch.float32, "integers")
    patch(small_model, Jacobians())
    assert zone(small_model, torch.sum, x, MINIMAL, MINIMAL).kind == "regular"


@pytest.mark.parametrize("size", [1e-10, 1e-9, 1e-8])
def test_a_small_difference_is_one_far_below_where_rounding_ends(size):
    """Between 10^5 and 10^8 times what rounding can leave: much more than it, and much less than 2^29 times."""
    t = lambda m, t: F.relu(t) * (0.15 + size) + F.relu(t) * 0.7 - F.relu(t) * 0.85  # noqa: E731 # short
    located = scalar_zone(t, 0.0, torch.float32, Jacobians(relu=0.3))
    assert located.kind == "bifurcation"
    assert located.difference == pytest.approx(0.3 * size, rel=1e-5)
    assert 2.0**16 < located.difference / located.rounding < 2.0**28


def test_a_large_gradient_above_the_ties_does_not_hide_a_small_difference():
    """It has no part in the difference, so its rounding is none of the difference's."""

    class Sizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.small = nn.Parameter(torch.tensor([0.3])), nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return 1e6 * (self.large * x).sin() + 1e-8 * F.relu(self.small)

    model = Sizes()
    patch(model, Jacobians())
    located = zone(model, torch.sum, torch.ones(1), Jacobians(relu=1.0))
    assert (located.kind, located.method) == ("bifurcation", "propagate")
    assert located.difference == pytest.approx(1e-8, rel=1e-6)
    assert located.rounding < 1e-20


def test_complex_parameters():
    class Spiral(nn.Module):
        def __init__(self, dtype, bias):
            super().__init__()
            self.w, self.bias = nn.Parameter(torch.full((2,), 1 + 2j, dtype=dtype)), bias

        def forward(self, x):
            return F.relu((self.w * 0.5).imag - x).sum() + (self.w * self.w.conj()).real.sum() * self.bias

    for dtype, real in ((torch.complex64, torch.float32), (torch.complex128, torch.float64)):
        model = Spiral(dtype, 1.0)
        patch(model, Jacobians())
        located = zone(model, lambda y: y, torch.ones(2, dtype=real), RELU1)
        assert located.kind == "bifurcation"
        assert located.difference == pytest.approx(0.5**0.5)  # 0.5 i for each of the two
        assert zone(model, lambda y: y, torch.zeros(2, dtype=real), RELU1).kind == "regular"


def test_printed_it_is_one_line():
    located = scalar_zone(lambda m, t: F.relu(t), 0.0, torch.float32, RELU1)
    assert len(str(located).splitlines()) == 1
    assert "bifurcation" in str(located)
    assert "propagate" in str(located)


def test_refusals():
    with pytest.raises(ValueError, match="not patched"):
        zone(nn.Linear(1, 1), torch.sum, torch.ones(1), RELU1)
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    patch(model, Jacobians())
    with pytest.raises(ValueError, match="another choice at each backward"):
        zone(model, torch.sum, torch.ones(1, 1), Jacobians(max_pool="random"))
    with torch.no_grad():
        model[0].weight.fill_(0), model[0].bias.fill_(0)
    with pytest.raises(NoZoneError, match="not finite in float64"):
        zone(model, lambda y: (y / 0 * 0 + y).sum() * float("nan"), torch.ones(1, 1), RELU1)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.relu = nn.Linear(1, 1), nn.ReLU()
            nn.init.zeros_(self.fc.weight), nn.init.zeros_(self.fc.bias)

        def forward(self, x):
            y = self.relu(self.fc(x))
            return self.relu(y) if y.dtype != torch.float32 else y

    patch(twice := Twice(), Jacobians())
    with pytest.raises(RuntimeError, match="evaluates relu otherwise"):
        zone(twice, torch.sum, torch.ones(1, 1), RELU1)


def test_gradients_that_are_not_finite_are_not_the_same():
    """Two infinities have the same bits, and say nothing of what they stand for."""
    large = lambda y: (y * 6e4 * 6e4).sum()  # noqa: E731 # said twice
    half = Jacobians(relu=0.5)
    for dtype, finite in ((torch.float16, False), (torch.float32, True)):
        located = zone(tied_unit(dtype), large, torch.ones(1, 1, dtype=dtype), RELU1, half)
        assert math.isfinite(located.observed.l2) == finite
        assert located.kind == "bifurcation"
        assert located.difference == pytest.approx(2**0.5 * 0.5 * 3.6e9)
    with pytest.raises(NoZoneError, match="not finite in float64"):
        zone(tied_unit(torch.float32), lambda y: y.sum() * math.nan, torch.ones(1, 1), RELU1, half)


def tied_unit(dtype):
    model = nn.Sequential(nn.Linear(1, 1, dtype=dtype), nn.ReLU())
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    patch(model, Jacobians())
    return model


# ------------------------------------------------------------------------------------------- the papers' criteria
def test_criteria_of_the_papers():
    a = {"first": torch.tensor([1.0, -2.0]), "second": torch.tensor([3.0])}
    b = {"first": torch.tensor([1.5, -1.0]), "second": torch.tensor([-1.0])}
    assert (linf_sum(a, b), l1_sum(a, b)) == (5.0, 5.5)
    assert differs_bitwise(a, b)
    assert differs_bitwise(a, b, first=True)
    c = {"first": a["first"], "second": b["second"]}
    assert differs_bitwise(a, c)
    assert not differs_bitwise(a, c, first=True)
    nan = {"w": torch.tensor([float("nan"), 0.0])}
    assert not differs_bitwise(nan, {"w": torch.tensor([float("nan"), -0.0])})
    assert differs_bitwise(nan, {"w": torch.zeros(2)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_lenet_on_a_constant_background(dtype):
    torch.manual_seed(0)
    model = create_backbone("paper/lenet5", 10, (1, 28, 28)).to(dtype)
    patch(model, Jacobians())
    x = torch.zeros(16, 1, 28, 28, dtype=dtype)
    x[:, :, 8:20, 8:20] = torch.rand(16, 1, 12, 12).to(dtype)
    labels = torch.arange(16) % 10
    located = zone(model, lambda y: F.cross_entropy(y, labels), x, MINIMAL)
    # The background's windows make rounding only; in half precision others tie by accident.
    assert located.kind == ("compensation" if dtype == torch.float32 else "bifurcation")
    assert located.observed.l1 > 0


class Bounded(nn.Module):
    def forward(self, x):
        return x.clamp(torch.zeros(4), torch.ones(4))


def test_clamp_between_tensors():
    model = nn.Sequential(nn.Linear(4, 4), Bounded(), nn.Linear(4, 1))
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    patch(model, Jacobians())
    x = torch.randn(3, 4)
    assert zone(model, torch.sum, x, Jacobians(clamp=(0.25, 0.25))).kind == "bifurcation"
    nn.init.constant_(model[0].bias, 0.5)
    assert zone(model, torch.sum, x, Jacobians(clamp=(0.25, 0.25))).kind == "regular"


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("choice", "bias", "kind"),
    [(RELU1, 0.0, "bifurcation"), (Jacobians(relu=2.0, rule="published"), 1.0, "regular")],
    ids=["exact", "published"],
)
def test_poolings_in_a_checkpoint(choice, bias, kind):
    torch.manual_seed(0)
    inner = Checkpointed(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 1))
    nn.init.zeros_(inner[0].weight), nn.init.constant_(inner[0].bias, bias)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), inner, nn.Flatten(), nn.Linear(18, 1))
    patch(model, Jacobians())
    assert zone(model, torch.sum, torch.randn(2, 1, 4, 4), choice).kind == kind


class Thirds(nn.Module):
    """n ReLUs, each divided by n, less one: 0 in its derivative over the reals, under any choice."""

    def __init__(self, n):
        super().__init__()
        self.n, self.relu = n, nn.ReLU()

    def forward(self, t):
        return sum((self.relu(t) / self.n for _ in range(self.n)), -self.relu(t))


class Reentrant(nn.Module):
    """Hides a part from the loss's graph."""

    def __init__(self, n, dtype):
        super().__init__()
        self.t, self.part = nn.Parameter(torch.zeros((), dtype=dtype)), Thirds(n)

    def forward(self, _):
        return checkpoint(self.part, self.t * 1.0, use_reentrant=True)


@pytest.mark.parametrize("n", [6, 7, 9, 13, 15, 21, 35])
def test_rounding_is_measured_where_float32_is_exact_by_luck(n):
    """The two replays differ by the tiny error of float64 alone; multiples of the loss show that it is rounding."""
    model = Reentrant(n, torch.float16)
    patch(model, Jacobians())
    cancelled = zone(model, torch.sum, None, Jacobians(relu=1.0))
    assert cancelled.method == "subtract"
    assert cancelled.kind in ("compensation", "regular")
    assert cancelled.observed.l1 == 0 or cancelled.kind == "compensation"


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda y: y.sum().detach(), ValueError, "no graph"),
        (lambda y: y.sum() * 1j, ValueError, "complex"),
        (lambda y: y.sum().item(), TypeError, "the loss comes first"),
    ],
)
def test_what_has_no_gradient_lies_in_no_zone(loss, error, message):
    """A loss without a graph has no node, either; that is not the regular zone."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    patch(model, Jacobians())
    with pytest.raises(error, match=message):
        zone(model, loss, torch.ones(1, 1), RELU1)
