"""Records, tables and figures go to every logger that can take them, and a run needs no W&B."""

import csv
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader, TensorDataset

from nslightning import Jacobians
from nslightning.callbacks import GradientDivergence, RunRecord, TwinDivergence, WeightDivergence, ZoneMonitor
from nslightning.choices import choice_label
from nslightning.models import ImageClassifier, Twins


class Calls:
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[Any, ...]]] = []
        self.config = SimpleNamespace(update=lambda content, **_: self.made.append(("config", (content,))))

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.made.append((name, (*args, *options.values())))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [args for made, args in self.made if made == name]


def plain(logger: type, **more: Any) -> Any:
    """A logger of a class, without the program that it logs to."""
    calls = Calls()

    class Quiet(logger):  # type: ignore[misc, valid-type] # the class is an argument
        def __init__(self) -> None:
            self.calls = calls

        experiment = property(lambda self: calls)
        run_id = name = version = "1"
        save_dir = root_dir = log_dir = None
        log_hyperparams = log_graph = save = finalize = after_save_checkpoint = log_metrics = lambda *_, **__: None
        log_table = lambda self, key, columns, data: calls.made.append(("table", (key, columns, data)))  # noqa: E731 # one line reads better
        log_image = lambda self, key, images: calls.made.append(("image", (key, images)))  # noqa: E731 # one line reads better

    return Quiet()


@pytest.fixture(scope="module")
def loggers(tmp_path_factory) -> dict[str, Calls]:
    """What a short training of one network and one of twins send."""
    made = {cls.__name__: plain(cls) for cls in (WandbLogger, MLFlowLogger, TensorBoardLogger)}
    images = TensorDataset(torch.rand(4, 1, 28, 28), torch.arange(4))
    options: dict[str, Any] = {"backbone": "paper/lenet5", "num_classes": 10, "image_shape": (1, 28, 28)}
    beta = {"beta10": Jacobians(max_pool=10)}
    watching = [GradientDivergence(beta, every_n_steps=1), ZoneMonitor(beta), WeightDivergence(every_n_steps=1)]
    for module, callbacks in (
        (ImageClassifier(**options), [*watching, RunRecord({"name": "x"}, 3)]),
        (Twins({"native": Jacobians(), **beta}, **options), [TwinDivergence(every_n_steps=1)]),
    ):
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=list(made.values()), callbacks=callbacks,
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=1,
            default_root_dir=tmp_path_factory.mktemp("run"),
        )  # fmt: skip
        trainer.fit(module, DataLoader(images, 2), DataLoader(images, 2))
        assert trainer.global_step == 2
    return {name: logger.calls for name, logger in made.items()}


TABLES = {"divergence/per_layer", "zones/table", "weights/table", "twins/table", "patch_report"}
FIGURES = {"divergence/figure", "twins/figure"}


def test_wandb_gets_each_table_and_figure_once(loggers):
    calls = loggers["WandbLogger"]
    assert sorted(key for key, _, _ in calls.of("table")) == sorted(TABLES)
    assert {key for key, _ in calls.of("image")} == FIGURES
    ((content,),) = calls.of("config")
    assert (content["config"], content["run"]["seed"]) == ({"name": "x"}, 3)


def test_mlflow_gets_them_as_files(loggers):
    calls = loggers["MLFlowLogger"]
    assert {name for _, _, name in calls.of("log_table")} == {f"{name}.json" for name in TABLES}
    assert len(calls.of("log_artifact")) == len(FIGURES)
    ((_, content, name),) = calls.of("log_dict")
    assert (content["run"]["seed"], name) == (3, "run.json")


def test_tensorboard_gets_them_as_text_and_images(loggers):
    calls = loggers["TensorBoardLogger"]
    text = {name: words for name, words, _ in calls.of("add_text")}
    assert set(text) == {*TABLES, "run"}
    assert json.loads(text["run"])["run"]["seed"] == 3
    assert text["weights/table"].splitlines()[0].startswith("| step | parameter | l1 |")
    assert {name for name, *_ in calls.of("add_image")} == FIGURES


def test_a_table_has_the_file_s_numbers(loggers):
    (table,) = [data for key, _, data in loggers["WandbLogger"].of("table") if key == "weights/table"]
    totals = [row for row in table if row[1] == ""]
    assert [row[0] for row in totals] == [0.0, 1.0, 2.0]
    assert totals[0][2] == 0.0 < totals[1][2] < totals[2][2]


WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "wandb":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from nslightning.cli import main

sys.exit(main(sys.argv[1:]))
"""


def test_without_wandb_a_packaged_config_runs_and_one_line_says_so():
    import subprocess

    args = ["fit", "--config", "configs/quickstart.yaml", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    args += ["--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "wandb" in line]
    assert line == (
        "W&B is left out (ImportError: wandb is blocked); `pip install wandb` mends it. "
        "runs/quickstart/001/metrics.csv has its numbers"
    )
    with Path("runs/quickstart/001/metrics.csv").open() as file:
        assert [row["train/loss"] != "" for row in csv.DictReader(file)].count(True) == 2
    # The config that makes the run again asks for W&B, which another machine may have.
    assert "WandbLogger" in Path("runs/quickstart/001/config.yaml").read_text()


def test_every_packaged_config_has_no_other_logger(repo_root):
    """What the test above shows of one config holds for all."""
    import yaml

    from nslightning.commands import wandb_run
    from nslightning.commands.trainer_parts import listed

    assert wandb_run.prepared(True, Path("x"), []) == (True, [])
    for file in sorted((repo_root / "configs").rglob("*.yaml")):
        trainer = (yaml.safe_load(file.read_text()) or {}).get("trainer") or {}
        for logger in listed(trainer.get("logger")):
            assert logger["class_path"].endswith("WandbLogger"), file


@pytest.mark.parametrize(
    ("flags", "group", "tags"),
    [
        ([], "quickstart", ["paper/lenet5", "FashionMNISTSample", "bf16-mixed", "max_pool=10"]),
        (
            ["--model.jacobians=jax"],  # its fields are more than the 64 characters that W&B takes
            "quickstart",
            [
                "paper/lenet5",
                "FashionMNISTSample",
                "bf16-mixed",
                f"{choice_label(Jacobians.preset('jax').to_dict())[:61]}...",
            ],
        ),
        (["--trainer.logger.dict_kwargs={group: mine, tags: [a, b]}"], "mine", ["a", "b"]),
        (["--trainer.logger.group=mine"], "mine", None),
    ],
)
@pytest.mark.filterwarnings("ignore:The number of training batches")  # two
def test_group_and_tags_are_the_config_s_or_say_what_is_trained(flags, group, tags, monkeypatch):
    from nslightning.cli import main

    stock, asked = WandbLogger.log_hyperparams, []

    def seen(self, *arguments):
        asked.append(self._wandb_init)
        stock(self, *arguments)

    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(WandbLogger, "log_hyperparams", seen)  # options are read from the source of `experiment`
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    few += ["--trainer.callbacks=null", "--trainer.enable_progress_bar=false", "--model.jacobians.max_pool=10"]
    assert main(["fit", "--config", "configs/quickstart.yaml", *few, *flags]) == 0
    options = asked[0]
    import wandb  # not before: what it hands on to `wandb.init` is read from its source

    wandb.Settings(run_tags=options.get("tags"))  # refuses what W&B refuses
    assert options["group"] == group
    if tags is not None:
        assert options["tags"] == tags
    # What was asked for is in the config that makes the run again, and nothing of this run.
    config = Path("runs/quickstart/001/config.yaml").read_text()
    assert ("mine" in config) == (group == "mine")
    assert "FashionMNISTSample\n      - bf16" not in config
    recorded = json.loads(Path("runs/quickstart/001/run.json").read_text())["segments"][0]["config"]
    assert "FashionMNISTSample" not in str(recorded["trainer"]["logger"])


def test_wandb_s_own_process_has_a_cache_where_the_user_has_none(tmp_path, monkeypatch):
    """It writes its log to the terminal else; the training's own caches stay where they are."""
    import wandb
    from jsonargparse import Namespace

    from nslightning.commands import wandb_run

    caches = []
    monkeypatch.setattr(wandb, "setup", lambda: caches.append(os.environ["XDG_CACHE_HOME"]))
    for place, cache in (({"XDG_CACHE_HOME": str(tmp_path)}, None), ({}, "own"), ({"HOME": str(tmp_path)}, None)):
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        folder = tmp_path / f"run-{len(place)}-{next(iter(place), '')}"
        folder.mkdir()
        options = Namespace(save_dir=None, name=None, id=None, offline=True)
        wandb_run._prepare(options, folder)
        assert caches == ([str(folder / "wandb" / "cache")] if cache else [])
        assert os.environ.get("XDG_CACHE_HOME") == place.get("XDG_CACHE_HOME")
        caches.clear()
