"""Steps that fp16's loss scale leaves out: no wrong order of calls, and said where they are many."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from nslightning.callbacks import LossWatch
from nslightning.models import ImageClassifier


def fit(folder, scale: float) -> tuple[bool, list[str]]:
    """Four epochs of one step, with the schedule's step after each: whether weights moved, and the warnings."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    module = ImageClassifier("paper/lenet5", lr_scheduler=lambda optimizer: StepLR(optimizer, 1, 0.5))
    before = copy.deepcopy(module.state_dict())
    images = TensorDataset(torch.randn(4, 1, 28, 28), torch.arange(4))
    trainer = Trainer(
        accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=4, logger=False,
        callbacks=[LossWatch()], default_root_dir=folder, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(images, batch_size=4))
    assert trainer.global_step == 4
    moved = any(not torch.equal(module.state_dict()[name], value) for name, value in before.items())
    return moved, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("scale", "left_out"), [(2.0**60, 4), (2.0**10, 0)])
def test_steps_that_are_left_out_are_said(scale, left_out, tmp_path):
    torch.manual_seed(0)
    moved, messages = fit(tmp_path, scale)
    assert moved == (not left_out)
    assert not any("lr_scheduler.step" in text for text in messages)
    about = [text for text in messages if "loss scale" in text]
    assert [text.split(", whose")[0] for text in about] == ["fp16's loss scale left out 4 of 4 steps"] * bool(left_out)
