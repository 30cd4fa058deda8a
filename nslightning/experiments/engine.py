"""Run an experiment: what is missing is computed, several cells side by side, and collected in one tidy table.

A folder ``<output>/<name>/<scale>`` holds ``cells/<id>.json`` (one finished cell each, written at once),
``cells/<id>.error`` (why a cell failed; it is tried again by the next call), ``cells/<id>.partial`` (how far a training
is that is being computed, every two minutes), ``results.csv`` (one row per cell, index
and metric; ``results.parquet`` too where pyarrow is installed) and ``provenance.json``.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from nslightning.experiments.cells import Cell
from nslightning.experiments.computing import compute
from nslightning.experiments.grid import Experiment, Planned
from nslightning.files import replacing, write_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Report", "collect", "folder_of", "run"]


class Report(NamedTuple):
    """What a call did.

    Args:
        folder: Where the results are.
        planned: Cells asked for.
        skipped: Of these, finished before.
        computed: Finished by this call.
        failed: Crashed in this call: ``(cell, the error's last line)``.
    """

    folder: Path
    planned: int
    skipped: int
    computed: int
    failed: list[tuple[Planned, str]]


def folder_of(experiment: Experiment, output: str | Path) -> Path:
    """Where the results of an experiment are kept: ``<output>/<name>/<scale>``."""
    return Path(output) / experiment.name / experiment.scale


def run(
    experiment: Experiment,
    output: str | Path = "results",
    *,
    workers: int = 1,
    device: str = "cpu",
    only: Mapping[str, Sequence[Any]] | None = None,
    progress: TextIO | None = None,
) -> Report:
    """Compute the cells that are missing and write the tidy table.

    A cell that crashes is recorded and does not stop the others. An interruption loses the cells that are being
    computed, a training at most its last two minutes: the next call goes on.

    Args:
        experiment: The grid.
        output: Where results are kept.
        workers: Processes side by side, one thread each; 1 computes in this process.
        device: Where the cells are computed, such as ``cpu`` or ``cuda``.
        only: Compute only the cells that have these values, by setting.
        progress: Where a line per cell is written.

    Returns:
        What was done.

    Raises:
        ValueError: If the grid is not admissible; nothing is written then.
        DataError: If a data set is not there; the cells that need another one may be asked for with ``only``.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: at least one process is needed")
    planned = experiment.cells(only)
    folder = folder_of(experiment, output)
    cells = folder / "cells"
    missing = [p for p in planned if not (cells / f"{p.id}.json").exists()]
    _check(missing, folder)
    failed: list[tuple[Planned, str]] = []
    started, done = time.monotonic(), 0
    try:
        for done, (cell, seconds, error) in enumerate(_computed(experiment.kind, missing, cells, workers, device), 1):
            if error is not None:
                failed.append((cell, error))
            if progress is not None:
                left = (time.monotonic() - started) / done * (len(missing) - done)
                what = ", ".join(f"{k}={v}" for k, v in cell.varied.items())
                state = f"failed: {error}" if error is not None else f"{seconds:.1f} s"
                print(f"{done}/{len(missing)} [{_clock(left)} left] {what}: {state}", file=progress, flush=True)
    except KeyboardInterrupt as stop:
        stop.add_note(f"after {len(planned) - len(missing) + done} of {len(planned)} cells of {experiment.name}")
        raise
    finally:  # an interrupted grid has its table too
        if any(cells.glob("*.json")):
            collect(experiment, output)
    return Report(folder, len(planned), len(planned) - len(missing), len(missing) - len(failed), failed)


def _check(missing: Sequence[Planned], folder: Path) -> None:
    """Say that there is no such data set or network, or no place for results, before anything is computed."""
    import torch

    from nslightning.experiments.networks import loaded
    from nslightning.models.backbones import create_backbone

    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{folder} cannot be made: {there} is no folder that may be written to")
    seen = set()
    for _, _, cell in missing:
        key = str((cell.data, cell.data_options, cell.backbone, cell.options))
        if key not in seen:
            seen.add(key)
            images = loaded(cell, torch.device("cpu"))
            create_backbone(cell.backbone, images.num_classes, images.image_shape, False, **cell.options)


def collect(experiment: Experiment, output: str | Path) -> pd.DataFrame:
    """Gather the finished cells of an experiment into its table.

    Args:
        experiment: The grid; what lies in the folder and is not in it is left out.
        output: Where results are kept.

    Returns:
        One row per cell, index and metric: ``experiment``, ``scale``, ``cell``, what varies, what the row is indexed by
        (``epoch``, ``theta``), ``metric``, ``value``, and the cell's ``data`` and ``device``.
    """
    import pandas as pd

    folder = folder_of(experiment, output)
    rows: list[dict[str, Any]] = []
    provenance = {}
    for planned in experiment.cells():
        file = folder / "cells" / f"{planned.id}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        head: dict[str, Any] = {"experiment": experiment.name, "scale": experiment.scale, "cell": planned.id}
        head |= {k: v if isinstance(v, (str, int, float, type(None))) else str(v) for k, v in planned.varied.items()}
        tail = {k: found["provenance"].get(k) for k in ("data", "device", "dtype")}
        rows += [{**head, **_restored(row), **tail} for row in found["rows"]]
        provenance[planned.id] = {k: found[k] for k in ("settings", "provenance", "seconds")}
    table = pd.DataFrame(rows)
    write_text(folder / "results.csv", table.to_csv(index=False, float_format="%.9g"))
    if find_spec("pyarrow") is not None and len(table):
        with replacing(folder / "results.parquet") as partial:
            table.astype({c: str for c in table if table[c].dtype == object}).to_parquet(partial, index=False)
    record = {"experiment": dataclasses.asdict(experiment), **_shared(provenance)}
    write_text(folder / "provenance.json", json.dumps(record, indent=1, default=str) + "\n")
    return table


def _shared(cells: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of all cells, with what they have in common said once."""
    environments: list[Any] = []
    found = {}
    for name, cell in cells.items():
        own = dict(cell["provenance"])
        environment = own.pop("environment", {})
        if environment not in environments:
            environments.append(environment)
        found[name] = {**cell, "provenance": {**own, "environment": environments.index(environment)}}
    return {"environments": environments, "cells": found}


def _computed(
    kind: str, missing: list[Planned], folder: Path, workers: int, device: str
) -> Iterator[tuple[Planned, float, str | None]]:
    """Compute cells, yielding each when it is done: (cell, seconds, error)."""
    from nslightning.data import DataError

    if workers == 1 or len(missing) < 2:
        for planned in missing:
            yield planned, *_compute(kind, planned.id, planned.cell, folder, device)
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork, nor do torch's threads
    pool = ProcessPoolExecutor(min(workers, len(missing)), context, _prepare, (1,))
    try:
        waiting: dict[Future[tuple[float, str | None]], Planned] = {
            pool.submit(_compute, kind, p.id, p.cell, folder, device): p for p in missing
        }
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                planned = waiting.pop(future)
                try:
                    yield planned, *future.result()
                except DataError:
                    raise
                except Exception as error:  # the process itself died: out of memory, a segmentation fault
                    yield planned, 0.0, f"{type(error).__name__}: {error}"
    except BaseException:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    pool.shutdown()


def _prepare(threads: int) -> None:
    """Start a worker process: the parent answers Ctrl-C for all."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def _compute(kind: str, name: str, cell: Cell, folder: Path, device: str) -> tuple[float, str | None]:
    """Compute one cell and write it, or why not: (seconds, error)."""
    from nslightning.data import DataError

    started = time.monotonic()
    failure, kept = folder / f"{name}.error", folder / f"{name}.partial"
    try:
        outcome = compute(kind, cell, device, kept)
    except DataError:  # no other cell would fare better
        raise
    except Exception as error:
        write_text(failure, f"{kind} {cell}\n\n{traceback.format_exc()}")
        return time.monotonic() - started, f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - started
    content = {
        "kind": kind,
        "settings": dataclasses.asdict(cell),
        "provenance": outcome.provenance,
        "seconds": round(seconds, 2),
        "rows": [_told(row) for row in outcome.rows],
    }
    write_text(folder / f"{name}.json", json.dumps(content, allow_nan=False))
    for file in (failure, kept):
        with suppress(FileNotFoundError):
            file.unlink()
    return seconds, None


def _told(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON has it: numbers that are none by their names."""
    value = row["value"]
    return {**row, "value": value if value - value == 0 else str(value)}


def _restored(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "value": float(row["value"])}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
