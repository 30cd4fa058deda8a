"""Figures of experiments: what is drawn is what the tables say, and nothing that diverged is dropped."""

import dataclasses
import importlib.util
import json
import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.axes import Axes
from scipy import stats

from nslightning import configs
from nslightning.commands import figure as command
from nslightning.experiments import Experiment, engine
from nslightning.experiments import figures as f
from nslightning.experiments.cells import Outcome
from nslightning.experiments.figures.results import runs_at_end, share_interval, sorted_choices
from nslightning.experiments.figures.standalone import tied_entries
from nslightning.experiments.figures.style import plain_log
from nslightning.experiments.published import table

FILES = sorted((Path(configs.__file__).parent / "experiments").glob("*.yaml"))
DOCS = Path(__file__).parents[2] / "docs"


def made_up(kind, cell, device, partial=None):
    """What a cell might have found, drawn from its settings: large published choices diverge."""
    draw = random.Random(str(dataclasses.asdict(cell)))
    value = cell.relu or cell.max_pool
    rows = []
    if kind == "train":
        dies = draw.randrange(1, 3) if cell.rule == "published" and value in (10, 50, 1000, 10000) else math.inf
        for epoch in range(min(cell.epochs, 4)):
            alive = epoch < dies
            metrics = {
                "train_loss": draw.uniform(0.1, 1) if alive else math.nan,
                "test_accuracy": draw.uniform(0.9, 0.99) if alive else 0.098,
                "nan": float(not alive),
            }
            if cell.count_zeros:
                metrics |= {"zeros": float(draw.randrange(4)), "relu_calls": 6e4 * (cell.width or 1)}
            rows += [{"epoch": epoch, "metric": k, "value": v} for k, v in metrics.items()]
    elif kind == "zones":
        for theta in range(cell.thetas):
            first = draw.choice([math.nan, *range(1, 200)]) if cell.precision < 64 else math.nan
            seen = first if cell.stop_at_first and first == first else 240
            differing = 0 if first != first else 1 if cell.stop_at_first else draw.randrange(1, 240)
            metrics = {
                "batches": seen,
                "differing": differing,
                "not_finite": draw.randrange(2),
                "first_differing": first,
            }
            if cell.histogram:
                metrics |= {"norm_zero": 100, "norm_1e-5": seen - 100 - metrics["not_finite"]}
            rows += [{"theta": theta, "metric": k, "value": float(v)} for k, v in metrics.items()]
    else:
        names, index = [*cell.choices, "control"], "step" if cell.steps else "epoch"
        for at in range(cell.steps or min(cell.epochs, 6) + 1):
            for i, twin in enumerate(names):
                lost = twin == "10000" and at > 3
                distance = math.nan if lost else 0.0 if twin in (names[0], "control") else at * i * 1e-3
                rows.append({index: at, "twin": twin, "metric": "l1_distance", "value": distance})
                if not cell.steps:
                    rows.append({index: at, "twin": twin, "metric": "test_accuracy", "value": draw.random()})
            if cell.steps:
                rows.append({index: at, "twin": names[0], "metric": "min_abs_input", "value": 0.0 if at == 2 else 1e-6})
    return Outcome(rows, {"data": f"{cell.data} (made up)", "device": "cpu", "dtype": "float32"})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Made-up results of every packaged experiment at smoke scale, and of some at larger ones, by the real engine."""
    output = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "compute", made_up)
        for file in FILES:
            engine.run(Experiment.read(file, "smoke"), output)
        for name in ("mnist_lenet_beta", "mnist_volume_relu", "cifar10_vgg_volume_max_pool"):
            engine.run(Experiment.read(configs.path(f"experiments/{name}"), "small"), output)
        engine.run(
            Experiment.read(configs.path("experiments/cifar10_vgg_twins_beta"), "paper"),
            output,
            only={"precision": [32]},
        )
    return output


def rows_of(results, name, scale="smoke"):
    return f.read([results / name / scale])


def drawn(axis: Axes, **keys):
    """The lines of an axis that stand for something, by their id."""
    wanted = [f"{k}={v}" for k, v in keys.items()]
    return [a for a in (*axis.lines, *axis.patches) if a.get_gid() and set(wanted) <= set(a.get_gid().split(";"))]


def panel(figure, title):
    (axis,) = [a for a in figure.axes if a.get_title() == title]
    return axis


def counts(axis, name):
    """The numbers in a line below an axis, from left to right."""
    marks = [t for t in axis.texts if (t.get_gid() or "").startswith(f"count={name};")]
    return [t.get_text() for t in sorted(marks, key=lambda t: t.xy[0])]


def test_every_figure_that_an_experiment_names_is_there_and_is_fed():
    named = {name for file in FILES for name in yaml.safe_load(file.read_text()).get("figures", ())}
    assert named <= set(f.FIGURES)
    for name, drawing in f.FIGURES.items():
        assert bool(f.feeding(name)) == drawing.needs_results, name


@pytest.mark.parametrize("name", f.FIGURES)
def test_every_figure_is_drawn_at_smoke_scale(name, results, monkeypatch, tmp_path):
    monkeypatch.setenv("NSLIGHTNING_DATA_DIR", str(tmp_path))
    folders = [results / e / "smoke" for e in f.feeding(name)] if f.FIGURES[name].needs_results else []
    figure = f.make(name, f.read(folders))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as axes that found no room
        figure.draw_without_rendering()
    assert any(artist.get_gid() for axis in figure.axes for artist in (*axis.lines, *axis.patches))
    if folders:
        footer = figure.get_supxlabel().replace("\n", " ")
        assert "smoke scale" in footer
        assert "made up" in footer
        (mark,) = [text.get_text() for text in figure.texts if text.get_gid() == "smoke"]
        assert mark.startswith("SMOKE")
        assert set(f.read(folders)["data"]) == set(mark.splitlines()[1].split(", "))


def test_only_checks_are_marked_as_such(results):
    figure = f.make("mnist-lenet-test", rows_of(results, "mnist_lenet_beta", "small"))
    assert not [text for text in figure.texts if text.get_gid() == "smoke"]


def test_boxes_hold_every_run_and_those_that_diverged_are_marked_and_counted(results):
    rows = rows_of(results, "mnist_lenet_beta", "small")
    figure = f.make("mnist-lenet-test", rows)
    last = rows[(rows["metric"] == "test_accuracy") & (rows["epoch"] == 3)]
    diverged = 0
    for rule in ("exact", "published"):
        for bits in (16, 32):
            axis = panel(figure, f"{rule} rule, {bits} bit")
            n, lost = [], []
            for choice in (0, 1, 100, 1000, 10000):
                for norm in (False, True):
                    of = "exact" if choice < 2 else rule  # one program under both rules
                    runs = last[
                        (last["rule"] == of) & (last["precision"] == bits) & (last["max_pool"] == choice)
                        & (last["batch_norm"] == norm)
                    ]["value"]  # fmt: skip
                    dead = rule == "published" and choice >= 1000
                    n, lost = [*n, str(len(runs))], [*lost, str(len(runs) * dead)]
                    marks = [a for a in drawn(axis, x=choice, hue=norm) if "paper" not in a.get_gid()]
                    points = [a for a in marks if a.get_marker() == "o"]
                    assert sorted(np.concatenate([a.get_ydata() for a in points])) == ([] if dead else sorted(runs))
                    crosses = [a for a in marks if a.get_marker() == "x"]
                    assert [a.get_gid().split(";")[-1] for a in crosses] == ["diverged=3"] * dead
                    diverged += len(crosses)
            assert (counts(axis, "n"), counts(axis, "NaN")) == (n, lost)
    assert diverged == 8


def test_published_points_are_the_published_numbers(results):
    figure = f.make("mnist-lenet-test", rows_of(results, "mnist_lenet_beta", "small"))
    theirs = table("training").query(
        "data == 'MNIST' and backbone == 'lenet5' and optimizer == 'sgd' and precision == 16"
    )
    theirs = theirs[theirs["metric"] == "test_accuracy"]
    axis = panel(figure, "exact rule, 16 bit")
    for choice in (0, 1, 100):
        for norm in (False, True):
            (mean,) = theirs[(theirs["value"] == choice) & (theirs["batch_norm"] == norm)]["mean"]
            (point,) = [a for a in drawn(axis, x=choice, hue=norm) if a.get_gid().endswith(";paper")]
            assert list(point.get_ydata()) == [mean]
            assert point.get_markerfacecolor() == "white"
    assert counts(axis, "paper NaN") == ["0"] * 6 + ["10"] * 4  # at 1000 and 10000 every published run diverged
    assert len([a for a in axis.lines if (a.get_gid() or "").endswith("paper-below")]) == 4


def test_a_sample_is_not_held_against_published_numbers(results):
    figure = f.make("mnist-lenet-test", rows_of(results, "mnist_lenet_beta"))
    assert not any("paper" in (a.get_gid() or "") for axis in figure.axes for a in axis.lines)


def test_loss_curves_are_means_over_the_finite_runs_and_end_in_a_cross(results):
    rows = rows_of(results, "mnist_lenet_beta", "small")
    figure = f.make("mnist-lenet-train", rows)
    loss = rows[(rows["metric"] == "train_loss") & (rows["precision"] == 32) & rows["batch_norm"].isin([False])]
    for rule, choice in (("exact", 10000), ("published", 10000), ("published", 100)):
        axis = panel(figure, f"{rule} rule, 32 bit, no batch norm")
        runs = loss[(loss["rule"] == rule) & (loss["max_pool"] == choice)]
        mean = [runs[runs["epoch"] == e]["value"].mean() for e in range(4)]  # pandas leaves NaN out
        (line,) = [a for a in axis.lines if a.get_gid() == f"choice={choice}"]
        np.testing.assert_allclose(line.get_ydata(), mean)
        ends = drawn(axis, choice=choice, ends=1)
        if rule == "published" and choice == 10000:
            last = max(e for e in range(4) if math.isfinite(mean[e]))
            assert (ends[0].get_xdata(), ends[0].get_ydata()) == ([last + 1], [pytest.approx(mean[last])])
            assert any("3 of 3 at $10^{4}$" in t.get_text() for t in axis.texts)
        else:
            assert ends == []
    theirs = table("curves").query(
        "data == 'MNIST' and backbone == 'lenet5' and optimizer == 'sgd' and precision == 32 and value == 100 "
        "and metric == 'train_loss' and not batch_norm"
    )
    (paper,) = drawn(panel(figure, "exact rule, 32 bit, no batch norm"), choice=100, paper=1)
    assert list(paper.get_ydata()) == list(theirs["mean"])
    assert list(paper.get_xdata()) == list(theirs["epoch"] + 1)


def test_rule_effect_pairs_seeds_and_counts_what_diverged(results):
    rows = rows_of(results, "mnist_lenet_beta", "small")
    figure = f.make("rule-effect", rows)
    top = panel(figure, "LeNet-5/MNIST\n32 bit, no BN")
    bottom = figure.axes[figure.axes.index(top) + 4]  # below it
    end = rows[(rows["metric"] == "test_accuracy") & (rows["epoch"] == 3) & (rows["precision"] == 32)]
    end = end[end["batch_norm"].isin([False]) & (end["rule"] == "exact")]
    value = {(c, s): v for c, s, v in zip(end["max_pool"], end["seed"], end["value"], strict=True)}
    (points,) = drawn(top, rule="exact")
    expected = [100 * (value[c, s] - value[0, s]) for c in (0, 1, 100, 1000, 10000) for s in range(3)]
    np.testing.assert_allclose(sorted(points.get_ydata()), sorted(expected))
    (points,) = drawn(top, rule="published")
    assert len(points.get_ydata()) == 3 * 3  # 0, 1 and 100: the others diverged
    shares = {rule: [drawn(bottom, rule=rule, choice=c)[0].get_height() for c in (0, 100, 10000)]
              for rule in ("exact", "published")}  # fmt: skip
    assert shares == {"exact": [0, 0, 0], "published": [0, 0, 100]}


def test_volume_bars_are_the_shares_of_parameter_vectors(results):
    rows = rows_of(results, "mnist_volume_relu", "small")
    figure = f.make("volume-mnist", rows)
    walks, width, depth, size = figure.axes
    differing = rows[(rows["metric"] == "differing") & (rows["rule"] == "exact")]
    base = (differing["width"] == 256) & (differing["batch_size"] == 256)
    theirs = table("volume_relu_mnist").query("factor == 'depth'")
    for bits in (16, 32, 64):
        for level in (1, 2, 3, 5, 6):
            hits = differing[base & (differing["depth"] == level) & (differing["precision"] == bits)]["value"] > 0
            (bar,) = [a for a in drawn(depth, level=level, precision=bits, rule="exact") if a in depth.patches]
            assert bar.get_height() == pytest.approx(100 * hits.mean())
            assert (bits == 64) == (bar.get_height() == 0)  # at its true value
            (mean,) = theirs[(theirs["depth"] == level) & (theirs["precision"] == bits)]["mean"]
            (point,) = [a for a in drawn(depth, level=level, precision=bits) if a.get_gid().endswith("paper")]
            assert list(point.get_ydata()) == [100 * mean]
    assert counts(depth, "n") == ["200"] * 15
    lost = rows[(rows["metric"] == "not_finite") & (rows["rule"] == "exact") & (rows["width"] == 16)]
    by_precision = [str(int(lost[lost["precision"] == bits]["value"].sum())) for bits in (16, 32, 64)]
    assert counts(width, "NaN")[:3] == by_precision
    assert {a.get_marker() for a in drawn(size, rule="published")} == {"x"}
    first = rows[(rows["metric"] == "first_differing") & (rows["precision"] == 32) & (rows["rule"] == "exact")]
    first = first[(first["width"] == 256) & (first["depth"] == 3) & (first["batch_size"] == 256)]["value"]
    (bar,) = drawn(walks, level=10, precision=32)
    assert bar.get_height() == pytest.approx(100 * (first * 256 <= 10_000).mean())
    assert 0 < bar.get_height() < 100


def test_impact_factors_are_shares_of_mini_batches(results):
    rows = rows_of(results, "cifar10_vgg_volume_max_pool", "small")
    figure = f.make("impact-factors", rows)
    part = rows[(rows["backbone"] == "paper/vgg16") & (rows["precision"] == 32)]
    total = part.groupby("metric")["value"].sum()
    (bar,) = [
        a for a in drawn(figure.axes[0], level="paper/vgg16", precision=32, rule="exact") if a in figure.axes[0].patches
    ]
    assert bar.get_height() == pytest.approx(100 * total["differing"] / total["batches"])
    (point,) = [a for a in drawn(figure.axes[0], level="paper/vgg16", precision=32) if a.get_gid().endswith("paper")]
    assert list(point.get_ydata()) == [pytest.approx(47.826)]


@pytest.mark.parametrize(("hits", "n"), [(0, 200), (3, 7), (200, 200), (1, 1000)])
def test_share_interval_is_wilsons(hits, n):
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert share_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_volume_curves_count_the_vectors_affected_so_far(results):
    rows = rows_of(results, "mnist_volume_relu", "small")
    rows = rows[(rows["depth"] == 3) & (rows["width"] == 256) & (rows["batch_size"] == 256) & (rows["precision"] == 32)]
    figure = f.FIGURES["cifar-volume"].make(rows[rows["rule"] == "exact"])
    (line,) = drawn(figure.axes[0], rule="exact", precision=32)
    first = rows[(rows["metric"] == "first_differing") & (rows["rule"] == "exact")]["value"]
    x, y = (np.asarray(v) for v in line.get_data())
    for images in (1000, 20_000, 45_000):
        assert y[np.flatnonzero(x <= images)[-1]] == pytest.approx(100 * (first * 256 <= images).mean())


def test_histograms_are_shares_of_all_mini_batches(results):
    rows = rows_of(results, "mnist_lenet_threshold")
    figure = f.make("threshold-histograms", rows)
    title = "LeNet-5/Fashion-MNIST sample\n$\\beta$ = 1, 16 bit"
    part = rows[(rows["precision"] == 16) & (rows["against"] == '{"max_pool": 1}')]
    total = part.groupby("metric")["value"].sum()
    for decade, metric in ((None, "norm_zero"), (-5, "norm_1e-5")):
        (bar,) = drawn(panel(figure, title), decade=decade)
        assert bar.get_height() == pytest.approx(100 * total[metric] / total["batches"])
    lost = int(total["not_finite"])
    assert any(t.get_text().endswith(f"NaN: {lost}") for t in panel(figure, title).texts) == (lost > 0)


def test_twins_always_come_with_their_control(results):
    rows = f.read([results / "cifar10_vgg_twins_beta" / "paper"])
    figure = f.make("weight-difference", rows)
    for rule in ("exact", "published"):
        axes = [a for a in figure.axes if a.get_title() == f"VGG11, CIFAR-10\n32 bit, {rule} rule"]
        distance = next(a for a in axes if a.get_ylabel() == "L1 distance")
        part = rows[(rows["rule"] == rule) & (rows["metric"] == "l1_distance")]
        for twin in ("1", "10", "10000", "control"):
            (line,) = [a for a in distance.lines if a.get_gid() == f"twin={twin}"]
            expected = part[part["twin"].astype(str) == twin].sort_values("epoch")["value"]
            np.testing.assert_array_equal(line.get_ydata(), expected)
        assert [a.get_marker() for a in drawn(distance, twin="10000", lost=1)] == ["x"]
        (paper,) = drawn(distance, twin="control", paper=1)
        theirs = table("lockstep").query("precision == 32 and curve == '0 vs 0'")["value"].clip(lower=0)
        assert list(paper.get_ydata()) == list(theirs)
    assert "0 vs 0 (control)" in [t.get_text() for t in figure.legends[0].get_texts()]


def test_zeros_per_relu_input(results):
    rows = rows_of(results, "mnist_zeros")
    figure = f.make("zeros", rows)
    for depth in (1, 3):
        total = rows[rows["depth"] == depth].groupby("metric")["value"].sum()
        lines = [a for a in drawn(figure.axes[0], precision=16, depth=depth) if len(a.get_ydata())]
        shown = [y for a in lines for y in a.get_ydata()]
        assert shown == ([pytest.approx(total["zeros"] / total["relu_calls"])] if total["zeros"] else [])


def test_zeros_of_an_activation_are_marked(results):
    figure = f.make("intro-min-activation", rows_of(results, "mnist_intro_relu"))
    (zeros,) = drawn(figure.axes[0], zeros="min_abs_input")
    assert list(zeros.get_xdata()) == [2]


def test_tied_entries_against_a_loop():
    image = torch.randint(0, 3, (8, 6), generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(8, 6, dtype=torch.bool)
    for i in range(8):
        for j in range(6):
            window = [int(image[a, b]) for a in (i // 2 * 2, i // 2 * 2 + 1) for b in (j // 2 * 2, j // 2 * 2 + 1)]
            expected[i, j] = int(image[i, j]) == max(window) and window.count(max(window)) > 1
    assert torch.equal(tied_entries(image), expected)
    assert 0 < int(expected.sum()) < 48


def test_imagenet_curves_are_the_published_ones():
    figure = f.make("imagenet", f.read([]))
    theirs = table("imagenet")
    theirs = theirs[(theirs["value"] == 10) & (theirs["run"] == 1) & theirs["epoch"].str.isdecimal()]
    (line,) = drawn(figure.axes[0], beta=10, run=1)
    assert sorted(line.get_ydata()) == sorted(theirs["accuracy"])
    assert "PUBLISHED" in figure.axes[0].get_title()


def test_the_smallest_programs():
    figure = f.make("intro-examples", f.read([]))
    (line,) = drawn(figure.axes[0], program="zero")
    np.testing.assert_allclose(line.get_ydata(), 1 - 2 * np.asarray(line.get_xdata()), atol=1e-6)
    (line,) = drawn(figure.axes[1], v=1, dtype="float64")
    assert list(line.get_ydata()) == [0, 0, -1.5, 0, 0]


def test_a_run_whose_metric_is_called_nan_is_read_as_such(results):
    rows = rows_of(results, "mnist_lenet_beta")
    assert "nan" in set(rows["metric"])
    ends = runs_at_end(rows, "test_accuracy")
    assert len(ends) == rows["cell"].nunique()


def test_choices_are_sorted_by_size_then_by_name():
    assert sorted_choices([10000, "minimal", -1, 0.5, 10]) == [-1, 0.5, 10, 10000, "minimal"]


def test_pdf_and_png_are_written(results, tmp_path, capsys):
    out = tmp_path / "new"
    argv = [
        "figure",
        "volume-mnist",
        "--from",
        str(results / "mnist_volume_relu" / "smoke" / "results.csv"),
        "--out",
        str(out),
    ]
    assert command.main(argv) == 0
    assert sorted(p.name for p in out.iterdir()) == ["volume-mnist.pdf", "volume-mnist.png"]
    assert (out / "volume-mnist.pdf").read_bytes().startswith(b"%PDF")
    assert (out / "volume-mnist.png").read_bytes().startswith(b"\x89PNG")
    assert "volume-mnist.pdf" in capsys.readouterr().out


def test_what_is_wrong_is_told_and_nothing_is_written(results, tmp_path, capsys):
    lenet = str(results / "mnist_lenet_beta" / "smoke")
    for argv, message in (
        (["fig33", "--from", lenet], "did you mean 'fig3'?"),
        (["nothing", "--from", lenet], "there is no figure 'nothing'. `nslightning figure --list` tells all: fig3,"),
        (["fig3"], "give --from with those of cifar10_vgg_alpha or cifar10_vgg_beta"),
        (["fig3", "--from", lenet], "fig3 is not drawn from mnist_lenet_beta, but from cifar10_vgg_alpha"),
        (["fig3", "--from", str(tmp_path)], "holds no results"),
        (["fig3", "--from", str(results / "cifar10_vgg_alpha")], "there are "),
    ):
        assert command.main(["figure", *argv, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_run_makes_the_results_first(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "compute", made_up)
    argv = ["figure", "fig3", "--run", "smoke", "--output", str(tmp_path / "results"), "--out", str(tmp_path / "out")]
    assert command.main([*argv, "--workers", "1", "--device", "cpu"]) == 0
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == ["cifar10_vgg_alpha", "cifar10_vgg_beta"]
    assert (tmp_path / "out" / "fig3.pdf").is_file()
    assert "computed" in capsys.readouterr().out
    assert command.main(argv) == 0
    assert "0 computed" in capsys.readouterr().out
    for wrong, message in (
        (["figure", "all"], "all needs --run SCALE"),
        ([*argv, "--from", str(results)], "give one of the two"),
        (["figure"], "name a figure, or --list them"),
        (["figure", "fig3", "--run", "smal"], "did you mean 'small'? There are: smoke, small, paper"),
        (["figure", "fig3", "--frm", "x"], "did you mean '--from'?"),
        (["figure", "pool-ties", "--out", str(tmp_path / "out" / "fig3.pdf")], "is a file, and is to be a folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main(wrong)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["smoke", "small", "paper"])
@pytest.mark.parametrize("name", [name for name, drawing in f.FIGURES.items() if drawing.needs_results])
def test_the_paper_is_told_of_where_it_is_drawn(name, scale, results):
    """In the legend and in the caption, and nowhere else."""
    folders = [p for e in f.feeding(name) if (p := results / e / scale).is_dir()]
    if not folders:
        return  # the larger scales are made up for some experiments
    figure = f.make(name, f.read(folders))
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    words = [t.get_text() for legend in legends for t in legend.get_texts()] + [figure.get_supxlabel()]
    of_paper = [text for text in words if "paper" in text.replace("paper scale", "")]
    assert bool(of_paper) == any_paper(figure), of_paper


def any_paper(figure):
    marks = [mark for axis in figure.axes for mark in (*axis.lines, *axis.patches)]
    return any(part.startswith("paper") for mark in marks for part in str(mark.get_gid()).split(";"))


@pytest.mark.parametrize(("low", "high"), [(2.3036, 2.3036001), (2.3, 2.4), (1.0, 9.0), (0.03, 0.9), (1e-5, 1.0)])
def test_a_logarithmic_axis_has_labels_that_differ(low, high):
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    axis.plot([0, 1], [low, high])
    axis.set_yscale("log")
    plain_log(axis.yaxis)
    axis.figure.canvas.draw()
    bottom, top = axis.get_ylim()
    shown = [t.get_text() for t in axis.get_yticklabels() if bottom <= t.get_position()[1] <= top and t.get_text()]
    assert len(shown) >= 2
    assert len(set(shown)) == len(shown)


def test_the_list_tells_every_figure(capsys):
    assert command.main(["figure", "--list"]) == 0
    out = capsys.readouterr().out
    for name, drawing in f.FIGURES.items():
        assert f"{name}\n    {drawing.title}\n" in out
        assert drawing.paper in out
    assert "from: cifar10_vgg_alpha, cifar10_vgg_beta\n" in out


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("make_gallery", DOCS / "make_gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gallery_is_what_the_results_give(gallery, monkeypatch, tmp_path):
    monkeypatch.setenv("NSLIGHTNING_DATA_DIR", str(tmp_path))
    made = gallery.entries(DOCS.parent / "results")
    assert (DOCS / "gallery.md").read_text(encoding="utf-8") == gallery.page(made), "run: python docs/make_gallery.py"
    pictures = {file.stem: file.stat().st_size for file in gallery.PLOTS.glob("*.png")}
    assert set(pictures) == {e.name for e in made if not e.missing}
    assert all(size <= gallery.LARGEST for size in pictures.values())


def test_the_gallery_draws_the_scale_of_which_most_cells_ran(gallery, tmp_path):
    """A few cells at the papers' scale do not take the place of a whole small grid."""
    for scale, count in (("small", 3), ("paper", 2)):
        folder = tmp_path / "mnist_lenet_beta" / scale
        folder.mkdir(parents=True)
        (folder / "results.csv").touch()
        (folder / "provenance.json").write_text(json.dumps({"cells": {str(k): {} for k in range(count)}}))
    assert [source.name for source in gallery.sources("mnist-lenet-test", tmp_path)] == ["small"]


def test_the_gallery_lists_what_has_no_results(gallery, tmp_path, monkeypatch):
    monkeypatch.setenv("NSLIGHTNING_DATA_DIR", str(tmp_path))
    made = gallery.entries(tmp_path)
    text = gallery.page(made)
    assert {e.name for e in made if not e.missing} == {n for n, d in f.FIGURES.items() if not d.needs_results}
    assert "| fig3 |" in text
    assert "`nslightning experiment cifar10_vgg_alpha --scale small`" in text


def test_each_panel_names_its_optimizer_and_what_does_not_move_is_counted(repo_root):
    """Of the committed grid over optimizers each panel says which one it is of."""
    rows = f.read([repo_root / "results/mnist_mitigation/small"])
    figure = f.make("rule-effect", rows)
    titles = [axis.get_title().replace("\n", " ") for axis in figure.axes if axis.get_title()]
    assert len(set(titles)) == len(titles) >= 4
    assert {"INNAprop"} <= {word.strip(",") for title in titles for word in title.split()}
    ends = rows[(rows["metric"] == "test_accuracy") & (rows["epoch"] == rows["epoch"].max())]
    settings = ends.groupby(["optimizer", "batch_norm", "precision"])
    moving = sum(runs.groupby("seed")["value"].nunique().max() > 1 for _, runs in settings)
    assert len(titles) == moving < len(settings)
    (caption,) = [text.get_text() for text in figure.texts if "Left out" in text.get_text()]
    assert f"Left out: {len(settings) - moving} settings" in " ".join(caption.split())
