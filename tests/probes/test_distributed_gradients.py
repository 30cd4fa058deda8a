"""Gradients that are distributed over two processes are measured as those of one."""

import json
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch import nn

from nslightning import Jacobians, patch
from nslightning.probes import MethodWarning, divergence, gradients

CHOICES = {"one": Jacobians(relu=1.0), "half": Jacobians(relu=0.5)}

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def network():
    """The last layer has one row: of its shards one process holds nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    nn.init.zeros_(model[0].bias)
    patch(model, Jacobians())
    return model


def images(rank):
    """Every process has images of its own; all zero, the first layer ties."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank)).double()
    x[:2] = 0
    return x


def sharded(rank, port, folder):
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = network()
    for part in (model[0], model[2], model):
        fully_shard(part)
    loss = model(images(rank)).square().sum()
    found = {}
    for method in ("subtract", "propagate"):
        with pytest.warns(MethodWarning, match="FSDP2") if method == "propagate" else torch.enable_grad():
            by_choice = divergence(loss, model, CHOICES, method=method)
        found[method] = {
            choice: {"": d.norms(), **{name: part.norms() for name, part in d.per_layer.items()}}
            for choice, d in by_choice.items()
        }
    whole = {name: g.full_tensor().tolist() for name, g in gradients(loss, model, CHOICES)["one"].items()}
    with open(f"{folder}/{rank}.json", "w") as file:  # noqa: PTH123 # in a process without fixtures
        json.dump([found, whole, [p.grad is None for p in model.parameters()]], file)
    dist.destroy_process_group()


def test_fsdp2_is_measured_shard_by_shard(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(sharded, (port, str(tmp_path)), nprocs=2)
    model = network()
    # FSDP averages over the processes, each on its own images.
    loss = sum(model(images(rank)).square().sum() for rank in (0, 1)) / 2
    want = divergence(loss, model, CHOICES)
    alone = gradients(loss, model, CHOICES)["one"]
    for rank in (0, 1):
        found, whole, untouched = json.loads((tmp_path / f"{rank}.json").read_text())
        assert all(untouched)
        for name, g in alone.items():
            torch.testing.assert_close(torch.tensor(whole[name], dtype=torch.float64), g)
        for method in ("subtract", "propagate"):
            for choice, d in want.items():
                assert d.l2 > 0
                for name, part in {"": d, **d.per_layer}.items():
                    assert found[method][choice][name] == pytest.approx(part.norms(), rel=1e-9, abs=1e-12)
