"""The figures: what is drawn, read back from matplotlib."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from nslightning.figures import divergence_by_step


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that are closed."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    return figures


@pytest.mark.filterwarnings("error")
def test_divergence_by_step_shows_zeros_and_non_finite_values(tmp_path, drawn):
    rows = pd.DataFrame(
        {
            "step": [0, 10, 20] * 4,
            "choice": ["a"] * 3 + ["b"] * 3 + ["zero"] * 3 + ["a rather long name of a choice"] * 3,
            "relative": [1e-3, 1e-5, 1e-4, 0.0, float("nan"), 1e-2, 0.0, 0.0, 0.0, 1e-7, float("inf"), 0.0],
        }
    )
    path = divergence_by_step(rows, tmp_path / "d.pdf")
    assert path.stat().st_size > 1000
    assert path.with_suffix(".png").stat().st_size > 1000
    (figure,) = drawn
    (axis,) = figure.axes
    labels = axis.get_legend_handles_labels()[1]
    assert labels == [
        "a",
        "b (1 of 3 exactly 0, 1 of 3 not finite)",
        "zero (3 of 3 exactly 0)",
        "a rather long name of a choice (1 of 3 exactly 0, 1 of 3 not finite)",
    ]
    assert list(axis.lines[0].get_ydata()) == [1e-3, 1e-5, 1e-4]
    assert axis.get_yscale() == "log"
    ticks = [line for line in axis.lines if line.get_marker() == "|"]
    assert [len(line.get_xdata()) for line in ticks] == [0, 1, 3, 1]


@pytest.mark.filterwarnings("error")
def test_divergence_by_step_where_all_is_zero(tmp_path, drawn):
    rows = pd.DataFrame({"step": [0, 1], "choice": ["a", "a"], "relative": [0.0, 0.0]})
    assert divergence_by_step(rows, tmp_path / "d.pdf").exists()
