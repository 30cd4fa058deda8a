"""A grid's training whose steps come from a captured graph finds what the eager one finds. Without a GPU.

Kernels' calls that are kept and made again stand for a CUDA graph (``captures.py``).
"""

import pytest
import torch
from captures import capturing_on_the_host

from nslightning.experiments import training
from nslightning.experiments.cells import settings
from nslightning.experiments.training import Run, train
from nslightning.models import captured
from nslightning.ops.autograd import native

# Six batches an epoch, the last of them smaller.
SMALL = {
    "backbone": "paper/fc", "width": 8, "depth": 2, "data": "FashionMNISTSample", "train_images": 90, "batch_size": 16,
    "epochs": 3, "learning_rate": 0.05, "eval_batch_size": 1000, "relu": 1.0,
}  # fmt: skip
CONVOLUTIONS = {"backbone": "paper/lenet5", "width": None, "depth": None, "max_pool": "minimal"}


@pytest.fixture
def eager(monkeypatch):
    """Trains a cell eagerly, by the operations that a graph of Python's calls can hold."""

    def run(cell):
        with monkeypatch.context() as patched:
            capturing_on_the_host(patched)
            return train(cell, "cpu")

    return run


@pytest.fixture
def graphs(monkeypatch):
    """Steps are captured on a CPU; the captured steps of each training."""
    record = capturing_on_the_host(monkeypatch)
    made = []

    def recorded(run):
        # A capture executes nothing: what running the function changed is put back.
        (step,) = (one for one in made if one._replay is None)
        tensors = list(step._network.buffers())
        before, stream = [tensor.clone() for tensor in tensors], torch.get_rng_state()
        capture, results = record(run)
        torch.set_rng_state(stream)
        for tensor, value in zip(tensors, before, strict=True):
            tensor.data.copy_(value)
        for result in results:
            result.data.fill_(-1)  # nothing was computed yet
        return capture.replay, results

    class Noted(captured.CapturedStep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(captured, "_recorded", recorded)
    monkeypatch.setattr(captured, "_on_another_stream", lambda run, batch: run(*batch))
    monkeypatch.setattr(training, "_CAPTURING", ("cpu",))
    monkeypatch.setattr(training, "CapturedStep", Noted)
    return made


VARIANTS = {
    "sgd with a schedule": {},
    "dropout": {"dropout": 0.5},
    "Adam": {"optimizer": "adam"},
    "INNAprop": {"optimizer": "INNAprop"},
    "loss scaling": {"precision": 24},
    "float64": {"precision": 64},
    "poolings": CONVOLUTIONS,
    "batch normalisation": CONVOLUTIONS | {"batch_norm": True},
    "another order of summation": {"arithmetic": "bias_last"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_captured_training_finds_what_the_eager_one_finds(eager, graphs, monkeypatch, variant):
    cell = settings("train", SMALL | VARIANTS[variant])
    outcome = train(cell, "cpu")
    (step,) = graphs
    assert step.replayed == 3 * 5 - step.WARM_UP  # each epoch's last batch is smaller
    monkeypatch.setattr(training, "_CAPTURING", ())
    assert outcome == eager(cell)
    assert len(graphs) == 1


def test_gradients_of_a_replay_stand_alone_after_an_eager_step(graphs):
    cell = settings("train", SMALL | CONVOLUTIONS | {"learning_rate": 0.0})
    images = training.loaded(cell, torch.device("cpu"))
    network, _ = training.build(cell, images, torch.device("cpu"), cell.init)
    run = Run(cell, network, torch.device("cpu"))
    batches = list(images.train.batches(16, torch.float32, seed=0))

    def gradients(batch):
        run.step(*batch)
        return [p.grad.clone() for p in network.parameters()]

    for batch in batches[:3]:
        run.step(*batch)
    one, smaller, again = gradients(batches[0]), gradients(batches[5]), gradients(batches[0])
    (step,) = graphs
    assert step.replayed == 2
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, smaller, strict=True))


@pytest.mark.parametrize(
    "change",
    [{"relu": "random"}, {"max_pool": "random"}, {"arithmetic": "random_rounding"}, {"arithmetic": "random_order"}],
)
def test_what_draws_from_streams_of_its_own_is_not_captured(graphs, change):
    cell = settings("train", SMALL | change | {"epochs": 1, "train_images": 16})
    train(cell, "cpu")
    assert not graphs


def test_steps_whose_zeros_are_counted_run_eagerly(graphs):
    cell = settings("train", SMALL | {"count_zeros": True})
    rows = train(cell, "cpu").rows
    assert not graphs[0].replayed
    assert sum(row["value"] for row in rows if row["metric"] == "relu_calls") == 3 * 90 * 2 * 8


def test_what_cannot_be_captured_goes_on_eagerly_and_says_why(eager, graphs, monkeypatch):
    def fails(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured, "_recorded", fails)
    cell = settings("train", SMALL)
    with pytest.warns(UserWarning, match="steps run eagerly.*not permitted when stream is capturing") as messages:
        outcome = train(cell, "cpu")
    assert len(messages) == 1
    assert not graphs[0].replayed
    monkeypatch.setattr(training, "_CAPTURING", ())
    assert outcome == eager(cell)


def test_the_nodes_that_the_tests_compare_with_are_the_native_ones_bits(eager):
    cell = settings("train", SMALL | CONVOLUTIONS)
    assert native._library() is not None
    assert train(cell, "cpu") == eager(cell)
