"""Launchers that start processes again: torchrun on one and on two machines, and SLURM. The bits stay the same."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import slurm_stand_in
import torch
import yaml
from ddp_helpers import finish, start
from test_two_processes import config

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


#: Else the processes of a later round may read addresses of an earlier one, and wait for what is gone.
RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def options():
    """Two epochs of six steps, with dropout and a checkpoint after every fifth step."""
    made = config(dropout=0.3)
    made["data"]["init_args"] |= {"batch_size": 8, "constant": 0.5}
    kept = ("DeadUnits", "Slow", "GradientDivergence", "Dump")
    made["trainer"]["callbacks"] = [
        *(c for c in made["trainer"]["callbacks"] if c["class_path"].endswith(kept)),
        {"class_path": "ddp_helpers.Fault"},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"every_n_train_steps": 5, "filename": "last"},
        },
    ]
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start("fit", options(), folder / "runs", "--trainer.devices=2", "--trainer.strategy=ddp"))
    return folder / "runs/run/001"


def equal(folder: Path, whole: Path) -> None:
    """Two runs have the same weights and the same measurements, to the bit."""
    for rank in (0, 1):
        ours, expected = (torch.load(f / f"weights-{rank}.pt") for f in (folder, whole))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert (folder / "divergence.csv").read_text() == (whole / "divergence.csv").read_text()


def launched(words, folder, **environment):
    """A launcher's command line, with the options' file as its last word, in its own process group."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(options()))
    return subprocess.Popen(
        [*words, f"--config={file}", f"--output={folder / 'runs'}"],
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def torchrun(*options):
    """The words of ``torchrun ... nslightning fit``."""
    run = [sys.executable, "-m", "torch.distributed.run", *options]
    return [*run, "-m", "nslightning", "fit", "--trainer.strategy=ddp"]


def until_it_exists(file, *processes):
    """Wait for a file that processes write."""
    end = time.monotonic() + 480
    while not file.exists():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_a_killed_process_again(rank, whole, tmp_path):
    """Killed at step 8: the checkpoint is of step 5, in the middle of the first epoch."""
    words = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=1")
    finish(
        launched([*words, "--trainer.devices=2"], tmp_path, FAULT=f"kill {rank} 8 {tmp_path / 'killed'}", **RESTARTS)
    )
    assert (tmp_path / "killed").exists()
    (folder,) = (tmp_path / "runs/run").iterdir()
    equal(folder, whole)


class Machine:
    """A network namespace with one cable to the others: its processes are reached by its address alone."""

    def __init__(self, number, switch):
        self.name, self.address = f"{switch}m{number}", f"10.231.7.{number}"
        ip("netns", "add", self.name)
        ip("link", "add", "cable0", "netns", self.name, "type", "veth", "peer", f"port{number}", "netns", switch)
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "cable0")
        for device in ("lo", "cable0"):
            ip("-n", self.name, "link", "set", device, "up")
        ip("-n", switch, "link", "set", f"port{number}", "master", "bridge0", "up")

    def train(self, folder):
        """Start this machine's part of a training; the first machine's address is where they meet."""
        first = self.address.endswith(".1")
        words = torchrun(
            "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=job7",
            "--rdzv-endpoint=10.231.7.1:29400", f"--rdzv-conf=is_host={int(first)}", f"--local-addr={self.address}",
        )  # fmt: skip
        words = ["ip", "netns", "exec", self.name, *words, "--trainer.num_nodes=2", "--trainer.devices=1"]
        return launched(words, folder, GLOO_SOCKET_IFNAME="cable0", SECONDS_PER_STEP="0.3", **RESTARTS)

    def processes(self):
        return [int(word) for word in ip("netns", "pids", self.name).split()]

    def kill(self):
        """Kill all its processes. torchrun's are in their own sessions: no signal to one group reaches them."""
        while alive := self.processes():
            for process in alive:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def unplug(self):
        """Take the cable out: nothing that happens here is heard of elsewhere."""
        ip("-n", self.name, "link", "delete", "cable0")


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def machines():
    """Makes machines that share a network."""
    switch = f"nsl{os.getpid()}"
    try:
        ip("netns", "add", switch)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        pytest.skip(f"two machines in one take `ip netns add`, which fails here: {reason}")
    made = []

    def machine():
        made.append(Machine(len(made) + 1, switch))
        return made[-1]

    try:
        ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge0", "up")
        yield machine
    finally:
        for one in made:
            one.kill()
            ip("netns", "delete", one.name)
        ip("netns", "delete", switch)


@pytest.mark.parametrize("unplugged", [False, True], ids=["killed", "unplugged"])
def test_a_machine_of_two_that_dies_is_replaced(unplugged, machines, whole, tmp_path):
    """The other machine waits for a third one, and the run goes on from its checkpoint."""
    first, second = machines(), machines()
    run, lost = first.train(tmp_path), second.train(tmp_path)
    folder = tmp_path / "runs/run/job7"
    until_it_exists(folder / "checkpoints/last.ckpt", run, lost)
    assert first.processes()
    assert second.processes()
    if unplugged:
        second.unplug()
    second.kill()
    lost.communicate()
    assert not (folder / "weights-1.pt").exists()
    finish(run, machines().train(tmp_path))
    assert [f.name for f in (tmp_path / "runs/run").iterdir()] == ["job7"]
    equal(folder, whole)


@pytest.mark.parametrize("event", ["limit", "preempt", "fail"])
def test_the_slurm_script_goes_on_after_it_was_interrupted(event, whole, tmp_path):
    """After its time limit, for another job, and on another machine: in its own folder and W&B run."""
    state = tmp_path / "state"
    state.mkdir()
    slurm_stand_in.install(tmp_path / "bin")
    command = tmp_path / "bin/nslightning"
    command.write_text(f'#!/bin/bash\nexec {sys.executable} -m nslightning "$@"\n')
    command.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = launched(
        ["sbatch", "--nodes=1", "--ntasks-per-node=2", ROOT / "examples/slurm.sh"], tmp_path,
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", SLURM_STAND_IN=str(state), SECONDS_PER_STEP="0.5",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    folder = tmp_path / "runs/run/77.0"
    until_it_exists(folder / "checkpoints/last.ckpt", job)
    first = (state / "task0").read_text()
    (state / "event").write_text(event)
    finish(job)
    assert (state / "task0").read_text() != first
    assert [f.name for f in (tmp_path / "runs/run").iterdir()] == ["77.0"]
    equal(folder, whole)
    name = (folder / "wandb_id").read_text().strip()
    records = list(folder.glob("wandb/offline-run-*"))
    assert len(records) == 2
    assert all(record.name.endswith(f"-{name}") for record in records)
