"""Jobs of a SLURM cluster, or processes in its place, through submitit."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from nslightning.experiments.executors.base import ItemResult, Resources, use_threads
from nslightning.experiments.executors.local import LocalExecutor
from nslightning.files import stderr_to

__all__ = ["SubmititExecutor"]

T = TypeVar("T")
R = TypeVar("R")

#: Tasks of one array job; most clusters take no more.
_ARRAY = 1000


class SubmititExecutor:
    """Computes items in jobs: an array job on SLURM, processes where there is none.

    A job holds the items that share its GPU, and ``cells_per_job`` of them one after another; a job that is preempted
    or runs out of time is queued again by submitit, and its items find the files that they wrote.

    Args:
        resources: The processes and devices that it may use. Its options are ``cluster``, ``cells_per_job`` and the
            parameters of ``submitit.AutoExecutor``, such as ``timeout_min``, ``slurm_partition`` or ``mem_gb``.
            ``cluster`` is ``slurm`` or ``local``; None takes SLURM on a machine that has it, else ``local``.
        folder: The folder in which submitit keeps jobs and their logs; all machines see it.

    Raises:
        ImportError: If submitit is not installed.
        ValueError: If an option has another name.
    """

    def __init__(self, resources: Resources, folder: Path) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ImportError("--executor=submitit needs submitit: pip install 'nslightning[submitit]'") from error
        self._resources, self._folder = resources, folder
        options = dict(resources.options)
        self._cluster, self._per_job = options.pop("cluster", None), options.pop("cells_per_job", None)
        if self._per_job is not None and (not isinstance(self._per_job, int) or self._per_job < 1):
            raise ValueError(f"cells_per_job={self._per_job!r} is not a number of cells from 1 on")
        folder.mkdir(parents=True, exist_ok=True)
        self._executor = submitit.AutoExecutor(folder, cluster=self._cluster)
        on_gpu = resources.device.startswith("cuda")
        parameters = {
            "name": "nslightning",
            "cpus_per_task": resources.cpus_per_cell * resources.per_gpu,
            "gpus_per_node": int(on_gpu),
            "timeout_min": 24 * 60,
            **options,
        }
        if self._on_slurm and resources.workers is not None:
            parameters["slurm_array_parallelism"] = resources.workers
        try:
            self._executor.update_parameters(**parameters)
        except (AssertionError, NameError) as error:  # submitit's ways to refuse
            raise ValueError(f"submitit refuses an option of the executor: {error}") from error

    @property
    def _on_slurm(self) -> bool:
        return bool(self._executor.cluster == "slurm")

    def results(self, work: Callable[[T, str], R], items: Sequence[T]) -> Iterator[ItemResult[T, R]]:
        """Compute a function of each item; see :class:`~nslightning.experiments.executors.Executor`."""
        together = self._resources.per_gpu
        size = self._per_job or max(together, -(-len(items) // _ARRAY))
        chunks = [list(items[i : i + size]) for i in range(0, len(items), size)]
        job_work = _Chunk(work, dataclasses.replace(self._resources, workers=together, options={}, say=None))
        running: dict[Any, list[T]] = {}
        try:
            if self._on_slurm:
                running = dict(zip(self._executor.map_array(job_work, chunks), chunks, strict=True))
                chunks = []
            while chunks or running:
                while chunks and len(running) < (self._resources.workers or 1):
                    chunk = chunks.pop(0)
                    # A job's own process of this machine ends by a traceback when it is cancelled.
                    with stderr_to(self._folder / "controllers.log"):
                        running[self._executor.submit(job_work, chunk)] = chunk
                done = [job for job in running if job.done()]
                for job in done:
                    yield from self._of_job(job, running.pop(job))
                if not done:
                    time.sleep(0.2)
        finally:
            for job in running:
                job.cancel()

    def _of_job(self, job: Any, chunk: list[T]) -> Iterator[ItemResult[T, R]]:
        if (error := job.exception()) is None:
            yield from cast("list[ItemResult[T, R]]", job.result())
            return
        log = RuntimeError(f"job {job.job_id} ended before it was done; {job.paths.stderr} says more")
        log.__cause__ = error
        yield from (ItemResult(item, None, log) for item in chunk)


class _Chunk(Generic[T, R]):
    """The work of one job."""

    def __init__(self, work: Callable[[T, str], R], resources: Resources) -> None:
        self._work, self._resources = work, resources

    def __call__(self, items: list[T]) -> list[ItemResult[T, R]]:
        use_threads(self._resources.cpus_per_cell)
        numbered = list(enumerate(items))
        by_number: dict[int, ItemResult[T, R]] = {}
        for (number, item), result, error in LocalExecutor(self._resources).results(
            functools.partial(_numbered, self._work), numbered
        ):
            by_number[number] = ItemResult(item, result, error)
        return [by_number[number] for number, _ in numbered]

    def checkpoint(self, items: list[T]) -> Any:
        """Return the job that submitit queues after a preemption or a time limit: the same one, whose cells go on."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, items)


def _numbered(work: Callable[[T, str], R], item: tuple[int, T], device: str) -> R:
    return work(item[1], device)
