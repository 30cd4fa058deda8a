"""A launcher that starts processes again: the run goes on by itself, and ends with the bits of one left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_helpers import finish, start
from test_two_processes import config

HERE = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def options():
    """Two epochs of six steps, with dropout and a checkpoint after every fifth step."""
    made = config(dropout=0.3)
    made["data"]["init_args"] |= {"batch_size": 8, "constant": 0.5}
    del made["trainer"]["logger"]
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


def torchrun(launch, output, *flags, before=(), **environment):
    """``torchrun ... -m nslightning fit`` in a process group of its own."""
    import yaml

    file = Path(f"{output}.yaml")
    file.write_text(yaml.safe_dump(options()))
    return subprocess.Popen(
        [*before, sys.executable, "-m", "torch.distributed.run", *launch, "-m", "nslightning", "fit",
         f"--config={file}", f"--output={output}", "--trainer.strategy=ddp", *flags],
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def test_torchrun_starts_a_killed_process_again(whole, tmp_path):
    """Killed at step 8: the checkpoint is of step 5, in the middle of the first epoch."""
    finish(
        torchrun(
            ["--standalone", "--nproc-per-node=2", "--max-restarts=1"], tmp_path / "runs", "--trainer.devices=2",
            FAULT=f"kill 1 8 {tmp_path / 'killed'}",
        )
    )  # fmt: skip
    assert (tmp_path / "killed").exists()
    (folder,) = (tmp_path / "runs/run").iterdir()
    equal(folder, whole)
