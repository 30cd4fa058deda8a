"""``nslightning sweep`` as a user calls it, and the spaces that it searches."""

import os
import signal

import pandas as pd
import pytest
import yaml

from nslightning.callbacks import StepSeed
from nslightning.cli import main
from nslightning.commands.search import Space

optuna = pytest.importorskip("optuna", reason="the extra `search` is not installed")

FIT = ["--config", "configs/quickstart.yaml", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
FIT += ["--trainer.enable_progress_bar=false"]


def sweep(folder, *options: str) -> int:
    return main(["sweep", *FIT, f"--output={folder}", "--epochs=1", *options])


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("0.1..0.9", Space("a.b", 0.1, 0.9)),
        ("1..8", Space("a.b", 1, 8, whole=True)),
        ("log:1e-4..1e-1", Space("a.b", 1e-4, 1e-1, log=True)),
        ("-1..1", Space("a.b", -1, 1, whole=True)),
        ("16|32", Space("a.b", values=(16, 32))),
        ("null|relu|[1, 2]", Space("a.b", values=(None, "relu", [1, 2]))),
    ],
)
def test_a_space_is_read(text, space):
    assert Space.parse("a.b", text) == space


@pytest.mark.parametrize("text", ["3", "1..", "2..1", "log:0..1", "log:a|b", "a..b", "nan..1", "1..inf", ""])
def test_what_is_no_space_is_refused(text):
    with pytest.raises(ValueError, match=r"--search a\.b="):
        Space.parse("a.b", text)


def test_a_sweep_goes_on_and_its_best_trial_is_a_config(tmp_path, capsys):
    spaces = tmp_path / "spaces.yaml"
    spaces.write_text("data.batch_size: [16, 32]\n")
    words = ["--search", "model.optimizer.lr=log:1e-3..1e-1", "--search", str(spaces)]
    storage = f"--storage=sqlite:///{tmp_path / 'study.db'}"
    folder = tmp_path / "sweep"
    assert sweep(folder, *words, storage, "--trials=1") == 0
    first = pd.read_csv(folder / "trials.csv")
    assert sweep(folder, *words, storage, "--trials=2") == 0
    said = capsys.readouterr().out
    table = pd.read_csv(folder / "trials.csv")
    assert list(table["trial"]) == [0, 1]
    pd.testing.assert_frame_equal(table.iloc[:1], first)
    assert table["model.optimizer.lr"].between(1e-3, 1e-1).all()
    assert table["model.optimizer.lr"].nunique() == 2  # it does not draw its first trial again
    assert table["data.batch_size"].isin([16, 32]).all()
    best = table.loc[table["val/acc1"].idxmax()]
    assert f"best: trial {best['trial']}, val/acc1={best['val/acc1']:.4f}" in said
    config = yaml.safe_load((folder / "best.yaml").read_text())
    assert config["data"]["init_args"]["batch_size"] == best["data.batch_size"]
    assert config["model"]["optimizer"]["init_args"]["lr"] == pytest.approx(best["model.optimizer.lr"])
    assert main(["fit", f"--config={folder / 'best.yaml'}", f"--output={tmp_path / 'runs'}", "--print_config"]) == 0
    assert sweep(folder, "--search", "model.optimizer.lr=0.1..0.2", storage, "--trials=2") == 2
    assert "holds another search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--search names what is searched"),
        (["--search", "model.optimizer.lr"], "--search takes OPTION=SPACE"),
        (["--search", "spaces.yaml"], "spaces.yaml: there is no such file"),
        (["--search", "model.optimizer.lr=3"], "is not a space"),
        (["--search", "a.b=1..2", "--trials=0"], "--trials is at least 1"),
        (["--search", "a.b=1..2", "--executor=rai"], "did you mean 'ray'"),
        (["--search", "a.b=1..2", "--trails=3"], "did you mean '--trials'"),
        (["--search", "model.optimzer.lr=0.1..0.2", "--trials=1"], "did you mean"),
    ],
)
def test_mistaken_calls(options, message, tmp_path, capsys):
    try:
        status = sweep(tmp_path, *options)
    except SystemExit as stop:  # of the parser
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("signum", "status", "by"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_an_interrupted_sweep_says_how_far_it_came_and_goes_on(signum, status, by, tmp_path, capsys, monkeypatch):
    """The signal comes in the first step of the second trial: the first one counts, the second is drawn once more."""
    steps = []

    def begins(*_):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(StepSeed, "on_train_batch_start", begins)
    words = ["--search", "model.optimizer.lr=log:1e-3..1e-1", "--trials=2", "--no-prune"]
    assert sweep(tmp_path / "search", *words) == status
    said = capsys.readouterr().err
    assert f"nslightning sweep: stopped by {by} after 1 of 2 trials of 'sweep'; the same command goes on" in said
    assert "Traceback" not in said
    first = pd.read_csv(tmp_path / "search/trials.csv")
    assert list(first["state"]) == ["complete"]

    assert sweep(tmp_path / "search", *words) == 0
    table = pd.read_csv(tmp_path / "search/trials.csv")
    assert list(table["state"]) == ["complete", "complete"]
    pd.testing.assert_frame_equal(table.iloc[:1], first)
    assert len(steps) == 3 + 2  # the two steps of the trial that was lost, and no others


@pytest.mark.slow
def test_workers_share_a_search(tmp_path):
    words = ["--search", "model.optimizer.lr=log:1e-3..1e-1", "--trials=4", "--workers=2", "--no-prune"]
    assert sweep(tmp_path, *words) == 0
    table = pd.read_csv(tmp_path / "trials.csv")
    assert len(table) == table["model.optimizer.lr"].nunique() == 4
