"""The engine of grids: expansion, skipping, resuming, tidy files, comparison; and the cells against slow truths."""

import dataclasses
import functools
import io
import json
import math
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Trainer

from nslightning import configs, patch
from nslightning.arithmetic import HalfProducts
from nslightning.commands.experiment import main
from nslightning.data import DataError, FashionMNISTSample, Synthetic
from nslightning.exact_csv import read_exactly
from nslightning.experiments import (
    Experiment,
    Outcome,
    compare,
    comparison,
    engine,
    examples,
    grid,
    markdown,
    run,
    settings,
    training,
)
from nslightning.experiments.collecting import collect, restore
from nslightning.experiments.data import Images, load
from nslightning.experiments.networks import build
from nslightning.experiments.published import searched_learning_rate, table
from nslightning.experiments.training import Run, evaluate, train
from nslightning.experiments.twins import twins
from nslightning.experiments.zones import _networks, _theta_seed, difference_norm, zones
from nslightning.models import ImageClassifier
from nslightning.models.paper import lenet5

CPU = torch.device("cpu")
SMALL = {"backbone": "paper/fc", "width": 8, "depth": 2, "data": "FashionMNISTSample", "train_images": 128}


# ---------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("augment", [False, True])
def test_batches_are_those_of_the_data_module(augment):
    module = Synthetic(images=70, batch_size=32, seed=5)
    source = module._split("train")
    if augment:
        source = type(source)(source.images, source.labels, source.mean, source.std, 4, True, 5)
        module._loaded["train"] = source
    images = Images(source, CPU, normalise=True, augment=True)
    loader = module.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for (x, y), (x0, y0) in zip(images.batches(32, torch.float32, epoch=epoch, seed=5), loader, strict=True):
            assert torch.equal(x, x0)
            assert torch.equal(y, y0)


def test_images_in_their_order_and_not_normalised():
    images = load("FashionMNISTSample", (), CPU, normalise=False, train_images=10).train
    (x, y), (rest, _) = images.batches(6, torch.float64)
    raw = FashionMNISTSample()._split("train")
    assert torch.equal(x, (raw.images[:6].float() / 255).double())
    assert torch.equal(y, raw.labels[:6])
    assert len(rest) == 4
    assert len(list(images.batches(3, torch.float32, limit=2))) == 2


def test_an_unknown_data_set_is_named():
    with pytest.raises(ValueError, match=r"data='MINST' is not a data set; did you mean 'MNIST'\? There are: .*SVHN"):
        load("MINST", (), CPU)


# ------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("operation", ["linear", "conv2d"])
def test_half_products_are_the_rounded_sums(operation):
    g = torch.Generator().manual_seed(0)
    if operation == "linear":
        x, w, b = (torch.rand(s, generator=g).sub(0.5).half() for s in ((40, 300), (20, 300), (20,)))
        function = F.linear
    else:
        x, w, b = (torch.rand(s, generator=g).sub(0.5).half() for s in ((4, 6, 9, 9), (8, 6, 3, 3), (8,)))
        function = functools.partial(F.conv2d, padding=1)
    with HalfProducts():
        y = function(x, w, b)
    exact = function(x.double(), w.double(), b.double())
    spacing = torch.from_numpy(np.spacing(y.abs().numpy())).double()
    assert y.dtype == torch.float16
    single = 2**-24 * 300 * function(x.double().abs(), w.double().abs(), b.double().abs())  # error of a float32 sum
    assert bool(((y.double() - exact).abs() <= 0.5 * spacing + single).all())
    assert float(((y.double() - exact).abs() <= 0.5 * spacing).double().mean()) > 0.99  # mostly just rounded once


def test_half_products_reach_a_patched_network_and_its_gradient():
    cell = settings("train", {**SMALL, "precision": 16})
    images = load("FashionMNISTSample", (), CPU)
    network, _ = build(cell, images, CPU, None)
    x, y = next(images.train.batches(16, torch.float16))
    with HalfProducts():
        F.cross_entropy(network(x).float(), y).backward()
    wide, _ = build(dataclasses.replace(cell, precision=64), images, CPU, None)
    wide.load_state_dict(network.state_dict())
    F.cross_entropy(wide(x.double()), y).backward()
    for p, q in zip(network.parameters(), wide.parameters(), strict=True):
        assert p.grad.dtype == torch.float16
        assert float((p.grad.double() - q.grad).norm() / q.grad.norm()) < 5e-3


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("precision", [32, 64])
def test_the_lean_loop_takes_lightnings_steps_bit_for_bit(precision):
    cell = settings(
        "train", {"backbone": "paper/lenet5", "max_pool": 10, "relu": 1.0, "precision": precision, "batch_size": 64}
    )
    module = FashionMNISTSample(batch_size=64, seed=0)
    images = load("FashionMNISTSample", (), CPU)
    network, _ = build(cell, images, CPU, None)
    optimizer = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)
    model = ImageClassifier(jacobians=cell.jacobians, optimizer=optimizer)
    model.backbone.load_state_dict(network.state_dict())
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, limit_val_batches=0, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, precision="64-true" if precision == 64 else "32-true",
    )  # fmt: skip
    if precision == 64:  # float32 weights are what Lightning's module starts from, rounded nowhere
        network.load_state_dict(network.float().state_dict())
        network.double()
    trainer.fit(model, module)
    Run(cell, network, CPU).epoch(images.train, 0)
    for mine, theirs in zip(network.parameters(), model.backbone.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def values(outcome, metric):
    return [row["value"] for row in outcome.rows if row["metric"] == metric]


def test_a_training_run_tells_what_it_did():
    trained = train(settings("train", {**SMALL, "epochs": 3, "learning_rate": 0.05, "count_zeros": True}), "cpu")
    assert [row["epoch"] for row in trained.rows if row["metric"] == "test_accuracy"] == [0, 1, 2]
    assert values(trained, "train_loss")[2] < values(trained, "train_loss")[0]
    assert values(trained, "relu_calls") == [128 * 16.0] * 3
    cosine = [0.05 * (1 + math.cos(math.pi * e / 3)) / 2 for e in range(3)]
    assert values(trained, "learning_rate") == pytest.approx(cosine)
    constant = train(settings("train", {**SMALL, "epochs": 2, "learning_rate": 0.05, "schedule": "constant"}), "cpu")
    assert values(constant, "learning_rate") == [0.05, 0.05]
    assert trained.provenance["data"] == "fashion_mnist_sample (embedded sample, first 128 training images)"


def test_a_run_is_the_same_again_and_another_seed_is_another():
    one, two, other = (train(settings("train", {**SMALL, "epochs": 1, "seed": s}), "cpu").rows for s in (1, 1, 2))
    assert one == two
    assert one != other


def test_a_diverged_run_keeps_the_accuracy_of_its_constant_output():
    trained = train(settings("train", {**SMALL, "epochs": 4, "learning_rate": 1e30}), "cpu")
    assert values(trained, "nan") == [0.0, 1.0, 1.0, 1.0]  # one step an epoch, and the first loss is a number
    labels = load("FashionMNISTSample", (), CPU).test.labels
    assert values(trained, "test_accuracy")[1:] == [float((labels == 0).double().mean())] * 3  # argmax of NaN is 0


def test_zeros_at_relu_inputs_are_counted():
    cell = settings("train", {**SMALL, "epochs": 1, "learning_rate": 0.0, "count_zeros": True, "batch_size": 32})
    network, _ = build(cell, load("FashionMNISTSample", (), CPU, train_images=128), CPU, None)
    with torch.no_grad():
        network.fc1.weight[3] = network.fc1.bias[3] = 0.0
    images = load("FashionMNISTSample", (), CPU, train_images=128).train
    with training._counting_zeros(network, True, CPU) as counted:
        for x, _ in images.batches(32, torch.float32):
            network(x)
    assert counted == {"zeros": 128.0, "relu_calls": 128 * 16.0}


def test_24_bits_scale_the_loss_each_run_for_itself_unless_the_quirk_is_asked_for():
    cell = settings("train", {**SMALL, "precision": 24, "epochs": 1})
    shared = dataclasses.replace(cell, shared_scaler=True)
    network = torch.nn.Linear(1, 1)

    def scaler(cell):
        return Run(cell, network, CPU).scaler

    assert scaler(cell) is not scaler(cell)
    assert scaler(cell).is_enabled()
    assert scaler(shared) is scaler(shared)
    assert not scaler(dataclasses.replace(cell, precision=32)).is_enabled()
    assert values(train(cell, "cpu"), "nan") == [0.0]


def test_evaluation_precision_and_loss_precision_are_options():
    logits, y = torch.tensor([[3.0, 1.0004883, 0.5]]).half(), torch.tensor([0])
    cell = settings("train", {**SMALL, "precision": 16})
    assert training._loss(cell, logits, y).dtype == torch.float32
    assert training._loss(dataclasses.replace(cell, half_loss=True), logits, y).dtype == torch.float16
    cell = settings("train", {**SMALL, "precision": 24})
    images = load("FashionMNISTSample", (), CPU)
    network, _ = build(cell, images, CPU, None)
    seen = []
    network.classifier.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    evaluate(cell, network, images.test)
    assert set(seen) == {torch.float16}
    seen.clear()
    evaluate(dataclasses.replace(cell, eval_float32=True), network, images.test)
    assert set(seen) == {torch.float32}


# ----------------------------------------------------------------------------------------------------------- zones


def slowly(cell, state, x, y):
    """Two networks, each patched with its choice: two forwards and two backwards, no shortcut."""
    counts = []
    for choice in (cell.jacobians, cell.alternative):
        network = lenet5(10, (1, 28, 28)).double()
        network.load_state_dict(state)
        patch(network, choice)
        F.cross_entropy(network(x), y).backward()
        counts.append([p.grad for p in network.parameters()])
    return counts


@pytest.mark.parametrize("rule", ["exact", "published"])
@pytest.mark.parametrize("against", [{"relu": 1.0}, {"max_pool": 1.0}])
@pytest.mark.parametrize("norm", ["bitwise_first_layer", "linf_sum", "l1_sum"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_norm_is_that_of_two_separate_gradients(rule, against, norm, tied):
    options = {"backbone": "paper/lenet5", "against": against, "norm": norm, "rule": rule, "precision": 64}
    cell = settings("zones", options)
    images = load("FashionMNISTSample", (), CPU)
    pair, _ = _networks(cell, images, CPU)
    x, y = next(images.train.batches(8, torch.float64))
    state = pair[0].state_dict()
    if tied:  # a channel of ReLU inputs that are exactly 0
        state["conv1.weight"][0] = state["conv1.bias"][0] = 0.0
    for network in pair:
        network.load_state_dict(state)
    a, b = slowly(cell, state, x, y)
    if norm == "bitwise_first_layer":
        expected = float(not torch.equal(a[0], b[0]))
    elif norm == "linf_sum":
        expected = sum(float((p - q).abs().max()) for p, q in zip(a, b, strict=True))
    else:
        expected = sum(float((p - q).abs().sum()) for p, q in zip(a, b, strict=True))
    assert difference_norm(cell, pair, x, y) == pytest.approx(expected, rel=1e-12, abs=0)
    if against == {"relu": 1.0}:
        assert (expected > 0) == tied


def test_zones_count_what_is_above_the_threshold_and_stop_when_asked():
    options = {"backbone": "paper/lenet5", "data": "FashionMNISTSample", "against": {"max_pool": 1.0}, "batch_size": 16}
    options |= {"norm": "l1_sum", "batches": 5, "thetas": 1}
    everything = zones(settings("zones", {**options, "histogram": True}), "cpu")
    assert values(everything, "batches") == [5.0]
    assert values(everything, "differing") == [5.0]
    binned = sum(row["value"] for row in everything.rows if row["metric"].startswith("norm_"))
    assert binned == 5
    stopped = zones(settings("zones", {**options, "stop_at_first": True}), "cpu")
    assert values(stopped, "batches") == [1.0]
    assert values(stopped, "first_differing") == [1.0]
    nothing = zones(settings("zones", {**options, "tau": 1e9}), "cpu")
    assert values(nothing, "differing") == [0.0]
    assert all(math.isnan(v) for v in values(nothing, "first_differing"))


def test_parameter_vectors_are_new_draws_shared_by_rules_and_batch_sizes():
    options = {**SMALL, "against": {"relu": 1.0}, "thetas": 3}
    cell = settings("zones", options)
    assert len({_theta_seed(settings("zones", {**options, "seed": s}), t) for s in range(3) for t in range(3)}) == 9
    assert _theta_seed(dataclasses.replace(cell, rule="published", batch_size=7), 1) == _theta_seed(cell, 1)
    assert _theta_seed(dataclasses.replace(cell, width=9), 1) != _theta_seed(cell, 1)


# ----------------------------------------------------------------------------------------------------------- twins


def test_twins_start_together_and_only_another_choice_takes_them_apart():
    options = {"backbone": "paper/lenet5", "data": "FashionMNISTSample", "train_images": 128, "batch_size": 32}
    options |= {"choices": {"0": {}, "1": {"max_pool": 1.0}}, "epochs": 2}
    rows = twins(settings("twins", options), "cpu").rows
    distances = {(r["twin"], r["epoch"]): r["value"] for r in rows if r["metric"] == "l1_distance"}
    assert [distances["control", e] for e in range(3)] == [0.0, 0.0, 0.0]
    assert distances["1", 0] == 0.0
    assert distances["1", 1] > 0.0
    alone = train(settings("train", {k: v for k, v in options.items() if k != "choices"} | {"max_pool": 1.0}), "cpu")
    together = [r["value"] for r in rows if r["metric"] == "test_accuracy" and r["twin"] == "1"]
    assert together[1:] == values(alone, "test_accuracy")


def test_twins_step_by_step_with_the_smallest_activation():
    cell = settings(
        "twins",
        {**SMALL, "choices": {"0": {}, "1": {"relu": 1.0}}, "steps": 3, "batch_size": 16, "momentum": 0.0}
        | {"weight_decay": 0.0, "shuffle": False, "init": "torch", "learning_rate": 0.1},
    )
    rows = twins(cell, "cpu").rows
    network, _ = build(cell, load("FashionMNISTSample", (), CPU), CPU, "torch")
    initial = [p.detach().clone() for p in network.parameters()]
    smallest = []
    for x, y in load("FashionMNISTSample", (), CPU).train.batches(16, torch.float32, limit=3):
        smallest.append(float(network.fc1(x.flatten(1)).detach().abs().min()))
        for p, g in zip(
            network.parameters(), torch.autograd.grad(F.cross_entropy(network(x), y), network.parameters()), strict=True
        ):
            p.data -= 0.1 * g
    assert [r["value"] for r in rows if r["metric"] == "min_abs_input"] == pytest.approx(smallest, rel=1e-4)
    assert any(not torch.equal(p, q) for p, q in zip(initial, network.parameters(), strict=True))
    assert {r["value"] for r in rows if r["metric"] == "l1_distance"} == {0.0}  # no exact zero was met
    with pytest.raises(ValueError, match="twins are two at least"):
        settings("twins", {**SMALL, "choices": {"0": {}}, "control": False})


# -------------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, -3.0])
def test_the_zero_function_has_derivative_1_minus_2_alpha(alpha):
    t = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    zero = examples.zero_of_relus(t, alpha)
    assert torch.equal(zero, torch.zeros(3))
    assert torch.autograd.grad(zero.sum(), t)[0].tolist() == [0.0, 1 - 2 * alpha, 0.0]


LAST_BITS = {torch.float32: 2**-24, torch.float64: 2**-53}


@pytest.mark.parametrize("dtype", LAST_BITS)
@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, -1e-4, -6.0])
def test_two_programs_for_the_maximum_differ_by_rounding_where_all_entries_are_equal(dtype, t):
    v = (1.14,) * 4
    scan, library = examples.max_of_scan, examples.max_of_library
    relus, other = examples.max_of_relus, functools.partial(examples.max_of_relus, at_zero=1.0)
    assert examples.program_difference(scan, library, v, t, dtype) == LAST_BITS[dtype]  # = 5.96e-8 in float32
    assert abs(examples.program_difference(other, relus, v, t, dtype)) == LAST_BITS[dtype]
    # In half the last bit depends on the order of the additions: 2^-11 here, 2^-12 in another order.
    assert 0 < abs(examples.program_difference(scan, library, v, t, torch.float16)) <= 2**-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_two_programs_for_the_maximum_differ_truly_where_all_entries_meet_at_0(dtype):
    v = (1.0, 2.0, 3.0, 4.0)
    scan, library = examples.max_of_scan, examples.max_of_library
    relus, other = examples.max_of_relus, functools.partial(examples.max_of_relus, at_zero=1.0)
    assert examples.program_difference(scan, library, v, 0.0, dtype) == 1.0 - 2.5
    assert examples.program_difference(relus, other, v, 0.0, dtype) == 2.5 - 1.0
    for t in (0.1, 1.0, -6.0):
        assert examples.program_difference(scan, library, v, t, dtype) == 0.0
        assert examples.program_difference(relus, other, v, t, dtype) == 0.0


# ------------------------------------------------------------------------------------------------------------ grid


@pytest.fixture
def experiment_file(tmp_path):
    file = tmp_path / "little.yaml"
    file.write_text(
        textwrap.dedent(
            """
            kind: train
            title: A little one
            note: Nothing to note.
            fixed: {backbone: paper/fc, width: 4, depth: 1, data: FashionMNISTSample, train_images: 64, epochs: 1}
            vary:
              seed: {from: 0, count: 2}
              relu: [0, 1]
              rule: [exact, published]
            compare:
              published: training
              where: {paper: A, data: MNIST, backbone: fc, parameter: alpha, metric: test_accuracy, batch_norm: false}
              match: {value: relu}
              metric: test_accuracy
            scales:
              smoke: {fixed: {epochs: 2}, vary: {rule: [exact]}}
              small: {}
              paper: {fixed: {epochs: 200}, grids: [{seed: [0]}, {seed: [0, 1], relu: [5]}]}
            """
        )
    )
    return file


def test_a_grid_is_expanded_with_the_first_setting_slowest(experiment_file):
    planned = Experiment.read(experiment_file, "small").cells()
    varied = [(p.varied["seed"], p.varied["relu"], p.varied["rule"]) for p in planned]
    assert varied == [(s, a, r) for s in (0, 1) for a in (0, 1) for r in ("exact", "published")]
    assert len({p.id for p in planned}) == 8
    assert all(p.cell.width == 4 for p in planned)


def test_a_scale_changes_what_it_names(experiment_file):
    smoke, paper = (Experiment.read(experiment_file, s) for s in ("smoke", "paper"))
    assert [(p.cell.epochs, p.cell.rule) for p in smoke.cells()] == [(2, "exact")] * 4
    assert [(p.cell.seed, p.cell.relu, p.cell.epochs) for p in paper.cells()] == [(0, 0, 200), (0, 5, 200), (1, 5, 200)]
    assert paper.cells()[0].varied == {"seed": 0, "relu": 0.0}  # every cell tells all that varies in any grid


def test_the_same_cell_has_the_same_name_whatever_the_grid(experiment_file):
    small = {p.id for p in Experiment.read(experiment_file, "small").cells()}
    one = Experiment.read(experiment_file, "small", {"relu": 1}).cells()
    assert {p.id for p in one} <= small
    assert len(one) == 4
    other = Experiment.read(experiment_file, "small", {"epochs": 3}).cells()
    assert not {p.id for p in other} & small


def test_only_keeps_what_has_these_values(experiment_file):
    experiment = Experiment.read(experiment_file, "small")
    assert len(experiment.cells({"rule": ["exact"], "seed": [1]})) == 2
    assert len(experiment.cells({"relu": [0, 1]})) == 8
    with pytest.raises(ValueError, match=r"no such setting; did you mean 'rule'"):
        experiment.cells({"rules": ["exact"]})
    with pytest.raises(ValueError, match=r"--only seed=7 leaves no cell; the grid has seed: 0, 1"):
        experiment.cells({"seed": [7]})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("vary:", "varies:", r"has the key 'varies'; did you mean 'vary'\?"),
        ("kind: train", "kind: trian", r"kind='trian' is not known; did you mean 'train'\?"),
        ("width: 4,", "widht: 4,", r"a train cell has no setting 'widht'; did you mean 'width'\?"),
        ("relu: [0, 1]", "relu: 1", r"relu varies over a list of values"),
        ("small: {}", "smal: {}", r"scales has the key 'smal'; did you mean 'small'\?"),
        (
            "rule: [exact, published]",
            "rule: [exat]",
            r"rule='exat' is not one of exact, published; did you mean 'exact'\?",
        ),
        ("epochs: 1}", "epochs: 1, precision: 8}", r"precision=8 is not one of 16, 24, 32, 64"),
        ("backbone: paper/fc,", "", "missing 1 required keyword-only argument: 'backbone'"),
        ("epochs: 1}", "epochs: 1, learning_rate: searched}", r"paper B has no searched learning rate for .*shared_lr"),
    ],
)
def test_a_mistake_in_the_file_is_named(experiment_file, old, new, message):
    experiment_file.write_text(experiment_file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        Experiment.read(experiment_file, "small").cells()


def test_the_searched_learning_rate_is_each_values_own_or_that_of_0():
    options = {"backbone": "paper/lenet5", "batch_norm": False, "learning_rate": "searched", "max_pool": 100}
    rows = table("learning_rates").query("paper == 'B' and backbone == 'lenet5' and optimizer == 'sgd'")
    rows = rows.query("precision == 32 and not batch_norm").set_index("value")["learning_rate"]
    own, shared = (
        searched_learning_rate(settings("train", {**options, "shared_lr": shared})) for shared in (False, True)
    )
    assert own == rows[100.0]
    assert shared == rows[0.0] == pytest.approx(0.03528, abs=1e-5)
    assert own != shared


# ---------------------------------------------------------------------------------------------------------- engine


@pytest.fixture
def counted(monkeypatch):
    """Count the cells that are computed; one may be told to fail."""
    done, failing = [], set()

    def compute(kind, cell, device, kept):
        done.append((cell.seed, cell.relu, cell.rule))
        if done[-1] in failing:
            raise RuntimeError("a bad day")
        rows = [{"epoch": 0, "metric": "test_accuracy", "value": 0.5 + cell.seed / 10}]
        rows += [{"epoch": 0, "metric": "nan", "value": 0.0}, {"epoch": 0, "metric": "train_loss", "value": math.nan}]
        return Outcome(rows, {"data": "made up", "device": "cpu"})

    monkeypatch.setattr(engine, "compute", compute)
    return done, failing


def test_finished_cells_are_skipped_and_the_rest_goes_on(experiment_file, tmp_path, counted):
    done, _ = counted
    experiment = Experiment.read(experiment_file, "small")
    first = run(experiment, tmp_path / "out", only={"seed": [0]})
    assert (first.planned, first.skipped, first.computed, first.failed) == (4, 0, 4, [])
    second = run(experiment, tmp_path / "out")
    assert (second.planned, second.skipped, second.computed) == (8, 4, 4)
    assert len(done) == len(set(done)) == 8
    assert run(experiment, tmp_path / "out").computed == 0
    results = read_exactly(first.folder / "results.csv")
    assert len(results) == 8 * 3
    assert list(results.columns) == [
        "experiment", "scale", "cell", "relu", "rule", "seed", "epoch", "metric", "value", "data", "device", "dtype",
    ]  # fmt: skip
    assert results.query("metric == 'train_loss'")["value"].isna().all()
    assert sorted(set(results["seed"])) == [0, 1]


def test_a_clone_goes_on_with_the_cells_of_its_table(experiment_file, tmp_path, counted, capsys):
    done, _ = counted
    experiment = Experiment.read(experiment_file, "small")
    folder = run(experiment, tmp_path / "out", only={"seed": [0]}).folder
    tables = [(folder / name).read_bytes() for name in ("results.csv", "provenance.json")]
    shutil.rmtree(folder / "cells")  # which no repository holds
    assert main(["experiment", str(experiment_file), "--output", str(tmp_path / "out"), "--list"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[:8]] == ["finished"] * 4 + ["missing"] * 4
    progress = io.StringIO()
    again = run(experiment, tmp_path / "out", only={"seed": [0]}, progress=progress)
    assert (again.skipped, again.computed, len(done)) == (4, 0, 4)
    assert "4 finished cells are taken from" in progress.getvalue()
    collect(experiment, tmp_path / "out")
    assert [(folder / name).read_bytes() for name in ("results.csv", "provenance.json")] == tables
    shutil.rmtree(folder / "cells")
    assert run(experiment, tmp_path / "out", only={"seed": [1]}).computed == 4
    assert len(read_exactly(folder / "results.csv")) == 8 * 3


@pytest.mark.parametrize("table", sorted(Path(__file__).parents[2].glob("results/*/*/results.csv")), ids=str)
def test_the_committed_tables_are_whole_when_they_are_collected_again(table, tmp_path):
    name, scale = table.parts[-3:-1]
    shutil.copytree(table.parent, tmp_path / name / scale, ignore=shutil.ignore_patterns("cells"))
    file, *settings = name.split("+")  # settings that won over the file's stand in the folder's name
    overrides = {key: yaml.safe_load(value) for key, value in (setting.split("=") for setting in settings)}
    experiment = Experiment.read(Path(configs.__file__).parent / f"experiments/{file}.yaml", scale, overrides)
    assert experiment.name == name
    cells = json.loads((table.parent / "provenance.json").read_text())["cells"]
    assert restore(experiment, tmp_path) == len(cells)
    collect(experiment, tmp_path)
    assert (tmp_path / name / scale / "results.csv").read_bytes() == table.read_bytes()
    assert json.loads((tmp_path / name / scale / "provenance.json").read_text())["cells"] == cells


def test_a_failed_cell_is_recorded_and_tried_again(experiment_file, tmp_path, counted):
    done, failing = counted
    failing.add((0, 1, "exact"))
    experiment = Experiment.read(experiment_file, "small")
    report = run(experiment, tmp_path / "out")
    ((planned, error),) = report.failed
    assert error == "RuntimeError: a bad day"
    record = report.folder / "cells" / f"{planned.id}.error"
    assert "a bad day" in record.read_text()
    assert report.computed == 7
    failing.clear()
    again = run(experiment, tmp_path / "out")
    assert (again.computed, again.failed) == (1, [])
    assert not record.exists()
    assert done.count((0, 1, "exact")) == 2


def test_an_interruption_loses_only_what_was_being_computed(experiment_file, tmp_path, counted, monkeypatch):
    done, _ = counted
    through = engine.compute

    def interrupted(kind, cell, device, kept):
        if len(done) == 3:
            raise KeyboardInterrupt
        return through(kind, cell, device, kept)

    experiment = Experiment.read(experiment_file, "small")
    monkeypatch.setattr(engine, "compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(experiment, tmp_path / "out")
    folder = engine.folder_of(experiment, tmp_path / "out")
    assert len(read_exactly(folder / "results.csv")["cell"].unique()) == 3
    monkeypatch.setattr(engine, "compute", through)
    assert run(experiment, tmp_path / "out").computed == 5
    assert len(done) == len(set(done)) == 8


def test_missing_data_stop_the_grid_at_once(experiment_file, tmp_path, monkeypatch):
    monkeypatch.setenv("NSLIGHTNING_DATA_DIR", str(tmp_path / "nowhere"))
    experiment = Experiment.read(experiment_file, "small", {"data": "MNIST"})
    load.cache_clear()
    with pytest.raises(DataError, match="missing: mnist"):
        run(experiment, tmp_path / "out")


def test_provenance_names_settings_code_and_data(experiment_file, tmp_path):
    experiment = Experiment.read(experiment_file, "small")
    report = run(experiment, tmp_path / "out", only={"seed": [0], "rule": ["exact"]})
    record = json.loads((report.folder / "provenance.json").read_text())
    assert record["experiment"]["title"] == "A little one"
    (environment,) = record["environments"]
    assert environment["versions"]["torch"] == torch.__version__
    assert {"git", "python", "platform"} <= environment.keys()
    assert len(record["cells"]) == 2
    cell = next(iter(record["cells"].values()))
    assert cell["settings"]["backbone"] == "paper/fc"
    assert cell["provenance"]["data"] == "fashion_mnist_sample (embedded sample, first 64 training images)"
    assert {"device", "dtype", "arithmetic", "patch", "environment"} <= cell["provenance"].keys()


def test_processes_side_by_side_find_what_one_finds(experiment_file, tmp_path):
    experiment = Experiment.read(experiment_file, "small")
    one = run(experiment, tmp_path / "one")
    two = run(experiment, tmp_path / "two", workers=2)
    assert two.computed == 8
    pd.testing.assert_frame_equal(*(read_exactly(r.folder / "results.csv") for r in (one, two)))


# --------------------------------------------------------------------------------------------------------- compare


SAMPLE = "FashionMNISTSample"


def made(experiment, numbers):
    """A tidy table with these final accuracies, by cell; None is a run that ended with NaN at 0.098."""
    rows = []
    for planned, value in zip(experiment.cells(), numbers, strict=True):
        head = {"experiment": "little", "scale": "small", "cell": planned.id, **planned.varied, "data": "made up"}
        rows += [
            {**head, "epoch": 0, "metric": "test_accuracy", "value": 0.999},
            {**head, "epoch": 1, "metric": "test_accuracy", "value": 0.098 if value is None else value},
            {**head, "epoch": 1, "metric": "nan", "value": float(value is None)},
        ]
    return pd.DataFrame(rows)


def test_means_over_runs_are_held_against_the_published_ones(experiment_file, monkeypatch):
    published = pd.DataFrame(
        [
            {"parameter": "alpha", "data": SAMPLE, "value": v, "mean": m, "sd": s, "n": 10, "n_nan": b}
            for v, m, s, b in ((0.0, 0.95, 0.01, 0), (1.0, 0.5, 0.4, 5), (5.0, 0.1, 0.0, 10))
        ]
    )
    monkeypatch.setattr(compare, "table", lambda name: published)
    experiment = Experiment.read(experiment_file, "small")
    entry = {"published": "training", "where": {"parameter": "alpha"}, "match": {"value": "relu"}}
    experiment = dataclasses.replace(experiment, compare=({**entry, "metric": "test_accuracy"},))
    # cells: seed 0: (relu 0 exact, 0 published, 1 exact, 1 published), then seed 1
    results = made(experiment, [0.93, 0.90, 0.97, None, 0.95, 0.92, 0.99, 0.5])
    compared = comparison(experiment, results).set_index(["relu", "rule"])
    row = compared.loc[(0, "exact")]
    assert (row["mean"], row["n"], row["nan"]) == (pytest.approx(0.94), 2, 0)
    assert row["sd"] == pytest.approx(math.sqrt(2) * 0.01)
    assert row["difference"] == pytest.approx(-0.01)
    assert (row["inside"], row["published_n"], row["published_nan"]) == ("yes", 10, 0)
    assert compared.loc[(0, "published"), "inside"] == "no"  # 0.91 is four standard deviations away
    nan = compared.loc[(1, "published")]
    assert (nan["mean"], nan["nan"]) == (pytest.approx((0.098 + 0.5) / 2), 1)
    assert nan["inside"] == "yes"
    dropping = dataclasses.replace(experiment, compare=({**experiment.compare[0], "drop_nan": True},))
    row = comparison(dropping, results).set_index(["relu", "rule"]).loc[(1, "published")]
    assert (row["mean"], row["n"], row["nan"]) == (0.5, 1, 1)
    best = dataclasses.replace(experiment, compare=({**experiment.compare[0], "at": "best"},))
    assert set(comparison(best, results)["mean"]) == {0.999}
    text = markdown(experiment, comparison(experiment, results))
    assert "Data: made up. Scale: small." in text
    assert "Only at the paper scale" in text
    assert "published_mean" in text
    assert "Inside:" in text


@pytest.mark.parametrize(
    ("kind", "fixed", "entry"),
    [
        (
            "train",
            {"width": 256, "depth": 3},
            {"published": "training", "where": {"paper": "A", "backbone": "fc", "parameter": "alpha",
             "batch_norm": False, "metric": "test_accuracy"}, "match": {"value": "relu"}, "metric": "test_accuracy"},
        ),
        (
            "zones",
            {"width": 256, "depth": 3, "batch_size": 256, "against": {"relu": 1}},
            {"published": "volume_relu_mnist", "where": {"factor": "depth"}, "statistic": "proportion",
             "match": {"depth": "depth", "precision": "precision"}, "metric": "test_accuracy"},
        ),
        (
            "train",
            {"width": 256, "depth": 3},
            {"published": "zeros", "match": {"depth": "depth", "width": "width", "precision": "precision"},
             "metric": "test_accuracy"},
        ),
    ],
)  # fmt: skip
def test_published_numbers_stand_beside_their_own_data_only(experiment_file, kind, fixed, entry):
    grid = {"data": ["MNIST", SAMPLE], "seed": [0]}
    both = Experiment("little", kind, "small", fixed={"backbone": "paper/fc", **fixed}, grids=(grid,), compare=(entry,))
    results = made(both, [0.9, 0.5])
    compared = comparison(both, results).set_axis(grid["data"])
    assert not math.isnan(compared.loc["MNIST", "published_mean"])
    assert compared.loc[SAMPLE, ["published_mean", "published_n", "difference"]].isna().all()
    assert compared.loc[SAMPLE, "inside"] == ""
    message = "Nothing is published for FashionMNISTSample; MNIST has published numbers."
    assert message in markdown(both, comparison(both, results))
    for data in grid["data"]:
        one = dataclasses.replace(both, grids=({**grid, "data": [data]},))
        text = markdown(one, comparison(one, made(one, [0.9])))
        assert (message in text) == (data == SAMPLE)
        assert ("| published_mean |" in text) == (data == "MNIST")
        assert ("Inside:" in text) == (data == "MNIST")


def test_shares_are_held_against_the_published_ones(experiment_file, monkeypatch):
    experiment_file.write_text(
        "kind: zones\n"
        "fixed: {backbone: paper/fc, against: {relu: 1}, depth: 1, width: 8}\n"
        "vary: {precision: [16, 32, 64]}\n"
        "scales: {small: {}}\n"
    )
    published = pd.DataFrame({"data": "MNIST", "precision": [16, 32], "n": 100, "mean": [0.5, 0.1]})
    monkeypatch.setattr(compare, "table", lambda name: published)
    entry = {"published": "volume", "match": {"precision": "precision"}, "metric": "differing"}
    experiment = Experiment.read(experiment_file, "small")
    rows = []
    for planned, differing in zip(experiment.cells(), ([0, 4, 1, 0], [1, 1, 0, 3], [0, 0, 0, 0]), strict=True):
        for theta, value in enumerate(differing):
            head = {"cell": planned.id, "theta": theta, "data": "made up"}
            rows += [{**head, "metric": "differing", "value": value}, {**head, "metric": "batches", "value": 10}]
    results = pd.DataFrame(rows)
    proportion = dataclasses.replace(experiment, compare=({**entry, "statistic": "proportion"},))
    compared = comparison(proportion, results).set_index("precision")
    assert list(compared["mean"]) == [0.5, 0.75, 0.0]
    assert list(compared["n"]) == [4, 4, 4]
    assert compared.loc[16, "inside"] == "yes"
    assert compared.loc[32, "sd"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert compared.loc[32, "inside"] == "no"  # 0.65 apart, two standard deviations are 0.338
    assert math.isnan(compared.loc[64, "published_mean"])  # the paper has no number for it, and the table has the row
    few = dataclasses.replace(experiment, compare=({**entry, "statistic": "within", "within": 1},))
    assert list(comparison(few, results).set_index("precision")["mean"]) == [0.75, 0.75, 1.0]
    rate = dataclasses.replace(experiment, compare=({**entry, "statistic": "rate", "over": "batches"},))
    assert list(comparison(rate, results)["inside"]) == ["", "", ""]
    share = dataclasses.replace(experiment, compare=({**entry, "statistic": "share"},))
    compared = comparison(share, results).set_index("precision")
    assert list(compared["mean"]) == [5 / 40, 5 / 40, 0.0]
    assert list(compared["n"]) == [4, 4, 4]  # draws: the ten mini-batches of one are not independent
    assert compared.loc[16, "sd"] == pytest.approx(0.0946485, rel=1e-5)  # of 0, 0.4, 0.1, 0 over the root of 4


@pytest.mark.parametrize(
    ("published", "draws", "inside"),
    [
        (0.20, 400, "no"),  # against 31 of 100: 0.11 apart, one standard deviation is 0.0465
        (0.22, 400, "yes"),  # 0.09 apart, one is 0.0476
        (0.215, 400, "no"),  # 0.095 apart, one is 0.04733 with p = 117 of 500; with 0.2625, halfway, it were 0.0492
        (0.18, 25, "yes"),  # against 30 of 100: 0.12 apart, one is 0.0999; of our draws alone it would be 0.0447
    ],
)
def test_a_share_is_outside_from_two_standard_deviations_of_both_sides_on(
    experiment_file, monkeypatch, published, draws, inside
):
    experiment_file.write_text(
        "kind: zones\nfixed: {backbone: paper/fc, against: {relu: 1}, depth: 1, width: 8}\nscales: {small: {}}\n"
    )
    rows = pd.DataFrame({"data": "MNIST", "precision": [32], "n": draws, "mean": published})
    monkeypatch.setattr(compare, "table", lambda name: rows)
    entry = {"published": "volume", "match": {"precision": "precision"}, "metric": "differing"}
    experiment = dataclasses.replace(
        Experiment.read(experiment_file, "small"), compare=({**entry, "statistic": "proportion"},)
    )
    (planned,) = experiment.cells()
    hits = 31 if draws == 400 else 30
    results = pd.DataFrame(
        [
            {"cell": planned.id, "theta": t, "data": "made up", "metric": "differing", "value": float(t < hits)}
            for t in range(100)
        ]
    )
    assert comparison(experiment, results)["inside"].item() == inside


@pytest.mark.parametrize(
    ("mean", "sd", "ours", "inside"),
    [
        (0.95, 0.01, 0.931, "yes"),
        (0.95, 0.01, 0.969, "yes"),
        (0.95, 0.01, 0.926, "no"),
        (0.95, 0.01, 0.974, "no"),
        (0.75, 0.125, 1.0, "yes"),  # exact in binary: two standard deviations themselves are inside
        (0.75, 0.125, 0.5, "yes"),
        (0.75, 0.125, 0.4375, "no"),
    ],
)
def test_a_mean_is_outside_above_two_published_standard_deviations(
    experiment_file, monkeypatch, mean, sd, ours, inside
):
    published = pd.DataFrame({"data": SAMPLE, "value": [0.0], "mean": mean, "sd": sd, "n": 10, "n_nan": 0})
    monkeypatch.setattr(compare, "table", lambda name: published)
    entry = {"published": "training", "match": {"value": "relu"}, "metric": "test_accuracy"}
    experiment = dataclasses.replace(Experiment.read(experiment_file, "small"), compare=(entry,))
    compared = comparison(experiment, made(experiment, [ours] * 8)).set_index(["relu", "rule"])
    assert compared.loc[(0, "exact"), "inside"] == inside
    assert compared.loc[(1, "exact"), "inside"] == ""


@pytest.mark.parametrize(("ours", "inside"), [(0.50, "yes"), (0.53, "no"), (0.30, "yes"), (0.27, "no")])
def test_a_probability_is_outside_from_two_standard_deviations_of_both_sides_on(
    experiment_file, monkeypatch, ours, inside
):
    """0.10 and 0.13 from 0.4 of 100 draws: deviations of 0.049 there and 0.029 here, together 0.057."""
    experiment_file.write_text(
        "kind: zones\nfixed: {backbone: paper/fc, against: {relu: 1}, depth: 1, width: 8}\nscales: {small: {}}\n"
    )
    rows = pd.DataFrame({"data": "MNIST", "precision": [32], "n": 100, "mean": 0.4})
    monkeypatch.setattr(compare, "table", lambda name: rows)
    entry = {"published": "volume", "match": {"precision": "precision"}, "metric": "chance", "statistic": "probability"}
    experiment = dataclasses.replace(Experiment.read(experiment_file, "small"), compare=(entry,))
    (planned,) = experiment.cells()
    chances = [ours - 0.05, ours + 0.05] * 2
    head = {"cell": planned.id, "data": "made up", "metric": "chance"}
    results = pd.DataFrame([{**head, "theta": t, "value": chance} for t, chance in enumerate(chances)])
    compared = comparison(experiment, results).iloc[0]
    assert (compared["mean"], compared["n"]) == (pytest.approx(ours), 4)
    assert compared["sd"] == pytest.approx(0.0288675, rel=1e-5)  # 0.1 / sqrt(3) over the root of 4
    assert compared["published_sd"] == pytest.approx(0.0489898, rel=1e-5)
    assert compared["inside"] == inside


@pytest.mark.parametrize(
    ("differing", "published", "draws", "inside"),
    [
        ([5, 6, 5, 6], 0.350, None, "yes"),  # one draw was published: 3.182446 * 0.0577350 * sqrt(1/4 + 1) is 0.2054
        ([5, 6, 5, 6], 0.340, None, "no"),
        ([5, 6, 5, 6], 0.679, 4, "yes"),  # four: the root is that of 1/2, and the limit 0.1299
        ([5, 6, 5, 6], 0.681, 4, "no"),
        ([10] * 4, 0.480, None, "yes"),  # all alike: four draws leave 1 - 0.05^(1/4), which is 0.5271
        ([10] * 4, 0.470, None, "no"),
        ([0] * 4, 0.520, None, "yes"),
        ([0] * 4, 0.530, None, "no"),
        ([5] * 4, 0.510, None, "no"),  # alike, and neither none nor all: no spread at all
    ],
)
def test_a_share_of_mini_batches_is_outside_from_students_limit_on(
    experiment_file, monkeypatch, differing, published, draws, inside
):
    experiment_file.write_text(
        "kind: zones\nfixed: {backbone: paper/fc, against: {relu: 1}, depth: 1, width: 8}\nscales: {small: {}}\n"
    )
    rows = pd.DataFrame({"data": "MNIST", "precision": [32], "n": 391, "mean": published})
    monkeypatch.setattr(compare, "table", lambda name: rows)
    entry = {"published": "volume", "match": {"precision": "precision"}, "metric": "differing", "statistic": "share"}
    entry |= {} if draws is None else {"draws": draws}
    experiment = dataclasses.replace(Experiment.read(experiment_file, "small"), compare=(entry,))
    (planned,) = experiment.cells()
    results = pd.DataFrame(
        [
            {"cell": planned.id, "theta": t, "data": "made up", "metric": metric, "value": float(value)}
            for t, count in enumerate(differing)
            for metric, value in (("differing", count), ("batches", 10))
        ]
    )
    assert comparison(experiment, results)["inside"].item() == inside


def test_a_ratio_is_that_of_the_sums(experiment_file, monkeypatch):
    """5 of 10 and 1 of 30 mini-batches are 6 of 40, and not the mean of 0.5 and 0.033."""
    experiment_file.write_text(
        "kind: zones\nfixed: {backbone: paper/fc, against: {relu: 1}, depth: 1, width: 8}\nscales: {small: {}}\n"
    )
    rows = pd.DataFrame({"data": "MNIST", "precision": [32], "n": 391, "mean": 0.2})
    monkeypatch.setattr(compare, "table", lambda name: rows)
    entry = {"published": "volume", "match": {"precision": "precision"}, "metric": "differing", "over": "batches"}
    experiment = Experiment.read(experiment_file, "small")
    (planned,) = experiment.cells()
    head = {"cell": planned.id, "data": "made up"}
    counts = [(0, "differing", 5.0), (0, "batches", 10.0), (1, "differing", 1.0), (1, "batches", 30.0)]
    results = pd.DataFrame([{**head, "theta": t, "metric": metric, "value": value} for t, metric, value in counts])
    for statistic in ("share", "rate"):
        experiment = dataclasses.replace(experiment, compare=({**entry, "statistic": statistic},))
        assert comparison(experiment, results)["mean"].item() == 6 / 40


def test_a_run_is_one_with_nan_if_it_ended_with_it(experiment_file, monkeypatch):
    published = pd.DataFrame({"data": SAMPLE, "value": [0.0], "mean": 0.9, "sd": 0.1, "n": 10, "n_nan": 0})
    monkeypatch.setattr(compare, "table", lambda name: published)
    entry = {"published": "training", "match": {"value": "relu"}, "metric": "test_accuracy", "drop_nan": True}
    experiment = dataclasses.replace(Experiment.read(experiment_file, "small"), compare=(entry,))
    results = made(experiment, [0.9, 0.9, 0.9, 0.9, 0.7, None, 0.7, 0.7])
    first = results[results["metric"] == "nan"].assign(epoch=0, value=1.0)  # all had one once
    compared = comparison(experiment, pd.concat([first, results])).set_index(["relu", "rule"])
    assert compared["nan"].to_dict() == {(0, "exact"): 0, (0, "published"): 1, (1, "exact"): 0, (1, "published"): 0}
    assert compared.loc[(0, "exact"), "mean"] == pytest.approx(0.8)
    assert compared.loc[(0, "published"), "mean"] == 0.9


def test_each_setting_is_listed_once_for_each_entry_that_matches_it(experiment_file, monkeypatch):
    """The first entry matches relu 0, the second nothing: each of the four settings has one row."""
    published = pd.DataFrame({"data": SAMPLE, "value": [0.0, 7.0], "mean": 0.9, "sd": 0.1, "n": 10, "n_nan": 0})
    monkeypatch.setattr(compare, "table", lambda name: published)
    entry = {"published": "training", "match": {"value": "relu"}, "metric": "test_accuracy"}
    entries = {**entry, "where": {"value": 0.0}}, {**entry, "where": {"value": 7.0}}
    experiment = dataclasses.replace(Experiment.read(experiment_file, "small"), compare=entries)
    compared = comparison(experiment, made(experiment, [0.9] * 8))
    assert list(zip(compared["relu"], compared["rule"], compared["inside"], strict=True)) == [
        (0, "exact", "yes"), (0, "published", "yes"), (1, "exact", ""), (1, "published", ""),
    ]  # fmt: skip


def test_mini_batches_of_one_draw_are_not_independent(experiment_file, monkeypatch):
    """VGG13 of the MaxPool paper: 18 and 12 of 20 mini-batches, against 44 % of one draw."""
    experiment_file.write_text(
        "kind: zones\nfixed: {backbone: paper/fc, against: {relu: 1}, depth: 1, width: 8}\n"
        "vary: {seed: [0, 1]}\nscales: {small: {}}\n"
    )
    rows = pd.DataFrame({"data": "MNIST", "precision": [32], "n": 391, "mean": 0.437})
    monkeypatch.setattr(compare, "table", lambda name: rows)
    entry = {"published": "volume", "match": {"precision": "precision"}, "metric": "differing", "statistic": "share"}
    experiment = dataclasses.replace(Experiment.read(experiment_file, "small"), compare=(entry,))
    records = []
    for planned, differing in zip(experiment.cells(), (18.0, 12.0), strict=True):
        head = {"cell": planned.id, "theta": 0, "data": "made up"}
        records += [{**head, "metric": "differing", "value": differing}, {**head, "metric": "batches", "value": 20.0}]
    compared = comparison(experiment, pd.DataFrame(records)).iloc[0]
    assert compared["mean"] == 0.75
    assert compared["n"] == 2
    assert compared["sd"] == pytest.approx(0.15)  # of 0.9 and 0.6, over the root of 2
    assert compared["inside"] == "yes"
    alike = pd.DataFrame([{**row, "value": 20.0} for row in records])
    assert comparison(experiment, alike)["inside"].item() == "yes"  # two draws with all leave 22 to 100 % open
    one = comparison(experiment, pd.DataFrame(records[:2])).iloc[0]
    assert math.isnan(one["sd"])
    assert one["inside"] == ""  # one draw tells no spread


def test_the_name_of_a_cell_does_not_depend_on_settings_at_their_defaults():
    """Finished cells are found by it, whatever settings are added later."""
    train_cell = settings("train", {"backbone": "paper/lenet5", "max_pool": 10, "seed": 1})
    zone_cell = settings("zones", {"backbone": "paper/fc", "against": {"relu": 1}})
    assert grid._identifier("train", train_cell) == "25a61d159455"
    assert grid._identifier("zones", zone_cell) == "47b31d97c575"
    default = settings("train", {"backbone": "paper/lenet5", "max_pool": 10, "seed": 1, "precision": 32})
    assert grid._identifier("train", default) == "25a61d159455"


def test_the_test_loss_is_the_mean_over_images_whatever_the_batches():
    cell = settings("train", {**SMALL, "eval_batch_size": 7})
    images = load("FashionMNISTSample", (), CPU).test
    assert len(images) % 7
    network, _ = build(cell, load("FashionMNISTSample", (), CPU), CPU, None)
    network.eval()
    x, y = next(images.batches(len(images), torch.float32))
    with torch.no_grad():
        expected = float(F.cross_entropy(network(x).double(), y))
    assert evaluate(cell, network, images)["loss"] == pytest.approx(expected, rel=1e-6)


def test_published_tables_hold_what_the_papers_files_say():
    training_rows = table("training")
    row = training_rows.query(
        "paper == 'B' and backbone == 'lenet5' and optimizer == 'sgd' and precision == 16 and not batch_norm "
        "and value == 1000 and metric == 'test_accuracy'"
    )
    assert row[["mean", "sd", "n", "n_nan"]].to_numpy().tolist() == [[0.098, 0.0, 10, 10]]
    volume = table("volume_relu_mnist").query("factor == 'width' and width == 1024 and precision == 32")
    assert volume["mean"].item() == 0.873
    pooled = table("volume_max_pool_cifar10").query("figure == 'notebook' and precision == 32")
    assert pooled["mean"].item() == pytest.approx(216 / 391, abs=1e-4)
    with pytest.raises(ValueError, match=r"no published table 'trainings'; there are .*training"):
        table("trainings")


# --------------------------------------------------------------------------------------------------------- command


def test_the_command_runs_skips_compares_and_lists(experiment_file, capsys, tmp_path):
    call = ["experiment", str(experiment_file), "--output", "out", "--workers", "1", "--only", "rule=exact"]
    assert main([*call, "--scale", "small", "--compare"]) == 0
    out, err = capsys.readouterr()
    assert "4 cells, 0 finished before, 4 computed" in out
    assert "| relu | rule |" in out
    assert err.count("left] relu=") == 4
    folder = tmp_path / "out" / "little" / "small"
    assert {f.name for f in folder.iterdir()} >= {"results.csv", "provenance.json", "comparison.md", "comparison.csv"}
    assert main([*call, "--scale", "small"]) == 0
    assert "4 finished before, 0 computed" in capsys.readouterr().out
    assert main(["experiment", str(experiment_file), "--output", "out", "--list"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("finished") == 4
    assert listed.count("missing") == 4


def test_several_experiments_in_one_call_and_settings_in_the_name(experiment_file, counted, capsys):
    again = experiment_file.with_name("again.yaml")
    again.write_text(experiment_file.read_text())
    call = ["experiment", "little.yaml", "again.yaml", "--output", "out", "--workers", "1"]
    assert main(call) == 0
    assert main([*call, "--set", "epochs=3", "--set", "data=FashionMNISTSample"]) == 0
    folders = {f.name for f in (experiment_file.parent / "out").iterdir()}
    more = "+epochs=3+data=FashionMNISTSample"
    assert folders == {"little", "again", f"little{more}", f"again{more}"}
    assert len(counted[0]) == 4 * 8
    assert main(["experiment", "little.yaml", "nowhere.yaml", "--output", "new"]) == 2
    assert not (experiment_file.parent / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere.yaml"],
            "there is no file nowhere.yaml, and no packaged experiment of that name. There are: cifar10_",
        ),
        (["mnist_lenet_bta"], "no packaged experiment of that name; did you mean 'mnist_lenet_beta'?"),
        (["little.yaml", "--scale", "medium"], "has no scale 'medium'. It has smoke, small, paper"),
        (["little.yaml", "--only", "rule"], "--only takes KEY=VALUE"),
        (["little.yaml", "--only", "rule=["], "--only rule=[: the value is no YAML"),
        (
            ["little.yaml", "--only", "relux=1"],
            "mean 'relu'? The grid varies relu, rule, seed, and has backbone,",
        ),
        (
            ["little.yaml", "--only", "xyzzy=1"],
            "xyzzy: there is no such setting. The grid varies relu, rule, seed",
        ),
        (["little.yaml", "--set", "widht=3"], "did you mean 'width'?"),
        (["little.yaml", "--set", "xyzzy=3"], "has no setting 'xyzzy'. It has: backbone,"),
        (["little.yaml", "--set", "epochs=two"], "epochs='two' is not an integer"),
        (["little.yaml", "--set", "epochs=0"], "epochs=0: at least 1 is needed"),
        (["little.yaml", "--set", "learning_rate=fast"], "learning_rate='fast' is not a number or one of searched"),
        (["little.yaml", "--set", "train_images=1.5"], "train_images=1.5 is not an integer or null"),
        (["little.yaml", "--set", "data_options=3"], "data_options=3 is not a mapping"),
        (["little.yaml", "--set", "shuffle=1"], "shuffle=1 is not true or false"),
        (
            ["little.yaml", "--set", "data=MNISTT"],
            "is not a data set; did you mean 'MNIST'? There are: CIFAR10,",
        ),
        (["little.yaml", "--set", "backbone=paper/cf"], "there is no backbone 'paper/cf'; did you mean paper/fc"),
        (["little.yaml", "--workers", "0"], "workers=0"),
        (["little.yaml", "--workers", "two"], "invalid int value: 'two'\n  nslightning experiment --help"),
        (["little.yaml", "--output", "little.yaml"], "little.yaml is not a folder that may be written to"),
        (["mnist_volume_relu", "--scale", "smoke", "--set", "against=relu"], "against='relu' is not a mapping"),
        (["little.yaml", "--device", "gpu"], "--device=gpu is not here; a GPU is named cuda"),
        (["little.yaml", "--comapre"], "did you mean '--compare'?"),
    ],
)
def test_a_mistaken_call_says_what_is_wrong(experiment_file, capsys, arguments, message):
    try:
        status = main(["experiment", *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert [f.name for f in experiment_file.parent.iterdir()] == ["little.yaml"]


def test_words_that_are_numbers_and_options_given_twice(experiment_file, capsys):
    """YAML reads 1e-3 as a word."""
    assert settings("train", {"backbone": "paper/fc", "learning_rate": "1e-3"}).learning_rate == 1e-3
    call = ["experiment", "little.yaml", "--list", "--only", "rule=exact"]
    assert main([*call, "--only", "relu=0", "--only", "relu=1"]) == 0
    assert "4 cells" in capsys.readouterr().out


def test_the_packaged_experiments_are_listed(experiment_file, monkeypatch, capsys):
    from nslightning.commands import experiment as command

    assert {"mnist_lenet_beta", "cifar10_vgg_alpha"} < command._packaged().keys()
    cells = len(Experiment.read(experiment_file, "small").cells())
    monkeypatch.setattr(command, "_packaged", lambda: {"little": experiment_file})
    assert main(["experiment", "--list", "--scale", "small"]) == 0
    title = Experiment.read(experiment_file, "small").title
    assert capsys.readouterr().out.splitlines() == [
        f"little  {cells:>4} cells  {title}",
        "1 experiments, at the scale small",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name an experiment, or --list them"),
        (["--list", "--only", "seed=0"], "--only, --set and --wandb-sweep are for the cells of an experiment"),
    ],
)
def test_a_call_without_an_experiment_only_lists_them(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["experiment", *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_every_packaged_experiment_expands_at_every_scale():
    from nslightning import configs

    files = sorted((configs.path("quickstart").parent / "experiments").glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        for scale in ("smoke", "small", "paper"):
            experiment = Experiment.read(file, scale)
            planned = experiment.cells()
            assert planned
            assert experiment.title
            for entry in experiment.compare:
                theirs = [compare._published(entry, p.cell) for p in planned]
                if scale == "paper":
                    assert any(theirs), f"{file.name}: nothing published matches {entry}"
                assert all(len(rows) <= 1 for rows in theirs), f"{file.name}: {entry} is ambiguous"


def test_interrupting_the_command_leaves_a_table_and_status_130(experiment_file, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "compute", interrupted)
    assert main(["experiment", str(experiment_file), "--workers", "1"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_pooling_by_the_norm_takes_the_choice_at_windows_of_zeros():
    options = {"backbone": "paper/lenet5", "pool": "norm", "against": {"norm": 1.0}, "norm": "l1_sum"}
    cell = settings("zones", options)
    images = load("FashionMNISTSample", (), CPU)
    (network,), _ = _networks(cell, images, CPU)
    x, y = next(images.train.batches(4, torch.float32))
    by_hand = F.lp_pool2d(network.relu1(network.conv1(x)), 2.0, 2)
    assert torch.allclose(network.pool1(network.relu1(network.conv1(x))), by_hand, rtol=1e-6)
    with torch.no_grad():  # a channel of zeros behind the ReLU, whose derivative there is 0: nothing comes through
        network.conv1.weight[0] = network.conv1.bias[0] = 0.0
    assert difference_norm(cell, (network,), x, y) == 0.0
    open_relu = dataclasses.replace(cell, relu=1.0)
    (network,), _ = _networks(open_relu, images, CPU)
    with torch.no_grad():
        network.conv1.weight[0] = network.conv1.bias[0] = 0.0
    assert difference_norm(open_relu, (network,), x, y) > 0.0


@pytest.mark.slow  # all together a minute
def test_every_packaged_experiment_runs_on_the_embedded_data(tmp_path, monkeypatch):
    from nslightning import configs

    monkeypatch.setenv("NSLIGHTNING_DATA_DIR", str(tmp_path / "nowhere"))
    load.cache_clear()
    for file in sorted((configs.path("quickstart").parent / "experiments").glob("*.yaml")):
        experiment = Experiment.read(file, "smoke")
        report = run(experiment, tmp_path / "out")
        assert report.failed == []
        results = read_exactly(report.folder / "results.csv")
        assert set(results["cell"]) == {p.id for p in experiment.cells()}
        if experiment.compare:
            assert len(comparison(experiment, results)) > 0
