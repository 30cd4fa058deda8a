"""The engine of grids: expansion, skipping, resuming, tidy files, comparison; and the cells against slow truths."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from nslightning import patch
from nslightning.data import FashionMNISTSample, Synthetic
from nslightning.experiments import settings, training
from nslightning.experiments.data import Images, load
from nslightning.experiments.networks import build
from nslightning.experiments.precision import HalfProducts
from nslightning.experiments.training import train
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
    with pytest.raises(ValueError, match=r"data='MINST' is no data set; there are .*MNIST"):
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
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    training._epoch(cell, network, training._optimizer(cell, network), scaler, images.train, 0)
    for mine, theirs in zip(network.parameters(), model.backbone.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def values(outcome, metric):
    return [row["value"] for row in outcome.rows if row["metric"] == metric]


def test_a_training_run_tells_what_it_did():
    found = train(settings("train", {**SMALL, "epochs": 3, "learning_rate": 0.05, "count_zeros": True}), "cpu")
    assert [row["epoch"] for row in found.rows if row["metric"] == "test_accuracy"] == [0, 1, 2]
    assert values(found, "train_loss")[2] < values(found, "train_loss")[0]
    assert values(found, "relu_calls") == [128 * 16.0] * 3
    cosine = [0.05 * (1 + math.cos(math.pi * e / 3)) / 2 for e in range(3)]
    assert values(found, "learning_rate") == pytest.approx(cosine)
    constant = train(settings("train", {**SMALL, "epochs": 2, "learning_rate": 0.05, "schedule": "constant"}), "cpu")
    assert values(constant, "learning_rate") == [0.05, 0.05]
    assert found.provenance["data"] == "fashion_mnist_sample (embedded sample, first 128 training images)"


def test_a_run_is_the_same_again_and_another_seed_is_another():
    one, two, other = (train(settings("train", {**SMALL, "epochs": 1, "seed": s}), "cpu").rows for s in (1, 1, 2))
    assert one == two
    assert one != other


def test_a_diverged_run_keeps_the_accuracy_of_its_constant_output():
    found = train(settings("train", {**SMALL, "epochs": 4, "learning_rate": 1e30}), "cpu")
    assert values(found, "nan") == [0.0, 1.0, 1.0, 1.0]  # one step an epoch, and the first loss is a number
    labels = load("FashionMNISTSample", (), CPU).test.labels
    assert values(found, "test_accuracy")[1:] == [float((labels == 0).double().mean())] * 3  # argmax of NaN is 0


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
    own = [training._scaler(cell, CPU) for _ in range(2)]
    assert own[0] is not own[1]
    assert own[0].is_enabled()
    assert training._scaler(shared, CPU) is training._scaler(shared, CPU)
    assert not training._scaler(dataclasses.replace(cell, precision=32), CPU).is_enabled()
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
    training._test(cell, network, images.test)
    assert set(seen) == {torch.float16}
    seen.clear()
    training._test(dataclasses.replace(cell, eval_float32=True), network, images.test)
    assert set(seen) == {torch.float32}


# ----------------------------------------------------------------------------------------------------------- zones


def slowly(cell, state, x, y):
    """Two networks, each patched with its choice: two forwards and two backwards, no shortcut."""
    found = []
    for choice in (cell.jacobians, cell.alternative):
        network = lenet5(10, (1, 28, 28)).double()
        network.load_state_dict(state)
        patch(network, choice)
        F.cross_entropy(network(x), y).backward()
        found.append([p.grad for p in network.parameters()])
    return found


@pytest.mark.parametrize("rule", ["exact", "published"])
@pytest.mark.parametrize("against", [{"relu": 1.0}, {"max_pool": 1.0}])
@pytest.mark.parametrize("norm", ["bitwise_first_layer", "linf_sum", "l1_sum"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_norm_is_that_of_two_separate_gradients(rule, against, norm, tied):
    given = {"backbone": "paper/lenet5", "against": against, "norm": norm, "rule": rule, "precision": 64}
    cell = settings("zones", given)
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
    given = {"backbone": "paper/lenet5", "data": "FashionMNISTSample", "against": {"max_pool": 1.0}, "batch_size": 16}
    given |= {"norm": "l1_sum", "batches": 5, "thetas": 1}
    everything = zones(settings("zones", {**given, "histogram": True}), "cpu")
    assert values(everything, "batches") == [5.0]
    assert values(everything, "differing") == [5.0]
    binned = sum(row["value"] for row in everything.rows if row["metric"].startswith("norm_"))
    assert binned == 5
    stopped = zones(settings("zones", {**given, "stop_at_first": True}), "cpu")
    assert values(stopped, "batches") == [1.0]
    assert values(stopped, "first_differing") == [1.0]
    nothing = zones(settings("zones", {**given, "tau": 1e9}), "cpu")
    assert values(nothing, "differing") == [0.0]
    assert all(math.isnan(v) for v in values(nothing, "first_differing"))


def test_parameter_vectors_are_new_draws_shared_by_rules_and_batch_sizes():
    given = {**SMALL, "against": {"relu": 1.0}, "thetas": 3}
    cell = settings("zones", given)
    assert len({_theta_seed(settings("zones", {**given, "seed": s}), t) for s in range(3) for t in range(3)}) == 9
    assert _theta_seed(dataclasses.replace(cell, rule="published", batch_size=7), 1) == _theta_seed(cell, 1)
    assert _theta_seed(dataclasses.replace(cell, width=9), 1) != _theta_seed(cell, 1)
