"""Every published setting has a config; optimizers by name; grids over entries of a mapping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from torch import nn

from nslightning import configs
from nslightning.commands.config_files import read_config
from nslightning.experiments import Experiment, comparison, settings
from nslightning.experiments.cells import TrainCell
from nslightning.experiments.compare import _published
from nslightning.experiments.grid import Planned
from nslightning.experiments.optimizers import make_optimizer
from nslightning.experiments.published import table
from nslightning.experiments.training import train
from nslightning.models.backbones import create_backbone

FILES = sorted((configs.path("quickstart").parent / "experiments").glob("*.yaml"))


def trained() -> Iterator[tuple[Experiment, list[Planned]]]:
    for file in FILES:
        if yaml.safe_load(file.read_text())["kind"] == "train":
            experiment = Experiment.read(file, "paper")
            yield experiment, experiment.cells()


def test_every_published_training_is_a_cell_of_some_grid_at_the_papers_scale() -> None:
    rows = table("training")
    rows = rows[rows["metric"] == "test_accuracy"]
    columns = ["paper", "data", "backbone", "batch_norm", "optimizer", "precision", "parameter"]
    wanted = {tuple(row) for row in rows[columns].itertuples(index=False)}
    assert len(wanted) == 36
    for experiment, cells in trained():
        for entry in experiment.compare:
            for planned in cells:
                for row in _published(entry, planned.cell):
                    wanted.discard(tuple(row.get(c) for c in columns))
    assert not wanted


@pytest.mark.parametrize(
    ("name", "pool", "epochs", "precision", "rule"),
    [("imagenet_beta", "2x2", 80, "16-mixed", "published"), ("imagenet_alpha", "3x3", 90, "32-true", "published")],
)
def test_imagenet_has_the_papers_network(name: str, pool: str, epochs: int, precision: str, rule: str) -> None:
    config = read_config(configs.path(name))
    model = config["model"]
    assert model["backbone_options"]["stem_pool"] == pool
    assert model["jacobians"]["rule"] == rule
    assert (config["trainer"]["max_epochs"], config["trainer"]["precision"]) == (epochs, precision)
    network = create_backbone(model["backbone"], 1000, (3, 224, 224), False, **model["backbone_options"])
    assert sum(p.numel() for p in network.parameters()) == 25_557_032


def test_the_heat_maps_of_innaprop_are_all_compared() -> None:
    experiment = Experiment.read(next(f for f in FILES if f.stem == "cifar10_innaprop"), "paper")
    cells = experiment.cells()
    assert len(cells) == 1200
    (entry,) = experiment.compare
    values = [row["mean"] for p in cells for row in _published(entry, p.cell)]
    assert len(values) == 1200
    assert 0.1 <= min(values) < max(values) < 0.95
    cell = next(
        p.cell for p in cells
        if p.varied["optimizer_options.alpha"] == 2.0 and p.varied["optimizer_options.beta"] == 0.5
    )  # fmt: skip
    assert isinstance(cell, TrainCell)
    assert cell.optimizer_options is not None
    assert {"alpha": 2.0, "beta": 0.5}.items() <= cell.optimizer_options.items()
    only = experiment.cells({"optimizer_options.alpha": [2.0], "epochs": [20], "backbone": ["paper/vgg11"]})
    assert len(only) == 20
    import pandas as pd

    rows = [
        {"cell": only[0].id, "epoch": e, "metric": m, "value": v, "data": "cifar10", "device": "cpu"}
        for e, accuracy in enumerate((0.5, 0.7, 0.6))
        for m, v in (("test_accuracy", accuracy), ("nan", 0.0))
    ]
    compared = comparison(experiment, pd.DataFrame(rows)).iloc[0]
    assert compared["mean"] == 0.7  # the best epoch, as published
    expected = table("innaprop_heat_maps").query(
        "backbone == 'vgg11' and epochs == 20 and weight_decay == 0 and alpha == 2 and beta == 0.1 "
        "and metric == 'best_test_accuracy'"
    )
    assert compared["published_mean"] == expected["mean"].item()


# ----------------------------------------------------------------------------------------------------- optimizers
@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("sgd", {"momentum": 0.9}, "SGD"),
        ("adam", {}, "Adam"),
        ("AdamW", {"weight_decay": 0.1}, "AdamW"),
        ("INNA", {"alpha": 0.5, "beta": 0.1}, "INNA"),
        ("INNAprop", {"alpha": 0.1, "beta": 0.9}, "INNAprop"),
        ("timm/lion", {}, "Lion"),
        ("torch.optim.RMSprop", {}, "RMSprop"),
    ],
)
def test_an_optimizer_is_made_by_name_with_its_options(name: str, options: dict[str, Any], kind: str) -> None:
    network = nn.Linear(3, 2)
    settings("train", {"backbone": "paper/fc", "optimizer": name})
    made = make_optimizer(name, network, 0.05, options)
    assert type(made).__name__ == kind
    assert len(made.param_groups) == 1
    assert made.param_groups[0]["lr"] == 0.05
    assert {k: made.param_groups[0][k] for k in options} == options
    assert len(made.param_groups[0]["params"]) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer='adamw' is not known; did you mean"),
        ({"optimizer": "timm/lyon"}, "optimizer='timm/lyon' is not one of timm's; did you mean 'timm/lion'?"),
        ({"optimizer": "torch.nn.Linear"}, "'torch.nn.Linear' is not known"),
        ({"optimizer": "sgd", "optimizer_options": {"nesterov": True}}, "name the class: optimizer: SGD"),
    ],
)
def test_an_optimizer_that_is_none_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        settings("train", {"backbone": "paper/fc", **wrong})
    assert message in str(error.value)


def test_a_run_takes_its_optimizer_and_a_cosine_that_ends_later() -> None:
    options = {"backbone": "paper/fc", "width": 8, "depth": 1, "data": "FashionMNISTSample", "train_images": 128}
    options |= {"epochs": 2, "optimizer": "INNAprop", "optimizer_options": {"alpha": 0.5, "beta": 0.9}}
    trained = train(settings("train", {**options, "learning_rate": 0.01, "schedule_epochs": 4}), "cpu")
    rates = [row["value"] for row in trained.rows if row["metric"] == "learning_rate"]
    assert rates == pytest.approx([0.01, 0.01 * (1 + 2**-0.5) / 2])
    losses = [row["value"] for row in trained.rows if row["metric"] == "train_loss"]
    plain = train(settings("train", {**options, "optimizer": "adam", "optimizer_options": None}), "cpu")
    other = [row["value"] for row in plain.rows if row["metric"] == "train_loss"]
    assert losses[0] == other[0]  # before the first step
    assert losses[1] != other[1]
