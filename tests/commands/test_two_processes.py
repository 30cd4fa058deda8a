"""Whole runs through the command line: two processes against one, and killed against left alone."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from ddp_helpers import finish, start

NORMS = ["l1", "l2", "linf", "relative", "cosine"]


def config(**backbone_options):
    """A small net without batch norm on 96 images, half of them constant."""
    return {
        "seed_everything": 3,
        "name": "run",
        "model": {
            "backbone": "paper/fc",
            "backbone_options": {"hidden": [24, 16], **backbone_options},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
        },
        "data": {
            "class_path": "Synthetic",
            "init_args": {"image_shape": [1, 7, 7], "num_classes": 4, "images": 96, "eval_images": 8},
        },
        "trainer": {
            "accelerator": "cpu",
            "precision": "64-true",
            "deterministic": True,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "max_epochs": 2,
            "logger": {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "test"}},
            "callbacks": [
                {"class_path": "ddp_helpers.DeadUnits"},
                {"class_path": "ddp_helpers.Slow"},
                {
                    "class_path": "nslightning.callbacks.GradientDivergence",
                    "init_args": {"every_n_steps": 2, "choices": {"relu1": {"relu": 1}, "half": {"relu": 0.5}}},
                },
                {"class_path": "nslightning.callbacks.TieMonitor", "init_args": {"every_n_steps": 2}},
                {"class_path": "nslightning.callbacks.WeightDivergence", "init_args": {"every_n_steps": 2}},
                {
                    "class_path": "nslightning.callbacks.ZoneMonitor",
                    "init_args": {"every_n_steps": 4, "choices": {"relu1": {"relu": 1}}},
                },
                {"class_path": "nslightning.callbacks.NonFiniteGuard"},
                {"class_path": "ddp_helpers.Dump"},
            ],
        },
    }


def totals(folder):
    rows = pd.read_csv(folder / "divergence.csv", keep_default_na=False)
    return rows.set_index(["step", "choice", "parameter"]).sort_index()


def metrics(folder):
    """One row per step; what was logged more than once fails."""
    rows = pd.read_csv(folder / "metrics.csv").drop(columns=["divergence/seconds", "divergence/share"], errors="ignore")
    rows = rows[[column for column in rows if not column.startswith("perf/")]]
    long = rows.melt("step").dropna()
    long = long[long["variable"] != "epoch"]
    assert not long.duplicated(["step", "variable"]).any()
    return long.pivot(index="step", columns="variable", values="value")


def test_two_processes_are_one_with_the_union_batch():
    both, alone = config(), config()
    for options in (both, alone):
        options["trainer"]["callbacks"][1:1] = [
            {"class_path": "ddp_helpers.TiedWhereConstant"},
            {"class_path": "ddp_helpers.OwnNumbers"},
        ]
    both["data"]["init_args"] |= {"batch_size": 8, "constant": 0.5}
    alone["data"]["init_args"] |= {"batch_size": 16, "constant": 0.5}
    finish(
        start("fit", both, "both", "--trainer.devices=2", "--trainer.strategy=ddp"),
        start("fit", alone, "alone", "--trainer.devices=1"),
    )
    assert os.listdir("both/run") == os.listdir("alone/run") == ["001"]  # noqa: PTH208 - names are wanted
    two, one = Path("both/run/001"), Path("alone/run/001")
    ranks = [torch.load(two / f"weights-{rank}.pt") for rank in (0, 1)]
    whole = torch.load(one / "weights-0.pt")
    assert not (one / "weights-1.pt").exists()
    for name, weight in whole.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert torch.allclose(ranks[0][name], weight, rtol=1e-9, atol=1e-12), name
    ours, expected = totals(two), totals(one)
    assert ours.index.is_unique
    assert sorted(set(expected.index.get_level_values("step"))) == [0, 2, 4, 6, 8, 10]
    assert set(expected["method"]) == {"propagate"}
    pd.testing.assert_frame_equal(ours, expected, rtol=1e-9, atol=1e-13)
    assert (ours.xs(("relu1", ""), level=("choice", "parameter"))["relative"] > 1e-3).all()
    a, b = metrics(two), metrics(one)
    same = [c for c in b if c.startswith(("divergence/", "ties/", "val/", "weights/"))]
    assert len(same) == 10 + 3 + 2 + 5
    pd.testing.assert_frame_equal(a[same], b[same], rtol=1e-9, atol=1e-12)
    assert a["train/loss"].notna().sum() == b["train/loss"].notna().sum() == 12
    (run,) = two.glob("wandb/offline-run-*")
    assert run.name.endswith((two / "wandb_id").read_text().strip())
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    assert (a["zones/relu1/bifurcation"].dropna() == 1).all()
    # Ties are those of both batches together; a zone's numbers are means over the processes. Each process alone has
    # others.
    own = [pd.read_json(two / f"own-{rank}.json").set_index("step") for rank in (0, 1)]
    assert own[0].index.tolist() == [0, 4, 8]
    ties, total = own[0]["tied"] + own[1]["tied"], own[0]["total"] + own[1]["total"]
    assert a["ties/total"].loc[own[0].index].tolist() == (ties / total).tolist()
    assert own[0]["tied"][0] != own[1]["tied"][0]
    observed = (own[0]["observed"] + own[1]["observed"]) / 2
    assert a["zones/relu1/observed"].dropna().tolist() == pytest.approx(observed.tolist(), rel=1e-9)
    assert (abs(own[0]["observed"] - own[1]["observed"]) > 1e-3 * observed).all()
    for folder in (two, one):
        assert (folder / "divergence.png").stat().st_size > 5000


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_an_epoch(devices):
    """Dropout, shuffled data, a checkpoint between two epochs' ends; then the same bits as without the kill."""
    options = config(dropout=0.3)
    options["data"]["init_args"] |= {"batch_size": 8 // devices, "constant": 0.5}
    options["trainer"] |= {"devices": devices, "strategy": "auto" if devices == 1 else "ddp"}
    checkpoint = {"every_n_train_steps": 5, "filename": "last"}
    options["trainer"]["callbacks"].append(
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint}
    )
    whole = start("fit", options, "whole")
    killed = start("fit", options, "killed", SECONDS_PER_STEP="0.5")
    two, one = Path("killed/run/001"), Path("whole/run/001")
    for _ in range(1200):
        file = two / "metrics.csv"
        # Step 7: beyond the checkpoint after step 4, before the next one and the end of the epoch at step 11.
        if (two / "checkpoints" / "last.ckpt").exists() and pd.read_csv(file)["step"].max() >= 7:
            break
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (two / "weights-0.pt").exists()
    state = torch.load(two / "checkpoints" / "last.ckpt", weights_only=False)
    assert (state["global_step"], state["epoch"]) == (5, 0)
    identity = (two / "wandb_id").read_text()
    finish(whole, start("fit", options, "killed", "--ckpt_path=last"))

    assert [f.name for f in Path("killed/run").iterdir()] == ["001"]
    assert (two / "wandb_id").read_text() == identity
    offline = sorted(f.name for f in two.glob("wandb/offline-run-*"))
    assert len(offline) == 2
    assert all(name.endswith(identity.strip()) for name in offline)
    assert json.loads((two / "run.json").read_text())["resumed_at_step"] == 5
    for rank in range(devices):
        ours, expected = (torch.load(folder / f"weights-{rank}.pt") for folder in (two, one))
        for name, weight in expected.items():
            assert torch.equal(ours[name], weight), name
    for table in ("divergence.csv", "weights.csv", "zones.csv"):
        assert (two / table).read_text() == (one / table).read_text()
    pd.testing.assert_frame_equal(metrics(two), metrics(one))
    assert metrics(two)["train/loss"].notna().sum() == 24


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(before, after):
    """With the same images a step it is the run that one number of processes makes; with others it is refused."""
    options = config()
    options["data"]["init_args"] |= {"batch_size": 16 // before, "constant": 0.5}
    options["trainer"]["callbacks"] = [
        {"class_path": "ddp_helpers.Dump"},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"every_n_train_steps": 4, "filename": "last"},
        },
    ]

    def processes(count):
        return [f"--trainer.devices={count}", f"--trainer.strategy={'auto' if count == 1 else 'ddp'}"]

    finish(
        start("fit", options, "whole", *processes(before)),
        start("fit", options, "changed", *processes(before), "--trainer.max_steps=4"),
    )
    folder = Path("changed/run/001")
    weights = torch.load(folder / "weights-0.pt")
    on = ["--ckpt_path=last", *processes(after), "--trainer.max_steps=-1"]
    refused = start("fit", options, "changed", *on)
    said, _ = refused.communicate(timeout=480)
    assert refused.returncode != 0
    assert "Traceback" not in said, said
    assert "batch_size x processes" in said
    finish(start("fit", options, "changed", *on, f"--data.init_args.batch_size={16 // after}"))
    ours, expected = (torch.load(f / "weights-0.pt") for f in (folder, Path("whole/run/001")))
    for name, weight in expected.items():
        assert torch.allclose(ours[name], weight, rtol=1e-9, atol=1e-12), name
    assert not torch.equal(ours[name], weights[name])
    assert metrics(folder)["train/loss"].notna().sum() == 12


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("began", [False, True], ids=["before the first step", "in training"])
def test_both_processes_are_asked_to_stop(signum, status, began):
    """As a terminal's Ctrl-C and a cluster's scheduler do it: one line, and one status, at any moment."""
    options = config()
    options["trainer"]["max_epochs"] = 400
    run = start("fit", options, "stopped", "--trainer.devices=2", "--trainer.strategy=ddp")

    def further():  # W&B's own process is another child
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        return any("LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in children)

    rows = Path("stopped/run/001/divergence.csv")
    while not (rows.exists() if began else further()):
        assert run.poll() is None
        time.sleep(0.1)
    os.killpg(run.pid, signum)
    said, _ = run.communicate(timeout=480)  # until both have closed their output
    assert run.returncode == status, said
    assert "Traceback" not in said
    assert "Child process" not in said
    assert "error: " not in said
    assert len(re.findall(r"nslightning fit: stopped by", said)) == 1, said
    assert ("go on with: nslightning fit --config" in said) == began
