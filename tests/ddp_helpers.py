"""Callbacks that the tests of whole runs put into a run's config; imported by its processes."""

import os
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from lightning.pytorch import Callback


class DeadUnits(Callback):
    """Makes some hidden units 0 at every input: ties that matter, in float64 too. They stay dead under ReLU'(0) = 0."""

    def on_fit_start(self, trainer, pl_module):
        if trainer.ckpt_path is not None:  # a run that goes on: under another ReLU'(0) they may have come alive
            return
        with torch.no_grad():
            for twin in getattr(pl_module, "twins", {"": pl_module}).values():
                layer = twin.backbone.fc1
                layer.weight[:5] = layer.bias[:5] = 0


class Dump(Callback):
    """Writes the final weights of each process beside the run folders."""

    def on_train_end(self, trainer, pl_module):
        file = Path(trainer.log_dir, f"weights-{trainer.global_rank}.pt")
        torch.save(pl_module.state_dict(), file)


class Slow(Callback):
    """Leaves time to be killed, where the environment asks for it."""

    def on_train_batch_start(self, *_):
        time.sleep(float(os.environ.get("SECONDS_PER_STEP", "0")))


if __name__ == "__main__":  # python -m ddp_helpers twins ...: a command whose further processes start likewise
    sys.exit(import_module(f"nslightning.commands.{sys.argv[1]}").main(sys.argv[1:]))
