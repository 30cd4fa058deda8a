"""Every number of the page of performance, recomputed from the files that it names."""

import json
import re

import pytest


@pytest.fixture
def page(repo_root):
    return (repo_root / "docs" / "performance.md").read_text()


@pytest.fixture
def results(repo_root):
    return lambda name: json.loads((repo_root / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.fixture
def ratios(repo_root):
    """The patched networks' times over stock's, from a table of `benchmarks.surgery`: the medians of rounds."""

    def read(name):
        rows = re.findall(
            r"\| (.+) \| (\w+) \|.*\| ([+-][\d.]+)% \|\n", (repo_root / f"benchmarks/results/{name}.md").read_text()
        )
        return [1 + float(change) / 100 for _, treatment, change in rows if treatment in ("native", "minimal")]

    return read


def cells(page, start):
    """The cells of the row that starts with this text, after the first."""
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def span(values):
    return f"{min(values):.1f} to {max(values):.1f}"


@pytest.mark.parametrize(("column", "file"), [*enumerate(["ops_cpu", "ops_bf16_cpu", "ops_fp16_cpu"])])
def test_operations(page, results, column, file):
    def rows(operations, layouts=("contiguous", "channels_last"), ties=(0.0, 1e-6, 0.5)):
        return span(
            [
                row["ratio"]
                for row in results(file)["rows"]
                if row["operation"] in operations and row["layout"] in layouts and row["ties"] in ties
                if row["variant"] not in ("stock", "naive")
            ]
        )

    table = page[: page.index("## What a call costs")]
    assert cells(table, "ReLU")[column] == rows(["relu"], ties=(0.0, 1e-6))
    assert cells(table, "the same, half of all entries tied")[column] == rows(["relu"], ties=(0.5,))
    assert cells(table, "ReLU6, LeakyReLU")[column] == rows(["relu6", "leaky_relu"])
    for window in ("2x2/2", "3x3/2"):
        name, pool = f"2-d max pooling, {window}", [f"max_pool2d {window}"]
        assert cells(table, name)[column] == rows(pool, ("contiguous",))
        below = table[table.index(name) :].splitlines()[1]
        assert cells(below, "the same, channels-last")[column] == rows(pool, ("channels_last",))


def test_the_naive_way(page, results):
    naive = [row["ratio"] for row in results("ops_cpu")["rows"] if row["variant"] == "naive"]
    assert f"takes {min(naive):.0f} to {max(naive):.0f}\ntimes stock's time in float32" in page


def test_calls(page, results):
    calls = results("host_cpu")["results"]
    modules = [
        call["ratio"]
        for name, call in calls.items()
        if re.fullmatch(r"module: (relu|relu6|leaky_relu|hardswish|max_pool.*)", name)
    ]
    assert len(modules) == 5
    assert cells(page, "a patched module: ReLU, ReLU6, LeakyReLU, Hardswish, max pooling") == [span(modules)]
    assert cells(page, "a functional call inside a patched model") == [f"{calls['function: relu']['ratio']:.1f}"]
    steps = [calls[f"step: LeNet-5, batch {batch}"]["ratio"] for batch in (1, 16)]
    assert cells(page, "a whole training step of LeNet-5, batch 1 and 16") == ["{:.2f}, {:.2f}".format(*steps)]


def test_steps(page, ratios, results):
    training, evaluation = ratios("steps_cpu"), ratios("evaluation_cpu")
    assert len(training) == len(evaluation) == 4
    expected = [f"{min(values):.2f} to {max(values):.2f}" for values in (training, evaluation)]
    assert cells(page, "VGG11, ResNet-18") == expected
    fit = results("fit_cpu")["results"]
    assert f"takes {next(iter(fit.values()))['ratio']:.2f} of a step of a bare loop" in page


def test_compiled_steps(page, results):
    compiled = results("compiled_cpu")["results"]
    rows = {"LeNet-5, batch 128": "LeNet-5", "ResNet-18 at 32 pixels, batch 32": "ResNet-18, 32x32"}
    rows["VGG11 at 32 pixels, batch 16"] = "VGG11, 32x32"
    for row, name in rows.items():
        assert cells(page, row) == [f"{compiled[name]['ratio']:.2f}"]
        assert compiled[name]["batch"] == int(row.split("batch ")[1])


def test_the_strict_check(page, results):
    watching = results("watching_cpu")["results"]
    assert f"costs a step at most {100 * max(one['share'] for one in watching.values()):.2f} %" in page
    looks = {name.split(",")[0]: one["first look"] for name, one in watching.items()}
    large = [100 * look for name, look in looks.items() if name != "lenet5"]
    assert set(looks) == {"lenet5", "googlenet", "resnet18", "transformer encoder"}
    assert f"takes {min(large):.1f} to {max(large):.0f} % of a step" in page
    assert f"and {looks['lenet5']:.1f} steps of LeNet-5" in page


def test_measured_steps(page, results):
    rows = results("divergence_full_cpu")["rows"]
    by_step = {
        step: {row["case"]: row["ratio"] for row in rows if row["step"] == step} for step in ("measured", "naive")
    }
    worst = by_step["measured"].pop("vgg11 worst")
    few = by_step["measured"].values()
    row = "a step on which one to five choices are measured, where few ties matter or none"
    assert cells(page, row) == [f"{min(few):.2f} to {max(few):.2f} plain steps"]
    assert cells(page, "the same where every tie matters to all five") == [f"{worst:.1f} plain steps"]
    assert cells(page, "the naive way, one more backward a choice") == [
        f"{span(by_step['naive'].values())} plain steps"
    ]


def test_zones(page, results):
    speed = {row["case"]: row["speed_up"] for row in results("zones_cpu")["rows"]}
    case = "LeNet-5, relu 1", "LeNet-5, max_pool minimal"
    expected = f"1/{speed[case[0]]:.0f} of the time without ties that matter, 1/{speed[case[1]]:.1f} with"
    assert cells(page, "a mini-batch of `zones`, LeNet-5, against the papers' two networks") == [expected]
    by_zone = [speed[f"{one}, by zone"] for one in case]
    expected = f"1/{by_zone[0]:.0f}, and {1 / by_zone[1]:.2f} times the time"
    assert cells(page, "the same, where zones also separate differences from rounding") == [expected]
