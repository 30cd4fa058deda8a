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
WORDS = (
    "--config", "configs/quickstart.yaml", "--trainer.enable_progress_bar=false", "--trainer.logger=true",
    "--trainer.limit_train_batches=60", "--trainer.limit_val_batches=2", "--trainer.max_epochs=2",
    "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=last", "--trainer.callbacks.save_top_k=1",
    "--trainer.callbacks.every_n_train_steps=10", "--trainer.callbacks.enable_version_counter=false",
)  # fmt: skip


def logged(folder: Path) -> pd.DataFrame:
    table = pd.read_csv(folder / "metrics.csv")
    return table[sorted(c for c in table if not c.endswith(("/seconds", "/share")))]


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again_ends_as_the_one_that_was_not(tmp_path):
    """`NSLIGHTNING_SOAK_KILLS` says how often; every signal in turn."""
    zygote, moments = Zygote(), random.Random(0)
    try:
        status, said = zygote.run("fit", *WORDS, "--name=whole", cwd=tmp_path)
        assert status == 0, said
        began = time.monotonic()
        status, said = zygote.run("fit", *WORDS, "--name=timed", cwd=tmp_path)
        length = time.monotonic() - began
        whole, number = tmp_path / "runs/whole/001", 0
        kills = 0
        while kills < KILLS:
            number += 1
            folder, name = tmp_path / f"runs/killed{number}/001", f"--name=killed{number}"
            for _ in range(6):
                again = ("--ckpt_path=last",) if runs.last_checkpoint(folder) else ()
                if not again and folder.exists():
                    folder.rename(folder.with_name(f"before-{kills}"))  # killed before its first checkpoint
                running = zygote.start("fit", *WORDS, name, *again, cwd=tmp_path)
                time.sleep(moments.uniform(0, length))
                signum = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[kills % 3]
                running.send(signum, group=signum == signal.SIGKILL)
                assert running.wait() in (0, 128 + signum), running.said
                assert "Traceback" not in running.said
                kills += 1
            again = ("--ckpt_path=last",) if runs.last_checkpoint(folder) else ()
            status, said = zygote.run("fit", *WORDS, name, *again, cwd=tmp_path)
            assert status == 0, said
            pd.testing.assert_frame_equal(logged(folder), logged(whole), check_exact=True)
            one, other = (torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (folder, whole))
            assert one["global_step"] == other["global_step"] == 120
            assert all(torch.equal(one["state_dict"][k], other["state_dict"][k]) for k in other["state_dict"])
    finally:
        zygote.close()
