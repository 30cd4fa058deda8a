"""Training metrics are computed at the steps that show them, and show what logging each step would have shown."""

import math

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from nslightning.callbacks import StepSeed
from nslightning.commands.run_callbacks import Bar
from nslightning.exact_csv import read_exactly
from nslightning.models import ImageClassifier

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")  # nothing is validated


class Quiet(Callback):
    """A callback that says that it reads no step's metrics."""

    reads_step_metrics = False


class Stops(Quiet):
    """Ends the training after a step, when that step is done."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx == 4


class ReadsEach(Callback):
    """One's own callback, which may look at any step."""


def data(n=80):
    g = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(torch.randn(n, 1, 28, 28, generator=g), torch.randint(10, (n,), generator=g)), batch_size=8
    )


def fit(folder, *callbacks, **options):
    """The rows that a training logged, and how often it called ``log``."""
    torch.manual_seed(0)
    module = ImageClassifier("paper/lenet5")
    logged = []
    stock = module.log
    module.log = lambda name, *args, **kwargs: (logged.append(name), stock(name, *args, **kwargs))
    defaults = {"max_epochs": 2, "log_every_n_steps": 4, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, logger=CSVLogger(folder, name="", version=""),
        callbacks=[StepSeed(0), *callbacks], enable_model_summary=False, **defaults | options,
    )  # fmt: skip
    trainer.fit(module, data())
    trainer.logger.save()
    file = folder / "metrics.csv"
    return read_exactly(file) if file.exists() else None, logged, trainer


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"max_steps": 7}, {"fast_dev_run": False}])
def test_the_metrics_file_is_that_of_logging_each_step(tmp_path, options):
    each, logged_each, a = fit(tmp_path / "each", ReadsEach(), **options)
    shown, logged, b = fit(tmp_path / "shown", Quiet(), **options)
    pd.testing.assert_frame_equal(each, shown)
    assert len(each) >= 1
    assert each["train/loss"].notna().all()
    assert len(logged) < len(logged_each)
    assert a.callback_metrics == b.callback_metrics  # the last step of a training is logged always


@pytest.mark.filterwarnings("ignore:The number of training batches")  # ten
def test_what_no_step_shows_is_not_computed(tmp_path):
    _, logged, _ = fit(tmp_path, max_epochs=1, log_every_n_steps=50)
    assert logged == ["train/loss", "train/acc1"]  # the last of ten steps


def test_a_step_that_a_callback_makes_the_last_is_logged_with_its_own_values(tmp_path):
    each, _, a = fit(tmp_path / "each", Stops(), ReadsEach(), log_every_n_steps=3)
    shown, logged, b = fit(tmp_path / "shown", Stops(), log_every_n_steps=3)
    assert shown["step"].tolist() == [2, 4]
    pd.testing.assert_frame_equal(each, shown)
    assert a.callback_metrics == b.callback_metrics
    assert len(logged) == 4


@pytest.mark.parametrize(
    "watching",
    [
        lambda folder: ModelCheckpoint(folder, monitor="train/loss", every_n_train_steps=1, save_top_k=1),
        lambda folder: EarlyStopping("train/acc1", patience=5),
    ],
)
def test_what_watches_a_training_metric_sees_each_step(tmp_path, watching):
    callback = watching(tmp_path / "kept")
    _, logged, _ = fit(tmp_path, callback, enable_checkpointing=True, max_epochs=1)
    assert len(logged) == 20
    if isinstance(callback, ModelCheckpoint):
        each, _, _ = fit(tmp_path / "again", ReadsEach(), log_every_n_steps=1, max_epochs=1)
        assert float(callback.best_model_score) == pytest.approx(each["train/loss"].min(), rel=1e-6)


def test_a_progress_bar_is_drawn_a_few_times_a_second(tmp_path, monkeypatch):
    clock = iter(x / 10 for x in range(10**6))  # a tenth of a second passes with each look
    monkeypatch.setattr("nslightning.commands.run_callbacks.monotonic", lambda: next(clock))
    drawn, bar = [], Bar()
    stock = bar._update_metrics
    monkeypatch.setattr(bar, "_update_metrics", lambda *args: (drawn.append(1), stock(*args)))
    _, _, trainer = fit(tmp_path, bar, enable_progress_bar=True, max_epochs=1)
    assert 4 <= len(drawn) <= 6  # of ten steps, and the epoch's end
    task = bar.progress.tasks[0]
    assert task.completed == task.total == 10
    assert math.isfinite(bar.get_metrics(trainer, trainer.lightning_module)["train/loss"])


def test_the_seed_of_a_step_seeds_as_torch_does(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seen.append(seed))
    from nslightning.callbacks import step_seed

    step_seed._seed_torch(2**40 + 3)
    assert seen == []
    drawn = torch.rand(5)
    torch.default_generator.manual_seed(2**40 + 3)
    assert torch.equal(drawn, torch.rand(5))
    monkeypatch.setattr(step_seed, "_device_type", lambda: "mps")
    step_seed._seed_torch(4)
    assert seen == [4]
