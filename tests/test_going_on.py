"""A run that is stopped and goes on: real processes, real signals, and what the record says afterwards."""

import json
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from zygote import Zygote

from nslightning import runs

QUICK = ("--config", "configs/quickstart.yaml", "--trainer.enable_progress_bar=false", "--trainer.logger=true")
SHORT = ("--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1")
EVERY = ("--trainer.callbacks.every_n_steps=1",)


@pytest.fixture(scope="module")
def zygote():
    made = Zygote()
    yield made
    made.close()


def steps_of(file: Path) -> list[int]:
    """The steps that a table has rows of; an unfinished row does not count."""
    if not file.exists():
        return []
    header, *rows = file.read_text().splitlines(keepends=True)
    place = header.strip().split(",").index("step")
    return [int(float(row.split(",")[place])) for row in rows if row.endswith("\n")]


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def checkpoint(folder: Path) -> dict:
    return torch.load(runs.last_checkpoint(folder), weights_only=True)


def test_the_readme_s_two_commands(zygote, tmp_path):
    """Stopped by SIGTERM with workers running, it goes on in its folder, under its own choice, to the same weights."""
    began = ("fit", *QUICK, "--model.jacobians.relu=1", "--model.jacobians.max_pool=10")
    folder = tmp_path / "runs/quickstart/001"
    first = zygote.start(*began, "--trainer.max_epochs=4000", *SHORT, "--data.workers=2", cwd=tmp_path)
    first.until(lambda: runs.last_checkpoint(folder))
    status, said = zygote.run("fit", *QUICK, "--ckpt_path=last", cwd=tmp_path)
    assert status == 2
    assert f"is in use by process {first.pid} on" in said
    assert "Traceback" not in said
    first.send(signal.SIGTERM, group=True)  # as a batch system does: to the loader's workers, too
    assert first.wait() == 143, first.said

    step = checkpoint(folder)["global_step"]
    assert "Traceback" not in first.said
    line = first.said.splitlines()[-1]
    assert line == (
        f"nslightning fit: stopped by SIGTERM: stopped at step {step}; go on with: "
        "nslightning fit --config runs/quickstart/001/config.yaml --ckpt_path=last"
    )
    assert (folder / "divergence.png").exists()
    assert record(folder)["ended"] == "stopped"

    end = step // 4 + 3
    status, said = zygote.run(
        "fit", *QUICK, "--ckpt_path=last", f"--trainer.max_epochs={end}", "--data.workers=0", cwd=tmp_path
    )
    assert status == 0, said
    assert "model.jacobians.relu: 0, and the run has 1.0" in said
    assert [p.name for p in folder.parent.iterdir()] == ["001"]
    now = record(folder)
    assert now["ended"] == "finished"
    assert {s["choice"] for s in now["segments"]} == {"relu=1, max_pool=10"}
    assert now["patch"]["jacobians"]["relu"] == 1.0
    assert [s["from_step"] for s in now["segments"]] == [0, step]
    assert now["segments"][1]["changed"] == {
        "data.workers": [2, 0], "trainer.max_epochs": [4000, end],
    }  # fmt: skip
    own = yaml.safe_load((folder / "config.yaml").read_text())
    assert (own["model"]["jacobians"]["relu"], own["trainer"]["limit_train_batches"]) == (1.0, 4)
    rows = pd.read_csv(folder / "divergence.csv")
    assert set(rows["reference"]) == {"relu=1, max_pool=10"}
    assert not rows.duplicated(["step", "choice", "parameter"]).any()

    status, said = zygote.run(*began, f"--trainer.max_epochs={end}", *SHORT, "--name=whole", cwd=tmp_path)
    assert status == 0, said
    whole = logged(tmp_path / "runs/whole/001")
    pd.testing.assert_frame_equal(logged(folder), whole, check_exact=True)
    assert whole["val/loss"].notna().sum() == end


def logged(folder: Path) -> pd.DataFrame:
    """What a run logged, but for what it measured by the clock."""
    table = pd.read_csv(folder / "metrics.csv")
    return table[sorted(c for c in table if not c.endswith(("/seconds", "/share")))]
