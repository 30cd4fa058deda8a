"""Every number in the findings' tables, and those in their sentences, recomputed from ``results/``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nslightning.experiments.published import table as published

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "findings.md").read_text()
Numbers = list[tuple[float, ...]]  # of a row: the numbers of each cell


@cache
def results(name: str) -> pd.DataFrame:
    # A metric is called "nan", and must stay a word.
    return pd.read_csv(ROOT / "results" / name / "results.csv", keep_default_na=False, na_values=[""])


def tables() -> dict[str, dict[str, list[str]]]:
    """The tables of the page by their header; the cells of each row by its first one. Emphasis is taken away."""
    cited: dict[str, dict[str, list[str]]] = {}
    header = ""
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.replace("*", "").strip("|").split("|")]
        if not line.startswith("|"):
            header = ""
        elif not header:
            header = f"{cells[0]}: {', '.join(cells[1:])}"
            assert header not in cited
            cited[header] = {}
        elif set(line) != {"|", "-"}:
            assert cells[0] not in cited[header]
            cited[header][cells[0]] = cells[1:]
    return cited


TABLES = tables()


def is_rounded(shown: str, value: float) -> bool:
    """Whether a number as it is written is a value, rounded to the digits written."""
    decimals = len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 0.5 * 10**-decimals + 1e-9


def same(cell: str, values: tuple[float, ...]) -> bool:
    shown = re.findall(r"-?\d*\.?\d+", cell)
    return len(shown) == len(values) and all(map(is_rounded, shown, values))


# ------------------------------------------------------------------------------------------------- training
def accuracy(name: str, **where: Any) -> tuple[float, ...]:
    """Mean and deviation of the last epoch's accuracy, and what the cell says of runs at chance and of NaN."""
    rows = results(f"{name}/small")
    rows = rows[rows["epoch"] == rows["epoch"].max()]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    runs = 100 * rows[rows["metric"] == "test_accuracy"]["value"]
    if runs.empty:
        return ()
    assert len(runs) == 3
    chance = sum(runs < 12)
    diverged = int(rows[rows["metric"] == "nan"]["value"].sum())
    return (runs.mean(), runs.std(), *([chance] if chance else []), *([diverged] if diverged else []))


def alpha_row(rule: str) -> Numbers:
    return [accuracy("mnist_mlp_alpha", rule=rule, relu=alpha) for alpha in (-10, -1, 0, 1, 10, 50)]


def beta_row(bits: int, norm: bool, rule: str) -> Numbers:
    return [
        accuracy("mnist_lenet_beta", precision=bits, batch_norm=norm, rule=rule, max_pool=beta)
        for beta in (0, 1, 100, 1000, 10000)
    ]


# ----------------------------------------------------------------------------------------------------- S_01
def sampled(bits: int, depth: int = 3, width: int = 256, batch_size: int = 256, rule: str = "exact") -> float:
    rows = results("mnist_volume_relu/small")
    draws = rows[
        (rows["metric"] == "differing") & (rows["precision"] == bits) & (rows["depth"] == depth)
        & (rows["width"] == width) & (rows["batch_size"] == batch_size) & (rows["rule"] == rule)
    ]["value"]  # fmt: skip
    assert len(draws) == 200
    return 100 * float((draws > 0).mean())


def paper_share(factor: str, bits: int, value: int) -> float | None:
    rows = published("volume_relu_mnist")
    rows = rows[(rows["factor"] == factor) & (rows["precision"] == bits) & (rows[factor] == value)]
    return 100 * float(rows["mean"].item()) if len(rows) else None


def beside_the_paper(factor: str, bits: int, values: tuple[int, ...]) -> Numbers:
    row = []
    for value in values:
        paper = paper_share(factor, bits, value)
        row.append((sampled(bits, **{factor: value}), *([] if paper is None else [paper])))
    return row


def counted(order: str, width: int, metric: str, depth: int, batch_size: int = 256) -> tuple[float, float]:
    rows = results("mnist_volume_exact/small")
    draws = rows[
        (rows["arithmetic"] == order) & (rows["width"] == width) & (rows["metric"] == metric)
        & (rows["depth"] == depth) & (rows["batch_size"] == batch_size)
    ]["value"]  # fmt: skip
    few = width == 1024 or batch_size != 256 or order.startswith("split") or (order, width) == ("sequential", 64)
    assert len(draws) == (3 if few else 10)
    return 100 * draws.mean(), 100 * draws.std() / math.sqrt(len(draws))


DEPTHS, WIDTHS, BATCHES = (1, 2, 3, 5, 6), (16, 64, 512, 1024), (16, 64, 512, 1024)
ORDERS = {
    "bias last": "bias_last",
    "bias first, in blocks (MKL here)": "native",
    "one accumulator, bias last": "sequential",
}


def by_depth(order: str) -> Numbers:
    return [counted(order, 256, f"probability_depth{depth}", 6) for depth in DEPTHS]


def by_width(order: str) -> Numbers:
    return [counted(order, width, "probability", 3) for width in WIDTHS]


def beside_two_widths(order: str) -> Numbers:
    """At 64 and 1024 neurons: the share, and by how many standard deviations the published one is above or below."""
    row: Numbers = []
    rows = results("mnist_volume_exact/small")
    for width in (64, 1024):
        known = (rows["arithmetic"] == order) & (rows["width"] == width)
        if not known.any():
            row += [(), ()]
            continue
        share, error = counted(order, width, "probability", 3)
        paper = paper_share("width", 32, width)
        assert paper is not None
        row += [(share, error), (abs(paper - share) / math.hypot(math.sqrt(paper * (100 - paper) / 1000), error),)]
    return row


def one_each(values: list[float | None]) -> Numbers:
    return [(value,) for value in values if value is not None]


# -------------------------------------------------------------------------------------------------- max pooling
def passed(backbone: str, batch_size: int = 128, batch_norm: bool = False) -> Numbers:
    """In 16, 32 and 64 bits: our share of the mini-batches and the paper's."""
    row: Numbers = []
    ours = results("cifar10_vgg_volume_max_pool/small")
    paper = published("volume_max_pool_cifar10")
    paper = paper[paper["figure"] == "impactfactors"]
    factor = "batch_norm" if batch_norm else "batch_size" if batch_size != 128 else "network"
    for bits in (16, 32, 64):
        mine = ours[
            (ours["backbone"] == f"paper/{backbone}") & (ours["batch_size"] == batch_size)
            & (ours["batch_norm"] == batch_norm) & (ours["precision"] == bits)
        ]  # fmt: skip
        if mine.empty:
            row.append(())
            continue
        sums = mine.groupby("metric")["value"].sum()
        assert sums["batches"] == 40
        theirs = paper[
            (paper["factor"] == factor) & (paper["backbone"] == backbone) & (paper["batch_size"] == batch_size)
            & (paper["batch_norm"] == batch_norm) & (paper["precision"] == bits)
        ]  # fmt: skip
        row.append((100 * sums["differing"] / sums["batches"], 100 * float(theirs["mean"].item())))
    return row


def zones(name: str, bits: int) -> Numbers:
    rows = results(name)
    sums = rows[rows["precision"] == bits].groupby("metric")["value"].sum()
    assert sums["regular"] == sums["batches"] - sums["differing"]
    return [(sums["differing"], sums["batches"]), (sums["compensation"],), (sums["bifurcation"],)]


def decades(against: str, bits: int, names: tuple[str, ...]) -> Numbers:
    rows = results("mnist_lenet_threshold/small")
    sums = rows[(rows["against"] == against) & (rows["precision"] == bits)].groupby("metric")["value"].sum()
    assert sums["batches"] == 938
    norms = {k.removeprefix("norm_"): v for k, v in sums.items() if k.startswith("norm_")}
    assert sum(norms.values()) == 938
    assert set(norms) <= set(names)  # the table leaves no decade out
    return [(100 * norms.get(name, 0) / 938,) for name in names]


def zeros_met(depth: int, bits: int) -> Numbers:
    """By width: ours of ten epochs, and the paper's of its first ten."""
    ours, paper = results("mnist_zeros/small"), published("zeros")
    row: Numbers = []
    for width in (16, 64, 256):
        mine, theirs = (
            rows[(rows["depth"] == depth) & (rows["precision"] == bits) & (rows["width"] == width)]
            for rows in (ours, paper)
        )
        assert mine["epoch"].nunique() == 10
        row.append((mine[mine["metric"] == "zeros"]["value"].sum(), theirs["first10"].item()))
    return row


POOL, RELU = "{'max_pool': 1}", "{'relu': 1}"
POOL_DECADES = ("zero", "1e-16", "1e-15", "1e-7", "1e-6", "1e-5", "1e-4", "1e-3", "1e-2")
RELU_DECADES = ("zero", "1e-5", "1e-3", "1e-2")


def mitigation(optimizer: str, norm: bool, bits: int = 32) -> Numbers:
    """The runs of each choice and rule: one, or the mean and deviation of three. At 0 both rules are one program."""
    rows = results("mnist_mitigation/small")
    rows = rows[
        (rows["optimizer"] == optimizer) & (rows["batch_norm"] == norm) & (rows["precision"] == bits)
        & (rows["metric"] == "test_accuracy") & (rows["epoch"] == rows["epoch"].max())
    ]  # fmt: skip
    row: Numbers = []
    for rule, alpha in (("exact", 0), ("exact", 10), ("published", 10)):
        of = rows[(rows["rule"] == rule) & (rows["relu"] == alpha)].set_index("seed")["value"]
        zero = rows[(rows["rule"] == "published") & (rows["relu"] == 0)].set_index("seed")["value"]
        assert alpha != 0 or (of[zero.index] == zero).all()
        assert sorted(of.index) == (list(range(3)) if bits == 16 and "Adam" not in optimizer else [0])
        chance = sum(of < 0.12)
        several = (100 * of.std(), *([chance] if chance else [])) if len(of) > 1 else ()
        row.append((100 * of.mean(), *several))
    return row


def hundred_epochs(bits: int, batch_norm: bool = False) -> Numbers:
    """LeNet-5's test accuracy after 100 epochs, by beta; nothing where no cell ran."""
    rows = results("mnist_lenet_beta/paper")
    rows = rows[(rows["metric"] == "test_accuracy") & (rows["epoch"] == 99) & (rows["precision"] == bits)]
    by_beta = rows[rows["batch_norm"] == batch_norm].set_index("max_pool")["value"]
    return [(100 * by_beta[beta],) if beta in by_beta.index else () for beta in (0, 10, 100, 1000, 10000)]


WIDE = "mnist_mlp_alpha+width=2048+epochs=3"


def wide_row(rule: str) -> Numbers:
    """The test accuracy of the net of 2048 neurons after 3 epochs, by alpha; nothing where no cell ran."""
    rows = results(f"{WIDE}/small")
    rows = rows[(rows["metric"] == "test_accuracy") & (rows["epoch"] == 2) & (rows["rule"] == rule)]
    by_alpha = rows.set_index("relu")["value"]
    return [(100 * by_alpha[alpha],) if alpha in by_alpha.index else () for alpha in (-10, 0, 10, 50)]


def autocast_row(rule: str) -> Numbers:
    """LeNet-5's test accuracy under fp16 autocast after 10 epochs, and the paper's, by beta."""
    rows = results("mnist_lenet_beta_24/small")
    rows = rows[(rows["metric"] == "test_accuracy") & (rows["epoch"] == 9) & (rows["rule"] == rule)]
    theirs = published("training")
    theirs = theirs[
        (theirs["backbone"] == "lenet5") & (theirs["data"] == "MNIST") & (theirs["precision"] == 24)
        & (theirs["metric"] == "test_accuracy") & ~theirs["batch_norm"]
    ].set_index("value")["mean"]  # fmt: skip
    return [
        (100 * value, 100 * theirs[beta]) for beta, value in rows.set_index("max_pool")["value"].sort_index().items()
    ]


#: What each row of each table has to say.
ROWS: dict[str, dict[str, Callable[[], Numbers]]] = {
    "alpha, 3 x 2048: -10, 0, 10, 50": {
        rule: lambda rule=rule: wide_row(rule) for rule in ("exact", "published")
    },
    "alpha: -10, -1, 0, 1, 10, 50": {
        "exact": lambda: alpha_row("exact"),
        "published": lambda: alpha_row("published"),
    },
    "bits, rule: beta 0, 1, 100, 10³, 10⁴": {
        f"{bits}, {'batch norm, ' * norm}{rule}": lambda bits=bits, norm=norm, rule=rule: beta_row(bits, norm, rule)
        for bits in (16, 32) for norm in (False, True) for rule in ("exact", "published")
    },
    **{
        f"optimizer{of}: alpha 0, 10, exact, 10, published": {
            f"{name}{', batch norm' * norm}": lambda name=name, norm=norm, bits=bits: mitigation(name, norm, bits)
            for name in ("sgd", "INNAprop", "Adam", "AdamW") for norm in (False, True)
        }
        for bits, of in ((16, ", 16 bits"), (32, ""), (64, ", 64 bits"))
    },
    "hidden layers of 256: 1, 2, 3, 5, 6": {
        f"{bits} bit": lambda bits=bits: beside_the_paper("depth", bits, DEPTHS) for bits in (16, 32, 64)
    },
    "order of summation, by layers of 256: 1, 2, 3, 5, 6": {
        "published": lambda: one_each([paper_share("depth", 32, depth) for depth in DEPTHS]),
        "sampled here (MKL, 200 draws)": lambda: one_each([sampled(32, depth=depth) for depth in DEPTHS]),
    } | {name: lambda order=order: by_depth(order) for name, order in ORDERS.items()},
    "neurons in each of 3 layers: 16, 64, 256, 512, 1024": {
        f"{bits} bit": lambda bits=bits: beside_the_paper("width", bits, (16, 64, 256, 512, 1024))
        for bits in (16, 32, 64)
    },
    "mini-batch, 3 layers of 256: 16, 64, 256, 512, 1024": {
        f"{bits} bit": lambda bits=bits: beside_the_paper("batch_size", bits, (16, 64, 256, 512, 1024))
        for bits in (16, 32, 64)
    },
    "order of summation, by neurons in 3 layers: 16, 64, 512, 1024": {
        "published": lambda: one_each([paper_share("width", 32, width) for width in WIDTHS]),
        "sampled here (MKL, 200 draws)": lambda: one_each([sampled(32, width=width) for width in WIDTHS]),
        "bias last": lambda: by_width("bias_last"),
        "bias first, in blocks (MKL here)": lambda: by_width("native"),
    },
    "order of summation, at two widths: 64 neurons, published is, 1024 neurons, published is": {
        "published": lambda: [(paper_share("width", 32, 64) or 0,), (), (paper_share("width", 32, 1024) or 0,), ()],
        "bias last": lambda: beside_two_widths("bias_last"),
        "bias first, in blocks (MKL here)": lambda: beside_two_widths("native"),
        "one accumulator, bias last": lambda: beside_two_widths("sequential"),
        "two slices, bias last": lambda: beside_two_widths("split_k=2"),
        "four slices, bias last": lambda: beside_two_widths("split_k=4"),
        "eight slices, bias last": lambda: beside_two_widths("split_k=8"),
    },
    "order of summation, by mini-batch: 16, 64, 512, 1024": {
        "published": lambda: one_each([paper_share("batch_size", 32, size) for size in BATCHES]),
        "bias first, in blocks (MKL here)": lambda: [
            counted("native", 256, "probability", 3, size) for size in BATCHES
        ],
    },
    **{
        f"hidden layers, {bits} bits: 16 neurons, 64, 256": {
            str(depth): lambda bits=bits, depth=depth: zeros_met(depth, bits) for depth in DEPTHS
        }
        for bits in (16, 32)
    },
    ": 16 bit, 32 bit, 64 bit": {
        "VGG11": lambda: passed("vgg11"),
        "VGG13": lambda: passed("vgg13"),
        "VGG16": lambda: passed("vgg16"),
        "VGG19": lambda: passed("vgg19"),
        "VGG11, batch 64": lambda: passed("vgg11", batch_size=64),
        "VGG11, batch 256": lambda: passed("vgg11", batch_size=256),
        "VGG11 with batch norm": lambda: passed("vgg11", batch_norm=True),
    },
    "24 bits: beta 0, 100, 10⁴": {
        rule: lambda rule=rule: autocast_row(rule) for rule in ("exact", "published")
    },
    "bits, 100 epochs: beta 0, 10, 100, 10³, 10⁴": {
        "32": lambda: hundred_epochs(32),
        "16": lambda: hundred_epochs(16),
        "16, batch norm": lambda: hundred_epochs(16, batch_norm=True),
    },
    ": gradients differ in a bit, by rounding alone, over the reals": {
        f"{bits} bit{', batch norm' * norm}": lambda bits=bits, norm=norm: zones(
            "zones_cifar10_vgg11" + "_bn" * norm, bits
        )
        for bits in (32, 64) for norm in (False, True)
    },
    "MaxPool's beta, 0 against 1: exact zeros, " + ", ".join(POOL_DECADES[1:]): {
        f"{bits} bit": lambda bits=bits: decades(POOL, bits, POOL_DECADES) for bits in (16, 32, 64)
    },
    "ReLU'(0), 0 against 1: exact zeros, " + ", ".join(RELU_DECADES[1:]): {
        f"{bits} bit": lambda bits=bits: decades(RELU, bits, RELU_DECADES) for bits in (16, 32, 64)
    },
}  # fmt: skip


@pytest.mark.parametrize("header", list(TABLES))
def test_every_row_of_every_table(header: str) -> None:
    assert header in ROWS, f"no test knows the table {header!r}"
    for name, cells in TABLES[header].items():
        values = ROWS[header][name]()
        assert len(cells) == len(values), name
        for cell, expected in zip(cells, values, strict=True):
            assert (cell == "" and not expected) or same(cell, expected), (name, cell, expected)


def test_no_table_went_missing() -> None:
    assert set(TABLES) == set(ROWS)
    assert {h: set(rows) for h, rows in TABLES.items()} == {h: set(rows) for h, rows in ROWS.items()}


def test_a_wrong_digit_would_be_seen() -> None:
    assert same("99.20 ± .08", (99.204, 0.0811))
    assert not same("99.20 ± .08", (99.206, 0.08))
    assert not same("99.20", (99.2, 0.08))
    assert not same("69.38 ± 50.26 (2 chance)", (69.38, 50.26, 1))


# ----------------------------------------------------------------------------------------------------- sentences
def said(pattern: str) -> tuple[str, ...]:
    (match,) = re.findall(pattern, " ".join(PAGE.split()))
    return match if isinstance(match, tuple) else (match,)


def test_the_introduction() -> None:
    rows = results("mnist_intro_relu/small")
    rows = rows[rows["metric"] == "l1_distance"]
    apart = rows[rows["value"] > 0]
    (step,) = said(r"the same floats until iteration (\d+)")
    # The distance is measured before each step: what iteration 65 does is seen before iteration 66.
    assert set(apart["step"].groupby([apart["precision"], apart["rule"]]).min()) == {int(step) + 1}
    assert set(apart["precision"]) == {32}
    assert set(apart["twin"].astype(str)) == {"1"}
    exact, rule = said(r"the weights are (\S+) apart .{1,60} under the exact rule, and (\S+) under the published one")
    last = rows[(rows["step"] == 99) & (rows["precision"] == 32) & (rows["twin"].astype(str) == "1")]
    by_rule = dict(zip(last["rule"], last["value"], strict=True))
    assert f"{by_rule['exact']:.0e}" == f"{float(exact):.0e}"
    assert is_rounded(rule, by_rule["published"])


def test_the_published_rule_has_the_same_shares() -> None:
    assert [sampled(bits, rule="published") for bits in (16, 32)] == [sampled(bits) for bits in (16, 32)]


def test_sixty_four_bits() -> None:
    settings, draws, images = said(r"in all (\d+) settings: ([\d,]+) draws of the weights, (\d+) million images")
    rows = results("mnist_volume_relu/small")
    rows = rows[(rows["precision"] == 64) & (rows["metric"] == "differing")]
    assert rows["cell"].nunique() % int(settings) == 0
    assert len(rows[["depth", "width", "batch_size"]].drop_duplicates()) == int(settings)
    assert len(rows) == int(draws.replace(",", ""))
    assert len(rows) * 60000 == int(images) * 10**6
    assert rows["value"].sum() == 0


def test_the_unexplained_widths() -> None:
    (least,) = said(r"64 neurons two slices come within (\S+) standard deviations")
    assert least == "two"
    assert abs(beside_two_widths("split_k=2")[1][0]) < 2
    low, high = said(r"At 1024 neurons the published share lies between ([\d.]+) % and ([\d.]+) %")
    one, other = (beside_two_widths(order)[2][0] for order in ("bias_last", "split_k=2"))
    assert is_rounded(low, one)
    assert is_rounded(high, other)
    assert one < 87.3 < other
    low, high = said(r"near the two rows with the bias last, ([\d.]+) and ([\d.]+) %")
    assert is_rounded(low, by_depth("bias_last")[2][0])
    assert is_rounded(high, by_depth("sequential")[2][0])


def test_the_sums_of_the_zeros() -> None:
    ours, inputs, theirs, ours32, theirs32, apart, in_millions = said(
        r"(\d+) zeros in ([\d,]+) million inputs stand beside the paper's (\d+): .+? it is (\d+) beside (\d+), "
        r"which is ([\d.]+) standard deviations apart.+? one input in ([\d.]+) million"
    )
    sums = {
        bits: [sum(column) for column in zip(*(c for d in DEPTHS for c in zeros_met(d, bits)), strict=True)]
        for bits in (16, 32)
    }
    assert [int(n) for n in (ours, theirs, ours32, theirs32)] == [*sums[16], *sums[32]]
    rows = results("mnist_zeros/small")
    rows = rows[(rows["precision"] == 16) & (rows["metric"] == "relu_calls")]
    assert round(rows["value"].sum() / 1e6) == int(inputs.replace(",", ""))
    assert is_rounded(apart, (sums[32][0] - sums[32][1]) / math.sqrt(sum(sums[32])))  # two counts of Poisson's
    assert abs(sums[16][0] - sums[16][1]) < 2 * math.sqrt(sum(sums[16]))
    assert is_rounded(in_millions, rows["value"].sum() / sums[16][0] / 1e6)


def test_lenets_zones() -> None:
    count = said(
        r"rounding alone on all (\d+) mini-batches in 32 bits and on all (\d+) in 64 bits, and real on all (\d+)"
    )
    assert [zones("zones_mnist_lenet", bits) for bits in (32, 64)] == [[(40, 40), (40,), (0,)]] * 2
    assert zones("zones_mnist_lenet", 16) == [(40, 40), (0,), (40,)]
    assert set(count) == {"40"}


def test_vgg13_is_two_draws() -> None:
    rows = results("cifar10_vgg_volume_max_pool/small")
    rows = rows[(rows["backbone"] == "paper/vgg13") & (rows["metric"] == "differing")]
    assert sorted(rows["value"]) == sorted(map(int, said(r"are (\d+) and (\d+) of 20")))


def test_runs_of_lenet() -> None:
    (runs,) = said(r"`mnist_lenet_beta`, (\d+) runs")
    assert results("mnist_lenet_beta/small")["cell"].nunique() == int(runs)


# ------------------------------------------------------------------------------------- sentences that sum up a table
def test_lenet_beside_the_paper_where_its_runs_stayed_finite() -> None:
    """Counted from both files of numbers, without the code that compares."""
    apart, compared, *values = said(
        r"but for (\w+) of (\d+) settings \(([\d.]+) and ([\d.]+) against ([\d.]+) and ([\d.]+), at a tenth"
    )
    ours = results("mnist_lenet_beta/small")
    ours = ours[(ours["metric"] == "test_accuracy") & (ours["epoch"] == ours["epoch"].max())]
    paper = published("training")
    paper = paper[
        (paper["data"] == "MNIST") & (paper["backbone"] == "lenet5") & (paper["optimizer"] == "sgd")
        & (paper["metric"] == "test_accuracy")
    ]  # fmt: skip
    within, outside = 0, []
    for (bits, norm, _, beta), runs in ours.groupby(["precision", "batch_norm", "rule", "max_pool"]):
        (row,) = paper[
            (paper["precision"] == bits) & (paper["batch_norm"] == norm) & (paper["value"] == beta)
        ].to_dict("records")  # fmt: skip
        if row["n_nan"] > 0:
            continue
        mean = runs["value"].mean()
        if abs(mean - row["mean"]) <= 2 * row["sd"]:
            within += 1
        else:
            outside.append((100 * mean, 100 * row["mean"]))
    assert {"two": 2}[apart] == len(outside)
    assert int(compared) == within + len(outside)
    outside.sort()
    assert same(" ".join(values), (outside[0][0], outside[1][0], outside[0][1], outside[1][1]))


def test_what_alpha_costs_under_both_rules() -> None:
    """ "No alpha changes the accuracy by a tenth of a point", "the same runs lose a point at 10 and all at 50"."""
    assert said(r"Under the chain rule no alpha between (-\d+) and (\d+) changes the accuracy by a tenth") == (
        "-10",
        "50",
    )
    assert said(r"lose a point at alpha = (\d+) and all at (\d+)") == ("10", "50")
    base, *others = (accuracy("mnist_mlp_alpha", rule="exact", relu=alpha)[0] for alpha in (0, -10, -1, 1, 10, 50))
    assert all(abs(other - base) < 0.1 for other in others)
    assert 0.5 < base - accuracy("mnist_mlp_alpha", rule="published", relu=10)[0] < 1.5
    assert accuracy("mnist_mlp_alpha", rule="published", relu=50)[2] == 3  # at chance


def test_which_shares_lie_outside_what_sampling_explains() -> None:
    """Two standard deviations of the difference of two shares, the paper's of 1,000 draws and ours of 200."""
    assert said(r"(At 32 bits one, three, five and six layers, 64 and 1024 neurons, and batches of 64 lie outside)")
    assert said(r"(so does 64 neurons at 16 bits)")
    outside = set()
    for factor, values in (("depth", DEPTHS), ("width", (16, 64, 512, 1024)), ("batch_size", BATCHES)):
        for bits in (16, 32):
            for value in values:
                ours, theirs = sampled(bits, **{factor: value}) / 100, (paper_share(factor, bits, value) or 0) / 100
                both = (200 * ours + 1000 * theirs) / 1200
                if abs(ours - theirs) > 2 * math.sqrt(both * (1 - both) * (1 / 200 + 1 / 1000)):
                    outside.add((factor, bits, value))
    assert outside == {
        *(("depth", 32, depth) for depth in (1, 3, 5, 6)),
        *(("width", bits, 64) for bits in (16, 32)),
        ("width", 32, 1024),
        ("batch_size", 32, 64),
    }


def test_lenet_under_adam() -> None:
    shown = said(
        r"no loss is visible either: ([\d.]+), ([\d.]+) and ([\d.]+) at beta 0, 100 and 10⁴ under the exact rule, "
        r"([\d.]+) and ([\d.]+) at 100 and 10⁴"
    )
    rows = results("mnist_lenet_beta_adam/small")
    rows = rows[(rows["metric"] == "test_accuracy") & (rows["epoch"] == 9)].set_index(["rule", "max_pool"])["value"]
    order = [("exact", 0), ("exact", 100), ("exact", 10000), ("published", 100), ("published", 10000)]
    assert all(is_rounded(s, 100 * rows[key]) for s, key in zip(shown, order, strict=True))
    assert len(rows) == 6  # one seed; at 0 both rules are one program


def test_what_the_mitigation_grid_met() -> None:
    """Every number of every epoch in 32 and 64 bits, compared as it is written."""
    rows = results("mnist_mitigation/small")
    (count,) = said(r"small scale: (\d+) of its 288 cells")
    assert rows["cell"].nunique() == int(count)
    halves = rows[
        (rows["precision"] == 16) & rows["optimizer"].isin(["Adam", "AdamW"]) & (rows["metric"] == "nan")
    ]  # fmt: skip
    assert halves["cell"].nunique() == 2 * 2 * 4
    assert set(halves["value"]) == {1.0}
    rows = rows[(rows["precision"] > 16) & rows["metric"].isin(["train_loss", "test_loss", "test_accuracy"])]
    first = {}
    for network, runs in rows.groupby(["precision", "optimizer", "batch_norm"]):
        wide = runs.pivot_table(index=["epoch", "metric"], columns=["relu", "rule"], values="value")
        assert wide.shape[1] == 4
        differing = wide.index.get_level_values("epoch")[wide.nunique(axis=1) > 1]
        first[network] = min(differing) + 1 if len(differing) else None
    (epoch,) = said(r"the losses differ from epoch (\d+) on")
    assert first.pop((32, "sgd", False)) == int(epoch)
    of32, of64 = said(r"In the other (\w+) rows of 32 bits and in all (\w+) of 64 bits")
    numbers = {"seven": 7, "eight": 8}
    assert [sum(bits == b for b, _, _ in first) for bits in (32, 64)] == [numbers[of32], numbers[of64]]
    assert set(first.values()) == {None}


def test_what_the_published_rule_costs_in_sixteen_bits() -> None:
    runs, of, low, high, plain, normed = said(
        r"costs sgd everything in (\w+) run of (\w+); with batch norm it costs (\d+) to (\d+) points in each of the "
        r"three\. INNAprop hides most of it: it loses ([\d.]+) points, and ([\d.]+) with batch norm"
    )
    rows = results("mnist_mitigation/small")
    rows = rows[
        (rows["precision"] == 16) & (rows["metric"] == "test_accuracy") & (rows["epoch"] == rows["epoch"].max())
    ]
    ends = rows.pivot_table(index=["optimizer", "batch_norm", "seed"], columns=["rule", "relu"], values="value")
    lost = 100 * (ends["exact", 0] - ends["published", 10])
    assert (ends["published", 10]["sgd", False] < 0.12).sum() == {"one": 1}[runs]
    assert len(lost["sgd", False]) == {"three": 3}[of]
    assert (lost["sgd", True].min().round(), lost["sgd", True].max().round()) == (int(low), int(high))
    assert is_rounded(plain, lost["INNAprop", False].mean())
    assert is_rounded(normed, lost["INNAprop", True].mean())


@pytest.mark.parametrize(
    ("name", "scale", "said"),
    [
        ("mnist_lenet_beta", "small", ""),
        ("mnist_mitigation", "small", ""),
        ("mnist_lenet_beta", "smoke", "Nothing is published for FashionMNISTSample; MNIST has published numbers."),
    ],
)
def test_a_comparison_says_what_nothing_is_published_for(name, scale, said):
    from nslightning import configs
    from nslightning.experiments import Experiment
    from nslightning.experiments.compare import _nothing_published

    assert _nothing_published(Experiment.read(configs.path(f"experiments/{name}"), scale)) == said


def test_the_order_of_summation():
    """The page says of this processor's library what `benchmarks.summation` measured, at every shape that it names."""
    content = json.loads((ROOT / "benchmarks" / "results" / "summation_cpu.json").read_text())
    rows = [row for row in content["rows"] if row["dtype"] == "float32" and row["shape"][1] == 784]
    assert {row["shape"][0] for row in rows} == {16, 64, 256, 512, 1024}  # batch sizes
    assert {row["shape"][2] for row in rows} == {16, 64, 256, 512, 1024}  # widths
    assert {(row["best"], row["share"]) for row in rows} == {("blocks=192", 1.0)}
    last = [100 * row["bias_last"] for row in rows]
    assert f"in {min(last):.0f} to {max(last):.0f} % with the bias last" in " ".join(PAGE.split())


def test_zeros_of_the_wide_net() -> None:
    rows = results(f"{WIDE}/small")
    sums = rows[rows["metric"].isin(["zeros", "relu_calls"])].groupby(["metric", "cell"])["value"].sum()
    assert len(sums["zeros"]) == 6  # runs
    inputs = {f"{value / 1e9:.1f}" for value in sums["relu_calls"]}
    assert inputs == {"1.1"}
    text = f"These runs met {sums['zeros'].sum():.0f} zeros, in {inputs.pop()} billion inputs of a ReLU each."
    assert text in " ".join(PAGE.split())


def test_lenet_in_24_bits_is_nan_under_the_published_rule_alone() -> None:
    rows = results("mnist_lenet_beta_24/small")
    nan = rows[rows["metric"] == "nan"].groupby(["rule", "max_pool"])["value"].agg(["sum", "count"])
    assert nan["sum"].to_dict() == {
        ("exact", 0): 0, ("exact", 100): 0, ("exact", 10000): 0,
        ("published", 0): 0, ("published", 100): 0, ("published", 10000): 10,
    }  # fmt: skip
    assert set(nan["count"]) == {10}  # epochs


def test_lenet_at_a_hundred_epochs() -> None:
    """The NaN of the table, and how many cells lie outside the published spread."""
    rows = results("mnist_lenet_beta/paper")
    assert set(rows[(rows["metric"] == "nan") & (rows["value"] > 0)]["max_pool"]) == {10000}
    compared = pd.read_csv(ROOT / "results" / "mnist_lenet_beta" / "paper" / "comparison.csv")
    outside = compared[compared["inside"] != "yes"]
    assert [tuple(row) for row in outside[["precision", "batch_norm", "max_pool"]].to_numpy()] == [
        (16, False, 1000), (16, True, 10000),
    ]  # fmt: skip
    assert len(compared) == 11
