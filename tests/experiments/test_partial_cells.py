"""A training of a grid that is interrupted goes on from its last minutes, bit for bit."""

import pytest
import torch

from nslightning.experiments import partial, run
from nslightning.experiments.cells import settings
from nslightning.experiments.grid import Experiment
from nslightning.experiments.partial import Partial
from nslightning.experiments.training import Run, train

SMALL = {
    "backbone": "paper/fc", "width": 8, "depth": 2, "data": "FashionMNISTSample", "train_images": 80, "batch_size": 16,
    "epochs": 3, "learning_rate": 0.05, "eval_batch_size": 1000,
}  # fmt: skip
STEPS = 15


@pytest.fixture
def steps(monkeypatch):
    """How many steps were taken; the step at which the training is interrupted, if it is."""
    state = {"taken": 0, "stop": None}
    stock = Run.step

    def step(self, x, y):
        if state["taken"] == state["stop"]:
            raise KeyboardInterrupt
        state["taken"] += 1
        return stock(self, x, y)

    monkeypatch.setattr(Run, "step", step)
    monkeypatch.setattr(partial, "SAVED_EVERY", 0.0)
    return state


VARIANTS = {
    "sgd with a schedule": {},
    "dropout": {"dropout": 0.5},
    "a random choice": {"relu": "random", "seed": 3},
    "Adam, in order": {"optimizer": "adam", "shuffle": False},
    "loss scaling": {"precision": 24},
    "augmented": {"backbone": "paper/lenet5", "width": None, "depth": None, "data": "Synthetic", "data_options":
                  {"image_shape": (1, 28, 28), "images": 80, "eval_images": 20}, "train_images": None},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_training_finds_what_the_whole_one_finds(tmp_path, steps, variant):
    cell = settings("train", SMALL | VARIANTS[variant])
    whole = train(cell, "cpu")
    assert steps["taken"] == STEPS
    for stop in (1, 4, 5, 8, 14):  # within an epoch and between two
        file = tmp_path / f"{stop}.partial"
        steps.update(taken=0, stop=stop)
        with pytest.raises(KeyboardInterrupt):
            train(cell, "cpu", file)
        torch.rand(stop)  # whatever else may draw
        steps.update(taken=0, stop=None)
        assert train(cell, "cpu", file) == whole
        assert steps["taken"] == STEPS - stop


def test_a_training_that_died_stays_dead(tmp_path, steps):
    cell = settings("train", SMALL | {"learning_rate": 1e30})
    whole = train(cell, "cpu")
    taken = steps["taken"]
    assert taken < STEPS
    steps.update(taken=0, stop=taken - 1)
    with pytest.raises(KeyboardInterrupt):
        train(cell, "cpu", tmp_path / "x")
    steps.update(taken=0, stop=None)
    assert str(train(cell, "cpu", tmp_path / "x").rows) == str(whole.rows)  # NaN is equal to nothing


def test_what_another_version_wrote_or_cannot_be_read_is_computed_again(tmp_path, steps, monkeypatch):
    cell, file = settings("train", SMALL), tmp_path / "x"
    whole = train(cell, "cpu", file)
    steps["taken"] = 0
    monkeypatch.setattr(partial, "_writer", lambda: {"python": "another"})
    assert Partial(file).load() is None
    assert train(cell, "cpu", file) == whole
    assert steps["taken"] == STEPS
    file.write_bytes(file.read_bytes()[:1000])
    steps["taken"] = 0
    assert train(cell, "cpu", file) == whole
    assert steps["taken"] == STEPS


def test_nothing_is_saved_before_its_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(partial.time, "monotonic", lambda: clock[0])
    kept = Partial(tmp_path / "x", every=60)
    clock[0] = 59.0
    assert not kept.due
    clock[0] = 60.0
    assert kept.due
    kept.save({"a": 1})
    assert not kept.due
    assert kept.load() == {"a": 1}
    assert not Partial(None, every=0).due


def test_a_grid_goes_on_within_the_cell_and_leaves_no_partial_file(tmp_path, steps):
    grid = Experiment("x", "train", "small", fixed=SMALL, grids=({"relu": [0, 1]},))
    steps["stop"] = STEPS + 7
    with pytest.raises(KeyboardInterrupt):
        run(grid, tmp_path)
    cells = tmp_path / "x/small/cells"
    assert [f.suffix for f in sorted(cells.iterdir(), key=lambda f: f.suffix)] == [".json", ".partial"]
    steps.update(taken=0, stop=None)
    report = run(grid, tmp_path)
    assert (report.skipped, report.computed, report.failed) == (1, 1, [])
    assert steps["taken"] == STEPS - 7
    assert [f.suffix for f in cells.iterdir()] == [".json", ".json"]
