"""A grid as a sweep of W&B: its definition, and what a run of the sweep logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nslightning.experiments import Experiment

__all__ = ["log_cells", "wandb_sweeps"]


def wandb_sweeps(experiment: Experiment, words: Sequence[str]) -> list[dict[str, Any]]:
    """Define the sweeps of a grid: one for each of its products, for W&B has no union of products.

    Each run of a sweep is a call of ``nslightning experiment`` for the cell that W&B hands out, so that its results lie
    in the same folder, under the same name, as those of a call that computes the whole grid.

    Args:
        experiment: The grid.
        words: The command line after ``nslightning experiment`` that reads it.

    Returns:
        The definitions, as ``wandb sweep FILE`` takes them.
    """
    command = ["${env}", "nslightning", "experiment", *words, "--workers=1", "--only", "${args_json}"]
    metric = {"name": "test_accuracy", "goal": "maximize"}
    return [
        {
            "name": f"{experiment.name} {experiment.scale}",
            "description": experiment.title or experiment.name,
            "method": "grid",
            **({"metric": metric} if experiment.kind == "train" else {}),
            "parameters": {name: {"values": list(values)} for name, values in grid.items()},
            "command": command,
        }
        for grid in experiment.grids
        if grid
    ]


def log_cells(experiment: Experiment, output: str | Path, only: Mapping[str, Sequence[Any]]) -> None:
    """Log what the cells of a run measured to the run that W&B's agent began.

    Args:
        experiment: The grid.
        output: The folder of its results.
        only: Values of settings that select the cells.
    """
    import wandb

    from nslightning.experiments import collect

    names = {planned.id for planned in experiment.cells(only)}
    table = collect(experiment, output)
    table = table[table["cell"].isin(names)] if len(table) else table
    with wandb.init(job_type="experiment", group=experiment.name) as run:
        index = next((name for name in ("epoch", "step", "theta") if name in table), None)
        groups = table.groupby(index) if index is not None else [(0, table)]
        for at, rows in groups:
            values = dict(zip(rows["metric"], rows["value"], strict=True))
            run.log(values if index is None else {index: at, **values})
