"""What docs/how-to/reproduce.md says of time, recomputed from the estimate's file, the grids and the results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from nslightning.experiments import Experiment
from nslightning.experiments.figures import FIGURES, feeding

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "reproduce.md").read_text(encoding="utf-8")
ESTIMATE: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "reproduction_cpu.json").read_text())


def is_rounded(shown: str, value: float) -> bool:
    return abs(float(shown) - value) <= 0.5 * 10.0 ** -len(shown.partition(".")[2]) + 1e-9


def test_the_estimate_is_of_the_grids_as_they_are() -> None:
    files = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))
    planned = {file.stem: len(Experiment.read(file, "small").cells()) for file in files}
    assert {name: e["cells"] for name, e in ESTIMATE["experiments"].items()} == planned, (
        "run: python -m benchmarks.reproduction"
    )


def test_each_figure_has_its_grids_and_their_time() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:1] == "|"]
    rows = [row for row in rows if len(row) == 4][2:]
    assert [row[0] for row in rows] == [name for name, drawing in FIGURES.items() if drawing.needs_results]
    for name, grids, cells, hours in rows:
        fed = feeding(name)
        known = [ESTIMATE["experiments"][e] for e in fed]
        assert int(cells) == sum(e["cells"] for e in known)
        assert is_rounded(hours, sum(e["core_hours"] for e in known))
        assert re.findall(r"`(\w+)`", grids) == fed or grids == f"the {len(fed)} trainings of both rules"


def test_the_sentences() -> None:
    text = " ".join(PAGE.split())
    (total,) = re.findall(r"all grids together are (\d+) core-hours", text)
    assert is_rounded(total, sum(e["core_hours"] for e in ESTIMATE["experiments"].values()))
    (said,) = re.findall(
        r"`(\w+)` took ([\d.]+) hours for an estimate of ([\d.]+), `(\w+)` ([\d.]+) for ([\d.]+), and `(\w+)`.{1,50}, "
        r"([\d.]+) for ([\d.]+)\.",
        text,
    )
    for name, took, estimated in zip(said[::3], said[1::3], said[2::3], strict=True):
        file = ROOT / "results" / name / "small" / "provenance.json"
        cells = json.loads(file.read_text())["cells"]
        assert len(cells) == ESTIMATE["experiments"][name]["cells"]
        assert is_rounded(took, sum(cell["seconds"] for cell in cells.values()) / 3600)
        assert is_rounded(estimated, ESTIMATE["experiments"][name]["core_hours"])
