"""Checks that a checkpoint fits the run that goes on from it, before the run writes anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule

from nslightning import runs
from nslightning.commands.config_files import read_config

if TYPE_CHECKING:
    from nslightning.commands.going_on import Start

__all__ = ["check_network", "check_optimizer"]

_RESTORED = ("model.optimizer", "model.lr_scheduler")


def check_network(start: Start, model: LightningModule) -> None:
    """Refuse a checkpoint of another network, in words and not as a list of all its parameters.

    Args:
        start: The checkpoint.
        model: The model of the config.

    Raises:
        ValueError: If their parameters differ.
    """
    stored = {name: tuple(v.shape) for name, v in start.content["state_dict"].items()}
    wanted = {name: tuple(v.shape) for name, v in model.state_dict().items()}
    odd = sorted(n for n in stored.keys() | wanted.keys() if stored.get(n) != wanted.get(n))
    if not odd:
        return
    made = start.content.get("hyper_parameters", {})
    made_as, now = (_network_in_words(hparams) for hparams in (made, model.hparams))
    name, (then_shape, now_shape) = odd[0], (d.get(odd[0], "missing") for d in (stored, wanted))
    raise ValueError(
        f"--ckpt_path: {start.checkpoint} holds {made_as}, and this is {now}: {len(odd)} parameters differ, "
        f"as {name}: {then_shape} in the checkpoint, {now_shape} here. Give the config that made it, by --config"
    )


def _network_in_words(hparams: Mapping[str, Any]) -> str:
    """List the contents of a checkpoint or a model."""
    network = hparams.get("backbone", hparams.get("size"))
    classes = hparams.get("num_classes", hparams.get("vocab_size"))
    return f"{network} for {classes} classes" if network else "another network"


def check_optimizer(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse another optimizer or schedule for a run that goes on: its checkpoint's would win, and the record be wrong.

    Args:
        config: The config to go on under.
        folder: The run's folder.

    Raises:
        ValueError: If they differ from the run's own.
    """
    own = folder / "config.yaml"
    if not own.is_file():
        return
    then, now = ({k: v for k, v in runs.flat(c).items() if k.startswith(_RESTORED)} for c in (read_config(own), config))
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            raise ValueError(
                f"--{name}={now.get(name)}: a run that goes on keeps its optimizer and schedule, whose state is in its "
                f"checkpoint ({name} is {then.get(name)}); leave out --ckpt_path to begin a new run"
            )
