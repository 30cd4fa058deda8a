"""Faults from outside end in one line and the right status, and nothing is half-written. Real processes and signals."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_data import write_image_folder

FIT = [
    *(sys.executable, "-m", "nslightning", "fit", "--model.backbone=paper/lenet5", "--data=ImageFolder"),
    *("--data.root=images", "--data.image_size=32", "--data.batch_size=2", "--trainer.max_epochs=400"),
    *("--trainer.enable_progress_bar=false", "--trainer.logger=false", "--name=x"),
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    *("--trainer.callbacks.every_n_train_steps=2", "--trainer.callbacks.filename=last"),
]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "images")
    return tmp_path


def until(condition, process: subprocess.Popen, limit: float = 240) -> None:
    """Wait for something that a process does."""
    end = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    return str(errors)


def goes_on(folder: Path) -> None:
    """The run in a folder goes on from its last checkpoint, to two steps more."""

    def steps() -> int:
        checkpoints = (folder / "checkpoints").glob("*.ckpt")  # whole ones: each is read
        return max(torch.load(file, weights_only=True)["global_step"] for file in checkpoints)

    step = steps()
    more = subprocess.run(
        [*FIT[:3], "fit", "--config", folder / "config.yaml", "--ckpt_path=last", "--trainer.max_epochs=-1",
         f"--trainer.max_steps={step + 2}"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert more.returncode == 0, more.stderr
    assert steps() == step + 2


@pytest.mark.slow
def test_a_reading_process_that_is_killed_ends_the_run_in_one_line(images):
    run = subprocess.Popen([*FIT, "--data.workers=1"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until(lambda: list(images.glob("runs/x/001/checkpoints/*.ckpt")), run)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    errors = ended(run)
    assert re.search(
        r"nslightning fit: error: a process that reads the data was ended from outside \(.*\); .*--data\.workers",
        errors,
    )
    assert "go on with: nslightning fit --config runs/x/001/config.yaml --ckpt_path=last" in errors
    goes_on(images / "runs/x/001")


@pytest.mark.slow
def test_a_file_that_disappears_is_named(images):
    run = subprocess.Popen([*FIT, "--data.workers=0"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until(lambda: list(images.glob("runs/x/001/checkpoints/*.ckpt")), run)
    gone = images / "images/train/ant/ant_3.jpg"
    content = gone.read_bytes()
    gone.unlink()
    errors = ended(run)
    assert "ant_3.jpg: it was there at the start and is gone" in errors
    gone.write_bytes(content)
    goes_on(images / "runs/x/001")


@pytest.mark.slow
def test_a_checkpoint_larger_than_files_may_be_leaves_the_one_before(images):
    limit = 2_000_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    # LeNet-5's checkpoint is about 0.5 MB, this network's 50.
    run = subprocess.Popen(
        [*FIT, "--data.workers=0", "--model.backbone=paper/vgg11"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=limited,
    )  # fmt: skip
    errors = ended(run)
    assert "larger than the system allows" in errors
    assert not list(images.glob("runs/x/001/checkpoints/*.ckpt"))
