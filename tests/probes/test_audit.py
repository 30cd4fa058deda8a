"""The audit: counts, divergences, verdicts and files, each against a separate computation; the command's statuses."""

import copy
import json
import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from nslightning import Jacobians, patch
from nslightning.cli import main
from nslightning.models.own import own_network
from nslightning.probes import divergence
from nslightning.probes.audit import CHOICES, DTYPES, Audit, SiteTies, Spread, audit, verdict
from nslightning.report import chart
from nslightning.report.audit_page import page
from nslightning.report.audit_text import advice, percent, site_label, table
from nslightning.surgery import selections


class Net(nn.Module):
    """Ties at a ReLU, behind a zeroed channel, and at the pools, behind a constant one; dropout."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.pool, self.drop, self.fc = nn.MaxPool2d(3, 2, 1), nn.Dropout(0.3), nn.Linear(16, 5)
        with torch.no_grad():
            self.bn.weight[1] = self.bn.bias[1] = 0
            self.conv.weight[2] = 0
            self.bn.bias[2] = 0.5

    def forward(self, x):
        x = self.pool(self.act(self.bn(self.conv(x))))
        return self.fc(self.drop(F.max_pool2d(x, 2)).flatten(1))


class Relu(nn.Module):
    """Logits behind one ReLU, whose first channel can be made to tie, with a given weight on what follows it."""

    def __init__(self, tie=False, after=1.0):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Linear(4, 3)
        with torch.no_grad():
            if tie:
                self.conv.weight[0] = self.conv.bias[0] = 0
            self.fc.weight[:, 0] *= after

    def forward(self, x):
        return self.fc(self.act(self.conv(x)).mean((2, 3)))


@pytest.fixture
def batches():
    images = torch.randn(2, 4, 3, 8, 8)
    images[0, 0] = 0.25  # a constant image, so that windows tie
    return [(images[0], torch.tensor([0, 1, 2, 0])), (images[1], torch.tensor([2, 1, 4, 3]))]


@pytest.fixture
def few():
    return [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))]


def windows_with_ties(x, kernel, stride, padding):
    """(tied, all) windows, counted in a loop."""
    x = x.double().numpy()
    tied = total = 0
    height = (x.shape[2] + 2 * padding - kernel) // stride + 1
    for image in x.reshape(-1, *x.shape[2:]):
        full = np.pad(image, padding, constant_values=-np.inf)
        for r in range(0, height * stride, stride):
            for s in range(0, height * stride, stride):
                window = full[r : r + kernel, s : s + kernel]
                tied += (window == window.max()).sum() > 1
                total += 1
    return int(tied), total


@pytest.mark.parametrize("dtype", DTYPES)
def test_tie_counts_agree_with_a_count_on_hooked_inputs(batches, dtype):
    net = Net()
    audited = audit(net, batches, dtypes=[dtype])
    seen = {"act": [0, 0], "pool": [0, 0]}
    stock = copy.deepcopy(net).to(DTYPES[dtype]).train()

    def relu_hook(module, args):
        seen["act"][0] += int((args[0] == 0).sum())
        seen["act"][1] += args[0].numel()

    def pool_hook(module, args):
        seen["pool"] = [a + b for a, b in zip(seen["pool"], windows_with_ties(args[0], 3, 2, 1), strict=True)]

    stock.act.register_forward_pre_hook(relu_hook)
    stock.pool.register_forward_pre_hook(pool_hook)
    with torch.no_grad():
        for images, _ in batches:
            stock(images.to(DTYPES[dtype]))
    sites = {site.name: site for site in audited.sites}
    assert list(sites) == ["act", "pool", ":max_pool2d"]
    for name in seen:
        assert sites[name].ties == {dtype: tuple(seen[name])}
    assert seen["act"][0] >= 2 * 4 * 64  # the zeroed channel
    assert 0 < seen["pool"][0] < seen["pool"][1]
    assert sites[":max_pool2d"].how == "functional"
    assert sites["act"].fraction(dtype) == seen["act"][0] / seen["act"][1]


def test_divergence_is_the_subtraction_in_float64(batches):
    net = Net()
    audited = audit(net, batches, dtypes=["64"], seed=3)
    want = {choice: [] for choice in CHOICES}
    layers = {}
    for i, (images, labels) in enumerate(batches):
        other = copy.deepcopy(net).double().train()
        patch(other, Jacobians())
        torch.manual_seed(3 + i)
        loss = F.cross_entropy(other(images.double()), labels)
        for choice, value in divergence(loss, other, CHOICES).items():
            want[choice].append(value.relative)
            layers[choice, i] = value
    assert [s.choice for s in audited.spreads] == list(CHOICES)
    for spread in audited.spreads:
        assert spread.per_batch == pytest.approx(want[spread.choice], rel=1e-9, abs=1e-15)
        assert spread.relative == max(spread.per_batch)
        if spread.relative:
            worst = layers[spread.choice, spread.per_batch.index(spread.relative)]
            name, share = next(iter(spread.layers.items()))
            assert share == pytest.approx((worst.per_layer[name].l2 / worst.l2) ** 2, rel=1e-8)
            assert share == max(spread.layers.values())
    by_choice = {s.choice: s.relative for s in audited.spreads}
    assert by_choice["jax"] == by_choice["tensorflow"] == 0
    assert by_choice["relu1"] > 1e-3
    assert by_choice["beta10"] > by_choice["minimal"] > 1e-3


def test_alpha_1_is_a_relu_written_by_hand(few):
    class One(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, g):
            return g * (ctx.saved_tensors[0] >= 0)

    net, grads = Relu(tie=True).double(), []
    for act in (torch.relu, One.apply):
        other = copy.deepcopy(net)
        loss = F.cross_entropy(other.fc(act(other.conv(few[0][0].double())).mean((2, 3))), few[0][1])
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(other.parameters()))]))
    want = float((grads[1] - grads[0]).norm() / grads[0].norm())
    audited = audit(net, few, dtypes=["64"], choices={"relu1": CHOICES["relu1"]})
    assert want > 1e-2
    assert audited.largest == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("model", "expected", "says"),
    [
        ({"tie": False}, "no ties", "do not depend on the Jacobian choice"),
        ({"tie": True, "after": 0.0}, "dead ties", "only dead ties. 1 site meets ties, most often act (25 % in 32)"),
        ({"tie": True, "after": 1e-9}, "rounding", "no more than rounding"),
        ({"tie": True}, "matters", "relu: the choice matters in 32. relu1 changes the gradient"),
    ],
)
def test_planted_ties_change_the_advice(few, model, expected, says):
    audited = audit(Relu(**model), few, dtypes=["32"])
    assert verdict(audited, "32") == expected
    words = "\n".join(advice(audited))
    assert says in words
    assert ("Nothing to change" in words) == (expected in ("dead ties", "rounding"))
    assert audited.largest == 0 if expected in ("no ties", "dead ties") else audited.largest > 0
    assert says in table(audited)
    assert expected in page(audited)


def test_advice_tells_the_ties_of_rounding_from_those_of_the_network(few):
    # 1 + 2^-10 is 1 in bf16 and is not in float64: windows of such outputs tie in bf16 alone.
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        net[0].weight.mul_(2**-10)
        net[0].bias.fill_(1)
    audited = audit(net, [(torch.randn(4, 3, 8, 8), few[0][1])], dtypes=["bf16", "64"])
    assert [verdict(audited, d) for d in ("bf16", "64")] == ["matters", "no ties"]
    assert "rounding makes the ones that do" in "\n".join(advice(audited))
    audited = audit(Relu(tie=True), few, dtypes=["bf16", "64"])
    assert "the network or the data makes ties" in "\n".join(advice(audited))


def test_a_difference_that_cancels_over_the_reals_is_rounding():
    """On a constant background every window of a plane gains what another one loses: only rounding is left."""
    torch.manual_seed(0)
    images = torch.zeros(4, 1, 80, 80)
    images[:, :, 20:40, 20:40] = torch.rand(4, 1, 20, 20)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip
    choices = {name: CHOICES[name] for name in ("minimal", "beta10")}
    audited = audit(net, [(images, torch.tensor([0, 1, 2, 0]))], dtypes=["32", "64"], choices=choices)
    for dtype in ("32", "64"):
        largest = max((s for s in audited.spreads if s.dtype == dtype), key=lambda s: s.relative)
        assert largest.relative > 2 * float(torch.finfo(DTYPES[dtype]).eps)  # which alone would say that it matters
        assert largest.zone == "compensation"
        assert verdict(audited, dtype) == "rounding"
    words = "\n".join(advice(audited))
    assert "large terms cancel in it: over the real numbers the gradients agree" in words
    assert "Nothing to change" in words
    assert Audit.from_dict(json.loads(json.dumps(audited.to_dict()))) == audited
    net[0].weight.data[0] = net[0].bias.data[0] = 0  # a plane that is constant: its ties do not cancel
    net[2] = nn.Sequential(nn.ReLU(), net[2])
    real = audit(net, [(images, None)], dtypes=["32"], choices=CHOICES)
    assert "bifurcation" in {s.zone for s in real.spreads}
    assert verdict(real, "32") == "matters"


def test_a_batch_without_a_finite_gradient_is_the_largest_difference(few):
    images, labels = few[0]
    batches = [(images, labels), (torch.full_like(images, math.inf), labels)]
    for order in (batches, batches[::-1]):
        audited = audit(Relu(tie=True), order, dtypes=["32"], choices={"relu1": CHOICES["relu1"]})
        (spread,) = audited.spreads
        assert sum(map(math.isnan, spread.per_batch)) == 1
        assert math.isnan(spread.relative)
        assert verdict(audited, "32") == "not finite"


def test_a_zone_is_that_of_the_batch_with_the_largest_difference(monkeypatch):
    """With its images, its labels and its draws."""

    class Dropped(Relu):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5))

    seen = []

    def located(model, loss_fn, inputs, choice):
        seen.append((inputs, loss_fn(model(inputs)).item()))
        return SimpleNamespace(kind="bifurcation")

    monkeypatch.setattr(sys.modules[Audit.__module__], "zone", located)
    net, at = Dropped(tie=True), []
    pictures = torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)
    for images, labels in product((pictures, pictures[::-1]), ((torch.arange(8) % 3, None), (None, None))):
        batches = list(zip(images, labels, strict=True))
        audited = audit(net, batches, dtypes=["64"], choices={"relu1": CHOICES["relu1"]}, seed=7)
        (spread,) = audited.spreads
        at.append(i := spread.per_batch.index(spread.relative))
        y = labels[i]
        if y is None:
            y = torch.randint(3, (8,), generator=torch.Generator().manual_seed(7 + i))
        torch.manual_seed(7 + i)
        expected = F.cross_entropy(copy.deepcopy(net).double()(images[i].double()), y)
        inputs, loss = seen.pop()
        assert torch.equal(inputs, images[i].double())
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        assert spread.zone == "bifurcation"
    assert 1 in at


def test_ties_of_every_operation_are_measured(few):
    """The presets and the named choices leave hardswish alone. The audit called its ties dead."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Hardswish(), nn.Flatten(), nn.Linear(192, 3))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-3.0)
    measured = audit(net, few, dtypes=["32"])
    assert [name for name in measured.choices if name not in CHOICES] == [
        "hardswish=(0.0, 1.5)",
        "hardswish=(-0.5, 1.0)",
    ]
    by_choice = {s.choice: s.relative for s in measured.spreads}
    assert by_choice["hardswish=(-0.5, 1.0)"] > 0 == by_choice["hardswish=(0.0, 1.5)"]  # the ties are at -3
    assert verdict(measured, "32") == "matters"
    relu = audit(Relu(tie=True), few, dtypes=["32"])
    assert relu.choices.keys() == CHOICES.keys() == {s.choice for s in relu.spreads}


def test_operations_that_are_not_measured_are_named(few):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Hardswish(), nn.LPPool2d(2, 1), nn.Flatten())
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-3.0)
    words = "\n".join(advice(audit(net, few, dtypes=["32"], choices=CHOICES)))
    assert "the gradients of all measured choices agree exactly." in words
    assert "Ties of hardswish were met, and no measured choice changes them: their effect is not known" in words
    assert "dead" not in words
    assert "Nothing to change" not in words
    assert "Not measured: 2 keeps PyTorch's own derivative" in words
    smooth = nn.Sequential(nn.Conv2d(3, 3, 8), nn.SiLU(), nn.Flatten())
    assert "there was nothing to choose" in advice(audit(smooth, few, dtypes=["32"]))[0]


@pytest.mark.filterwarnings("ignore:gradients are subtracted")  # noise does not add up
def test_noise_floor(few):
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * (1 + 2 * torch.rand(()))

    class NoisyNet(Relu):
        def forward(self, x):
            return super().forward(Noisy.apply(x)) + 0 * Noisy.apply(self.fc.bias)

    class VeryNoisy(Relu):
        def forward(self, x):
            return Noisy.apply(super().forward(x))

    class NoisyKernel(Relu):  # which nothing in the graph tells, as of atomic additions
        def forward(self, x):
            y = super().forward(x)
            if y.requires_grad:
                y.register_hook(lambda g: g * (1 + 2 * torch.rand(())))
            return y

    assert audit(NoisyKernel(tie=True), few, dtypes=["32"]).noise["32"] > 1e-3
    assert audit(Relu(tie=True), few).noise == dict.fromkeys(DTYPES, 0.0)
    audited = audit(VeryNoisy(tie=True), few, dtypes=["32"])
    assert audited.noise["32"] > 1e-3
    for factor, words in ((2.0, "matters"), (0.5, "rounding")):  # of the floor
        spread = replace(audited.spreads[0], relative=factor * audited.noise["32"])
        assert verdict(replace(audited, spreads=[spread]), "32") == words
    assert audit(NoisyNet(tie=True), few, dtypes=["32"]).noise["32"] == 0  # noise that reaches no parameter


@pytest.mark.filterwarnings("ignore:gradients are subtracted")  # noise does not add up
def test_the_noise_floor_is_that_of_the_noisiest_batch():
    class NoisyWhereBright(Relu):
        def forward(self, x):
            y = super().forward(x)
            if y.requires_grad and x.mean() > 0:
                y.register_hook(lambda g: g * (1 + 2 * torch.rand(())))
            return y

    bright, dark = (torch.randn(2, 3, 8, 8).abs() * sign for sign in (1, -1))
    batches = [(bright, None), (dark, None)]
    for order in (batches, batches[::-1]):
        assert audit(NoisyWhereBright(tie=True), order, dtypes=["32"]).noise["32"] > 1e-3
    assert audit(NoisyWhereBright(tie=True), batches[1:], dtypes=["32"]).noise["32"] == 0


def test_model_and_random_state_are_left_untouched(batches):
    net = Net().eval()
    net.conv.weight.grad = marker = torch.ones_like(net.conv.weight)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    types = [type(m) for m in net.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002 # the global one
    first = audit(net, batches, dtypes=["16", "32"])
    assert net.conv.weight.grad is marker
    assert not net.training
    assert [type(m) for m in net.modules()] == types
    assert not selections(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002 # the global one
    torch.manual_seed(99)
    assert audit(net, batches, dtypes=["16", "32"]) == first
    assert audit(net, batches, dtypes=["32"], training=False).spreads != first.spreads[len(CHOICES) :]


def test_buffers_are_put_back_before_each_batch(few):
    class Counting(Relu):
        def __init__(self):
            super().__init__(tie=True)
            self.register_buffer("calls", torch.ones(()))

        def forward(self, x):
            self.calls.mul_(2)
            return super().forward(x) * float(self.calls)

    net = Counting()
    first, again = audit(net, few * 2, dtypes=["64"], choices={"relu1": CHOICES["relu1"]}).spreads[0].per_batch
    assert first == again > 0
    assert net.calls == 1


def test_a_dtype_that_cannot_be_run_is_said(few):
    class NoHalf(Relu):
        def forward(self, x):
            if x.dtype == torch.float16:
                raise RuntimeError('"net" not implemented for <Half>')
            return super().forward(x)

    audited = audit(NoHalf(), few, dtypes=["16", "32"])
    assert audited.dtypes == ["32"]
    assert audited.not_run == {"16": '"net" not implemented for <Half>'}
    assert '16 could not be run on cpu: "net" not implemented for <Half>' in table(audited)
    assert "not implemented for &lt;Half&gt;" in page(audited)
    assert any(line.startswith("16 could not be run on cpu") for line in advice(audited))
    with pytest.raises(RuntimeError, match=r"runs in none of 16: .*not implemented"):
        audit(NoHalf(), few, dtypes=["16"])


def test_json_round_trip_also_of_what_is_not_finite(batches):
    audited = audit(Net(), batches, dtypes=["16", "32"])
    plain = json.loads(json.dumps(audited.to_dict(), allow_nan=False))
    assert Audit.from_dict(plain) == audited
    assert plain["largest"] == audited.largest
    huge = audit(Relu(tie=True), [(torch.full((1, 3, 2, 2), 1e30), torch.tensor([0]))], dtypes=["16"])
    assert verdict(huge, "16") == "not finite"
    assert math.isnan(huge.largest)
    assert "not finite" in table(huge)
    assert "not finite" in page(huge)
    text = json.dumps(huge.to_dict(), allow_nan=False)
    assert json.dumps(Audit.from_dict(json.loads(text)).to_dict()) == text


def figures(source):
    """The rows of a page's figures, decoded as the page's script does."""
    data = json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', source)[1])
    rows = []
    for figure in data["figures"]:
        columns = {
            n: [c["values"][i] for i in c["codes"]] if isinstance(c, dict) else c for n, c in figure["columns"].items()
        }
        rows.append([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    return rows


def test_html_loads_nothing_and_names_every_site(batches):
    audited = audit(Net(), batches, name="<b>&net", data='"mine"')
    text = page(audited)
    assert "<b>&net" not in text
    assert "&lt;b&gt;&amp;net" in text
    assert "default-src 'none'" in text
    shown = text.partition("<script")[0]
    assert not re.search(r'(?:src|href)="(?!#)', shown)
    spreads, sites = figures(text)
    assert [(r["row"], r["series"], r["rounding"]) for r in spreads] == [
        (s.choice, s.dtype, pytest.approx(torch.finfo(DTYPES[s.dtype]).eps, rel=1e-4))
        for choice in CHOICES for s in audited.spreads if s.choice == choice
    ]  # fmt: skip
    drawn = {(r["row"], r["series"]): r["value"] for r in spreads}
    for spread in audited.spreads:
        assert drawn[spread.choice, spread.dtype] == pytest.approx(spread.relative, rel=1e-4)
    drawn = {(r["row"], r["series"]): r["value"] for r in sites}
    assert drawn == {
        (site_label(site.name), dtype): pytest.approx(site.fraction(dtype), rel=1e-4)
        for site in audited.tied_sites for dtype in DTYPES
    }  # fmt: skip
    for site in audited.sites:
        assert f">{site_label(site.name)}</th>".replace(".", ".<wbr>") in text
    for tag in ("table", "div", "p", "tr", "td", "details", "title"):
        assert len(re.findall(rf"<{tag}[ >]", shown)) == shown.count(f"</{tag}>")


@pytest.mark.parametrize("version", ["5.8", "6.4"])
def test_each_value_is_drawn_once_and_zeros_are_hollow(version):
    """Drawn by Vega itself: filled marks, hollow ones for exact zeros, crosses for what is not finite, two rules."""
    from vl_convert import vegalite_to_svg

    values = [("relu1", "16", 0.25), ("relu1", "32", 0.0), ("beta10", "16", None), ("beta10", "32", 1e-6)]
    rows = [{"row": c, "series": d, "value": v, "rounding": 1e-3 if d == "16" else 1e-7} for c, d, v in values]
    svg = vegalite_to_svg(chart("dots") | {"datasets": {"wandb": rows}}, vl_version=version)
    marks = re.findall(r'<path aria-label="([^"]*)" role="graphics-symbol" aria-roledescription="point"[^>]*>', svg)
    shown = [tuple(re.search(rf"{key}: ([^;]+)", mark)[1] for key in ("of", "precision", "value")) for mark in marks]
    assert sorted(shown) == [
        ("beta10", "16", "not finite"), ("beta10", "32", "1e-6"), ("relu1", "16", "2.5e-1"),
        ("relu1", "32", "exactly 0"),
    ]  # fmt: skip
    hollow = [mark for mark in re.findall(r'aria-roledescription="point"[^>]*>', svg) if " fill=" not in mark]
    assert len(hollow) == 2
    assert svg.count('aria-roledescription="rule mark"') == 2
    assert re.search(r'<text[^>]* fill="[^"]+"[^>]*>0</text>', svg), "the head of the zeros' column has a colour"
    assert "undefined" not in svg


def test_five_hundred_sites_stay_readable():
    """The figure begins with the forty most tied sites, and the others fold away; each one is on the page."""
    sites = [SiteTies(f"blocks.{i}.act", "relu", "module", "ReLU", {"32": (i, 1000)}) for i in range(500)]
    spread = Spread("relu1", "32", 0.1, 1.0, [0.1], {"w": 1.0})
    choices = {"relu1": CHOICES["relu1"].to_dict()}
    measured = Audit("net", "synthetic", "cpu", True, "2", 1, (1, 3), choices, ["32"], {}, sites, [spread], {"32": 0.0})
    source = page(measured)
    (figure,) = (f for f in json.loads(re.search(r'id="figures">(.*?)</script>', source)[1])["figures"] if f["first"])
    assert figure["first"] == ["row", 40]
    assert figure["columns"]["row"]["values"][:2] == ["blocks.499.act", "blocks.498.act"]
    first, more = source.split("<summary>More sites with ties: 459</summary>")
    assert first.partition("<body>")[2].count("blocks.<wbr>") == 40
    assert more.partition("<summary>Sites without ties: 1</summary>")[0].count("blocks.<wbr>") == 459


def test_table_is_aligned_and_says_what_it_leaves_out(few):
    layers = [nn.Conv2d(3, 3, 1), *(nn.ReLU() for _ in range(25)), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    audited = audit(nn.Sequential(*layers), few, dtypes=["32", "64"])
    text = table(audited)
    assert "25 sites: 24 tied (20 shown; --json and --html list all), 1 without a tie (" in text
    lines = text.splitlines()
    start = lines.index("Ties, as a share of evaluations") + 1
    assert len({len(line) for line in lines[start : start + 22]}) == 1
    assert [percent(x) for x in (1.0, 0.5, 3e-6, 0.999999)] == ["100 %", "50 %", "0.0003 %", "99.9999 %"]


def test_wrong_calls_of_the_function(few):
    with pytest.raises(ValueError, match=r"dtype 'fp32' is not known\. Allowed: 16, bf16, 32, 64"):
        audit(Relu(), few, dtypes=["fp32"])
    with pytest.raises(ValueError, match="at least one batch"):
        audit(Relu(), [])
    with pytest.raises(ValueError, match="labels go from 0 to 7, and the model has 3 classes"):
        audit(Relu(), [(few[0][0], torch.tensor([0, 7, 1, 1]))])
    with pytest.raises(ValueError, match="K >= 2 classes"):
        audit(nn.Sequential(nn.Conv2d(3, 1, 8), nn.Flatten()), few)
    patched = Relu()
    patch(patched, Jacobians())
    with pytest.raises(ValueError, match="patched"):
        audit(patched, few)


# ------------------------------------------------------------------------------------------------- the command
MODELS = """
import torch
from torch import nn

def build(channels=3):
    net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    with torch.no_grad():
        net[0].weight[0] = net[0].bias[0] = 0
    return net

def gray(): return build(1)
def broken(): raise KeyError("no weights")
def number(): return 3
class Asserts(nn.Linear):
    def forward(self, x):
        raise AssertionError("wrong size")
def asserts(): return Asserts(1, 2)
instance = build()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(MODELS)
    (tmp_path / "bad_syntax.py").write_text("def build(:")
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path
    sys.modules.pop("own_models", None)


def run(*args):
    return main(["audit", *args])


def test_own_model_files_and_fail_above(own, capsys):
    small = ["own_models:build", "--image-size", "12", "--precisions", "32", "64"]
    assert run(*small, "--json", "a.json", "--html", "a.html") == 0
    plain = json.loads(Path("a.json").read_text())
    assert re.search(r"^1 +relu +25 % +25 %$", capsys.readouterr().out, re.MULTILINE)
    assert plain["model"] == "own_models:build"
    assert plain["sites"][0]["ties"] == {"32": [400, 1600], "64": [400, 1600]}
    assert Path("a.html").read_text().startswith("<!DOCTYPE html>")
    largest = plain["largest"]
    assert largest > 1e-3
    assert run(*small, "--fail-above", repr(largest)) == 0
    assert run(*small, "--fail-above", repr(math.nextafter(largest, 0)), "--json", "b.json") == 3
    assert "exceeds --fail-above" in capsys.readouterr().err
    assert json.loads(Path("b.json").read_text()) == plain  # written all the same, and the same numbers
    assert run("own_models:instance", *small[1:], "--eval") == 0
    assert sorted(p.name for p in own.iterdir() if p.is_file()) == [
        "a.html",
        "a.json",
        "b.json",
        "bad_syntax.py",
        "own_models.py",
    ]


def test_named_model_on_the_sample(capsys):
    assert run("paper/lenet5", "--data", "FashionMNISTSample", "--precisions", "32", "--batches", "2") == 0
    out = capsys.readouterr().out
    assert "2 batches of 4 x 1 x 28 x 28, FashionMNISTSample" in out
    assert re.search(r"^pool1 +max_pool +\d+(\.\d+)? %$", out, re.MULTILINE)


def test_folder_of_images(own, capsys):
    rng = np.random.default_rng(0)
    for name in ("tree/cat/1.png", "tree/cat/2.jpg", "tree/dog/3.png", "tree/dog/4.JPEG", "flat/1.png", "flat/2.png"):
        path = own / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    few = ["--precisions", "32", "--image-size", "16"]
    assert run("own_models:build", "--data", "tree", *few, "--json", "a.json") == 0
    plain = json.loads((own / "a.json").read_text())
    assert plain["data"] == "4 images of tree, 2 classes, resized and cropped from 30 x 20 pixels (--image-size)"
    assert plain["shape"] == [4, 3, 16, 16]
    assert run("own_models:build", "--data", "flat", "--batch-size", "2", *few) == 0
    assert "2 images of flat, random labels, resized and cropped from 30 x 20 pixels" in capsys.readouterr().out
    assert run("own_models:build", "--data", "flat", "--batch-size", "3", *few, "--html", "x.html") == 1
    assert "2 images in it, 3 needed" in capsys.readouterr().err
    assert run("own_models:gray", "--data", "flat", "--batch-size", "2", *few) == 1
    assert "takes images of 1 channel, the data have 3" in capsys.readouterr().err
    (own / "flat/1.png").write_bytes(b"no image")
    assert run("own_models:build", "--data", "flat", "--batch-size", "2", *few, "--html", "x.html") == 1
    assert "the image cannot be decoded" in capsys.readouterr().err
    assert not (own / "x.html").exists()


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["timn/resnet18"], 2, ["no model 'timn/resnet18'", "did you mean 'timm/resnet18'"]),
        (["paper/lenet"], 2, ["no model 'paper/lenet'", "did you mean 'paper/lenet5'"]),
        (["resnet18"], 2, ["package.module:factory"]),
        (["paper/lenet5", "--data", "MNSIT"], 2, ["no such folder or data set", "did you mean 'MNIST'"]),
        (["own_model:build"], 2, ["no module 'own_model'", "did you mean 'own_models:build'"]),
        (["own_models:biuld"], 2, ["has no 'biuld'", "did you mean 'own_models:build'"]),
        (["own_models:number"], 2, ["returns a int, not an nn.Module"]),
        (["own_models:broken"], 1, ["own_models:broken() failed with KeyError: 'no weights'"]),
        ([".own_models:build"], 2, ["not of the form package.module:factory"]),
        (["own_models:"], 2, ["not of the form package.module:factory"]),
        (["bad_syntax:build"], 1, ["importing bad_syntax failed with SyntaxError"]),
        (["own_models:asserts"], 1, ["runs in none of 16, bf16, 32, 64: AssertionError: wrong size"]),
        (["own_models:build", "--image-size", "1"], 1, ["runs in none of 16, bf16, 32, 64"]),
        (["own_models:build", "--html", "missing/a.html"], 2, ["there is no folder missing"]),
        (["own_models:build", "--json", "."], 2, ["--json takes a file"]),
        (["own_models:build", "--json", "a", "--html", "a"], 2, ["name one file"]),
        (["own_models:build", "--device", "cuda:99"], 2, ["--device=cuda:99 is not here. ", "There is cpu"]),
    ],
)
def test_wrong_calls_of_the_command(own, capsys, args, status, says):
    assert run(*args) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in ("nslightning audit: error: ", *says):
        assert text in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "the following arguments are required: MODEL"),
        (["paper/lenet5", "--bach_size", "3"], "did you mean '--batch-size'"),
        (["paper/lenet5", "--batch-size", "0"], "'0' is not a whole number of at least 1"),
        (["paper/lenet5", "--precisions", "fp16"], "invalid choice: 'fp16'"),
        (["paper/lenet5", "--fail-above", "nan"], "'nan' is not a number of at least 0"),
    ],
)
def test_options_that_are_not_understood(capsys, args, says):
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_nothing_half_written_stays(own, capsys, monkeypatch):
    def full(self, target):
        raise OSError("no space left on device")

    (own / "a.json").write_text("before")
    monkeypatch.setattr(Path, "replace", full)
    assert run("own_models:build", "--image-size", "12", "--precisions", "32", "--json", "a.json") == 1
    assert "no space left on device" in capsys.readouterr().err
    assert (own / "a.json").read_text() == "before"
    assert sorted(p.name for p in own.iterdir() if p.is_file()) == ["a.json", "bad_syntax.py", "own_models.py"]


def test_help_is_quick_and_documents_the_statuses():
    code = (
        "import sys\nfrom nslightning.cli import main\ntry:\n    main(['audit', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'timm', 'torchvision', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--fail-above" in shown
    assert "exit status: 0 done; 1" in shown
    assert "3 a relative divergence exceeds --fail-above" in shown


def test_an_interrupted_audit_keeps_what_it_measured(tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second precision: the first is shown and written, and the way to the rest is named."""
    from nslightning.probes import audit as module

    measure = module._measure

    def interrupted(network, batches, dtype, *rest):
        if dtype == "64":
            raise KeyboardInterrupt
        return measure(network, batches, dtype, *rest)

    monkeypatch.setattr(module, "_measure", interrupted)
    file = tmp_path / "audit.json"
    command = ["audit", "paper/lenet5", "--batch-size=2", "--json", str(file)]
    assert main([*command, "--precisions", "32", "64", "16"]) == 130
    said = capsys.readouterr()
    assert "--precisions 64 16 measures the rest" in said.err
    assert json.loads(file.read_text())["dtypes"] == ["32"]
    file.unlink()
    assert main([*command, "--precisions", "64", "32"]) == 130
    assert "nslightning audit: stopped by Ctrl-C; nothing was measured yet" in capsys.readouterr().err
    assert not file.exists()


def test_progress_is_one_line_of_a_terminal(capsys, monkeypatch):
    from nslightning.commands import progress

    with progress.progress() as tell:
        tell("at once, where it is no terminal: nothing")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress.progress() as tell:
        tell("one")
        tell("two")
    assert capsys.readouterr().err == "\r\x1b[Kone\r\x1b[Ktwo\r\x1b[K"


# ------------------------------------------------------------------------------------------------ the user's weights
SMALL = ["--precisions", "32", "--json", "a.json"]


def test_a_checkpoint_into_ones_own_network(own, capsys):
    alive = own_network("own_models:build")
    nn.init.constant_(alive[0].bias, 1.0)
    weights = {f"net.{name}": value for name, value in alive.state_dict().items()}
    torch.save({"state_dict": weights | {"loss.weight": torch.ones(1)}}, "a.ckpt")
    dead = ["own_models:build", "--image-size", "12", *SMALL]
    assert run(*dead) == 0
    assert json.loads((own / "a.json").read_text())["largest"] > 0
    assert run(*dead, "--weights", "a.ckpt") == 0
    assert json.loads((own / "a.json").read_text())["largest"] == 0

    torch.save(own_network("own_models:gray").state_dict(), "gray.pt")
    capsys.readouterr()
    assert run(*dead, "--weights", "gray.pt") == 1
    assert "0.weight, which has shape (4, 1, 3, 3), and is (4, 3, 3, 3) here" in capsys.readouterr().err
    (own / "broken.pt").write_bytes(b"no checkpoint")
    assert run(*dead, "--weights", "broken.pt") == 1
    assert "cannot be read as a checkpoint" in capsys.readouterr().err
    assert run(*dead, "--weights", "missing.pt") == 1
    assert "there is no file missing.pt" in capsys.readouterr().err


def test_a_checkpoint_of_fit(own, capsys):
    from nslightning.models import ImageClassifier

    model = ImageClassifier("paper/lenet5", backbone_options={"batch_norm": True})
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save(content, "fit.ckpt")
    assert run("fit.ckpt", "--data", "FashionMNISTSample", *SMALL) == 0
    assert json.loads((own / "a.json").read_text())["shape"] == [4, 1, 28, 28]
    torch.save({"state_dict": model.state_dict()}, "nameless.ckpt")
    assert run("nameless.ckpt", *SMALL) == 1
    assert "name the network, and the checkpoint by --weights=nameless.ckpt" in capsys.readouterr().err


def test_hugging_face_folders(own, capsys):
    transformers = pytest.importorskip("transformers", reason="needs the extra huggingface: transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained("images")
    assert run("images", "--image-size", "32", *SMALL) == 0
    assert {s["operation"] for s in json.loads((own / "a.json").read_text())["sites"]} == {"relu", "max_pool"}
    text = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=17, activation_function="relu")
    transformers.GPT2LMHeadModel(text).save_pretrained("text")
    assert run("text", *SMALL) == 0
    plain = json.loads((own / "a.json").read_text())
    assert (plain["shape"], plain["data"]) == ([4, 32], "random tokens")
    assert run("text", "--data", "MNIST", *SMALL) == 2
    transformers.GPT2Model(text).save_pretrained("headless")
    assert run("headless", *SMALL) == 1
    assert "returns no logits" in capsys.readouterr().err
