"""Who computes which kind of cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nslightning.experiments.cells import Cell, Outcome
from nslightning.experiments.training import train
from nslightning.experiments.twins import twins
from nslightning.experiments.zones import zones
from nslightning.runs import environment

__all__ = ["compute"]

_COMPUTE: dict[str, Callable[[Any, str], Outcome]] = {"train": train, "twins": twins, "zones": zones}


def compute(kind: str, cell: Cell, device: str) -> Outcome:
    """Compute one cell in this process.

    Args:
        kind: A key of :data:`~nslightning.experiments.cells.KINDS`.
        cell: Its settings.
        device: Where.

    Returns:
        What it measured.
    """
    with cell.computed.applied():
        outcome = _COMPUTE[kind](cell, device)
        surroundings = {k: v for k, v in environment().items() if k != "command"}
    return outcome._replace(provenance={**outcome.provenance, "environment": surroundings})
