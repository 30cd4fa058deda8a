"""Checks that need a device: the bits of its batches, captured steps, and that no step waits."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from nslightning import Jacobians
from nslightning.callbacks import GradientDivergence, LossWatch, StepSeed
from nslightning.data import Synthetic
from nslightning.data.images import TensorImages
from nslightning.models import ImageClassifier

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device (torch.cuda.is_available() is False)"),
]
CUDA = torch.device("cuda:0")


def test_batches_have_the_bits_of_those_made_on_the_cpu():
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8, generator=g)
    pixels[0, 0].view(-1)[:256] = torch.arange(256)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    for augmented in (False, True):
        here = TensorImages(pixels, torch.arange(300) % 10, mean, std, 4 * augmented, augmented, 5)
        on_gpu = here.to(CUDA)
        for epoch in (0, 3):
            index = torch.randperm(300, generator=g)
            (x, y), (x0, y0) = on_gpu.batch(index.to(CUDA), epoch), here.batch(index, epoch)
            assert torch.equal(x.cpu(), x0)
            assert torch.equal(y.cpu(), y0)


class NoWait(Callback):
    """Raises at an operation that makes the host wait, from the third step of an epoch to the last but one."""

    reads_step_metrics = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if 2 <= batch_idx < 6 else "default")

    def on_train_epoch_end(self, trainer, pl_module):
        torch.cuda.set_sync_debug_mode("default")


def fit(folder, *callbacks, precision="32-true", **options):
    torch.manual_seed(0)
    module = ImageClassifier("paper/vgg11", image_shape=(3, 32, 32), jacobians=Jacobians(relu=1.0), **options)
    trainer = Trainer(
        accelerator="gpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=folder, limit_val_batches=0, precision=precision,
        callbacks=[StepSeed(0), LossWatch(), *callbacks], deterministic=True,
    )  # fmt: skip
    trainer.fit(module, Synthetic((3, 32, 32), images=250, eval_images=8, batch_size=32, constant=0.5))
    return {name: value.cpu() for name, value in module.state_dict().items()}, trainer


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}], ids=["eager", "captured"])
def test_no_step_waits(tmp_path, precision, options):
    fit(tmp_path, NoWait(), precision=precision, **options)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_captured_training_is_the_eager_one(tmp_path, precision):
    eager, _ = fit(tmp_path, precision=precision)
    captured, _ = fit(tmp_path, precision=precision, cuda_graph=True)
    assert eager.keys() == captured.keys()
    for name, value in eager.items():
        assert torch.equal(value, captured[name]), name


def test_a_captured_training_is_measured_as_the_eager_one(tmp_path):
    choices = {"relu0": Jacobians(), "minimal": Jacobians(relu=1.0, max_pool="minimal")}
    (_, a), (_, b) = (
        fit(tmp_path, GradientDivergence(choices, every_n_steps=3), cuda_graph=graph) for graph in (False, True)
    )
    names = [name for name in a.callback_metrics if name.endswith(("/l1", "/l2", "/linf"))]
    assert len(names) == 6
    for name in names:
        assert float(b.callback_metrics[name]) == pytest.approx(float(a.callback_metrics[name]), rel=1e-6)


def test_a_captured_language_model_is_the_eager_one(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers: pip install nslightning[language]")
    from torch.utils.data import DataLoader, TensorDataset

    from nslightning.models import LanguageModel

    tokens = torch.randint(17, (64, 17), generator=torch.Generator().manual_seed(0))
    weights = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        model = LanguageModel(
            "mini", vocab_size=17, block_size=16, activation="relu", jacobians=Jacobians(relu=1.0),
            config={"n_layer": 2, "n_head": 2, "n_embd": 32}, cuda_graph=cuda_graph,
        )  # fmt: skip
        trainer = Trainer(
            accelerator="gpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False, deterministic=True,
            enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=8))
        weights.append({name: value.cpu() for name, value in model.state_dict().items()})
    eager, captured = weights
    assert all(torch.equal(value, captured[name]) for name, value in eager.items())


@pytest.mark.parametrize(
    "change", [{}, {"precision": 24}, {"optimizer": "adam"}, {"dropout": 0.5}, {"batch_norm": True}]
)
def test_a_captured_cell_finds_what_the_eager_one_finds(monkeypatch, change):
    from nslightning.experiments import training
    from nslightning.experiments.cells import settings

    network = {"backbone": "paper/lenet5"}
    if "dropout" in change:
        network = {"backbone": "paper/fc", "width": 64, "depth": 2}
    data = {"image_shape": (1, 28, 28), "images": 250, "eval_images": 20, "constant": 0.5}
    cell = settings(
        "train", {**network, "data": "Synthetic", "data_options": data, "batch_size": 32, "epochs": 3,
                  "learning_rate": 0.05, "relu": 1.0, "arithmetic": "deterministic", **change},
    )  # fmt: skip
    made = []

    class Noted(training.CapturedStep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(training, "CapturedStep", Noted)
    captured = training.train(cell, "cuda:0").rows
    assert made[0].replayed == 3 * 7 - 3  # each epoch's last batch is smaller
    monkeypatch.setattr(training, "_CAPTURING", ())
    assert captured == training.train(cell, "cuda:0").rows
