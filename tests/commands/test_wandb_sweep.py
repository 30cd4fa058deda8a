"""A grid as a sweep of W&B: the command that an agent makes of it computes the cell, and logs it."""

import json

import pandas as pd
import pytest
import yaml
from wandb.sdk.launch.sweeps import utils

from nslightning.commands import experiment, wandb_sweep

LITTLE = """
kind: train
title: A little one
fixed: {backbone: paper/fc, width: 4, depth: 1, data: FashionMNISTSample, train_images: 64, epochs: 2}
vary: {max_pool: [0, minimal], seed: [0, 1]}
scales: {small: {}}
"""


def test_an_agents_command_computes_one_cell_and_logs_it(tmp_path, monkeypatch, capsys):
    file, sweep, output = tmp_path / "little.yaml", tmp_path / "sweep.yaml", tmp_path / "out"
    file.write_text(LITTLE)
    words = ["experiment", str(file), f"--output={output}", f"--wandb-sweep={sweep}"]
    assert experiment.main(words) == 0
    assert f"wandb sweep {sweep}" in capsys.readouterr().out
    assert not output.exists()
    definition = yaml.safe_load(sweep.read_text())
    assert definition["method"] == "grid"
    assert definition["parameters"] == {"max_pool": {"values": [0, "minimal"]}, "seed": {"values": [0, 1]}}

    # As wandb's agent does it, by its own functions.
    template = utils.create_sweep_command(definition["command"])
    asked = {"args": {"max_pool": {"value": "minimal"}, "seed": {"value": 1}}}
    arguments = utils.create_sweep_command_args(asked)
    command = [word for part in template for word in arguments_of(part, arguments)]
    assert command[:3] == ["/usr/bin/env", "nslightning", "experiment"]

    logged = []

    class Run:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def log(self, values):
            logged.append(values)

    monkeypatch.setattr("wandb.init", lambda **options: Run())
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert experiment.main([*command[2:], "--device=cpu"]) == 0
    table = pd.read_csv(output / "little/small/results.csv")
    assert table["cell"].nunique() == 1
    assert (set(table["max_pool"]), set(table["seed"])) == ({"minimal"}, {1})
    assert [values["epoch"] for values in logged] == [0, 1]
    want = table.query("epoch == 1 and metric == 'test_accuracy'")["value"].item()
    assert logged[1]["test_accuracy"] == pytest.approx(want)


def arguments_of(part, arguments):
    """What wandb's agent puts in the place of a macro."""
    macros = {"${env}": ["/usr/bin/env"], **{f"${{{name}}}": words for name, words in arguments.items()}}
    return macros.get(part, [part])


def test_each_product_is_a_sweep_of_its_own(tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text(LITTLE.replace("vary: {max_pool: [0, minimal], seed: [0, 1]}", "grids: [{seed: [0]}, {relu: [1]}]"))
    assert experiment.main(["experiment", str(file), f"--wandb-sweep={tmp_path / 's.yaml'}"]) == 0
    parameters = [yaml.safe_load((tmp_path / f"s-{n}.yaml").read_text())["parameters"] for n in (1, 2)]
    assert parameters == [{"seed": {"values": [0]}}, {"relu": {"values": [1]}}]


def test_the_definition_is_plain_data():
    from nslightning.experiments import Experiment

    grid = Experiment("x", "train", "small", grids=({"seed": (0, 1)},))
    (sweep,) = wandb_sweep.wandb_sweeps(grid, ["x"])
    assert json.loads(json.dumps(sweep)) == sweep
