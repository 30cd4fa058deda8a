"""``nslightning lr-search`` as a user calls it."""

from __future__ import annotations

import sys

import pandas as pd
import pytest

from nslightning.cli import main

optuna = pytest.importorskip("optuna", reason="the extra `search` is not installed")

FIT = ["--config", "configs/quickstart.yaml", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2"]
FIT += ["--trainer.enable_progress_bar=false", "--low=1e-3"]


def search(folder, *options: str) -> int:
    return main(["lr-search", *FIT, f"--output={folder}", *options])


def test_a_search_per_choice_goes_on_where_it_was(tmp_path, capsys) -> None:
    choices = ["--choices", "relu0:relu=0", "beta10:max_pool=10"]
    assert search(tmp_path, "--trials=1", "--epochs=1", *choices) == 0
    first = pd.read_csv(tmp_path / "trials.csv")
    assert first.groupby("choice").size().to_dict() == {"relu0": 1, "beta10": 1}
    assert search(tmp_path, "--trials=2", "--epochs=1", *choices) == 0
    said = capsys.readouterr().out
    both = pd.read_csv(tmp_path / "trials.csv")
    assert both.groupby("choice").size().to_dict() == {"relu0": 2, "beta10": 2}
    kept = both.merge(first, on=list(first.columns))
    assert len(kept) == 2  # the first trials were not run again
    assert both["lr"].between(1e-3, 1e-1).all()
    assert both.groupby("choice")["lr"].nunique().eq(2).all()
    for choice, group in both.groupby("choice"):
        best = group.loc[group["val/acc1"].idxmax()]
        assert f"{choice}: best lr {best['lr']:.5g} (val/acc1={best['val/acc1']:.4f}" in said
    config = (tmp_path / "trials" / "beta10" / "001" / "config.yaml").read_text()
    assert "max_pool: 10.0" in config
    assert (tmp_path / "lr_search.png").stat().st_size > 1000
    # What the trials had in common must stay.
    assert search(tmp_path, "--trials=3", "--epochs=2", *choices) == 2
    assert "epochs was 1 and is 2" in capsys.readouterr().err


def test_a_diverged_trial_is_a_bad_one_and_not_a_broken_one(tmp_path) -> None:
    space = ["--search", "model.optimizer.lr=log:1e3..1e4", "--metric=val/loss", "--minimise"]
    assert main(["sweep", *FIT[:-1], *space, "--trials=1", "--epochs=1", f"--output={tmp_path}"]) == 0
    (trial,) = pd.read_csv(tmp_path / "trials.csv").to_dict("records")
    assert (trial["val/loss"], trial["state"]) == (sys.float_info.max, "complete")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--high=1e-5"], "0 < low < high"),
        (["--trials=0"], "--trials is at least 1"),
        (["--trails=3"], "did you mean '--trials'?"),
        (["--choices", "beta:max_pol=10"], "did you mean 'max_pool'"),
        (["--choices", "a:relu=0", "a:relu=1"], "two choices have one name"),
        (["--trials=1", "--epochs=1", "--metric=val/acc2"], "it logs"),
        (["--metric=val/loss"], "val/loss is a loss, and the largest value would win"),
        (["--trials=1", "--epochs=1", "--trainer.max_epoch=3"], "did you mean"),
        (["--trials=1", "--epochs=1", "--data.batch_size=0"], "batch_size is 0"),
    ],
)
def test_mistaken_calls(options, message, tmp_path, capsys) -> None:
    try:
        status = search(tmp_path / "search", *options)
    except SystemExit as stop:  # of the parser
        status = stop.code
    assert status == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "\nnslightning lr-search: error: " in f"\n{errors}"
    assert "nslightning fit" not in errors
    assert not (tmp_path / "search").exists()


def test_a_call_that_is_mended_searches_where_the_mistaken_one_did(tmp_path, capsys) -> None:
    """The folder was there before: the failed trial stays in it, and counts for nothing."""
    assert search(tmp_path, "--trials=1", "--epochs=1", "--data.batch_size=0") == 2
    assert search(tmp_path, "--trials=1", "--epochs=1", "--data.batch_size=8") == 0
    assert len(pd.read_csv(tmp_path / "trials.csv")) == 1
