"""The W&B workspace: its panels show what is logged, its definition is made without a connection."""

import json
import re
import sys

import pytest

from nslightning.commands.dashboard import main

pytest.importorskip("wandb_workspaces", reason="the extra `dashboard` is not installed: wandb-workspaces")


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """What a short training of twins and one of a single network send to W&B: keys, and columns of tables."""
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import WandbLogger
    from torch.utils.data import DataLoader, TensorDataset

    from nslightning import Jacobians
    from nslightning.callbacks import (
        GradientDivergence,
        Performance,
        TieMonitor,
        TwinDivergence,
        WeightDivergence,
        ZoneMonitor,
    )
    from nslightning.models import ImageClassifier, Twins

    keys, tables, summarised = set(), {}, set()

    class Run:
        """W&B's run, which is asked to summarise metrics."""

        def define_metric(self, name, **options):
            summarised.add(name)

    class Recorder(WandbLogger):
        """W&B's logger without W&B."""

        def __init__(self):
            self._checkpoint_callbacks = {}
            self._experiment = Run()

        def log_metrics(self, metrics, step=None):
            keys.update(metrics)

        def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
            tables[key] = columns

        name = version = save_dir = None
        log_hyperparams = log_graph = save = finalize = after_save_checkpoint = lambda self, *args, **options: None

    images = TensorDataset(torch.rand(4, 1, 28, 28), torch.arange(4))
    options = {"backbone": "paper/lenet5", "num_classes": 10, "image_shape": (1, 28, 28)}
    beta = {"beta10": Jacobians(max_pool=10)}
    for module, callbacks in (
        (
            ImageClassifier(jacobians=Jacobians(), **options),
            [
                GradientDivergence(beta, every_n_steps=1),
                TieMonitor(),
                ZoneMonitor(beta),
                WeightDivergence(),
                Performance(),
            ],
        ),
        (Twins({"native": Jacobians(), **beta}, **options), [TwinDivergence()]),
    ):
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=Recorder(), callbacks=callbacks, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=1,
            default_root_dir=tmp_path_factory.mktemp("run"),
        )  # fmt: skip
        trainer.fit(module, DataLoader(images, 2), DataLoader(images, 2))
    assert "divergence/*" in summarised
    return keys, tables


@pytest.fixture(scope="module")
def made():
    from nslightning.dashboard import definition

    return definition("someone", "nslightning")


def panels(definition):
    sections = definition["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    return [
        (section["name"], panel["viewType"], panel["config"]) for section in sections for panel in section["panels"]
    ]


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on loader workers
def test_every_panel_draws_what_is_logged(made, logged):
    from nslightning.dashboard import METRICS

    keys, _ = logged
    lines = [config for _, kind, config in panels(made) if kind == "Run History Line Plot"]
    assert len(lines) == sum(map(len, METRICS.values()))
    for config in lines:
        assert config["xAxis"] == "trainer/global_step"
        if config.get("useMetricRegex"):
            matched = {key for key in keys if re.search(config["metricRegex"], key)}
            assert config["metrics"] == []
        else:
            matched = keys & set(config["metrics"])
        assert matched, config


def test_divergence_and_distances_are_drawn_on_logarithmic_axes(made):
    log = {
        (name, config["chartTitle"]): config["yLogScale"] for name, _, config in panels(made) if "yLogScale" in config
    }
    assert log["Divergence by choice", "Relative L2 divergence"]
    assert log["Weights of twins", "L1 distance of the weights"]
    assert not log["Loss and accuracy by choice", "Validation accuracy"]


def test_the_regular_expressions_take_no_other_metric():
    from nslightning.dashboard import METRICS

    def drawn(section, title, key):
        return bool(re.search(METRICS[section][title][0], key))

    assert drawn("Divergence by choice", "Relative L2 divergence", "divergence/relu1/relative")
    assert not drawn("Divergence by choice", "Relative L2 divergence", "divergence/seconds")
    assert drawn("Ties", "Tied share of evaluations, by site", "ties/layer1.0.relu")
    assert not drawn("Ties", "Tied share of evaluations, by site", "ties/total")
    assert not drawn("Loss and accuracy by choice", "Twins: validation accuracy", "val/acc1")


def test_the_heat_map_draws_columns_of_the_table_that_is_logged(made, logged):
    (config,) = (config for _, kind, config in panels(made) if kind == "Vega2")
    (run_sets,) = config["userQuery"]["queryFields"]
    (table,) = (field for field in run_sets["fields"] if field["name"] == "historyTable")
    arguments = {a["name"]: a["value"] for a in table["args"]}
    spec = made["charts"][config["panelDefId"].removeprefix("someone/")]
    computed = {t["as"] for t in spec["transform"]}
    drawn = set(re.findall(r'"field": "([^"]+)"', json.dumps(spec))) - computed
    assert drawn == set(arguments["tableColumns"]) - {"relative"}
    assert "datum.relative" in json.dumps(spec)
    assert set(arguments["tableColumns"]) <= set(logged[1][arguments["tableKey"]])


def test_runs_are_grouped_by_their_choice(made):
    (runs,) = made["workspace"]["spec"]["section"]["runSets"]
    names = [key["name"] for key in runs["grouping"]]
    assert names == ["config.value.model.jacobians.relu", "config.value.model.jacobians.max_pool"]
    pinned = runs["runFeed"]["columnPinned"]
    assert {f"config:{name}" for name in names} | {"config:run.value.patch.fingerprint", "summary:val/acc1"} <= set(
        pinned
    )


def test_the_command_writes_the_definition(tmp_path, capsys, made):
    assert main(["dashboard", "--entity", "someone", "--out", "view.json"]) == 0
    written = json.loads((tmp_path / "view.json").read_text())
    assert capsys.readouterr().out == "view.json: written; --apply makes the view at W&B\n"
    assert written["charts"] == made["charts"]
    assert len(panels(written)) == len(panels(made))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["view.json"]


def test_applying_sends_the_charts_and_the_view(monkeypatch, capsys):
    import wandb
    from wandb_workspaces.workspaces import Workspace, internal

    sent = []

    class Server:
        def create_custom_chart(self, **chart):
            sent.append((chart["entity"], chart["name"], chart["spec"]["mark"]["type"]))

    def upsert(view):
        sent.append((view.entity, view.project, view.display_name))
        return {"upsertView": {"view": {"name": "nw-abc-v", "id": "1"}}}

    monkeypatch.setattr(wandb, "Api", Server)
    monkeypatch.setattr(internal, "upsert_view2", upsert)
    monkeypatch.setattr(Workspace, "url", property(lambda self: f"at:{self._internal_name}"))
    assert main(["dashboard", "--entity", "someone", "--project", "p", "--name", "n", "--apply"]) == 0
    assert sent == [("someone", "nslightning-layers", "rect"), ("someone", "p", "n")]
    assert capsys.readouterr().out == "at:nw-abc-v\n"


def test_what_wandb_refuses_is_told(monkeypatch, capsys):
    import wandb

    def refuse():
        raise wandb.errors.CommError("no such entity")

    monkeypatch.setattr(wandb, "Api", refuse)
    assert main(["dashboard", "--entity", "someone", "--apply"]) == 1
    assert "error: W&B: no such entity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--entity", "a", "--out", "."], "--out takes a file; . is a folder"),
        (["--entity", "a", "--out", "none/x.json"], "there is no folder none; make it first"),
    ],
)
def test_mistaken_calls_are_refused(tmp_path, capsys, arguments, message):
    assert main(["dashboard", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_entity_is_needed_and_may_come_from_the_environment(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        main(["dashboard"])
    assert "--entity" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_ENTITY", "team")
    assert main(["dashboard"]) == 0
    assert json.loads((tmp_path / "dashboard.json").read_text())["workspace"]["entity"] == "team"


def test_without_the_extra_the_error_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(["dashboard", "--entity", "a"]) == 2
    assert "pip install 'nslightning[dashboard]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
