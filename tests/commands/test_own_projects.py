"""Somebody's network, LightningModule and DataModule on the command line."""

import json
import sys

import pytest
import torch
import yaml

from nslightning.cli import main
from nslightning.models import create_backbone
from nslightning.models.own import OwnNameError

CODE = """
import lightning.pytorch as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.randn(3)  # an import may draw


def make(num_classes, width=8, image_shape=None):
    assert image_shape[0] == 1
    return nn.Sequential(nn.Conv2d(1, width, 5), nn.ReLU(), nn.Flatten(), nn.Linear(width * 576, num_classes))


network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.ReLU())


def broken(num_classes):
    raise KeyError("weights")


class Net(L.LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(F.relu(self.net(batch[0])), batch[1])
        self.log("train/loss", loss)
        return loss

    def predict_step(self, batch):
        return self.net(batch[0])

    test_step = validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Ranked(Net):
    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).topk(1).values.sum()


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        x = torch.arange(32.0).reshape(16, 2) - 8
        return DataLoader(TensorDataset(x, torch.arange(16) % 2), batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
"""

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=4"]
OWN = ["--model=somebodys.Net", "--data=somebodys.Data", *QUIET]
PATCH = ["--trainer.callbacks+=NonsmoothPatch", "--trainer.callbacks.jacobians.relu=1"]


@pytest.fixture(autouse=True)
def somebodys(tmp_path):
    (tmp_path / "somebodys.py").write_text(CODE)
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path
    sys.modules.pop("somebodys", None)


def test_own_module_and_data_by_class_path(somebodys):
    assert main(["fit", *OWN, *PATCH, "--model.width=6", "--trainer.callbacks+=TieMonitor"]) == 0
    folder = somebodys / "runs" / "somebodys.Net" / "001"
    report = json.loads((folder / "patch_report.json").read_text())
    assert {(s["name"], s["how"], s["choice"]) for s in report["sites"]} == {
        ("net.1", "module", 1.0),
        ("", "functional", 1.0),
    }
    assert json.loads((folder / "run.json").read_text())["patch"]["fingerprint"] == report["fingerprint"]
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    assert content["nslightning"]["jacobians"]["relu"] == 1.0
    assert content["state_dict"]["net.0.weight"].shape == (6, 2)

    again = ["--config", str(folder / "config.yaml")]
    assert main(["fit", *again, "--ckpt_path=last", "--trainer.max_epochs=2"]) == 0
    assert json.loads((folder / "run.json").read_text())["resumed_at_step"] == 4
    assert main(["test", *again, f"--ckpt_path={checkpoint}"]) == 0
    assert main(["predict", *again, f"--ckpt_path={checkpoint}"]) == 0
    batches = torch.load(folder / "predictions.pt", weights_only=True)
    assert [tuple(batch.shape) for batch in batches] == [(4, 2)] * 4


def test_another_choice_is_refused_where_it_is_asked_for(somebodys, capsys):
    assert main(["fit", *OWN, *PATCH]) == 0
    refuse = ["--trainer.callbacks.on_mismatch=refuse", "--ckpt_path=last", "--trainer.max_epochs=2"]
    other = ["--trainer.callbacks+=NonsmoothPatch", "--trainer.callbacks.jacobians.relu=0.5"]
    assert main(["fit", *OWN, *other, *refuse]) == 2
    assert "made under relu=1.0, and this run has relu=0.5" in capsys.readouterr().err


def test_a_preset_by_name(somebodys):
    assert main(["fit", *OWN, "--trainer.callbacks+=NonsmoothPatch", "--trainer.callbacks.jacobians=jax"]) == 0
    record = json.loads((somebodys / "runs" / "somebodys.Net" / "001" / "run.json").read_text())
    assert record["patch"]["jacobians"]["leaky_relu"] == 1.0


def test_a_config_names_them(somebodys):
    patch = {"class_path": "nslightning.callbacks.NonsmoothPatch", "init_args": {"jacobians": {"max_pool": 10}}}
    config = {
        "model": {"class_path": "somebodys.Net", "init_args": {"width": 3}},
        "data": {"class_path": "somebodys.Data"},
        "trainer": {"callbacks": [patch], "max_epochs": 1, "enable_progress_bar": False, "log_every_n_steps": 4},
    }
    (somebodys / "mine.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "mine.yaml"]) == 0
    assert (somebodys / "runs" / "mine" / "001" / "patch_report.json").is_file()


def test_an_unpatched_module_is_named(somebodys):
    with pytest.warns(UserWarning, match="Net is not patched and trains with PyTorch's own derivatives"):
        assert main(["fit", *OWN]) == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model=somebodys.Nett", "--data=somebodys.Data"], "there is no class 'somebodys.Nett'"),
        (["--model=ImageClassifer", "--data=somebodys.Data"], "ImageClassifier"),
        (["--model=somebodys.Net", "--model.widht=3", "--data=somebodys.Data"], "width"),
        (["--model=somebodys.Ranked", "--data=somebodys.Data", *PATCH, *QUIET], "topk"),
        (["--model.backbone=somebodys:mak", "--data=MNIST"], "did you mean 'somebodys:make'"),
        (["--model.backbone=somebody:make", "--data=MNIST"], "did you mean 'somebodys:make'"),
    ],
)
def test_mistakes_are_named(args, says, capsys):
    assert main(["fit", *args]) == 2
    assert says in capsys.readouterr().err


def test_own_network_as_a_backbone(somebodys, capsys):
    args = ["--config=configs/quickstart.yaml", "--model.backbone=somebodys:make", "--trainer.callbacks=[]", *QUIET]
    args += ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.logger=false"]
    assert main(["fit", *args, "--model.backbone_options.width=6", "--name=own"]) == 0
    (checkpoint,) = (somebodys / "runs" / "own" / "001" / "checkpoints").glob("*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    assert content["hyper_parameters"]["backbone"] == "somebodys:make"
    assert content["state_dict"]["backbone.0.weight"].shape[0] == 6
    assert main(["fit", *args, "--model.backbone_options.widht=6"]) == 2
    assert "somebodys:make has no option 'widht'; did you mean 'width'?" in capsys.readouterr().err


def test_networks_are_made_anew_and_from_the_seed_alone():
    torch.manual_seed(0)
    first = create_backbone("somebodys:make", 10, (1, 28, 28))
    torch.manual_seed(0)
    second = create_backbone("somebodys:make", 10, (1, 28, 28))  # imported by now
    assert torch.equal(first[0].weight, second[0].weight)
    copies = [create_backbone("somebodys:network", 10, (1, 28, 28)) for _ in range(2)]
    assert copies[0] is not copies[1]
    assert torch.equal(copies[0][1].weight, copies[1][1].weight)
    with pytest.raises(ValueError, match="takes no options; given width"):
        create_backbone("somebodys:network", 10, (1, 28, 28), width=3)
    with pytest.raises(RuntimeError, match=r"somebodys:broken\(num_classes=10\) failed with KeyError: 'weights'"):
        create_backbone("somebodys:broken", 10, (1, 28, 28))
    with pytest.raises(OwnNameError, match=r"is not of the form package\.module:factory"):
        create_backbone("some bodys:network", 10, (1, 28, 28))
