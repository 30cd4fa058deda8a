"""Lightning's callbacks in this package's configs: the blocks of the how-to page run, and do what the page says."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from nslightning import runs
from nslightning.cli import main

PAGE = Path(__file__).parents[2] / "docs/how-to/lightning-callbacks.md"
BLOCKS = dict(re.findall(r'```yaml title="(\w+)\.yaml"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL))
FEW = ["--trainer.limit_train_batches=32", "--trainer.limit_val_batches=2", "--trainer.enable_progress_bar=false"]


def fit(name: str, *flags: str) -> Path:
    """Train with a block of the page, on top of its base."""
    for file, text in BLOCKS.items():
        Path(f"{file}.yaml").write_text(text)
    assert main(["fit", "--config=base.yaml", f"--config={name}.yaml", f"--name={name}", *FEW, *flags]) == 0
    return Path("runs") / name / "001"


def checkpoint(folder: Path) -> dict:
    file = runs.last_checkpoint(folder)
    assert file is not None
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "base"])
def test_a_block_of_the_page_runs(name, caplog):
    folder = fit(name)
    content = checkpoint(folder)
    record = runs.read_record(folder)
    assert record["ended"] == "finished"
    accumulated = {"accumulation": [8, 8], "schedule": [8, 32]}.get(name, [32, 32])
    if name != "batch":  # whose batches are larger, and fewer
        assert content["global_step"] == sum(accumulated)
    # The run's own config makes it again.
    callbacks = (yaml.safe_load(BLOCKS[name])["trainer"].get("callbacks") or [{}])[0]
    assert callbacks.get("class_path", "") in (folder / "config.yaml").read_text()


SCHEDULES = {
    None: ([], 1.0),
    "CosineAnnealingLR": (["--model.lr_scheduler.T_max=4"], (1 + 2**-0.5) / 2),
    "StepLR": (["--model.lr_scheduler.step_size=1", "--model.lr_scheduler.gamma=0.5"], 0.5),
    "ExponentialLR": (["--model.lr_scheduler.gamma=0.5"], 0.5),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_that_is_found_is_the_one_that_is_trained_with(schedule, monkeypatch):
    """From the first step on, and for the schedule from its beginning."""
    from lightning.pytorch.callbacks import LearningRateFinder

    from nslightning.models import ImageClassifier

    suggested, rates = list[float](), list[float | None]()
    monkeypatch.setattr(ImageClassifier, "on_train_epoch_start", lambda self: rates.append(self.lr), raising=False)
    find = LearningRateFinder.on_fit_start

    def noted(self, trainer, module):
        find(self, trainer, module)
        suggested.append(self.optimal_lr.suggestion())
        rates.clear()

    monkeypatch.setattr(LearningRateFinder, "on_fit_start", noted)
    flags, factor = SCHEDULES[schedule]
    fit("rate", *([f"--model.lr_scheduler={schedule}", *flags] if schedule else []))
    (rate,) = suggested
    assert rate != 0.02
    assert rates == [rate, pytest.approx(rate * factor)]


def test_a_finder_has_no_twins_to_find_one_rate_for(capsys):
    """What cannot be is one line."""
    args = ["twins", "--config", "configs/twins_mnist_lenet.yaml", "--data=FashionMNISTSample", *FEW]
    status = main([*args, "--trainer.logger=false", "--trainer.callbacks=LearningRateFinder"])
    error = capsys.readouterr().err
    assert status == 2, error
    assert "LearningRateFinder" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("callback", "says"),
    [
        (["EarlyStopping", "monitor=val/los"], ["EarlyStopping", "`val/los`", "`val/loss`"]),
        (["BackboneFinetuning"], ["no parameter that is trained", "BackboneFinetuning"]),
        (["Timer", "duration=soon"], ["soon", "DD:HH:MM:SS"]),
    ],
)
def test_what_a_callback_refuses_is_one_line(callback, says, capsys):
    """Also where it refuses in the middle of a training."""
    Path("base.yaml").write_text(BLOCKS["base"])
    name, *arguments = callback
    flags = [f"--trainer.callbacks={name}", *(f"--trainer.callbacks.{argument}" for argument in arguments)]
    status = main(["fit", "--config=base.yaml", *FEW, *flags])
    error = capsys.readouterr().err.partition("nslightning fit: error: ")[2]
    assert status == 2
    assert len(error.splitlines()) == 1
    for part in says:
        assert part in error
