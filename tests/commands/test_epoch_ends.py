"""A kill in any hook: what goes on from the last checkpoint logs, validates and schedules as what was never killed."""

import logging
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

from nslightning import runs
from nslightning.callbacks import RunRecord
from nslightning.commands.epoch_ends import EpochEnds
from nslightning.commands.run_callbacks import StopWhenAsked
from nslightning.commands.stopping import Signals


class Logs(LightningModule):
    """Logs at its steps, its validations and its epochs' ends; its rate of learning falls with them."""

    def __init__(self, plateau: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.plateau = plateau

    def training_step(self, batch, batch_idx):
        loss = -self.weight * batch.mean()
        self.log("rate", self.optimizers().param_groups[0]["lr"])
        self.log("loss", loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.weight.detach() * batch.mean())

    def on_train_epoch_end(self):
        self.log("ended", float(self.current_epoch))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        if not self.plateau:
            return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 1, 0.5)}
        falling = ReduceLROnPlateau(optimizer, mode="min", patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "monitor": "val/loss"}}


GOES_ON = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")


class Killed(BaseException):
    pass


class Done(BaseException):
    """The hooks of an epoch have all been called."""


class Dies(Callback):
    """The process is killed in a hook: the `at`-th that is called in the second epoch, or with the third one's first.

    Args:
        at: The number of hooks that are called before.
    """

    def __init__(self, at: int):
        self.left, self.where = at, ""

    def call(self, hook: str, epoch: int) -> None:
        if epoch == 2 and hook == "train_batch_end":
            raise Done
        if epoch and self.left == 0:
            self.where = hook
            raise Killed(hook)
        self.left -= bool(epoch)


HOOKS = (
    "train_start", "train_epoch_start", "train_batch_start", "train_batch_end", "validation_start",
    "validation_epoch_start", "validation_batch_start", "validation_batch_end", "validation_epoch_end",
    "validation_end", "train_epoch_end", "train_end",
)  # fmt: skip
for name in HOOKS:
    setattr(Dies, f"on_{name}", lambda self, trainer, *_, hook=name: self.call(hook, trainer.current_epoch))


class AfterSaving(ModelCheckpoint):
    """The process is killed right after a checkpoint is written at an epoch's end."""

    dies: bool = False

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        if self.dies and trainer.current_epoch == 1:
            raise Killed("saved")


KINDS = {
    "each step": ({"every_n_train_steps": 1}, False, {}),
    "each step, watching": ({"every_n_train_steps": 1}, True, {}),
    "each step, validated within the epoch": ({"every_n_train_steps": 1}, True, {"val_check_interval": 1}),
    "each step, an epoch without a validation": (
        {"every_n_train_steps": 1}, False, {"check_val_every_n_epoch": 3, "accumulate_grad_batches": 2}
    ),
    "each validation": ({"monitor": "val/loss"}, True, {}),
    "each epoch": ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, True, {}),
}  # fmt: skip


def fit(folder: Path, kind: str, dies: Dies | None = None, after_saving: bool = False) -> None:
    """A training of three epochs of two steps; it goes on where it has a checkpoint."""
    saving, plateau, options = KINDS[kind]
    file = folder / "checkpoints/last.ckpt"
    going_on = file if file.exists() else None
    saves = AfterSaving(file.parent, "last", enable_version_counter=False, **saving)
    saves.dies = after_saving
    trainer = Trainer(
        **{"max_epochs": 3, "log_every_n_steps": 2} | options, accelerator="cpu", logger=runs.MetricsFile(folder),
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    dying = [] if dies is None else [dies]
    trainer.callbacks = [RunRecord({}), saves, *dying, EpochEnds(), StopWhenAsked(Signals(), folder)]
    loader = DataLoader(torch.ones(8), batch_size=4)
    try:
        trainer.fit(Logs(plateau), loader, loader, ckpt_path=going_on)
    except (Done, Killed):
        assert dies is not None or after_saving


def logged(folder: Path) -> pd.DataFrame:
    table = pd.read_csv(folder / "metrics.csv")
    return table[sorted(table)]


@GOES_ON
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")  # all batches are alike
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_in_any_hook_loses_nothing(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "disabled", True)
    here = runs.environment()
    monkeypatch.setattr("nslightning.callbacks.run_record.environment", lambda: here)  # it asks git, and takes long
    whole = tmp_path / "whole/001"
    fit(whole, kind)
    weight = torch.load(whole / "checkpoints/last.ckpt", weights_only=True)["state_dict"]["weight"]
    assert logged(whole)["val/loss"].notna().sum() == {"val_check_interval": 6, "check_val_every_n_epoch": 1}.get(
        next(iter(KINDS[kind][2]), ""), 3
    )
    hooks = set()
    for at in range(200):
        folder = tmp_path / f"killed{at}/001"
        dies = Dies(at)
        fit(folder, kind, dies)
        if not dies.where:
            break
        hooks.add(dies.where)
        fit(folder, kind)
        pd.testing.assert_frame_equal(logged(folder), logged(whole), obj=f"killed in hook {at}, {dies.where}")
        now = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]["weight"]
        assert torch.equal(now, weight), (at, dies.where)
    unmet = {hook for hook in HOOKS if "check_val_every_n_epoch" in KINDS[kind][2] and "validation" in hook}
    assert hooks == set(HOOKS) - {"train_start", "train_end"} - unmet


@GOES_ON
def test_a_kill_after_an_epoch_s_checkpoint_loses_no_row(tmp_path):
    """Lightning writes what an epoch's end logged after the checkpoints that it saves there."""
    whole, killed = tmp_path / "whole/001", tmp_path / "killed/001"
    fit(whole, "each epoch")
    fit(killed, "each epoch", after_saving=True)
    fit(killed, "each epoch")
    pd.testing.assert_frame_equal(logged(killed), logged(whole))
    assert list(logged(whole)["ended"].dropna()) == [0, 1, 2]
