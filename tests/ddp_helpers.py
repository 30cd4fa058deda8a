"""Whole runs in separate processes, and the callbacks that they put into a run's config."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback
from torch import distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

from nslightning import Jacobians, using


class UnionNorm(nn.BatchNorm1d):
    """PyTorch's SyncBatchNorm takes tensors on a GPU alone: these are its statistics, for the processor."""

    def forward(self, x):
        if dist.is_initialized():
            count = dist.get_world_size()
            mean, square = (all_reduce(t.mean(0)) / count for t in (x, x.square()))
        else:
            mean, square = x.mean(0), x.square().mean(0)
        return (x - mean) / (square - mean.square() + self.eps).sqrt() * self.weight + self.bias


class DeadUnits(Callback):
    """Makes some hidden units 0 at every input: ties that matter, in float64 too. They stay dead under ReLU'(0) = 0."""

    def on_fit_start(self, trainer, pl_module):
        if trainer.ckpt_path is not None:  # a run that goes on: under another ReLU'(0) they may have come alive
            return
        with torch.no_grad():
            for twin in getattr(pl_module, "twins", {"": pl_module}).values():
                layer = twin.backbone.fc1
                layer.weight[:5] = layer.bias[:5] = 0


class TiedWhereConstant(Callback):
    """Makes some hidden units the difference of two pixels: 0 at the images whose pixels are all equal."""

    def on_fit_start(self, trainer, pl_module):
        with torch.no_grad():
            layer = pl_module.backbone.fc1
            layer.weight[5:15] = layer.bias[5:15] = 0
            layer.weight[5:15, 0], layer.weight[5:15, 1] = 1, -1


class OwnNumbers(Callback):
    """Each process's own ties and its own gradient's difference under ReLU'(0) = 1, counted without the callbacks."""

    def on_train_start(self, *_):
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step % 4:
            return
        net, (x, y) = pl_module.backbone, batch
        with torch.no_grad():
            first = F.linear(x.flatten(1), net.fc1.weight, net.fc1.bias)
            second = F.linear(first.clamp(min=0), net.fc2.weight, net.fc2.bias)
        gradients = []
        for choice in (Jacobians(relu=1.0), Jacobians()):
            with using(net, choice):
                gradients.append(torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters())))
        difference = torch.cat([(a - b).flatten() for a, b in zip(*gradients, strict=True)])
        self.rows.append(
            {
                "step": trainer.global_step,
                "tied": sum(int((h == 0).sum()) for h in (first, second)),
                "total": first.numel() + second.numel(),
                "observed": float(difference.norm()),
            }
        )

    def on_train_end(self, trainer, pl_module):
        Path(trainer.log_dir, f"own-{trainer.global_rank}.json").write_text(json.dumps(self.rows))


class Dump(Callback):
    """Writes the final weights of each process beside the run folders."""

    def on_train_end(self, trainer, pl_module):
        file = Path(trainer.log_dir, f"weights-{trainer.global_rank}.pt")
        torch.save(pl_module.state_dict(), file)


class Slow(Callback):
    """Leaves time to be killed, where the environment asks for it."""

    def on_train_batch_start(self, *_):
        time.sleep(float(os.environ.get("SECONDS_PER_STEP", "0")))


class Fault(Callback):
    """Goes wrong once, in one process at one step, where the environment says so: ``FAULT=kind rank step file``."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        kind, *place, file = os.environ.get("FAULT", "none 0 0 .").split()
        kind, _, target = kind.partition("=")
        here = [trainer.global_rank, trainer.global_step]
        if kind == "none" or [int(number) for number in place] != here or Path(file).exists():
            return
        Path(file).touch()
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "nan":
            batch[0].fill_(torch.nan)
        elif kind == "memory":
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, size + 2**28))
            torch.empty(2**32, dtype=torch.uint8)
        elif kind == "remove":
            Path(target).unlink()
        elif kind == "reader":
            (reader, *_) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            os.kill(int(reader), signal.SIGKILL)


class NoWandb(Callback):
    """Kills W&B's own process where the environment says so: after a step, or when the training is done."""

    def on_train_batch_end(self, trainer, *_):
        if os.environ["KILL_WANDB"] == str(trainer.global_step):
            self._kill()

    def teardown(self, trainer, pl_module, stage):
        if os.environ["KILL_WANDB"] == "done":
            self._kill()

    def _kill(self):
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        (core,) = (int(pid) for pid in children if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(core, signal.SIGKILL)
        os.waitid(os.P_PID, core, os.WEXITED | os.WNOWAIT)


def start(command, options, output, *flags, **environment):
    """``nslightning COMMAND`` in its own process group."""
    file = Path(f"{output}.yaml")
    file.write_text(yaml.safe_dump(options))
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "nslightning", command, f"--config={file}", f"--output={output}", *flags],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(*processes):
    """Wait for processes, which are to end well."""
    for process in processes:
        try:
            said, _ = process.communicate(timeout=480)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, said
