"""Where a step of ``nslightning fit`` spends its time, by Lightning's profiler: ``python -m benchmarks.fit_profile``.

LeNet-5 on the sample of Fashion-MNIST, 128 images a batch, one thread, no measuring callback. To profile an older
commit with today's libraries, run this file there: ``PYTHONPATH=<path> python benchmarks/fit_profile.py --out ...``.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from lightning.pytorch.profilers import SimpleProfiler

import nslightning
from nslightning.cli import main as command

SHOWN = 0.005  # share of the training's time below which a part is not listed
EPOCHS = 6


class Kept(SimpleProfiler):
    """A profiler that others can read after the training."""

    made: ClassVar[list[Any]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made.append(self)


def main() -> None:
    """Train, and write what each part took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fit_profile_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as output, mock.patch("lightning.pytorch.profilers.SimpleProfiler", Kept):
        arguments = [
            "fit", "--model.backbone=paper/lenet5", "--data=FashionMNISTSample", "--data.batch_size=128",
            f"--trainer.max_epochs={EPOCHS}", "--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0",
            "--trainer.enable_progress_bar=false", "--trainer.logger=false", f"--output={output}", "--name=profile",
            "--trainer.profiler=lightning.pytorch.profilers.SimpleProfiler", "--trainer.enable_checkpointing=false",
        ]  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            command(arguments)
    (profiler,) = Kept.made
    taken = {name: times for name, times in profiler.recorded_durations.items() if times}
    steps = len(taken["run_training_batch"])
    whole = 1e3 * sum(taken["run_training_epoch"]) / steps
    parts = {name: (1e3 * sum(times) / steps, 1e3 * statistics.median(times)) for name, times in taken.items()}
    rows = [(mean, median, name) for name, (mean, median) in parts.items() if mean > SHOWN * whole]
    listed = sorted(rows, reverse=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(nslightning.__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    record = {
        "machine": {"torch": torch.__version__, "python": sys.version.split()[0], "threads": 1, "commit": commit},
        "steps": steps,
        "milliseconds per step": {name: round(mean, 3) for mean, _, name in listed},
        "median of a call, milliseconds": {name: round(median, 3) for _, median, name in listed},
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for mean, median, name in listed:
        print(f"{mean:8.3f} ms a step, {median:8.3f} ms a call  {name}")


if __name__ == "__main__":
    main()
