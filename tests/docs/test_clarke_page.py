"""The cost tables and their sentences in docs/clarke.md, recomputed from the files of measurements."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clarke.md").read_text(encoding="utf-8")


def measured(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return content


def shown(header: str) -> list[list[str]]:
    """The cells of the table with this header, without header and rule."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {header}"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def is_rounded(text: str, value: float) -> bool:
    """Whether a number as written is the value, rounded to the digits written."""
    decimals = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10.0**-decimals * (1 + 1e-9)


def said(pattern: str) -> tuple[str, ...]:
    (match,) = re.findall(pattern, " ".join(PAGE.split()))
    return match if isinstance(match, tuple) else (match,)


def test_the_enumerators_cost() -> None:
    known = {(row["units"], row["inputs"]): row for row in measured("clarke_cpu")["rows"]}
    rows = shown("units n")
    assert len(rows) >= 7
    for row in rows:
        units, inputs, patterns, programs = map(int, row[:4])
        cost = known[units, inputs]
        assert (patterns, programs) == (cost["patterns"], cost["linear_programs"])
        # What the formula of the page says of n hyperplanes in general position, by its recurrence.
        cells = {(0, p): 1 for p in range(1, inputs + 1)} | {(n, 1): 2 for n in range(1, units + 1)}
        for n in range(1, units + 1):
            for p in range(2, inputs + 1):
                cells[n, p] = cells[n - 1, p] + (cells[n - 1, p - 1] if n > 1 else 1)
        assert patterns == cells[units, inputs]
        assert is_rounded(row[4], cost["seconds"] / cost["one_run_seconds"])
    assert [(int(r[0]), int(r[1])) for r in rows] == [(8, 2), (16, 2), (32, 2), (3, 3), (5, 5), (7, 7), (9, 9)]


def test_forward_modes_cost() -> None:
    known = {row["dimension"]: row for row in measured("forward_mode_cpu")["rows"]}
    rows = shown("p |")
    assert [int(row[0]) for row in rows] == sorted(known)
    for p, evaluation, *ratios in rows:
        times = known[int(p)]
        assert float(evaluation) == float(f"{1000 * times['evaluation']:.3g}")
        for text, value in zip(
            ratios,
            [
                times["backward"] / times["evaluation"],
                times["forward_mode"] / times["evaluation"],
                times["matrix_product"] / times["evaluation"],
                times["forward_mode"] / times["matrix_product"],
            ],
            strict=True,
        ):
            assert is_rounded(text, value), (p, text, value)


def test_the_exponents() -> None:
    rows = [row for row in measured("forward_mode_cpu")["rows"] if row["dimension"] >= 300]
    forward, backward = said(r"\(four points\).{1,30}power ([-\d.]+) for forward mode and ([-\d.]+) for the backward")
    assert len(rows) == 4
    dimensions = np.log([row["dimension"] for row in rows])
    for text, name in ((forward, "forward_mode"), (backward, "backward")):
        ratios = np.log([row[name] / row["evaluation"] for row in rows])
        assert is_rounded(text, float(np.polyfit(dimensions, ratios, 1)[0]))


@pytest.mark.parametrize(("text", "value", "same"), [("0.3", 0.26, True), ("0.3", 0.24, False), ("92", 92.6, False)])
def test_a_wrong_digit_would_be_seen(text: str, value: float, same: bool) -> None:
    assert is_rounded(text, value) == same
