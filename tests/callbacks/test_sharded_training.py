"""Trainings whose parameters are spread over two processes: patched, checkpointed, gone on with, the same bits."""

import os
import socket

import pandas as pd
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from nslightning import Jacobians, patch
from nslightning.callbacks import GradientDivergence
from nslightning.exact_csv import read_exactly

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]


class Net(LightningModule):
    """All hidden units tie at every image: the first layer moves by the Jacobian choice alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act, self.b = nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)
        self.double()
        patch(self, Jacobians(relu=0.25))

    def training_step(self, x):
        return self(x)

    def forward(self, x):
        h = self.a(x)
        return (self.b(self.act(h - h.detach())) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class FullySharded(Net):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for part in (self.a, self):  # the last layer is the whole's own
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class TensorParallel(Net):
    def configure_model(self):
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        parallelize_module(self, self.device_mesh["tensor_parallel"], {"a": ColwiseParallel(), "b": RowwiseParallel()})


KINDS = {"fsdp2": (FullySharded, 2, 1), "tensor": (TensorParallel, 1, 2)}
STEPS, SAVED = 6, 4


def trained(module, folder, strategy, checkpoint=None):
    """Train; both processes of a spread training see the images that one sees."""
    saving = ModelCheckpoint(f"{folder}/checkpoints", "{step}", save_top_k=-1, every_n_train_steps=SAVED)
    trainer = Trainer(
        accelerator="cpu", strategy=strategy, devices=1 if strategy == "auto" else 2, max_steps=STEPS, logger=False,
        callbacks=[GradientDivergence({"one": {"relu": 1.0}}, every_n_steps=1), saving], default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    images = list(torch.randn(16, 3, generator=torch.Generator().manual_seed(1)).double())
    trainer.fit(module, DataLoader(images, batch_size=8), ckpt_path=checkpoint)
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for n, p in module.named_parameters()}


def fits(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    for name, (kind, data, tensor) in KINDS.items():
        weights = []
        for checkpoint in (None, f"{folder}/{name}/checkpoints/step={SAVED}.ckpt"):
            strategy = ModelParallelStrategy(
                data_parallel_size=data, tensor_parallel_size=tensor, process_group_backend="gloo"
            )
            place = f"{folder}/{name}" if checkpoint is None else f"{folder}/{name}-resumed"
            weights.append(trained(kind(), place, strategy, checkpoint))
        if rank == 0:
            torch.save(weights, f"{folder}/{name}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("runs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(fits, (port, str(made)), nprocs=2)
    return made


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    made = tmp_path_factory.mktemp("alone")
    return trained(Net(), made, "auto"), made


@pytest.mark.parametrize("name", KINDS)
def test_trains_as_one_process_does(name, folder, alone):
    weights, _ = torch.load(folder / f"{name}.pt")
    assert not torch.equal(alone[0]["a.weight"], Net().a.weight)  # the choice was taken
    for part, weight in alone[0].items():
        torch.testing.assert_close(weights[part], weight, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", KINDS)
def test_measures_as_one_process_does(name, folder, alone):
    norms = ["l1", "l2", "linf", "relative", "cosine"]
    ours, one = (
        read_exactly(next(f.rglob("divergence.csv")), keep_default_na=False) for f in (folder / name, alone[1])
    )
    assert (one[one["parameter"] == ""]["l2"] > 0).all()
    pd.testing.assert_frame_equal(ours[norms], one[norms], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", KINDS)
def test_goes_on_from_a_checkpoint_with_the_same_bits(name, folder):
    assert (folder / name / f"checkpoints/step={SAVED}.ckpt").is_dir()  # written in parts
    whole, resumed = torch.load(folder / f"{name}.pt")
    assert all(torch.equal(resumed[part], weight) for part, weight in whole.items())
