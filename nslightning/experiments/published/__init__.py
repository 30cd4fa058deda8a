"""Numbers of the two papers, as small CSV files: to compare experiments with. See README.md in this folder."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from nslightning.experiments.cells import TrainCell

__all__ = ["searched_learning_rate", "table"]


@lru_cache
def _read(name: str) -> pd.DataFrame:
    from nslightning.exact_csv import read_exactly

    with files(__name__).joinpath(f"{name}.csv").open() as file:
        return read_exactly(file)


def table(name: str) -> pd.DataFrame:
    """A published table.

    Args:
        name: A CSV file of this folder, without its ending.

    Returns:
        A copy.

    Raises:
        ValueError: If no table has that name.
    """
    known = sorted(f.name.removesuffix(".csv") for f in files(__name__).iterdir() if f.name.endswith(".csv"))
    if name not in known:
        raise ValueError(f"there is no published table {name!r}; there are {', '.join(known)}")
    return _read(name).copy()


def searched_learning_rate(cell: TrainCell) -> float:
    """The learning rate that a paper's search found for a training run.

    Args:
        cell: The run. With ``shared_lr`` the rate is the one found for alpha or beta = 0.

    Returns:
        The rate.

    Raises:
        ValueError: If the paper did not search one.
    """
    parameter = "alpha" if cell.paper == "A" else "beta"
    value = 0.0 if cell.shared_lr else cell.relu if cell.paper == "A" else cell.max_pool
    return _searched(
        parameter,
        value,
        paper=cell.paper,
        data=cell.data,
        backbone=cell.backbone.removeprefix("paper/"),
        batch_norm=bool(cell.batch_norm),
        optimizer=cell.optimizer,
        precision=cell.precision,
    )


@lru_cache(maxsize=4096)
def _searched(parameter: str, value: float | str, **wanted: str | bool | int) -> float:
    rows = table("learning_rates")
    for column, one in wanted.items():
        rows = rows[rows[column] == one]
    published = rows[rows["value"] == value] if not isinstance(value, str) else rows[:0]
    if published.empty:
        values = ", ".join(f"{v:g}" for v in rows["value"])
        searched = f"it searched {parameter} in {values}" if values else "it searched no value"
        asked = ", ".join(f"{k}={v}" for k, v in wanted.items() if k != "paper")
        raise ValueError(
            f"paper {wanted['paper']} has no searched learning rate for {asked}, {parameter}={value}: {searched}. "
            "Give learning_rate a number, or take the one of 0 for all: shared_lr: true"
        )
    return float(published["learning_rate"].iloc[0])
