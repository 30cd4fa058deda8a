"""The worst choice against all corners, tried one by one in networks whose slopes are written out."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nslightning import Jacobians, ops, patch, using
from nslightning.probes import divergence, worst_choice


class Layers(nn.Module):
    """Two ReLUs, one below the other; rows of zeros make ties at both."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two, self.three = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 1)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        with torch.no_grad():
            self.one.weight[:2], self.one.bias[:2] = 0, 0
            self.two.weight[0], self.two.bias[0] = torch.tensor([1.0, -1.0, 0.0, 0.0]), 0

    def forward(self, x):
        return self.three(self.relu2(self.two(self.relu1(self.one(x)))))

    def gradient(self, x, slopes):
        """With every ReLU replaced by its slope: the Jacobian choice is then no question."""
        a = (x @ self.one.weight.T + self.one.bias) * slopes[0]
        b = (a @ self.two.weight.T + self.two.bias) * slopes[1]
        loss = (b @ self.three.weight.T + self.three.bias).sin().sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.parameters()))])


@pytest.mark.parametrize("seed", range(6))
def test_all_corners_of_two_layers(seed):
    model = Layers(seed).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    with torch.no_grad():
        pre1 = model.one(x)
        pre2 = model.two(pre1.relu())
    ties = [(0, *index.tolist()) for index in (pre1 == 0).nonzero()] + [
        (1, *index.tolist()) for index in (pre2 == 0).nonzero()
    ]
    assert len(ties) == 6  # four at the first ReLU, two at the second
    base = model.gradient(x, [(pre1 > 0).double(), (pre2 > 0).double()])
    largest = 0.0
    for corner in product((0.0, 1.0), repeat=len(ties)):
        slopes = [(pre1 > 0).double(), (pre2 > 0).double()]
        for (layer, i, j), slope in zip(ties, corner, strict=True):
            slopes[layer][i, j] = slope
        largest = max(largest, float((model.gradient(x, slopes) - base).norm()))
    patch(model, Jacobians())
    with using(model, Jacobians(relu=0.5)):  # what the model now takes is not the reference
        worst = worst_choice(model, lambda y: y.sin().sum(), x)
    assert worst.value == pytest.approx(largest, rel=1e-9)
    assert worst.relative == pytest.approx(largest / float(base.norm()), rel=1e-9)
    assert set(worst.sites) == {"relu1", "relu2"}
    one_for_all = divergence(model(x).sin().sum(), model, {"1": Jacobians(relu=1.0)})["1"].l2
    assert worst.value >= one_for_all * (1 - 1e-12)


def corners(model, x):
    """The slopes of all corners, and which ties there are; the first corner is the reference."""
    with torch.no_grad():
        pre1 = model.one(x)
        pre2 = model.two(pre1.relu())
    ties = [(layer, *i.tolist()) for layer, pre in enumerate((pre1, pre2)) for i in (pre == 0).nonzero()]
    for corner in product((0.0, 1.0), repeat=len(ties)):
        slopes = [(pre1 > 0).double(), (pre2 > 0).double()]
        for (layer, i, j), slope in zip(ties, corner, strict=True):
            slopes[layer][i, j] = slope
        yield corner, slopes


def largest_of_all(model, x):
    """The largest difference of all corners, by enumeration, the largest where all ties are alike, and their number."""
    values = {}
    base = None
    for corner, slopes in corners(model, x):
        gradient = model.gradient(x, slopes)
        base = gradient if base is None else base
        values[corner] = float((gradient - base).norm())
    alike = max(value for corner, value in values.items() if len(set(corner)) == 1)
    return max(values.values()), alike, len(values)


@pytest.mark.parametrize("nets", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_small_networks_against_every_corner(nets):
    """All corners where they may all be tried; else never below the best of the corners in which all ties are alike."""
    equal, searched = 0, 0
    for seed in range(nets):
        model = Layers(1000 + seed).double()
        x = torch.randn(1 + seed % 2, 3, dtype=torch.float64)
        largest, alike, number = largest_of_all(model, x)
        patch(model, Jacobians())
        loss = lambda y: y.sin().sum()  # noqa: E731 # said once
        worst = worst_choice(model, loss, x, evaluations=number)
        assert worst.guarantee == "all corners"
        assert worst.value == pytest.approx(largest, rel=1e-9)
        short = worst_choice(model, loss, x, evaluations=number - 1)
        assert short.guarantee in ("single ties", "slopes")
        assert alike * (1 - 1e-9) <= short.value <= largest * (1 + 1e-9)
        equal += short.value >= largest * (1 - 1e-9)
        searched += 1
    assert equal >= 0.97 * searched


def test_no_single_tie_makes_it_larger():
    """Ten ties in one layer, of which any two that differ in sign cancel: slopes alone stop early."""
    model = nn.Sequential(nn.Linear(1, 10, bias=False), nn.ReLU(), nn.Linear(10, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, -1.0] * 5]))
    shared = nn.Sequential(nn.Linear(1, 1, bias=False), Spread(), *model[1:]).double()
    nn.init.zeros_(shared[0].weight)
    patch(shared, Jacobians())
    worst = worst_choice(shared, torch.sum, torch.ones(1, 1, dtype=torch.float64), evaluations=100)
    assert worst.guarantee == "single ties"
    assert worst.value == pytest.approx(5.0)  # all of one sign, and the others at 0
    assert worst_choice(shared, torch.sum, torch.ones(1, 1, dtype=torch.float64), evaluations=3).guarantee == "slopes"


class Spread(nn.Module):
    """One number as the input of several units."""

    def __init__(self, units=10):
        super().__init__()
        self.units = units

    def forward(self, x):
        return x.expand(-1, self.units)


def test_the_steepest_change_is_tried_first():
    """All units on give 4 + 1 - 2 - 1 = 2; of the four that may go off, the one of -2 leaves the most."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), Spread(4), nn.ReLU(), nn.Linear(4, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[3].weight.copy_(torch.tensor([[4.0, 1.0, -2.0, -1.0]]))
    patch(model, Jacobians())
    x = torch.ones(1, 1, dtype=torch.float64)
    for evaluations, value in ((0, 2.0), (1, 4.0), (2, 5.0)):
        worst = worst_choice(model, torch.sum, x, starts=0, rounds=1, evaluations=evaluations)
        assert (worst.value, worst.guarantee) == (pytest.approx(value), "slopes")


def test_tied_absolute_errors_each_have_a_sign():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), Error(torch.tensor([[1.0, -2.0, 4.0]]))).double()
    nn.init.zeros_(model[0].weight)
    patch(model, Jacobians())
    worst = worst_choice(model, lambda y: y, torch.ones(2, 1, dtype=torch.float64))
    assert worst.value == pytest.approx(14 / 6)  # (1 + 2 + 4) for each of two images, of six entries' mean
    assert worst.sites == {"1:l1_loss": pytest.approx(14 / 6)}
    assert worst.relative == float("inf")


class Error(nn.Module):
    def __init__(self, factors):
        super().__init__()
        self.register_buffer("factors", factors)

    def forward(self, x):
        return F.l1_loss(x * self.factors, torch.zeros(len(x), 3, dtype=x.dtype))


def test_a_site_that_is_called_twice_counts_both_calls():
    """Two calls of one module: what each makes alone adds up by squares."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.relu = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1)), nn.ReLU()

        def forward(self, x):
            return 3 * self.relu(self.a * x) + 4 * self.relu(self.b * x)

    model = Twice()
    patch(model, Jacobians())
    worst = worst_choice(model, torch.sum, torch.ones(1))
    assert worst.value == pytest.approx(5.0)
    assert worst.sites == {"relu": pytest.approx(5.0)}


class Pair(nn.Module):
    """A loss of two vectors of parameters, (1, 2, 3) and twice as much times a number that is 0."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.w, self.v = loss, nn.Parameter(torch.zeros(3).double()), nn.Parameter(torch.zeros(1).double())

    def forward(self, x):
        return self.loss(self.w * x, 2 * self.v * x)


ZEROS, ONES = torch.zeros(3).double(), torch.ones(3).double()


def given_to_an_entry_at_its_bound():
    """Half of the gradient in torch 2.15, which gives the bound the other half; all of it in torch 2.11."""
    entry = torch.zeros(1, requires_grad=True)
    (share,) = torch.autograd.grad(entry.clamp(min=torch.zeros(1)), entry)
    return share.item()


KEPT = given_to_an_entry_at_its_bound()
GROUPS = torch.tensor([0, 0, 1])
# The largest difference to stock's gradient, with x = (1, 2, 3), as worked out by hand.
LOSSES = {
    "maximum of a constant": (lambda a, b: torch.maximum(ZEROS, a).sum(), (14 / 4) ** 0.5),  # halves
    "minimum of a constant": (lambda a, b: torch.minimum(ZEROS, a).sum(), (14 / 4) ** 0.5),
    # Each tie moves what is kept of x_i from w_i to v, which has twice as much.
    "clamp between parameters": (lambda a, b: a.clamp(min=b).sum(), KEPT * (14 + 144) ** 0.5),
    "clamp of a constant": (lambda a, b: ZEROS.clamp(min=a).sum(), KEPT * 14**0.5),
    "clamp against its own multiple": (lambda a, b: b.clamp(min=2 * b).sum(), KEPT * 12.0),  # from 1 or 1.5 to 2
    "hinge": (lambda a, b: F.hinge_embedding_loss(a, -ONES, margin=0.0, reduction="sum"), 14**0.5),
    "ranking": (lambda a, b: F.margin_ranking_loss(ZEROS, a, ONES, reduction="sum"), 14**0.5),
    "several classes": (
        lambda a, b: F.multi_margin_loss((a + torch.tensor([0.5, 0, 0]))[None], torch.tensor([0]), margin=0.5),
        (4 / 9 + 4 / 9 + 1) ** 0.5,
    ),
    # Of 0, w_0, w_1 each has a third: w_1 takes all, and w_0 loses 1/3. Of 0, w_2 each has a half.
    "maxima of groups": (
        lambda a, b: ZEROS.scatter_reduce(0, GROUPS, a, "amax").sum(), (1 / 9 + (4 / 3) ** 2 + 1.5**2) ** 0.5
    ),
    "both ends": (lambda a, b: (lambda r: r.max - r.min)(a.aminmax()), 13**0.5),  # of the last two
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_constants_are_varied(name):
    """A constant that comes first, and what a loss computes of its operands, do not hide a site."""
    loss, largest = LOSSES[name]
    model, x = Pair(loss), torch.arange(1.0, 4.0).double()
    try:
        model(x).backward()
    except RuntimeError as error:  # torch 2.11 has no derivative of aminmax
        if "aten::aminmax is not implemented" not in str(error):
            raise
        pytest.skip(f"torch {torch.__version__}: {error}")
    patch(model, Jacobians())
    worst = worst_choice(model, lambda y: y, x)
    assert worst.value == pytest.approx(largest, rel=1e-9)
    assert worst.unvaried == ()
    (value,) = worst.sites.values()  # one site, whatever the number of its nodes
    assert value == pytest.approx(largest, rel=1e-9)


def test_what_is_not_varied_is_named_and_others_are_no_sites():
    other = nn.Sequential(nn.ReLU())
    patch(other, Jacobians())
    model = Pair(lambda a, b: a.norm() + other(a).sum() + ops.relu(b, 0.5).sum())
    object.__setattr__(model, "other", other)
    patch(model, Jacobians())
    worst = worst_choice(model, lambda y: y, torch.arange(1.0, 4.0).double())
    assert (worst.value, worst.unvaried) == (0.0, (":norm",))


def test_operations_of_another_model_are_not_varied():
    """They come after one of the model's own, of the same kind."""
    other, model = nn.Sequential(nn.ReLU()), nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
    nn.init.zeros_(model[0].weight)
    for one in (other, model):
        patch(one, Jacobians())
    worst = worst_choice(model, lambda y: y.sum() + 5 * other(model[0].weight).sum(), torch.ones(1, 1))
    assert (worst.value, worst.sites, worst.unvaried) == (1.0, {"1": 1.0}, ())


class Rows(nn.Module):
    """Units that all tie; the gradient is the sum of the rows of those that are on."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.p, self.relu = torch.tensor(rows), nn.Parameter(torch.zeros(len(rows[0]))), nn.ReLU()

    def forward(self, _):
        return self.relu(self.rows @ self.p)


def test_the_search_begins_where_all_ties_are_alike():
    patch(model := Rows([[3.0], [4.0]]), Jacobians())
    worst = worst_choice(model, torch.sum, None, starts=0, rounds=1, evaluations=1)
    assert (worst.value, worst.guarantee) == (7.0, "slopes")


def test_ties_are_tried_again_until_none_is_larger():
    """A tie that made nothing larger does so when others have changed."""
    rows = [[0.0, 6.0], [-6.0, -3.0], [-2.0, 4.0], [1.0, -6.0], [6.0, -2.0]]
    patch(model := Rows(rows), Jacobians())
    worst = worst_choice(model, torch.sum, None, starts=0, rounds=1, evaluations=31)
    assert (worst.value, worst.guarantee) == (pytest.approx(122**0.5), "single ties")


def test_several_entries_of_a_window_are_tried():
    found = set()
    for seed in range(30):
        values = torch.randperm(9, generator=torch.Generator().manual_seed(seed)).double() + 1
        model = nn.Sequential(nn.Linear(1, 9, bias=False), nn.Unflatten(1, (1, 3, 3)), nn.MaxPool2d(3)).double()
        nn.init.zeros_(model[0].weight)
        model[0].register_forward_hook(lambda m, args, y, values=values: y * values)
        patch(model, Jacobians())
        worst = worst_choice(model, torch.sum, torch.ones(1, 1).double())
        found.add((values.square() + values[0] ** 2 - worst.value**2).abs().argmin().item())
    assert len(found - {0, 8}) >= 2  # beside the first and the last


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda a, b: torch.relu(a).sum() + (0 * b).sqrt().sum(), "not finite"),
        (lambda a, b: torch.relu(a).sum().detach(), "no graph"),
        (lambda a, b: torch.relu(a).sum() * (1 + 1j), "complex"),
        (lambda a, b: torch.relu(a), "one number"),
    ],
)
def test_what_has_no_largest_difference_is_refused(loss, message):
    model = Pair(loss)
    patch(model, Jacobians())
    with pytest.raises(ValueError, match=message):
        worst_choice(model, lambda y: y, ONES)


def test_differences_of_half_precision_are_not_rounded():
    """The gradients are 1 and 2^-9, and 1 - 2^-9 is no bfloat16."""
    model = Pair(lambda a, b: (torch.relu(a) + a * 2**-9).sum()).bfloat16()
    patch(model, Jacobians())
    x = torch.tensor([1.0, 0.0, 0.0]).bfloat16()
    worst = worst_choice(model, lambda y: y, x)
    assert worst.value == divergence(model(x), model, {"1": Jacobians(relu=1.0)})["1"].l2


def test_printed_it_is_a_few_lines():
    model = Layers(0).double()
    patch(model, Jacobians())
    text = str(worst_choice(model, lambda y: y.sin().sum(), torch.randn(2, 3, dtype=torch.float64)))
    assert len(text.splitlines()) == 3
    assert "all corners" in text
    assert "relu1" in text


@pytest.mark.parametrize("kernel", [(2, 2), (3, 1)], ids=["apart", "overlapping"])
def test_all_corners_of_pooling_windows(kernel):
    size, stride = kernel
    torch.manual_seed(1)
    weight = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    x = torch.randint(0, 2, (1, 1, 5, 5)).double().mul(0.5).add(1)
    model = nn.Sequential(nn.Conv2d(1, 1, 2, bias=False), nn.MaxPool2d(size, stride)).double()
    with torch.no_grad():
        model[0].weight.copy_(weight.sign())
        image = model[0](x)
        windows = F.unfold(image, size, stride=stride)[0].T  # (windows, entries)
        positions = F.unfold(torch.arange(16.0).view(1, 1, 4, 4), size, stride=stride)[0].T.long()
    tied = [positions[w][windows[w] == windows[w].max()].tolist() for w in range(len(windows))]
    assert sum(len(t) > 1 for t in tied) >= 2
    g = torch.arange(1.0, len(tied) + 1, dtype=torch.float64)
    patches = F.unfold(x, 2)[0].T  # the convolution's gradient at each of its outputs
    gradient = lambda chosen: sum(g[w] * patches[p] for w, p in enumerate(chosen))  # noqa: E731 # local
    base = gradient([t[0] for t in tied])
    largest = max(float((gradient(chosen) - base).norm()) for chosen in product(*tied))
    patch(model, Jacobians())
    worst = worst_choice(model, lambda y: (y.flatten() * g).sum(), x)
    assert 0.9 * largest <= worst.value <= largest * (1 + 1e-9)
    assert worst.sites == {"1": pytest.approx(worst.value)}


def test_reference_inside_and_no_tie():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.zero_()
    patch(model, Jacobians())
    x = torch.ones(1, 1)
    assert worst_choice(model, torch.sum, x, Jacobians(relu=0.25)).value == pytest.approx(0.75 * 2**0.5)
    assert worst_choice(model, torch.sum, x, Jacobians(relu=1.0)).value == pytest.approx(2**0.5)
    with torch.no_grad():
        model[0].bias.fill_(1.0)
    worst = worst_choice(model, torch.sum, x)
    assert (worst.value, worst.relative, worst.sites) == (0.0, 0.0, {})


def test_a_site_alone_leaves_the_others_at_the_reference():
    """The model was patched with another choice than the reference."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.t, self.first, self.second = nn.Parameter(torch.zeros(2)), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return 3 * self.first(self.t[0]) + 4 * self.second(self.t[1])

    patch(model := Two(), Jacobians(relu=0.5))
    worst = worst_choice(model, torch.sum, None, Jacobians(relu=1.0))
    assert (worst.value, worst.sites, worst.guarantee) == (5.0, {"first": 3.0, "second": 4.0}, "all corners")


def test_networks_of_other_parts_leave_no_trace():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 2)
            self.relu, self.pool, self.six = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.ReLU6()

        def forward(self, x):
            x = self.pool(self.relu(self.bn(self.conv(x))))
            x = self.six(x)
            return self.fc(F.leaky_relu(x, 0.1).mean((2, 3)))

    model = Net()
    with torch.no_grad():
        model.bn.weight[0] = 0
    patch(model, Jacobians())
    x = torch.randint(0, 2, (3, 1, 8, 8)).float()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    worst = worst_choice(model, lambda y: y.square().sum(), x)
    assert worst.value > 0
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {"relu", "pool"} <= set(worst.sites)
    for choice in (Jacobians(relu=1.0, relu6=(1.0, 1.0), leaky_relu=1.0), Jacobians(max_pool="minimal")):
        loss = model(x).square().sum()
        assert worst.value >= divergence(loss, model, {"": choice})[""].l2 * (1 - 1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="not patched"):
        worst_choice(nn.ReLU(), torch.sum, torch.ones(1))
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    patch(model, Jacobians())

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.zero_()
    with pytest.raises(ValueError, match="run without it"):
        worst_choice(Checkpointed(), torch.sum, torch.ones(1, 1))
    with pytest.raises(ValueError, match="no Clarke Jacobian"):
        worst_choice(model, torch.sum, torch.ones(1, 1), Jacobians(rule="published"))
