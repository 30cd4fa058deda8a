"""docs/published-settings.md is what its generator makes, and says what the published files and ours say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

DOCS = Path(__file__).parents[2] / "docs"
PUBLISHED = Path(__file__).parents[2] / "nslightning" / "experiments" / "published"
PAGE = (DOCS / "published-settings.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_published_settings", DOCS / "make_published_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks for its annotations
    spec.loader.exec_module(module)
    return module


def cells() -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:1] == "|"]
    return [row for row in rows[2:] if len(row) == 11]


def test_the_page_is_what_the_grids_and_the_results_say(generator: ModuleType) -> None:
    assert generator.page() == PAGE, "run: python docs/make_published_settings.py"


def test_each_published_setting_has_one_line() -> None:
    rows = pd.read_csv(PUBLISHED / "training.csv")
    rows = rows[rows["metric"] == "test_accuracy"]
    keys = rows[["paper", "data", "backbone", "batch_norm", "optimizer", "precision", "parameter"]].drop_duplicates()
    assert len(cells()) == len(keys) == 36
    for paper, data in keys[["paper", "data"]].drop_duplicates().itertuples(index=False):
        count = ((keys["paper"] == paper) & (keys["data"] == data)).sum()
        assert sum(row[:2] == [paper, data] for row in cells()) == count


def test_inside_and_outside_are_counted_from_the_files() -> None:
    """LeNet-5's counts, without the code that compares."""
    theirs = pd.read_csv(PUBLISHED / "training.csv")
    theirs = theirs[
        (theirs["data"] == "MNIST") & (theirs["backbone"] == "lenet5") & (theirs["optimizer"] == "sgd")
        & (theirs["metric"] == "test_accuracy")
    ]  # fmt: skip
    ours = pd.read_csv(DOCS.parent / "results" / "mnist_lenet_beta" / "small" / "results.csv")
    ours = ours[(ours["metric"] == "test_accuracy") & (ours["epoch"] == ours["epoch"].max())]
    ran = [row for row in cells() if row[7] == "`mnist_lenet_beta`"]
    assert len(ran) == 4
    for row in ran:
        norm, bits = row[3] == "yes", int(row[5])
        said = []
        for rule in ("published", "exact"):
            inside = []
            mine = ours[(ours["batch_norm"] == norm) & (ours["precision"] == bits) & (ours["rule"] == rule)]
            for beta, runs in mine.groupby("max_pool"):
                paper = theirs[
                    (theirs["batch_norm"] == norm) & (theirs["precision"] == bits) & (theirs["value"] == beta)
                ]
                inside.append(abs(runs["value"].mean() - paper["mean"].item()) <= 2 * paper["sd"].item() + 1e-12)
            said.append(f"{rule}: {sum(inside)} inside, {len(inside) - sum(inside)} outside")
        scales, counts = row[8].split("<br>"), row[9].split("<br>")
        assert counts[scales.index("small")] == "; ".join(said)


def test_what_did_not_run_says_so_and_how_many_runs_it_is() -> None:
    results = DOCS.parent / "results"
    for row in cells():
        if not (results / row[7].strip("`")).exists():
            assert row[8:10] == ["no", ""]
            count, _, rest = row[10].partition(" run")
            assert int(count) > 0
            assert rest.endswith(" epochs")
    assert sum(row[8] == "no" for row in cells()) == 29
