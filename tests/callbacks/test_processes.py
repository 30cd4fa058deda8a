"""GradientDivergence on two processes: which way it takes, decided in common, and the numbers."""

import os
import socket
import warnings
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.multiprocessing as mp
from ddp_helpers import UnionNorm
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from nslightning import Jacobians, patch
from nslightning.callbacks import GradientDivergence
from nslightning.exact_csv import read_exactly

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]


class Net(LightningModule):
    """All hidden units tie, and the difference reaches the first layer's weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act, self.b = nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 1)
        self.double()
        patch(self, Jacobians(relu=0.25))

    def hidden(self, x):
        h = self.a(x + 1)
        return self.act(h - h.detach())

    def forward(self, x):
        return self.b(self.hidden(x)).square().mean()

    def training_step(self, x):
        return self(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clipping(Net):
    """A hook that clips: the difference of two gradients is not what passes it."""

    def hidden(self, x):
        h = self.a(x + 1)
        h.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        return self.act(h - h.detach())


class HiddenOnOne(Net):
    """On the first process the operation runs inside a transform, where the loss's graph does not show it."""

    def hidden(self, x):
        if self.global_rank:
            return super().hidden(x)
        h = self.a(x + 1)
        return torch.vmap(self.act)(h - h.detach())


class Sharded(Net):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for part in (self.a, self.b, self):
            fully_shard(part)


class Synced(Net):
    """Batch norm over both processes, below ties that the first process alone has."""

    def __init__(self):
        super().__init__()
        self.norm = UnionNorm(5).double()

    def hidden(self, x):
        h = self.norm(self.a(x + 1))
        return self.act(h - h.detach() + (x[:, :1] < 0))


class Smooth(Net):
    """The same without batch norm."""

    def hidden(self, x):
        h = self.a(x + 1)
        return self.act(h - h.detach() + (x[:, :1] < 0))


RUNS = {
    "ddp": (Net, "auto"),
    "synced": (Synced, "auto"),
    "smooth": (Smooth, "auto"),
    "hook": (Clipping, "auto"),
    "one": (HiddenOnOne, "auto"),
    "one, asked": (HiddenOnOne, "subtract"),
    "fsdp2": (Sharded, "auto"),
    "fsdp2, unwatched": (Sharded, None),
}


def pictures():
    """The second process takes those of odd numbers, whose first value is below 0."""
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1)).double()
    x[:, 0] = x[:, 0].abs()
    x[1::2, 0] *= -1
    return list(x)


def fits(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    images = pictures()
    for name, (kind, method) in RUNS.items():
        module = kind()
        sharded = isinstance(module, Sharded)
        strategy = (
            ModelParallelStrategy(process_group_backend="gloo")
            if sharded
            else DDPStrategy(timeout=timedelta(seconds=120))
        )
        choices = {"one": {"relu": 1.0}, "half": {"relu": 0.5}}
        measuring = [GradientDivergence(choices, every_n_steps=1, method=method)] if method else []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer = Trainer(
                accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, callbacks=measuring, logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                default_root_dir=f"{folder}/{name}", use_distributed_sampler=False,
            )  # fmt: skip
            sampler = DistributedSampler(images, num_replicas=2, rank=rank, shuffle=False)
            trainer.fit(module, DataLoader(images, batch_size=4, sampler=sampler))
        weights = {n: p.full_tensor() if sharded else p.detach() for n, p in module.named_parameters()}
        words = [str(w.message) for w in said if "GradientDivergence" in str(w.message)]
        torch.save((weights, words), f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(fits, (port, str(folder)), nprocs=2)

    def read(name):
        tables = list(Path(folder, name).rglob("divergence.csv"))
        table = read_exactly(tables[0], keep_default_na=False) if tables else None
        return table, *torch.load(folder / f"{name}-0.pt")

    return {name: read(name) for name in RUNS}


@pytest.mark.parametrize(
    ("name", "method"), [("ddp", "propagate"), ("hook", "subtract"), ("one", "subtract"), ("fsdp2", "subtract")]
)
def test_the_method_that_was_taken(runs, name, method):
    table, _, said = runs[name]
    assert set(table["method"]) == {method}
    assert len(table) == 2 * 2 * 4  # steps, choices, parameters and their total
    assert (table[table["parameter"] == ""]["l2"] > 0).all()
    assert bool(said) == (method == "subtract")


def test_one_process_that_cannot_propagate_decides_for_both(runs):
    (auto, *_), (asked, *_) = runs["one"], runs["one, asked"]
    pd.testing.assert_frame_equal(auto, asked)


def test_shards_are_measured_as_whole_gradients(runs):
    norms = ["l1", "l2", "linf", "relative", "cosine"]
    pd.testing.assert_frame_equal(runs["fsdp2"][0][norms], runs["ddp"][0][norms], rtol=1e-9, atol=1e-13)
    assert runs["fsdp2"][0]["parameter"].tolist() == runs["ddp"][0]["parameter"].tolist()


def test_measuring_shards_changes_no_training(runs):
    for name, weight in runs["fsdp2, unwatched"][1].items():
        assert torch.equal(runs["fsdp2"][1][name], weight)


@pytest.mark.parametrize("name", ["synced", "smooth"])
def test_two_processes_measure_what_one_does_with_the_union_of_their_batches(runs, name, tmp_path):
    """With batch norm over the processes every choice's backward exchanges values: both processes run each of them."""
    table, weights, said = runs[name]
    assert [words for words in said if "between processes" in words] == said
    assert bool(said) == (name == "synced")
    module = RUNS[name][0]()
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path),
        callbacks=[GradientDivergence({"one": {"relu": 1.0}, "half": {"relu": 0.5}}, every_n_steps=1)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(pictures(), batch_size=8))
    (alone,) = (read_exactly(file, keep_default_na=False) for file in tmp_path.rglob("divergence.csv"))
    norms = ["l1", "l2", "linf", "relative", "cosine"]
    assert table["parameter"].tolist() == alone["parameter"].tolist()
    pd.testing.assert_frame_equal(table[norms], alone[norms], rtol=1e-9, atol=1e-13)
    assert (table[table["parameter"] == "a.weight"]["l2"] > 0).all()
    for key, weight in module.named_parameters():
        torch.testing.assert_close(weights[key], weight.detach(), rtol=1e-9, atol=1e-12)
