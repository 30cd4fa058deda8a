"""docs/operations.md is what its generator makes; its plots are there, and are what the code returns."""

import importlib.util
from pathlib import Path

import pytest
import torch

from nslightning import Jacobians
from nslightning.jacobians import NONSMOOTH
from nslightning.ops.registry import OPERATIONS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_operations", DOCS / "make_operations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_says(generator):
    assert (DOCS / "operations.md").read_text(encoding="utf-8") == generator.page(), (
        "run: python docs/make_operations.py"
    )


def test_one_description_one_entry_one_plot(generator):
    fields = [name for name in Jacobians.__dataclass_fields__ if name != "rule"]
    assert list(NONSMOOTH) == fields
    assert set(OPERATIONS) == set(fields) == set(generator.LINES) | set(generator.PLANES)
    assert {path.stem for path in generator.PLOTS.glob("*.svg")} == set(fields)
    for name in fields:
        assert generator.spellings(name)
        assert generator.chosen_by(name)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("relu", "norm") else pytest.mark.slow) for n in NONSMOOTH]
)
def test_plots_are_current(generator, name, tmp_path):
    generator.plot(name, tmp_path / "plot.svg")
    drawn, committed = (path.read_text() for path in (tmp_path / "plot.svg", generator.PLOTS / f"{name}.svg"))
    assert drawn == committed, "run: python docs/make_operations.py"


@pytest.mark.parametrize("name", NONSMOOTH)
def test_the_clarke_jacobian_in_words_is_the_one_measured(generator, name):
    """The one-sided derivatives are the ends of the interval that the description names, where it names numbers."""
    if name not in generator.LINES:
        return
    f, _, kinks = generator.LINES[name]
    assert len(kinks) == len(NONSMOOTH[name].kinks)
    for kink, described in zip(kinks, NONSMOOTH[name].kinks, strict=True):
        near = torch.tensor([kink - 1e-9, kink + 1e-9], dtype=torch.float64)
        measured = sorted(generator.gradient(f, near, Jacobians()).tolist())
        text = described.clarke.split(" where")[0].split("= ")[-1]
        if text.startswith("["):
            ends = [eval(end) for end in text.strip("[]").split(",")]
            assert measured == pytest.approx(ends, abs=2e-3)
        elif "jump" not in text:  # between a parameter and 1
            assert measured[1] == 1.0
