"""Every configuration in configs/ runs through the command line, on images in their real on-disk format."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
import wandb
from fake_data import write_all

from nslightning import configs
from nslightning.cli import main

# Those of `nslightning twins` are test_twins.py's subject.
CONFIGS = sorted(f.stem for f in Path(configs.__file__).parent.glob("*.yaml") if not f.stem.startswith("twins_"))
SMALL = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--data.batch_size=4",
    "--data.eval_batch_size=4",
]
FAKE = ["--data.verify=false"]
# ImageNet's configs ask for all GPUs; two processes are test_ddp.py's subject.
ONE_PROCESS = ["--trainer.strategy=auto", "--trainer.devices=1", "--data.image_size=64", "--data.workers=0"]
EXTRA = {
    "quickstart": [],
    "watched_lenet": [],  # of the same packaged sample, which takes no `verify`
    "resnet_imagenet": [*FAKE, *ONE_PROCESS, "--trainer.precision=bf16-mixed"],
    "resnet_imagenet_fast": [*FAKE, *ONE_PROCESS, "--data.augmentation.sizes=[[0, 48], [1, 64]]"],
    # The size of a vision transformer's images is its own.
    "vit_imagenet": [*FAKE, *ONE_PROCESS, "--data.batch_size=6", "--data.augmentation.repeats=2"],
    "convnext_imagenet": [*FAKE, *ONE_PROCESS, "--trainer.accumulate_grad_batches=1"],
    "imagenet_alpha": [*FAKE, *ONE_PROCESS],
    "imagenet_beta": [*FAKE, *ONE_PROCESS],
}
# Trainings of a paper's accuracies: nothing else is measured along the way.
UNMEASURED = {"imagenet_alpha", "imagenet_beta"}


@pytest.fixture(scope="module")
def fake_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_all(root)
    return root


@pytest.fixture(autouse=True)
def _fresh_wandb() -> Iterator[None]:
    """W&B's process does not outlive the environment of the test that started it."""
    yield
    wandb.teardown()


SLOW = {"cifar100_densenet121", "convnext_imagenet", "resnet_imagenet", "resnet_imagenet_fast", "vit_imagenet"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CONFIGS]
)
@pytest.mark.filterwarnings(
    "ignore:paper/resnet50 in 16-mixed on a processor is slow"
)  # it is, and two batches are few
@pytest.mark.filterwarnings("ignore:fp16's loss scale left out 2 of 2 steps")  # and too few to find a scale
def test_config_trains_two_batches(name, fake_data, monkeypatch):
    monkeypatch.setenv("NSLIGHTNING_DATA_DIR", str(fake_data))
    assert main(["fit", "--config", f"configs/{name}.yaml", *SMALL, *EXTRA.get(name, FAKE)]) == 0

    folder = Path("runs", name, "001")
    metrics = pd.read_csv(folder / "metrics.csv")
    assert metrics["train/loss"].count() == 2
    assert metrics["train/loss"].notna().any()
    assert metrics["val/acc1"].between(0, 1).any()
    record = json.loads((folder / "run.json").read_text())
    assert record["seed"] == 0
    assert record["patch"]["sites"] > 0
    assert json.loads((folder / "patch_report.json").read_text())["fingerprint"] == record["patch"]["fingerprint"]
    assert record["patch"]["fingerprint"] in (folder / "patch_report.txt").read_text()
    results = ("divergence.csv", "divergence.pdf", "divergence.png")
    assert [(folder / file).exists() for file in results] == [name not in UNMEASURED] * 3
    if name not in UNMEASURED:
        divergence = pd.read_csv(folder / "divergence.csv", keep_default_na=False, na_values=["nan"])
        assert set(divergence["step"]) == {0}
        assert (divergence["linf"] >= 0).all()
        for figure in results[1:]:
            assert (folder / figure).stat().st_size > 1000
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert "class_path" in (folder / "config.yaml").read_text()
    assert sorted(p.name for p in Path().iterdir()) == ["runs"]
