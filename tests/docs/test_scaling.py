"""The cost model of docs/scaling.md, and the page's numbers."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.scaling import Machine, needs

MACHINE = Machine(1000, cores=4, images_per_core=500, network=1e9, storage=1e9, image_bytes=1e5)


def test_one_device_reduces_nothing():
    one = needs(MACHINE, 10_000_000, 100, 1, 3, 10)
    assert one["all_reduce_bytes"] == 0
    assert one["measured_steps_share"] == 0
    assert one["images_per_second"] == pytest.approx(1000)
    assert one["bound"] == "devices"


def test_a_slow_network_is_paid_for_beyond_the_backward():
    # A step of 0.1 s; 2 * 1/2 * 4e8 bytes at 1e9 a second: 0.4 s, of which 2/30 are hidden.
    two = needs(MACHINE, 100_000_000, 100, 2, 0, 10)
    assert two["all_reduce_seconds"] == pytest.approx(0.4)
    assert two["images_per_second"] == pytest.approx(200 / (0.1 + 0.4 - 0.2 / 3))
    # Four choices and the reference measured every 10th step: 0.2 s more a step.
    measured = needs(MACHINE, 100_000_000, 100, 2, 4, 10)
    assert measured["images_per_second"] == pytest.approx(200 / (0.1 + 0.4 - 0.2 / 3 + 0.2))


def test_storage_and_cores_bound_what_they_serve():
    many = needs(MACHINE, 1, 100, 100, 0, 10)
    assert (many["bound"], many["images_per_second"]) == ("storage", 1e4)
    few = needs(Machine(5000, 4, 500, 1e9, 1e12, 1e5), 1, 100, 2, 0, 10)
    assert (few["bound"], few["images_per_second"]) == ("cores", 4000)


def test_the_page_holds_the_committed_numbers(repo_root: Path):
    content = json.loads((repo_root / "benchmarks/results/scaling.json").read_text())
    page = (repo_root / "docs/scaling.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| (\d+)% \| (\w+) \| (\d+) ms \| ([\d.]+)% \|$", page, re.M)
    assert rows == [
        (
            str(row["devices"]),
            f"{row['images_per_second']:,.0f}",
            f"{row['efficiency'] * 100:.0f}",
            row["bound"],
            f"{row['all_reduce_seconds'] * 1e3:.0f}",
            f"{row['measured_steps_share'] * 100:.1f}",
        )
        for row in content["rows"]
    ]
    assumed = content["assumed"]
    for row in content["rows"]:
        machine = Machine(**{name: assumed[name] for name in Machine.__dataclass_fields__})
        numbers = (content["measured"]["parameters"], assumed["batch"], row["devices"], assumed["choices"])
        assert needs(machine, *numbers, assumed["every"])["images_per_second"] == row["images_per_second"]
    measured = content["measured"]
    assert f"One core prepares {measured['images_per_core']:.0f} images" in page
    # What two processes summed is what the model says: a set of gradients for each choice, and one for the reference.
    sets = assumed["choices"] + 1
    assert measured["measured_step"]["bytes"] == sets * 4 * measured["parameters"]
    assert f"{sets} sets of gradients, {measured['measured_step']['bytes'] / 1e6:.0f} MB" in page
    saved = measured["checkpoint"]
    assert f"A checkpoint takes {saved['bytes'] / 1e6:.0f} MB and {saved['seconds']:.1f} s" in page
