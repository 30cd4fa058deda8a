"""The findings' tables on the order of summation, recomputed from ``results/``."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "findings.md").read_text()
RESULTS = pd.read_csv(ROOT / "results" / "mnist_volume_exact" / "small" / "results.csv")


def row(start: str) -> list[str]:
    """The cells of the table row that starts with some words, without emphasis."""
    (line,) = [line for line in PAGE.splitlines() if line.replace("*", "").startswith(f"| {start} |")][:1]
    return [cell.replace("*", "").strip() for cell in line.strip("|").split("|")[1:]]


def counted(arithmetic: str, width: int, metric: str, depth: int) -> tuple[float, float]:
    """The mean over the draws in per cent, and its standard deviation."""
    which = RESULTS.query(
        "arithmetic == @arithmetic and width == @width and metric == @metric and depth == @depth and batch_size == 256"
    )["value"]
    assert len(which) >= 3
    return 100 * which.mean(), 100 * which.std() / math.sqrt(len(which))


ORDERS = {
    "bias last": "bias_last",
    "bias first, in blocks (MKL here)": "native",
    "one accumulator, bias last": "sequential",
}


@pytest.mark.parametrize("name", list(ORDERS))
def test_shares_by_depth(name: str) -> None:
    for cell, layers in zip(row(name), (1, 2, 3, 5, 6), strict=True):
        mean, sd = (float(v) for v in re.split(r" ± ", cell))
        found = counted(ORDERS[name], 256, f"probability_depth{layers}", 6)
        assert (mean, sd) == pytest.approx(found, abs=0.0501)


@pytest.mark.parametrize("name", ["bias last", "bias first, in blocks (MKL here)"])
def test_shares_by_width(name: str) -> None:
    page = PAGE[PAGE.index("| neurons in each of 3 layers | 16 | 64 | 512 |") :]
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")][:1]
    for cell, width in zip(line.strip("|").split("|")[1:], (16, 64, 512), strict=True):
        mean, sd = (float(v) for v in cell.split("±"))
        assert (mean, sd) == pytest.approx(counted(ORDERS[name], width, "probability", 3), abs=0.0501)
