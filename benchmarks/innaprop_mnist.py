"""LeNet-5 on MNIST for three epochs: AdamW against INNAprop at the published pairs; the table of docs/innaprop.md.

NSLIGHTNING_DATA_DIR=... OMP_NUM_THREADS=1 python benchmarks/innaprop_mnist.py trains (minutes on one core), writes
benchmarks/results/innaprop_mnist.csv and draws docs/figures/innaprop_mnist.png. With --figure it only draws, and prints
the table.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
CSV, FIGURE = ROOT / "benchmarks/results/innaprop_mnist.csv", ROOT / "docs/figures/innaprop_mnist.png"
SEED = 0
COMMON = [
    f"--seed_everything={SEED}", "--model.backbone=paper/lenet5", "--data=MNIST", "--data.batch_size=128",
    "--data.holdout=0.1", "--trainer.max_epochs=3", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=5",
    "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false",
    "--model.optimizer.lr=1e-3", "--model.optimizer.weight_decay=0.01",
]  # fmt: skip
RUNS = {
    "AdamW": ["--model.optimizer=torch.optim.AdamW"],
    **{
        f"INNAprop ({alpha}, {beta})": [
            "--model.optimizer=nslightning.optim.INNAprop",
            f"--model.optimizer.alpha={alpha}",
            f"--model.optimizer.beta={beta}",
        ]
        for alpha, beta in ((0.1, 0.9), (1, 1), (2, 2))
    },
}
STEPS = 422  # of an epoch: 54,000 images in batches of 128
BIN = 50  # steps whose ten logged losses make one point of the curve


def train(folder: Path) -> None:
    """Run each training by the command line and gather what it logged."""
    parts = []
    for name, flags in RUNS.items():
        label = "".join(c if c.isalnum() or c == "." else "_" for c in name.lower()).strip("_")
        where = [f"--output={folder}", f"--name={label}"]
        # The optimizer's class comes before its options.
        command = [sys.executable, "-m", "nslightning", "fit", *where, *flags, *COMMON]
        subprocess.run(command, check=True)
        log = pd.read_csv(sorted((folder / label).glob("*/metrics.csv"))[-1])
        log["step"] += 1  # logged with the number of steps before it
        tidy = log.melt(["epoch", "step"], ["train/loss", "val/loss", "val/acc1"], "metric").dropna()
        parts.append(tidy.assign(optimizer=name, seed=SEED).sort_values(["step", "metric"]))
    columns = ["optimizer", "seed", "epoch", "step", "metric", "value"]
    CSV.parent.mkdir(exist_ok=True)
    pd.concat(parts)[columns].to_csv(CSV, index=False, float_format="%.6g", lineterminator="\n")


def draw(rows: pd.DataFrame) -> None:
    """Training loss by step, in bins, and validation accuracy by epoch."""
    import matplotlib.pyplot as plt

    from nslightning.figures import COLOURS, DASHES, STYLE

    with plt.rc_context(STYLE):
        figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
        for i, (name, group) in enumerate(rows.groupby("optimizer", sort=False)):
            look = {"color": COLOURS[i], "ls": DASHES[i], "label": name}
            train_loss = group[group["metric"] == "train/loss"]
            train_loss = train_loss[train_loss["step"] <= train_loss["step"].max() // BIN * BIN]  # whole bins
            means = train_loss.groupby((train_loss["step"] - 1) // BIN)[["step", "value"]].mean()
            loss.plot(means["step"], means["value"], **look)
            acc1 = group[group["metric"] == "val/acc1"]
            accuracy.plot(acc1["epoch"] + 1, 100 * acc1["value"], marker="o", ms=3.5, **look)
        loss.set(yscale="log", xlabel="optimizer step", ylabel=f"training loss, means over {BIN} steps")
        for epoch in (1, 2):
            loss.axvline(epoch * STEPS, color="0.6", lw=0.6, zorder=0)
        loss.annotate("epochs", (STEPS, 1), (2, -2), va="top", xycoords=loss.get_xaxis_transform(),
                      textcoords="offset points", fontsize=7, color="0.4")  # fmt: skip
        accuracy.set(xlabel="epoch", ylabel="accuracy on 6,000 held-out images (%)", xticks=[1, 2, 3])
        handles, names = loss.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=4, fontsize=8)
        FIGURE.parent.mkdir(exist_ok=True)
        figure.savefig(FIGURE)
        plt.close(figure)


def table(rows: pd.DataFrame) -> str:
    """One row per run, in markdown."""
    lines = [
        "| optimizer | training loss, steps 1-100 | steps 1167-1266 "
        "| held-out loss, epochs 1 / 2 / 3 | held-out accuracy (%), epochs 1 / 2 / 3 |",
        "|---|---|---|---|---|",
    ]
    for name, group in rows.groupby("optimizer", sort=False):
        train_loss, val_loss, acc1 = (group[group["metric"] == m] for m in ("train/loss", "val/loss", "val/acc1"))
        first = train_loss[train_loss["step"] <= 100]["value"].mean()
        last = train_loss[train_loss["step"] > 3 * STEPS - 100]["value"].mean()
        losses = " / ".join(f"{v:.4f}" for v in val_loss["value"])
        accuracies = " / ".join(f"{100 * v:.2f}" for v in acc1["value"])
        lines.append(f"| {name} | {first:.3f} | {last:.4f} | {losses} | {accuracies} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", action="store_true", help="Only draw, from the committed CSV.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Where run folders go.")
    arguments = parser.parse_args()
    if not arguments.figure:
        train(arguments.runs)
    rows = pd.read_csv(CSV)
    draw(rows)
    print(table(rows))
