"""Run an experiment: missing cells are computed, several side by side, and collected in one tidy table.

A folder ``<output>/<name>/<scale>`` holds ``cells/<id>.json`` (one finished cell each, written at once),
``cells/<id>.error`` (why a cell failed; it is tried again by the next call), ``cells/<id>.partial`` (how far a training
is that is being computed, every two minutes), ``cells/<id>.running`` (who computes it), ``results.csv`` (one row per
cell, index and metric; ``results.parquet`` too where pyarrow is installed) and ``provenance.json``. The process
that computes a cell writes its files, so that every executor leaves the same folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from nslightning.experiments.collecting import collect, finished, folder_of, restore
from nslightning.experiments.computing import compute
from nslightning.experiments.executors import Resources, make_executor
from nslightning.experiments.grid import Experiment, Planned
from nslightning.experiments.progress import make_progress
from nslightning.files import check_writable, write_text

__all__ = ["Report", "run"]


class Report(NamedTuple):
    """The outcome of a call.

    Args:
        folder: The folder of the results.
        planned: Number of cells that were asked for.
        skipped: Number of them that were finished before.
        computed: Number of them that this call finished.
        failed: Cells that crashed in this call: ``(cell, the error's last line)``.
    """

    folder: Path
    planned: int
    skipped: int
    computed: int
    failed: list[tuple[Planned, str]]


def run(
    experiment: Experiment,
    output: str | Path = "results",
    *,
    workers: int | None = 1,
    device: str = "cpu",
    only: Mapping[str, Sequence[Any]] | None = None,
    progress: TextIO | None = None,
    executor: str = "local",
    gpus_per_cell: float | None = None,
    executor_options: Mapping[str, Any] | None = None,
) -> Report:
    """Compute the cells that are missing and write the tidy table.

    A cell that crashes is recorded and does not stop the others. An interruption loses the cells that are being
    computed, a training at most its last two minutes: the next call goes on, by any executor.

    Args:
        experiment: The grid.
        output: The folder of all results; every machine that computes sees it.
        workers: Cells side by side, one thread each; 1 computes in this process. None: as many as fit.
        device: The device that computes the cells, such as ``cpu`` or ``cuda``.
        only: Compute only the cells that have these values, by setting.
        progress: Stream for the progress: a live table in a terminal, else a line per cell.
        executor: The executor: ``local``, ``ray`` or ``submitit``.
        gpus_per_cell: Share of a GPU that a cell takes; None takes the file's.
        executor_options: Options of the executor that win over the file's.

    Returns:
        The folder of results, and the cells that were asked for, skipped, computed and failed.

    Raises:
        ValueError: If the grid is not admissible; nothing is written then.
        ImportError: If the executor's extra is not installed.
        DataError: If a data set is not there; the cells that need another one may be asked for with ``only``.
    """
    from nslightning.data import DataError

    resources = Resources(
        workers=workers,
        device=device,
        say=progress,
        gpus_per_cell=gpus_per_cell or (experiment.gpus_per_cell if device.startswith("cuda") else None),
        options={**experiment.executor_options.get(executor, {}), **(executor_options or {})},
    )
    planned = experiment.cells(only)
    folder = folder_of(experiment, output).absolute()
    cells = folder / "cells"
    restored = restore(experiment, output)
    if restored and progress is not None:
        print(f"{restored} finished cells are taken from {folder / 'results.csv'}", file=progress, flush=True)
    done_before = finished(folder)
    missing = [p for p in planned if p.id not in done_before]
    existing = _check(missing, folder)
    failed: list[tuple[Planned, str]] = []
    computed = 0
    try:
        if missing:
            work = functools.partial(compute_cell, experiment.kind, cells)
            results = make_executor(executor, resources, folder).results(work, missing)
            with make_progress(progress, missing, cells) as shown, closing(results):  # type: ignore[type-var] # a generator, which has `close`
                for cell, outcome, error in results:
                    if outcome is not None and outcome.data_missing:  # no other cell would fare better
                        _remove_empty(cells, until=existing)
                        raise DataError(outcome.error)
                    seconds, reason = (outcome.seconds, outcome.error) if outcome is not None else (0.0, None)
                    if reason is None and not (cells / f"{cell.id}.json").exists():
                        reason = f"{type(error).__name__}: {error}" if error is not None else _elsewhere(cells)
                    if reason is not None:
                        failed.append((cell, reason))
                    else:
                        computed += 1
                    shown.ended(cell, seconds, reason)
    except KeyboardInterrupt as stop:
        done = len(finished(folder) & {cell.id for cell in planned})
        stop.add_note(f"after {done} of {len(planned)} cells of {experiment.name}")
        raise
    finally:  # an interrupted grid has its table too
        if any(cells.glob("*.json")):
            collect(experiment, output)
    return Report(folder_of(experiment, output), len(planned), len(planned) - len(missing), computed, failed)


def _elsewhere(cells: Path) -> str:
    return f"a worker wrote the cell into {cells} on its own machine: all machines need to see the same --output"


def _remove_empty(folder: Path, until: Path) -> None:
    """Remove folders that hold nothing, up to one that was there before."""
    for made in (folder, *folder.parents):
        if made == until:
            break
        with suppress(OSError):  # there are results in it
            made.rmdir()


def _check(missing: Sequence[Planned], folder: Path) -> Path:
    """Say that there is no such data set or network, or no place for results, before anything is computed.

    Returns:
        The folder among ``folder`` and those above it that is there already.
    """
    import torch

    from nslightning.experiments.networks import loaded
    from nslightning.models.backbones import create_backbone

    existing = check_writable(folder)
    seen = set()
    for _, _, cell in missing:
        key = str((cell.data, cell.data_options, cell.backbone, cell.options))
        if key not in seen:
            seen.add(key)
            images = loaded(cell, torch.device("cpu"))
            create_backbone(cell.backbone, images.num_classes, images.image_shape, False, **cell.options)
    return existing


class Ended(NamedTuple):
    """The ending of a cell's computation.

    Args:
        seconds: The time that it took.
        error: Its error's last line; None for a finished cell.
        data_missing: Whether the data set is not there.
    """

    seconds: float
    error: str | None = None
    data_missing: bool = False


def compute_cell(kind: str, cells: Path, planned: Planned, device: str) -> Ended:
    """Compute one cell and write its results, or its error.

    Args:
        kind: Kind of the cell.
        cells: The folder of the cells' files.
        planned: The cell.
        device: The device that computes it.

    Returns:
        How it ended.
    """
    from nslightning.commands.process import plain_warnings
    from nslightning.data import DataError

    started, cell = time.monotonic(), planned.cell
    done, failure, kept, running = (cells / f"{planned.id}.{e}" for e in ("json", "error", "partial", "running"))
    if done.exists():  # a worker that computed it was ended right after
        return Ended(0.0)
    write_text(running, json.dumps({"host": platform.node(), "pid": os.getpid(), "began": time.time()}))
    try:
        with plain_warnings():  # also in a process of its own, where no command set it
            outcome = compute(kind, cell, device, kept)
    except DataError as error:
        return Ended(time.monotonic() - started, str(error), data_missing=True)
    except Exception as error:
        write_text(failure, f"{kind} {cell}\n\n{traceback.format_exc()}")
        return Ended(time.monotonic() - started, f"{type(error).__name__}: {error}")
    finally:
        running.unlink(missing_ok=True)
    seconds = time.monotonic() - started
    content = {
        "kind": kind,
        "settings": dataclasses.asdict(cell),
        "provenance": outcome.provenance,
        "seconds": round(seconds, 2),
        "rows": [_as_json(row) for row in outcome.rows],
    }
    write_text(done, json.dumps(content, allow_nan=False))
    for file in (failure, kept):
        with suppress(FileNotFoundError):
            file.unlink()
    return Ended(seconds)


def _as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON has it: numbers that are not finite by their names."""
    value = row["value"]
    return {**row, "value": value if value - value == 0 else str(value)}
