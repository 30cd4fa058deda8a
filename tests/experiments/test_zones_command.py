"""``nslightning zones`` as a user calls it."""

from __future__ import annotations

import math
import statistics
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from nslightning.cli import main
from nslightning.commands.zones import _mean, _shares
from nslightning.exact_csv import read_exactly
from nslightning.experiments.cells import ZoneCell

SETTING = ["--data=FashionMNISTSample", "--backbone=paper/lenet5", "--batch-size=16", "--batches=2", "--chunk=2"]


def zones(folder, *options: str) -> int:
    return main(["zones", *SETTING, f"--output={folder}", *options])


def test_draws_are_added_until_the_interval_is_narrow_and_never_computed_twice(tmp_path, capsys) -> None:
    folder = tmp_path / "zones"
    minimal = ["--choices", "minimal:max_pool=minimal", "--precisions", "32"]
    assert zones(folder, *minimal, "--draws=2") == 0
    first = read_exactly(folder / "zones.csv").iloc[0]
    assert (first["draws"], first["batches"]) == (2, 4)
    said = capsys.readouterr()
    assert "95 % interval" in said.out
    assert "1/1" in said.err
    assert zones(folder, *minimal, "--half-width=0.25") == 0
    added = read_exactly(folder / "zones.csv").iloc[0]
    n, share, z2 = added["draws"], added["share"], 1.959963984540054**2
    assert n > 2
    # Wilson's interval, by its formula.
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2) / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    assert added["low"] == pytest.approx(max(0.0, centre - half), abs=1e-5)
    assert added["high"] == pytest.approx(min(1.0, centre + half), abs=1e-5)
    assert half <= 0.25
    assert added[["regular", "compensation", "bifurcation"]].sum() == pytest.approx(1.0)
    each = read_exactly(folder / "zones" / "results.csv").pivot_table(
        index=["seed", "theta"], columns="metric", values="value"
    )
    assert len(each) == n
    assert (each["differing"] > 0).mean() == pytest.approx(share)
    # The background of an image ties everywhere, with equal upstream weights: rounding, and nothing over the reals.
    assert added["compensation"] > 0.5
    capsys.readouterr()
    assert zones(folder, *minimal, "--half-width=0.25") == 0
    assert capsys.readouterr().err == ""  # nothing left to compute
    assert (folder / "zones.png").stat().st_size > 1000


def test_of_mini_batches_and_with_the_papers_threshold(tmp_path) -> None:
    options = ["--choice=minimal:max_pool=minimal", "--norm=linf_sum", "--of=batches", "--draws=4", "--half-width=0.01"]
    assert zones(tmp_path / "z", *options, "--precisions=[32,64]") == 0
    shares = read_exactly(tmp_path / "z" / "zones.csv")
    results = read_exactly(tmp_path / "z" / "zones" / "results.csv")
    assert set(results["tau"]) == {1e-7, 1e-15}
    for bits, group in results.groupby("precision"):
        each = group.pivot_table(index=["seed", "theta"], columns="metric", values="value")
        row = shares[shares["precision"] == bits].iloc[0]
        share = (each["differing"] / each["batches"]).mean()
        assert row["share"] == pytest.approx(share)
        # The mini-batches of one draw are not independent: Student's interval of four draws, with three degrees of
        # freedom; where all draws say the same, what four of them can exclude at 5 %.
        half = 3.182446 * (differing := each["differing"] / each["batches"]).std() / math.sqrt(4)
        low, high = max(0.0, share - half), min(1.0, share + half)
        if differing.std() == 0:
            low, high = (0.0, 1 - 0.05**0.25) if share == 0 else (0.05**0.25, 1.0)
        assert (row["low"], row["high"]) == pytest.approx((low, high), rel=1e-4)


def test_students_interval_of_draws_that_differ() -> None:
    """Half its width is 4.302653 (two degrees of freedom) times 0.1 over the root of 3."""
    share, low, high = _mean(pd.Series([0.2, 0.3, 0.4]))
    assert (share, low, high) == pytest.approx((0.3, 0.3 - 0.248414, 0.3 + 0.248414), rel=1e-5)
    assert _mean(pd.Series([0.5])) == (0.5, 0.0, 1.0)  # one draw tells nothing of the others


def test_the_interval_of_mini_batches_is_students(tmp_path) -> None:
    """Draws are independent and their mini-batches are not: the draws' shares, by the formula."""
    shares = [0.25, 0.5, 0.75, 0.25, 1.0]
    rows = [
        {"precision": 32, "cell": "a", "theta": i, "metric": metric, "value": value}
        for i, share in enumerate(shares)
        for metric, value in {"differing": 4 * share, "batches": 4, "not_finite": 0}.items()
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    experiment: Any = SimpleNamespace(cells=lambda: [SimpleNamespace(varied={"precision": 32})])
    row = _shares(experiment, tmp_path, "batches").iloc[0]
    mean, deviation = statistics.fmean(shares), statistics.stdev(shares)
    half = 2.776445 * deviation / math.sqrt(5)  # the 97.5 % quantile with four degrees of freedom, from a table
    assert row["share"] == pytest.approx(mean)
    assert row["low"] == pytest.approx(mean - half, abs=1e-6)
    assert row["high"] == pytest.approx(mean + half, abs=1e-6)


def test_a_noisy_arithmetic_tells_its_floor(tmp_path, capsys) -> None:
    """Under random rounding a gradient that is computed twice differs from itself, by some ulp."""
    minimal = ["--choice=minimal:max_pool=minimal", "--precisions=[32]", "--draws=2"]
    assert zones(tmp_path / "plain", *minimal) == 0
    assert "within it" not in capsys.readouterr().out
    assert zones(tmp_path / "noisy", *minimal, "--arithmetic=random_rounding") == 0
    assert "within it" in capsys.readouterr().out
    plain, noisy = (read_exactly(tmp_path / name / "zones.csv").iloc[0] for name in ("plain", "noisy"))
    assert (plain["noise_floor"], plain["within_noise"]) == (0, 0)
    assert 2.0**-24 < noisy["noise_floor"] < 2.0**-18  # some ulp of the gradient's norm
    each = read_exactly(tmp_path / "noisy" / "zones" / "results.csv").pivot_table(
        index=["seed", "theta"], columns="metric", values="value"
    )
    assert noisy["noise_floor"] == pytest.approx(each["noise_floor"].max(), rel=1e-5)
    assert noisy["within_noise"] == pytest.approx(each["within_noise"].sum() / each["batches"].sum())


def test_as_published_is_the_released_procedure(tmp_path, monkeypatch) -> None:
    """Each cell that is computed is the one that the same grid's ``as_published`` makes."""
    from nslightning.experiments import zones as cells

    computed: list[ZoneCell] = []
    walk = cells._walk

    def seen(cell: ZoneCell, *arguments: Any) -> dict[str, float]:
        computed.append(cell)
        return walk(cell, *arguments)

    monkeypatch.setattr(cells, "_walk", seen)
    # One draw at once: the command's own process computes it.
    options = ["--choice=beta1:max_pool=1", "--norm=linf_sum", "--precisions=[16]", "--draws=2", "--workers=1"]
    for name, more in (("plain", []), ("published", ["--as-published=true"])):
        assert zones(tmp_path / name, *options, *more) == 0
    plain, published = (cell for i, cell in enumerate(computed) if i % 2 == 0)
    assert (plain.rule, published.rule) == ("exact", "published")
    assert published == plain.as_published()
    assert len({c.seed for c in computed}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--as-published=true"], "--as-published takes a norm of the papers"),
        (["--half-width=0"], "between 0 and 0.5"),
        (["--choices", "relu0:relu=0"], "the same choice"),
        (["--choices=a:rely=0"], "did you mean 'relu'"),
        (["--tau=1"], "norm=zone has none"),
        (["--chunk=0"], "at least 1"),
        (["--backbone=paper/lenet6", "--draws=1"], "lenet5"),
        (["--data=MNST", "--draws=1"], "'MNST' is not a data set"),
    ],
)
def test_mistaken_calls(options, message, tmp_path, capsys) -> None:
    assert zones(tmp_path / "z", *options) != 0
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
