"""Who computes which kind of cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nslightning.experiments.cells import Cell, Outcome, TrainCell
from nslightning.experiments.training import train
from nslightning.experiments.twins import twins
from nslightning.experiments.zones import zones
from nslightning.runs import environment

__all__ = ["compute"]

_COMPUTE: dict[str, Callable[[Any, str], Outcome]] = {"twins": twins, "zones": zones}


def compute(kind: str, cell: Cell, device: str, kept: Path | None = None) -> Outcome:
    """Compute one cell in this process.

    Args:
        kind: A key of :data:`~nslightning.experiments.cells.KINDS`.
        cell: Its settings.
        device: The device that computes.
        kept: File for the state of an unfinished training, from which it goes on.

    Returns:
        Its measurements, with their provenance.
    """
    with cell.computed.applied():
        if isinstance(cell, TrainCell) and kind == "train":
            outcome = train(cell, device, kept)
        else:
            outcome = _COMPUTE[kind](cell, device)
        surroundings = {k: v for k, v in environment().items() if k != "command"}
    return outcome._replace(provenance={**outcome.provenance, "environment": surroundings})
