"""Grids of runs, tidy results, and the published numbers to compare them with."""

from nslightning.experiments.cells import KINDS, Cell, Outcome, TrainCell, TwinCell, ZoneCell, settings
from nslightning.experiments.collecting import collect, folder_of
from nslightning.experiments.compare import comparison, markdown
from nslightning.experiments.computing import compute
from nslightning.experiments.engine import Report, run
from nslightning.experiments.grid import SCALES, Experiment, Planned

__all__ = [
    "KINDS",
    "SCALES",
    "Cell",
    "Experiment",
    "Outcome",
    "Planned",
    "Report",
    "TrainCell",
    "TwinCell",
    "ZoneCell",
    "collect",
    "comparison",
    "compute",
    "folder_of",
    "markdown",
    "run",
    "settings",
]
