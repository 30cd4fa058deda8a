"""A run that is stopped and goes on: real processes, real signals, and what the record says afterwards."""

import json
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from zygote import Zygote

from nslightning import runs
from nslightning.commands.epoch_ends import EpochEnds
from nslightning.commands.run_callbacks import MovedRun, StopWhenAsked
from nslightning.commands.stopping import Signals, Stopped, signals

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
    if not (text := file.read_text()):  # created, and not written to yet
        return []
    header, *rows = text.splitlines(keepends=True)
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
        f"nslightning fit: stopped by SIGTERM at step {step}; go on with: "
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


class Logs(LightningModule):
    """Logs at its steps and at its epochs' ends; its rate of learning depends on the last epoch's mean loss."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        loss = -self.weight * batch.mean()
        self.log("rate", self.optimizers().param_groups[0]["lr"])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.log("ended", float(self.current_epoch))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        falling = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "monitor": "loss"}}


class Asks(Callback):
    """A signal comes in the middle of a step."""

    def __init__(self, kept: Signals, step: int):
        self.kept, self.step = kept, step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            self.kept.signum = signal.SIGTERM


def fit_until(folder: Path, at: int | None, checkpoint: Path | None = None, **options) -> StopWhenAsked:
    """A training of two epochs of four steps, which a signal in the step `at` stops."""
    with signals() as kept:
        last = StopWhenAsked(kept, folder)
        trainer = Trainer(
            **{"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 2} | options,
            callbacks=[Asks(kept, at), last], logger=runs.MetricsFile(folder),
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        # Lightning puts those that save checkpoints at the end.
        trainer.callbacks += [EpochEnds(), trainer.callbacks.pop(trainer.callbacks.index(last))]
        with suppress(Stopped, SystemExit):
            trainer.fit(Logs(), DataLoader(torch.ones(16), batch_size=4), ckpt_path=checkpoint)
    return last


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # it goes on
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")  # all batches are alike
@pytest.mark.parametrize("step", range(8))
def test_what_the_last_step_logged_is_not_lost(step, tmp_path):
    """Wherever in an epoch it is stopped: at a step whose row is due, at another, and at an epoch's last one."""
    parts, whole = (tmp_path / name / "001" for name in ("parts", "whole"))
    stopped = fit_until(parts, step)
    assert stopped.step == step + 1
    assert stopped.saved == (step < 7)  # with the last step of all it is done
    if stopped.saved:
        fit_until(parts, None, stopped.file)
    fit_until(whole, None)
    parts, whole = (pd.read_csv(folder / "metrics.csv") for folder in (parts, whole))
    # Of an epoch that it was stopped in, Lightning takes the mean over the steps since.
    steps = ["epoch", "step", "loss_step", "rate", "ended"]
    pd.testing.assert_frame_equal(parts[steps], whole[steps])
    assert (parts["loss_epoch"].notna() == whole["loss_epoch"].notna()).all()
    assert whole["loss_step"].notna().sum() == 4
    assert whole["loss_epoch"].notna().sum() == 2
    if step in (3, 7):  # between two epochs nothing is lost
        pd.testing.assert_frame_equal(parts, whole)


class Scored(Logs):
    """Its epochs have the scores that are given."""

    def __init__(self, *scores: float):
        super().__init__()
        self.scores = scores

    def on_train_epoch_end(self):
        self.log("score", self.scores[self.current_epoch])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # it goes on
@pytest.mark.parametrize("way", ["moved", "another path to it", "the same path"])
def test_a_worse_epoch_does_not_take_the_place_of_the_best_one_when_a_run_was_moved(way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/x/001")

    def fit(folder: Path, epochs: int, *scores: float, goes_on: bool = True) -> ModelCheckpoint:
        best = ModelCheckpoint(folder / "checkpoints", "best", monitor="score", mode="max", save_last=True)
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[best], enable_progress_bar=False,
            enable_model_summary=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.callbacks += [MovedRun(folder)]
        loader = DataLoader(torch.ones(4), batch_size=4)
        trainer.fit(Scored(*scores), loader, ckpt_path=folder / "checkpoints/last.ckpt" if goes_on else None)
        return best

    first = fit(folder, 2, 5.0, 7.0, goes_on=False)
    assert float(first.best_model_score) == 7.0
    if way == "moved":
        Path("elsewhere").mkdir()
        Path("runs").rename("elsewhere/runs")
        folder = Path("elsewhere/runs/x/001")
    elif way == "another path to it":
        folder = folder.absolute()
    best = fit(folder, 3, 5.0, 7.0, 6.0)
    assert float(best.best_model_score) == 7.0
    assert Path(best.best_model_path).resolve() == (folder / "checkpoints/best.ckpt").resolve()
    assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["epoch"] == 1


class Dies(Callback):
    """The process is killed right after a checkpoint is written at the end of a step."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 4:
            raise RuntimeError("killed")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # it goes on
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")  # all batches are alike
def test_a_checkpoint_counts_no_step_whose_row_is_missing(tmp_path):
    """Lightning writes a step's row after the checkpoints of the step: a kill in between would lose it."""

    def fit(name, *callbacks, checkpoint=None):
        folder = tmp_path / name / "001"
        with signals() as kept:
            last, saves = StopWhenAsked(kept, folder), ModelCheckpoint(folder, "{step}", every_n_train_steps=1)
            trainer = Trainer(
                max_epochs=1, accelerator="cpu", log_every_n_steps=2, logger=runs.MetricsFile(folder),
                callbacks=[saves], enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            trainer.callbacks += [*callbacks, EpochEnds(), last]
            trainer.fit(Logs(), DataLoader(torch.ones(24), batch_size=4), ckpt_path=checkpoint)
        return pd.read_csv(folder / "metrics.csv")

    with pytest.raises(RuntimeError, match="killed"):
        fit("parts", Dies())
    parts = fit("parts", checkpoint=tmp_path / "parts/001/step=4.ckpt")
    whole = fit("whole")
    assert whole["loss_step"].notna().sum() == 3
    pd.testing.assert_frame_equal(parts[["step", "loss_step"]], whole[["step", "loss_step"]])


@pytest.mark.parametrize("where", ["validation", "step"])
def test_workers_that_die_of_a_signal_leave_a_checkpoint_only_where_it_is_exact(where, tmp_path):
    """In the validation after an epoch's last step Lightning has counted the step only in part."""

    class Watched(Logs):
        def validation_step(self, batch, batch_idx):
            pass

    class WorkersDie(Callback):
        def __init__(self, kept):
            self.kept = kept

        def die(self, here, trainer):
            if here == where and not trainer.sanity_checking and trainer.global_step >= 3:
                self.kept.signum = signal.SIGTERM
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

        def on_validation_start(self, trainer, pl_module):
            self.die("validation", trainer)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.die("step", trainer)

    loader = DataLoader(torch.ones(16), batch_size=4)
    with signals() as kept:
        last = StopWhenAsked(kept, tmp_path)
        trainer = Trainer(
            max_epochs=2, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.callbacks += [WorkersDie(kept), last]  # before the step is begun, for the one that stops
        with pytest.raises(RuntimeError, match="killed by signal"):
            trainer.fit(Watched(), loader, loader)
    assert last.saved == (where == "step")
    assert last.step == (4 if where == "validation" else 3)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # it goes on
def test_epochs_of_one_step_are_stopped_between_two(tmp_path):
    """Every step is its epoch's last one; the rate of learning falls as it does without a stop."""
    options = {"max_epochs": 6, "limit_train_batches": 1, "log_every_n_steps": 1}
    for at in (0, 2, 4):
        parts = tmp_path / f"parts{at}/001"
        stopped = fit_until(parts, at, **options)
        assert (stopped.saved, stopped.step) == (True, at + 1)
        fit_until(parts, None, stopped.file, **options)
    fit_until(tmp_path / "whole/001", None, **options)
    whole = pd.read_csv(tmp_path / "whole/001/metrics.csv")
    assert whole["rate"].dropna().nunique() > 1
    for at in (0, 2, 4):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / f"parts{at}/001/metrics.csv"), whole)


def logged(folder: Path) -> pd.DataFrame:
    """What a run logged, but for what it measured by the clock."""
    table = pd.read_csv(folder / "metrics.csv")
    by_clock = ("/seconds", "/share", "/images_per_second", "/data_wait", "/memory_gib")
    return table[sorted(c for c in table if not c.endswith(by_clock))]


def test_another_choice_is_another_segment(zygote, tmp_path):
    """Ctrl-C with 130; then a choice that is asked for: record, table and figure tell the two apart."""
    folder = tmp_path / "runs/quickstart/001"
    first = zygote.start("fit", *QUICK, "--model.jacobians.relu=1", "--trainer.max_epochs=4000", *SHORT, cwd=tmp_path)
    first.until(lambda: len(steps_of(folder / "metrics.csv")) > 3)
    first.send(signal.SIGINT)
    assert first.wait() == 130, first.said
    assert "Traceback" not in first.said
    step = checkpoint(folder)["global_step"]
    assert f"stopped by Ctrl-C at step {step}; go on with: nslightning fit" in first.said
    old = (folder / "divergence.png").read_bytes()

    words = ("--ckpt_path=last", f"--trainer.max_epochs={step // 4 + 4}", "--model.jacobians.relu=0.5")
    status, said = zygote.run("fit", *QUICK, *words, cwd=tmp_path)
    assert status == 0, said
    assert "the checkpoint was made under relu=1.0, and this run has relu=0.5" in said
    one, two = record(folder)["segments"]
    assert (one["from_step"], one["to_step"], one["choice"]) == (0, step, "relu=1")
    assert (two["from_step"], two["to_step"], two["choice"]) == (step, None, "relu=0.5")
    assert two["changed"]["model.jacobians.relu"] == [1.0, 0.5]
    assert one["config"]["model"]["jacobians"]["relu"] == 1.0
    rows = pd.read_csv(folder / "divergence.csv")
    assert set(rows["reference"][rows["step"] < step]) == {"relu=1"}
    assert set(rows["reference"][rows["step"] >= step]) == {"relu=0.5"}
    assert (folder / "divergence.png").read_bytes() != old
    assert runs.choice_changes(folder) == [(step, "relu=1 to relu=0.5")]
    # The verdict is of the steps that have one reference.
    assert f"since step {step}, with which a segment of another choice or precision begins:\nrelu1: " in said
    n = rows["step"][rows["step"] >= step].nunique()
    assert f"on {n} of {n} step{'s' * (n > 1)}\n" in said.partition(f"since step {step}")[2]

    end = checkpoint(folder)["global_step"]
    status, said = zygote.run("fit", *QUICK, "--ckpt_path=last", f"--trainer.max_steps={end}", cwd=tmp_path)
    assert status == 0, said
    assert f"no step was left after step {end}; a larger --trainer.max_steps trains on" in said

    status, said = zygote.run("fit", *QUICK, "--ckpt_path=last", "--model.optimizer.lr=0.5", cwd=tmp_path)
    assert status == 2
    assert "a run that goes on keeps its optimizer and schedule" in said


def test_slurm_checkpoints_belong_to_the_run(zygote, tmp_path):
    """A job's checkpoint in the folder it was started in is not another job's; a requeued job finds its own."""
    slurm = {
        "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "1",
    }  # fmt: skip
    words = ("fit", *QUICK, *SHORT, "--name=job", "--trainer.max_epochs=4000")
    folder = tmp_path / "runs/job/001"
    first = zygote.start(*words, cwd=tmp_path, **slurm)
    first.until(lambda: runs.last_checkpoint(folder))
    first.send(signal.SIGUSR1)
    first.until(lambda: list(folder.glob("hpc_ckpt_*.ckpt")))
    first.send(signal.SIGKILL, group=True)
    assert first.wait() == 137
    assert not list(tmp_path.glob("*.ckpt"))
    at = torch.load(folder / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"]

    shutil.copy(folder / "hpc_ckpt_1.ckpt", tmp_path)
    other = ("fit", *QUICK, *SHORT, "--name=other", "--trainer.max_epochs=1")
    status, said = zygote.run(*other, cwd=tmp_path, **slurm | {"SLURM_JOB_ID": "78"})
    assert status == 0, said
    assert record(tmp_path / "runs/other/001")["resumed_at_step"] is None

    again = (*words, f"--trainer.max_epochs={at // 4 + 2}")
    status, said = zygote.run(*again, cwd=tmp_path, SLURM_RESTART_COUNT="1", **slurm)
    assert status == 0, said
    assert [f.name for f in folder.parent.iterdir()] == ["001"]
    assert record(folder)["resumed_at_step"] >= at


def last_line(running) -> str:
    assert "Traceback" not in running.said
    return running.said.rstrip().splitlines()[-1]


def test_measurements_stop_and_go_on(zygote, tmp_path):
    """`lr-search`, `zones` and `experiment`, by either signal: where they stopped, and how they go on."""
    search = ("lr-search", *QUICK[:3], *SHORT, "--trials=3", "--epochs=4000")
    running = zygote.start(*search, cwd=tmp_path)
    running.until(lambda: list(tmp_path.glob("runs/lr-search/trials/config/*")))
    time.sleep(3)
    running.send(signal.SIGTERM)
    assert running.wait() == 143, running.said
    assert last_line(running) == (
        "nslightning lr-search: stopped by SIGTERM after 0 of 3 trials of 'config'; the same command goes on"
    )

    zones = (
        "zones",
        "--data=FashionMNISTSample",
        "--batches=1",
        "--precisions=[32]",
        "--chunk=1",
        "--half-width=0.001",
    )
    running = zygote.start(*zones, cwd=tmp_path)
    running.until(lambda: list(tmp_path.glob("runs/zones/zones/cells/*.json")))
    running.send(signal.SIGINT)
    assert running.wait() == 130, running.said
    line = last_line(running)
    assert line.startswith("nslightning zones: stopped by Ctrl-C")
    assert line.endswith("; the same command goes on")

    grid = ("experiment", "mnist_lenet_beta", "--scale=smoke", "--workers=1", "--set=epochs=40")
    cells = "results/*/smoke/cells/*.json"
    running = zygote.start(*grid, cwd=tmp_path)
    running.until(lambda: list(tmp_path.glob(cells)))
    running.send(signal.SIGTERM)
    assert running.wait() == 143, running.said
    finished = len(list(tmp_path.glob(cells)))
    assert f"stopped by SIGTERM after {finished} of " in last_line(running)
    status, said = zygote.run(*grid, "--list", cwd=tmp_path)
    assert (status, said.count(" finished ")) == (0, finished)


def test_an_audit_that_is_stopped_says_what_is_left(zygote, tmp_path):
    """Before anything is measured, and after the first precision."""
    audit = ("audit", "paper/lenet5", "--data=FashionMNISTSample", "--batches=200", "--json=audit.json")
    running = zygote.start(*audit, "--precisions", "32", "64", cwd=tmp_path)
    time.sleep(1)
    running.send(signal.SIGTERM)
    assert running.wait() == 143, running.said
    assert last_line(running) == "nslightning audit: stopped by SIGTERM; nothing was measured yet"
    assert not (tmp_path / "audit.json").exists()


def test_twins_stop_and_go_on(zygote, tmp_path):
    """SIGTERM: 143, and the command that the last line names goes on to the end."""
    twins = (
        "twins", "--config", "configs/twins_mnist_lenet.yaml", "--data=FashionMNISTSample", "--trainer.logger=true",
        "--trainer.enable_progress_bar=false", *SHORT, "--name=twins", "--divergence.every_n_steps=1",
    )  # fmt: skip
    running = zygote.start(*twins, "--trainer.max_epochs=4000", cwd=tmp_path)
    running.until(lambda: len(steps_of(tmp_path / "runs/twins/001/metrics.csv")) > 3)
    running.send(signal.SIGTERM)
    assert running.wait() == 143, running.said
    step = checkpoint(tmp_path / "runs/twins/001")["global_step"]
    said, go_on = last_line(running).split("; go on with: nslightning ")
    assert said == f"nslightning twins: stopped by SIGTERM at step {step}"
    status, said = zygote.run(*go_on.split(), f"--trainer.max_epochs={step // 4 + 2}", cwd=tmp_path)
    assert status == 0, said
    assert record(tmp_path / "runs/twins/001")["ended"] == "finished"
