"""Kills at random moments: whatever ended a training, it goes on to the bits of the one that was never stopped."""

import os
import random
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from zygote import Zygote

from nslightning import runs

KILLS = int(os.environ.get("NSLIGHTNING_SOAK_KILLS", "200"))
STEPS = 150
WORDS = (
    "--config", "configs/quickstart.yaml", "--trainer.enable_progress_bar=false", "--trainer.logger=true",
    "--model.backbone=paper/fc", "--model.backbone_options={hidden: [8]}", "--data.batch_size=8",
    f"--trainer.limit_train_batches={STEPS}", "--trainer.limit_val_batches=2", "--trainer.max_epochs=2",
    "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=last", "--trainer.callbacks.save_top_k=1",
    "--trainer.callbacks.every_n_train_steps=10", "--trainer.callbacks.enable_version_counter=false",
)  # fmt: skip


def logged(folder: Path) -> pd.DataFrame:
    """What a run logged, but for what it measured by the clock."""
    table = pd.read_csv(folder / "metrics.csv")
    by_clock = ("/seconds", "/share", "/images_per_second", "/data_wait", "/memory_gib")
    return table[sorted(c for c in table if not c.endswith(by_clock))]


def assert_same_run(folder: Path, whole: Path) -> None:
    """The same bits in every metric, every measurement and the weights, and nothing half-written beside them."""
    pd.testing.assert_frame_equal(logged(folder), logged(whole), check_exact=True)
    one, other = (pd.read_csv(f / "divergence.csv") for f in (folder, whole))
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    one, other = (torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (folder, whole))
    assert one["global_step"] == other["global_step"] == 2 * STEPS
    assert all(torch.equal(one["state_dict"][k], other["state_dict"][k]) for k in other["state_dict"])
    kinds = {f.name for f in folder.rglob("*") if f.is_file()} - {f.name for f in whole.rglob("*") if f.is_file()}
    assert not kinds
    record = runs.read_record(folder)
    assert record["ended"] == "finished"
    steps = [(s["from_step"], s["to_step"]) for s in record["segments"]]
    assert steps[0][0] == 0
    assert steps[-1][1] is None


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again_ends_as_the_one_that_was_not(tmp_path):
    """`NSLIGHTNING_SOAK_KILLS` says how often; the signals in turn, a quarter of the runs with a loader's worker."""
    zygote, moments = Zygote(), random.Random(0)
    try:
        status, said = zygote.run("fit", *WORDS, "--name=whole", cwd=tmp_path)
        assert status == 0, said
        began = time.monotonic()
        status, said = zygote.run("fit", *WORDS, "--name=timed", cwd=tmp_path)
        length = time.monotonic() - began
        whole = tmp_path / "runs/whole/001"
        assert_same_run(tmp_path / "runs/timed/001", whole)
        kills, number, stops = 0, 0, []
        while kills < KILLS:
            number += 1
            name = f"--name=killed{number}"
            folder, workers = tmp_path / f"runs/killed{number}/001", f"--data.workers={number % 4 == 0:d}"
            while True:  # until it is done before it is killed
                again = ("--ckpt_path=last",) if runs.last_checkpoint(folder) else ()
                if not again and folder.exists():
                    folder.rename(folder.with_name(f"before-{kills}"))  # killed before its first checkpoint
                began = time.monotonic()
                running = zygote.start("fit", *WORDS, name, workers, *again, cwd=tmp_path)
                time.sleep(moments.uniform(0.1, length) if kills < KILLS else 0)
                signum = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[kills % 3]
                if kills < KILLS:
                    running.send(signum, group=signum != signal.SIGINT and moments.random() < 0.5)
                status = running.wait()
                assert status in (0, 128 + signum), running.said
                assert "Traceback" not in running.said
                if status == 0:
                    if not again:
                        length = time.monotonic() - began  # the machine may be quicker now, or slower
                    break
                kills += 1
                stops.append((signum.name, "step" in running.said.splitlines()[-1] if running.said else False))
            assert_same_run(folder, whole)
            print(f"{kills} kills, {number} trainings", flush=True)
    finally:
        zygote.close()
