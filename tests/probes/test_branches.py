"""Branches of a lower precision imposed on a replay: the order is the recorded one, and the values are the replay's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nslightning import Jacobians, patch
from nslightning.ops.record import OPERATIONS
from nslightning.probes import zone
from nslightning.probes.branches import Branches

LAST = Jacobians(
    max="last", maximum="last", max_pool="last", hinge=1.0, relu=1.0, clamp=(1.0, 1.0), scatter_max="last",
    segment_max="last", norm=1.0,
)  # fmt: skip


class Compensated(nn.Module):
    """(y - b)^2 for two numbers that are the same over the reals, and are rounded in two ways: its slope is 0."""

    def __init__(self, pick):
        super().__init__()
        self.pick = pick
        self.rows = nn.Linear(64, 4, bias=False)
        self.rows.weight.data[:] = self.rows.weight.data[0]
        self.pool = nn.MaxPool1d(2)

    def forward(self, x):
        b = (x * self.rows.weight[0].detach()).sum(1)
        return (self.pick(self, self.rows(x)) - b) ** 2


PICKS = {
    "amax": lambda m, y: y.amax(1),
    "max": lambda m, y: y.max(1).values,
    "amin": lambda m, y: y.amin(1),
    "aminmax": lambda m, y: y.aminmax(dim=1).max,
    "maximum": lambda m, y: torch.maximum(y[:, 0], y[:, 1]),
    "fmin": lambda m, y: torch.fmin(y[:, 2], y[:, 1]),
    "pool": lambda m, y: m.pool(y.unsqueeze(1))[:, 0, 0],
    "overlapping pool": lambda m, y: F.max_pool1d(y.unsqueeze(1), 3, 1)[:, 0, 0],
    "adaptive pool": lambda m, y: F.adaptive_max_pool1d(y.unsqueeze(1), 1)[:, 0, 0],
    "relu": lambda m, y: y[:, 0] + F.relu(y[:, 1] - y[:, 2]),
    "clamp": lambda m, y: y[:, 0] + (y[:, 1] - y[:, 2]).clamp(0, 1),
    "clamp between tensors": lambda m, y: y[:, 0].clamp(y[:, 1].detach(), y[:, 1].detach() + 1),
    "scatter": lambda m, y: y.new_full((2,), -1e3).scatter_reduce(
        0, torch.arange(2).repeat_interleave(4), y.flatten(), "amax"
    ),
    "scatter with a base": lambda m, y: y[:, 0].scatter_reduce(0, torch.tensor([0, 1]), y[:, 1], "amin"),
    "index": lambda m, y: y.T.new_full((1, 2), -1e3).index_reduce(0, torch.zeros(4, dtype=torch.long), y.T, "amax")[0],
    "segments": lambda m, y: torch.segment_reduce(y.flatten(), "max", lengths=torch.tensor([4, 4])),
    "norm": lambda m, y: y[:, 0] + (y[:, 1:2] - y[:, 2:3]).norm(dim=1),
    "normalize": lambda m, y: y[:, 0] + 0 * F.normalize(y[:, 1:], dim=1).sum(1),
    "hinge": lambda m, y: y[:, 0] + F.margin_ranking_loss(y[:, 1], y[:, 2], torch.ones(len(y)), reduction="none"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")
def test_a_compensation_is_none_over_the_reals(pick, dtype):
    """Rounding of the low precision that entered the replay would be a bifurcation there."""
    kinds = []
    for seed in range(6):
        torch.manual_seed(seed)
        model = Compensated(PICKS[pick]).to(dtype)
        patch(model, Jacobians())
        located = zone(model, lambda y: y.float().sum(), torch.randn(2, 64).to(dtype), LAST)
        kinds.append(located.kind)
        assert located.difference < 1e-9
    assert "bifurcation" not in kinds


def impose(operation, seen, arguments):
    """What a site is given after a recorded evaluation was imposed on it."""
    branches, op = Branches(), OPERATIONS[operation]
    functions = {"max": torch.amax, "maximum": torch.maximum, "relu": torch.relu, "max_pool": F.max_pool2d}
    call = lambda args: op.functions[functions[operation]](*args)  # noqa: E731 # said once
    branches.record("site", op, call(seen))
    branches.begin()
    arguments = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in arguments)
    branches.impose("site", op, call(arguments))
    return arguments


def test_only_what_is_off_its_branch_is_moved_and_not_to_recorded_values():
    low = torch.tensor([1.0, 0.0, -1.0, 0.5, -0.5])
    high = torch.tensor([1 + 1e-9, 1e-9, -1 - 1e-9, -1e-9, 1e-9], dtype=torch.float64)
    (moved,) = impose("relu", (low,), (high,))
    assert torch.equal(moved[:3], torch.stack([high[0], torch.zeros((), dtype=torch.float64), high[2]]))
    assert 0 < moved[3] < 1e-300
    assert -1e-300 < moved[4] < 0


def test_maxima_keep_their_winners_and_their_values():
    low = torch.tensor([[2.0, 2.0, 1.0], [2.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
    high = torch.tensor([[2.0, 2 - 1e-9, 1 + 1e-9], [2 + 1e-9, 1.0, 2.0], [1.0, 2.0, 2 + 1e-9]], dtype=torch.float64)
    moved, _ = impose("max", (low, 1), (high, 1))
    winners = moved == moved.amax(1, keepdim=True)
    assert winners.tolist() == [[True, True, False], [True, False, True], [False, True, False]]
    assert (moved - high).abs().max() < 1.1e-9
    assert moved[0, 2] == high[0, 2]
    assert moved[0, 0] == 2
    assert moved[1, 2] == 2 + 1e-9


@pytest.mark.parametrize("function", [torch.amin, torch.amax, torch.min, torch.max, torch.aminmax])
def test_the_least_and_the_largest_tie_where_they_did(function):
    branches, operation = Branches(), OPERATIONS["max"]
    call = lambda x: operation.functions[function](x, dim=1)  # noqa: E731 # said twice
    nan = float("nan")
    low = torch.tensor([[1.0, 1.0, 2.0, 2.0], [nan, 1.0, 2.0, 2.0]])
    high = torch.tensor([[1.0, 1 + 1e-9, 2.0, 2 - 1e-9], [2 + 1e-9, 1.0, 2.0, 2 + 1e-9]], dtype=torch.float64)
    branches.record("site", operation, call(low))
    branches.begin()
    moved = high.clone()
    branches.impose("site", operation, call(moved))
    least, largest = ("min" in function.__name__), ("max" in function.__name__)
    assert moved[0].tolist() == [1.0, 1.0 if least else 1 + 1e-9, 2.0, 2.0 if largest else 2 - 1e-9]
    assert moved[1, 0] == high[1, 0]  # where the low precision had no number


def test_what_is_recorded_is_what_was_given():
    """The operation may overwrite it."""
    branches, operation = Branches(), OPERATIONS["relu"]
    call = operation.functions[torch.relu]
    low, high = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-1.0, 1e-9, 1.0], dtype=torch.float64)
    branches.record("site", operation, call(low))
    low.relu_()
    branches.begin()
    branches.impose("site", operation, call(high))
    assert high.tolist() == [-1.0, 0.0, 1.0]


def test_pairs_tie_where_they_did():
    low = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([[1.0, 1.0, 2.0]])
    high = torch.tensor([1 + 1e-9, 1.0, 2.0]).double(), torch.tensor([[1.0, 1.0, 2.0]]).double()
    low, high = ((x.expand(1, 3), y) for x, y in (low, high))
    x, y = impose("maximum", low, high)
    assert torch.equal(y, high[1])
    assert x[0, 0] == y[0, 0]
    assert x[0, 1] > y[0, 1]
    assert x[0, 2] < y[0, 2]


def test_of_a_pair_the_one_of_the_whole_shape_is_moved():
    low = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([[1.0, 1.0, 2.0]] * 2)
    high = torch.tensor([1 + 1e-9, 1.0, 2.0]).double(), torch.tensor([[1.0, 1.0, 2.0]] * 2).double()
    x, y = impose("maximum", low, high)
    assert torch.equal(x, high[0])
    assert (y[:, 0] == x[0]).all()
    assert (y[:, 1] < x[1]).all()
    assert (y[:, 2] > x[2]).all()


def moved_by(operation, call, low, high):
    """The replay's operands after a recorded evaluation was imposed on them."""
    branches, high = Branches(), [t.double() for t in high]
    branches.record("site", OPERATIONS[operation], call(*low))
    branches.begin()
    branches.impose("site", OPERATIONS[operation], call(*high))
    return high


def test_vectors_stay_on_their_side_of_what_they_are_divided_by():
    call = lambda x: OPERATIONS["norm"].functions[F.normalize](x, 2.0, 1, 1.0)  # noqa: E731 # the fourth: the least
    high = torch.tensor([[1 + 1e-9, 0.0], [2 + 1e-9, 0.0]], dtype=torch.float64)
    (moved,) = moved_by("norm", call, [torch.tensor([[1.0, 0.0], [2.0, 0.0]])], [high])
    assert moved.tolist() == [[1.0, 0.0], [2 + 1e-9, 0.0]]


def test_hinges_tie_at_the_values_of_the_replay():
    target = torch.tensor([1.0, -1.0, 1.0])
    call = lambda x, y: OPERATIONS["hinge"].functions[F.margin_ranking_loss](x, y, target.to(x))  # noqa: E731 # short
    low = torch.tensor([1.0, 1.0, 2.0]), torch.ones(3)
    high = torch.tensor([[1 + 1e-9, 1 + 1e-9, 2], [1 + 3e-9, 1, 1]], dtype=torch.float64)
    x, y = moved_by("hinge", call, low, high.clone())
    assert torch.equal(y, high[1])
    assert (x - y)[:2].abs().max() < 1e-15
    assert x[2] == 2


def test_planes_with_one_value_keep_their_own():
    """Windows overlap: an entry that wins two of them ties all with one another, inside its plane."""
    low = torch.ones(1, 2, 1, 3)
    high = torch.tensor([[[[1, 1 + 1e-9, 1]], [[1 + 2e-9, 1 + 3e-9, 1 + 2e-9]]]], dtype=torch.float64)
    (moved, *_) = impose("max_pool", (low, (1, 2), 1), (high, (1, 2), 1))
    assert moved.flatten().tolist() == [1.0] * 3 + [1 + 2e-9] * 3


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 1), (2, 1)])
def test_pooling_windows_keep_their_winners(kernel, stride):
    """Quantised images tie all over; noise of another precision breaks the ties, and reverses neighbours."""
    for seed in range(20):
        torch.manual_seed(seed)
        low = (torch.rand(2, 3, 8, 8) * 6).round() / 6
        high = low.double() + 1e-9 * torch.randn(2, 3, 8, 8, dtype=torch.float64)
        moved, *_ = impose("max_pool", (low, kernel, stride), (high, kernel, stride))

        def winners(x):
            windows = x.unfold(2, kernel, stride).unfold(3, kernel, stride).flatten(4)
            return windows == windows.amax(-1, keepdim=True)

        assert torch.equal(winners(moved), winners(low))
        assert (moved - high).abs().max() < 1e-7
        # What need not be moved is not: an untied plane keeps every value.
        untied = torch.rand(1, 1, 8, 8)
        (same, *_) = impose("max_pool", (untied, kernel, stride), (untied.double() + 1e-12, kernel, stride))
        assert torch.equal(same, untied.double() + 1e-12)


def test_a_tie_of_two_windows_is_one_value_each():
    """Two windows apart with the same maximum in the low precision need not have it in the other."""
    low = torch.tensor([[[[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]]])
    high = low.double()
    high[0, 0, 0] = torch.tensor([1.0, 1 + 1e-9, 1 + 2e-9, 1 + 3e-9], dtype=torch.float64)
    (moved, *_) = impose("max_pool", (low, 2), (high, 2))
    assert moved[0, 0, 0, 0] == moved[0, 0, 0, 1] == 1
    assert moved[0, 0, 0, 2] == moved[0, 0, 0, 3] == 1 + 2e-9


def test_nan_is_on_every_side():
    nan = float("nan")
    low = torch.tensor([nan, 1.0, 0.0])
    high = torch.tensor([2.0, 1 + 1e-9, 1e-9], dtype=torch.float64)
    (moved,) = impose("relu", (low,), (high,))
    assert moved.tolist() == [2.0, 1 + 1e-9, 0.0]
    low = torch.rand(1, 1, 4, 4)
    high = low.double() + 1e-12
    low[0, 0, :2, :2] = nan  # a whole window: the others stay on their branches, and keep their values
    (same, *_) = impose("max_pool", (low, 2), (high, 2))
    assert torch.equal(same, high)


@pytest.mark.parametrize(("function", "sign"), [("amax", 1), ("amin", -1)])
def test_groups_keep_their_winners(function, sign):
    branches, operation, groups = Branches(), OPERATIONS["scatter_max"], torch.tensor([0, 0, 0, 1, 1])

    def call(entries):
        base = torch.full((2,), -100.0 * sign, dtype=entries.dtype)
        return operation.functions[torch.scatter_reduce](base, 0, groups, entries, function)

    low = torch.tensor([3.0, 3.0, 2.0, 5.0, 4.0])
    high = torch.tensor([3.0, 3 - 1e-9, 2.0, 4 - 1e-9, 4.0], dtype=torch.float64)
    branches.record("site", operation, call(sign * low))
    branches.begin()
    entries = sign * high
    branches.impose("site", operation, call(entries))
    moved = sign * entries
    assert moved[:3].tolist() == [3.0, 3.0, 2.0]
    assert moved[3] == 4 - 1e-9
    assert moved[4] < moved[3]


def test_a_checkpoint_that_runs_again_takes_the_nearest_record():
    branches, operation = Branches(), OPERATIONS["relu"]
    call = operation.functions[torch.relu]
    for value in (-1.0, 1.0):
        branches.record("site", operation, call(torch.tensor([value])))
    branches.begin()
    branches.again = True
    near = torch.tensor([-1 + 1e-9], dtype=torch.float64)
    branches.impose("site", operation, call(near))
    assert near.item() == -1 + 1e-9
