"""Kinks that are written by hand are found by deciding their ties otherwise; smooth code is left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nslightning import Jacobians, patch
from nslightning.probes import handwritten
from nslightning.probes.audit import Audit, audit
from nslightning.probes.by_hand import _COMPARISONS
from nslightning.report.audit_text import advice


class Net(nn.Module):
    """A function of the rows of a product, of which every other is 0 and has a gradient."""

    def __init__(self, f):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.f = nn.Linear(3, 4, bias=False), f

    def forward(self, x):
        y = self.lin(x)
        return self.f(y - y.detach() * (torch.arange(len(y)) % 2 == 0).unsqueeze(1))


def batch(dtype=torch.float32):
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(model, x):
    weights = torch.linspace(0.5, 2, 4).to(x.dtype)
    return lambda: ((model(x) - 1) * weights).square().sum()


def leaky(y):
    z = y.clone()
    z[z < 0] *= 0.1
    return z


def in_place(y):
    return y * y.clone().detach().gt_(0)


def branch(y):
    return torch.stack([v if v > 0 else 0 * v for v in y.flatten()]).view(y.shape)


def taken(y):
    return y.gather(1, y.argmax(1, keepdim=True)) + 0 * y


KINKS = {
    "mask times": lambda y: y * (y > 0),
    "mask as numbers": lambda y: y * (y >= 0).to(y.dtype),
    "of what is detached": lambda y: y * (y.detach() > 0),
    "where": lambda y: torch.where(y > 0, y, torch.zeros_like(y)),
    "where, the other way": lambda y: torch.where(y <= 0, 0.0, y),
    "method where": lambda y: y.where(y > 0, 0 * y),
    "masked_fill": lambda y: y.masked_fill(y < 0, 0),
    "masked_fill in place": lambda y: y.clone().masked_fill_(torch.lt(y, 0), 0),
    "indexing": leaky,
    "sign": lambda y: y * y.sign(),
    "heaviside": lambda y: y * torch.heaviside(y.detach(), torch.zeros(())),
    "in place": in_place,
    "of two": lambda y: torch.where(y[:, :2] > y[:, 2:], y[:, :2], y[:, 2:]).repeat(1, 2),
    "branches": branch,
    "argmax": taken,
    "elu": lambda y: torch.where(y > 0, y, 2 * torch.expm1(y)),
    "bool product": lambda y: y * torch.logical_and(y > 0, y < 5),
}


@pytest.mark.parametrize("name", KINKS)
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.filterwarnings("ignore:.*nothing to patch")
def test_kinks_are_found(name, patched):
    model = Net(KINKS[name])
    if patched:
        patch(model, Jacobians(), example=batch())
    before = {n: p.clone() for n, p in model.named_parameters()}
    kinks = handwritten(model, loss_of(model, batch()))
    assert [(kink.module, kink.place.split(":")[0]) for kink in kinks] == [("", "test_by_hand.py")]
    (kink,) = kinks
    assert 0 < kink.tied <= kink.total
    assert kink.relative > 1e-2
    assert (
        KINKS[name].__code__.co_firstlineno <= int(kink.place.split(":")[1]) < KINKS[name].__code__.co_firstlineno + 4
    )
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_the_change_is_that_of_the_other_derivative():
    """Of y (y > 0) the other derivative at 0 is 1, as of relu under another choice."""
    x = batch(torch.float64)
    model, other = Net(KINKS["mask times"]).double(), Net(F.relu).double()
    (kink,) = handwritten(model, loss_of(model, x))
    patch(other, Jacobians())
    grads = []
    for choice in (0.0, 1.0):
        other_model = Net(F.relu).double()
        patch(other_model, Jacobians(relu=choice))
        grads.append(torch.autograd.grad(loss_of(other_model, x)(), other_model.lin.weight)[0])
    assert kink.relative == pytest.approx(float((grads[1] - grads[0]).norm() / grads[0].norm()), abs=1e-12)
    assert (kink.tied, kink.total) == (12, 24)


def compared(name):
    """The factor that a comparison with 0 gives, as a function and in place, and the one of its other side."""
    opposite = {"gt": "ge", "ge": "gt", "lt": "le", "le": "lt", "eq": None, "ne": None}
    opposite |= {"greater": "ge", "greater_equal": "gt", "less": "le", "less_equal": "lt", "not_equal": None}
    side = opposite[name]
    other = (lambda y: y * getattr(torch, side)(y, 0)) if side else lambda y: y * float(name != "eq")
    return {
        name: (lambda y: y * getattr(torch, name)(y, 0), other),
        f"{name}_": (lambda y: y * getattr(y.clone().detach(), f"{name}_")(0), other),
    }


def stepped(at_zero, other):
    """The step with a value at 0, and the one with the value on its other side."""
    step = lambda y, value: y * torch.heaviside(y.detach(), torch.tensor(value, dtype=y.dtype))  # noqa: E731
    return lambda y: step(y, at_zero), lambda y: step(y, other)


COLUMNS = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)  # tells the entries of a row of zeros apart


def of_rows(y, index):
    return (y * COLUMNS).gather(1, index.view(-1, 1)) + 0 * y


def last_of_rows(y):
    """Of the rows of zeros the last entry, of the other rows the greatest."""
    return of_rows(y, torch.tensor([3 if bool((row == 0).all()) else int(row.argmax()) for row in y]))


def of_all(y, index):
    return (y * COLUMNS).flatten()[index] + y**2


DECIDED = {
    **{k: v for name in sorted(_COMPARISONS) for k, v in compared(name).items()},
    "sign": (lambda y: y * y.sign(), lambda y: y * (1 - 2 * (y < 0).to(y.dtype))),
    "sgn_": (lambda y: y * y.clone().detach().sgn_(), lambda y: y * (1 - 2 * (y < 0).to(y.dtype))),
    "sign above": (lambda y: y * y.sign().clamp(min=0), lambda y: y * (y >= 0)),
    "heaviside, 0": stepped(0.0, 1.0),
    "heaviside, 1": stepped(1.0, 0.0),
    "heaviside, 1/2": stepped(0.5, 0.0),
    "argmax of rows": (lambda y: of_rows(y, y.argmax(1, keepdim=True)), last_of_rows),
    "argmax of rows, a dimension less": (lambda y: of_rows(y, y.argmax(-1)), last_of_rows),
    "argmin of rows": (lambda y: of_rows(y, torch.argmin(-y, 1, True)), last_of_rows),
    # Rows 0, 2 and 4 are 0: the entry nearest to 0 is the first of row 0, or the last of row 4.
    "argmin of all": (lambda y: of_all(y, y.abs().argmin()), lambda y: of_all(y, 19)),
    "argmax of all": (lambda y: of_all(y, (-y.abs()).argmax()), lambda y: of_all(y, 19)),
}


@pytest.mark.parametrize("name", DECIDED)
def test_the_change_is_that_of_the_side_written_out(name):
    f, other = DECIDED[name]
    model, x = Net(f).double(), batch(torch.float64)
    (kink,) = handwritten(model, loss_of(model, x))
    (before,) = torch.autograd.grad(loss_of(model, x)(), model.lin.weight)
    model.f = other
    (after,) = torch.autograd.grad(loss_of(model, x)(), model.lin.weight)
    assert kink.relative == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-12)


@pytest.mark.parametrize(("units", "found"), [(0, False), (4, False), (1000, True)])
def test_what_rounding_explains_is_no_kink(units, found):
    """One slope is another times 1 + `units` eps; without units, the two branches round one product in two ways."""
    slope = 0.07 * (1 + units * torch.finfo(torch.float32).eps)
    model = Net(lambda y: torch.where(y > 0, y * slope, y * 0.1 * 0.7) if units else torch.where(y > 0, 5 * y, five(y)))
    assert bool(handwritten(model, loss_of(model, batch()))) is found


def five(y):
    return y + y + y + y + y


SMOOTH = {
    "gelu": F.gelu,
    "silu": F.silu,
    "softmax": lambda y: y.softmax(-1),
    "layer norm": lambda y: F.layer_norm(y, (4,)),
    "huber by hand": lambda y: torch.where(y * y <= 0, y * y / 2, y * y / 2 + y**3),
    "sinc by hand": lambda y: torch.where(y == 0, torch.ones_like(y), y.sin() / torch.where(y == 0, 1.0, y)),
    "causal mask": lambda y: y.masked_fill(torch.ones(6, 4).triu(1) == 1, -1e4).softmax(-1),
    "padding": lambda y: y * (torch.arange(4) < 2),
    "a check": lambda y: y if bool((y >= -100).all()) else y * 2,
    "attention": lambda y: F.scaled_dot_product_attention(y[None], y[None], y[None])[0],
    "softplus by hand": lambda y: torch.where(y > 20, y, torch.log1p(y.clamp(max=20).exp())),
    "a square by parts": lambda y: torch.where(y > 0, y * y, -(y * y)),
    "max pooling of its own kernel": lambda y: F.max_pool1d(y, 2).repeat(1, 2),
    "relu": F.relu,
    "dropout": lambda y: F.dropout(y, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", SMOOTH)
def test_what_has_no_kink_of_its_own_is_left_alone(name):
    model = Net(SMOOTH[name])

    def loss():
        torch.manual_seed(3)
        return loss_of(model, batch())()

    assert handwritten(model, loss) == []


def test_jumps_are_not_kinks():
    model = Net(lambda y: y * 0 + (y > 0) + y)
    assert handwritten(model, loss_of(model, batch())) == []


def test_forgotten_arguments_are_passed_on():
    """PyTorch's handler forgets the weight of an L1 loss where a mode is active."""
    model, x = Net(lambda y: y * (y > 0)), batch()
    seen = []

    def loss():
        seen.append(F.l1_loss(model(x), torch.ones(6, 4), weight=torch.full((6, 4), 7.0)))
        return seen[-1]

    assert len(handwritten(model, loss)) == 1
    assert seen[0] == loss()


def test_smooth_networks_cost_one_forward():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.TransformerEncoderLayer(4, 2, 8, activation="gelu"))
    runs = []

    def loss():
        runs.append(0)
        torch.manual_seed(0)
        return model(batch()[None]).square().sum()

    assert handwritten(model, loss) == []
    assert len(runs) == 1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 4)
        nn.init.zeros_(self.lin.weight), nn.init.zeros_(self.lin.bias)

    def forward(self, x):
        y = self.lin(x)
        return torch.where(y > 0, y, 0) + x.sum()


def test_an_audit_names_the_module_and_the_line():
    model = nn.Sequential(nn.Linear(3, 3), Block(), nn.Linear(4, 2))
    audited = audit(model, [(batch(), None)] * 2, dtypes=["32", "64"])
    (line,) = audited.by_hand
    assert (line.name, line.place.split(":")[0], line.code) == (
        "1", "test_by_hand.py", "return torch.where(y > 0, y, 0) + x.sum()",
    )  # fmt: skip
    assert line.ties == {"32": (48, 48), "64": (48, 48)}
    assert all(value > 0.01 for value in line.relative.values())
    paragraphs = [text for text in advice(audited) if text.startswith("A kink written by hand")]
    assert not audited.clarke["32"].holds
    assert len(paragraphs) == 1
    assert "1 compares at test_by_hand.py" in paragraphs[0]
    assert "F.relu" in paragraphs[0]
    assert Audit.from_dict(audited.to_dict()) == audited
    older = audited.to_dict()
    del older["by_hand"]
    assert Audit.from_dict(older).by_hand == []
    pairs = [(factor * batch(), torch.arange(6) % 2) for factor in (1, 3)]
    alone = [audit(model, [pair], dtypes=["64"]).by_hand[0].relative["64"] for pair in pairs]
    assert alone[0] != alone[1]
    for order in (pairs, pairs[::-1]):
        assert audit(model, order, dtypes=["64"]).by_hand[0].relative["64"] == max(alone)
    smooth = audit(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), [(batch(), None)], dtypes=["32"])
    assert smooth.by_hand == []
