"""Gradients that are distributed over two processes are measured as those of one."""

import json
import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from ddp_helpers import UnionNorm
from torch import distributed as dist
from torch import nn

from nslightning import Jacobians, patch
from nslightning._torch import exchanges_values
from nslightning.probes import MethodWarning, UnseenError, divergence, gradients, zone

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
    """Each process has its own images; they are all zero, and the first layer ties."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank)).double()
    x[:2] = 0
    return x


def even():
    """Four hidden units, two for each of two processes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    nn.init.zeros_(model[0].bias)
    patch(model, Jacobians())
    return model


#: The parts that are sharded one by one; what is left belongs to the whole, which FSDP2 does not shard after a forward.
WRAPPED = {"each layer": (0, 2), "one layer": (0,), "the whole alone": ()}


def work(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name, parts in WRAPPED.items():
        with open(f"{folder}/{name}-{rank}.json", "w") as file:  # noqa: PTH123 # in a process without fixtures
            json.dump(sharded(rank, parts), file)
    torch.save(split(), f"{folder}/split-{rank}.pt")
    dist.destroy_process_group()


def sharded(rank, parts):
    """FSDP2."""
    from torch.distributed.fsdp import fully_shard

    model = network()
    for part in (*(model[i] for i in parts), model):
        fully_shard(part)
    loss = model(images(rank)).square().sum()
    measured = {}
    for method in ("subtract", "propagate"):
        with pytest.warns(MethodWarning, match="FSDP2") if method == "propagate" else torch.enable_grad():
            by_choice = divergence(loss, model, CHOICES, method=method)
        measured[method] = {
            choice: {"": d.norms(), **{name: part.norms() for name, part in d.per_layer.items()}}
            for choice, d in by_choice.items()
        }
    whole = {name: g.full_tensor().tolist() for name, g in gradients(loss, model, CHOICES)["one"].items()}
    with pytest.raises(UnseenError, match="a zone is one process's, and the parameters are distributed"):
        zone(model, lambda y: y.square().sum(), images(rank), CHOICES["one"])
    return measured, whole, [p.grad is None for p in model.parameters()]


def split():
    """Tensor parallel: each process has some rows of the first layer, and the columns of the second that they meet."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = parallelize_module(even(), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    loss = model(images(0)).square().sum()
    norms = {
        method: {choice: d.norms() for choice, d in divergence(loss, model, CHOICES, method=method).items()}
        for method in ("subtract", "propagate")
    }
    return norms, {name: g.full_tensor() for name, g in gradients(loss, model, CHOICES)["one"].items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(made)), nprocs=2)
    return made


def test_tensor_parallel_layers_have_the_gradients_of_one_process(folder):
    model = even()
    loss = model(images(0)).square().sum()
    want = {choice: d.norms() for choice, d in divergence(loss, model, CHOICES).items()}
    assert all(norms["l2"] > 0 for norms in want.values())
    alone = gradients(loss, model, CHOICES)["one"]
    for rank in (0, 1):
        by_method, whole = torch.load(folder / f"split-{rank}.pt")
        assert whole.keys() == alone.keys()
        for name, g in alone.items():  # the last layer adds up two partial sums: another order of additions
            torch.testing.assert_close(whole[name], g, rtol=1e-12, atol=1e-15)
        for norms in by_method.values():
            assert norms.keys() == want.keys()
            assert all(norms[choice] == pytest.approx(want[choice], rel=1e-12) for choice in want)


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_fsdp2_is_measured_shard_by_shard(wrapped, folder):
    model = network()
    # FSDP averages over the processes, each on its own images.
    loss = sum(model(images(rank)).square().sum() for rank in (0, 1)) / 2
    want = divergence(loss, model, CHOICES)
    alone = gradients(loss, model, CHOICES)["one"]
    for rank in (0, 1):
        read_back, whole, untouched = json.loads((folder / f"{wrapped}-{rank}.json").read_text())
        assert all(untouched)
        for name, g in alone.items():
            torch.testing.assert_close(torch.tensor(whole[name], dtype=torch.float64), g)
        for method in ("subtract", "propagate"):
            for choice, d in want.items():
                assert d.l2 > 0
                for name, part in {"": d, **d.per_layer}.items():
                    assert read_back[method][choice][name] == pytest.approx(part.norms(), rel=1e-9, abs=1e-12)


@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_reduce is deprecated")  # it is what people call
def test_a_backward_that_exchanges_values_is_run_whole_for_every_choice():
    """In a group of one process: what decides is the graph."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), UnionNorm(5), nn.ReLU(), nn.Linear(5, 1)).double()
    with torch.no_grad():
        model[1].weight[:2] = 0  # these units are 0 at every image
    patch(model, Jacobians())
    loss = model(images(0)).square().sum()
    counted = []
    loss.grad_fn.register_hook(lambda *_: counted.append(1))
    with pytest.warns(MethodWarning, match="exchanges values between processes"):
        norms = {name: d.norms() for name, d in divergence(loss, model, CHOICES, method="propagate").items()}
    assert len(counted) == 3
    with pytest.raises(UnseenError, match="a zone is one process's"):
        zone(model, lambda y: y.square().sum(), images(0), CHOICES["one"])
    dist.destroy_process_group()  # the same statistics, without the exchange
    loss = model(images(0)).square().sum()
    assert norms["one"]["l2"] > 0
    for name, d in divergence(loss, model, CHOICES, method="propagate").items():
        assert norms[name] == pytest.approx(d.norms(), rel=1e-9)


def test_pytorch_s_own_batch_norm_over_processes_is_known_and_takes_no_processor():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from torch.nn.modules._functions import SyncBatchNorm

    assert exchanges_values(SimpleNamespace(_forward_cls=SyncBatchNorm))
    assert not exchanges_values(torch.ones(1, requires_grad=True).exp().grad_fn)
    with pytest.raises(ValueError, match="expected input tensor to be on GPU"):
        nn.SyncBatchNorm(2)(torch.ones(4, 2))
