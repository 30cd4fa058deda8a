"""The finished cells of an experiment as one tidy table, with what they were computed by."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nslightning.exact_csv import read_exactly
from nslightning.experiments.grid import Experiment
from nslightning.files import replacing, write_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["collect", "finished", "folder_of", "recorded", "restore"]


def folder_of(experiment: Experiment, output: str | Path) -> Path:
    """Return the folder where the results of an experiment are kept: ``<output>/<name>/<scale>``."""
    return Path(output) / experiment.name / experiment.scale


def finished(folder: Path) -> set[str]:
    """The names of the finished cells.

    Args:
        folder: The folder of the experiment's results.

    Returns:
        The names, which are those of the files: the folder is read once, whatever the number of cells.
    """
    return {file.stem for file in (folder / "cells").glob("*.json")}


def recorded(folder: Path) -> set[str]:
    """The names of the cells that the table has, whether their files are here or not: a repository has the table alone.

    Args:
        folder: The folder of the experiment's results.

    Returns:
        The names.
    """
    record = folder / "provenance.json"
    if not (record.is_file() and (folder / "results.csv").is_file()):
        return set()
    return set(json.loads(record.read_text())["cells"])


def restore(experiment: Experiment, output: str | Path) -> int:
    """Make the files of finished cells again from the table, where they are not here.

    A repository holds the table and its provenance, without the cells' files. In a clone of it a grid goes on with what
    the table has; else the next table would have the new cells alone.

    Args:
        experiment: The grid.
        output: The folder of all results.

    Returns:
        How many cells were restored. Their values have the nine digits of the table.
    """
    folder = folder_of(experiment, output)
    lost_names = recorded(folder) - finished(folder)
    lost = {p.id: p for p in experiment.cells() if p.id in lost_names}
    if not lost:
        return 0
    record = json.loads((folder / "provenance.json").read_text())
    import pandas as pd

    # A metric may be called nan.
    table = read_exactly(folder / "results.csv", low_memory=False, keep_default_na=False, na_values=[""])
    for name, rows in table[table["cell"].isin(lost)].groupby("cell", sort=False):
        planned, entry = lost[str(name)], record["cells"][name]
        by_cell = {"experiment", "scale", "cell", *planned.varied, "data", "device", "dtype", "value"}
        index = [column for column in table if column not in by_cell]
        content = {
            "kind": experiment.kind,
            "settings": entry["settings"],
            "provenance": {
                **entry["provenance"],
                "environment": record["environments"][entry["provenance"]["environment"]],
            },
            "seconds": entry["seconds"],
            "rows": [
                {
                    **{column: value for column, value in zip(index, row, strict=True) if not pd.isna(value)},
                    "value": value if math.isfinite(value) else str(value),
                }
                for *row, value in rows[[*index, "value"]].astype(object).itertuples(index=False)
            ],
        }
        write_text(folder / "cells" / f"{name}.json", json.dumps(content, allow_nan=False))
    return len(lost)


def collect(experiment: Experiment, output: str | Path) -> pd.DataFrame:
    """Gather the finished cells of an experiment into its table.

    Args:
        experiment: The grid; what lies in the folder and is not in it is left out.
        output: The folder of all results.

    Returns:
        One row per cell, index and metric: ``experiment``, ``scale``, ``cell``, what varies, what the row is indexed by
        (``epoch``, ``theta``), ``metric``, ``value``, and the cell's ``data`` and ``device``.
    """
    import pandas as pd

    folder = folder_of(experiment, output)
    columns: dict[str, list[Any]] = {}
    total, provenance = 0, {}
    done = finished(folder)
    for planned in experiment.cells():
        if planned.id not in done:
            continue
        content = json.loads((folder / "cells" / f"{planned.id}.json").read_text())
        rows = content["rows"]
        parts: dict[str, list[Any]] = {
            name: [value] * len(rows)
            for name, value in {
                "experiment": experiment.name,
                "scale": experiment.scale,
                "cell": planned.id,
                **{k: v if isinstance(v, (str, int, float, type(None))) else str(v) for k, v in planned.varied.items()},
            }.items()
        }
        for name in dict.fromkeys(name for row in rows for name in row):
            parts[name] = [row.get(name, math.nan) for row in rows]
        parts["value"] = [float(value) for value in parts["value"]]
        parts |= {k: [content["provenance"].get(k)] * len(rows) for k in ("data", "device", "dtype")}
        for name in (*columns, *(name for name in parts if name not in columns)):
            if name not in columns:
                columns[name] = [math.nan] * total
            columns[name] += parts[name] if name in parts else [math.nan] * len(rows)
        total += len(rows)
        provenance[planned.id] = {k: content[k] for k in ("settings", "provenance", "seconds")}
    table = pd.DataFrame(columns)
    write_text(folder / "results.csv", table.to_csv(index=False, float_format="%.9g"))
    if find_spec("pyarrow") is not None and len(table):
        with replacing(folder / "results.parquet") as partial:
            table.astype({c: str for c in table if table[c].dtype == object}).to_parquet(partial, index=False)
    record = {"experiment": dataclasses.asdict(experiment), **_shared(provenance)}
    write_text(folder / "provenance.json", _lines(record))
    return table


def _shared(cells: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of all cells, with what they have in common said once."""
    environments: list[Any] = []
    own_parts = {}
    for name, cell in cells.items():
        own = dict(cell["provenance"])
        environment = own.pop("environment", {})
        if environment not in environments:
            environments.append(environment)
        own_parts[name] = {**cell, "provenance": {**own, "environment": environments.index(environment)}}
    return {"environments": environments, "cells": own_parts}


def _lines(record: Mapping[str, Any]) -> str:
    """JSON with a line per cell and environment: indenting every setting takes seconds for ten thousand cells."""
    parts = []
    for name, part in record.items():
        if isinstance(part, list):
            entries, around = [json.dumps(entry, default=str) for entry in part], "[]"
        else:
            entries = [f"{json.dumps(key)}: {json.dumps(entry, default=str)}" for key, entry in part.items()]
            around = "{}"
        inside = ",\n  ".join(entries)
        parts.append(f" {json.dumps(name)}: {around[0]}\n  {inside}\n {around[1]}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
