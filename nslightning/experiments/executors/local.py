"""Processes of this machine, one thread each."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from nslightning.experiments.executors.base import ItemResult, Resources, cores, use_threads
from nslightning.experiments.executors.memory import Peak, free_memory, measured_peak, processes_that_fit
from nslightning.experiments.executors.occupancy import Occupancy

__all__ = ["LocalExecutor"]

T = TypeVar("T")
R = TypeVar("R")


class LocalExecutor:
    """Computes items in processes of this machine; one worker computes in this process.

    Without a number of workers, the first item is computed alone. Its peak of memory, and on a GPU the share of time in
    which that worked, say how many processes fit side by side. A process that the system ends (out of memory, a
    segmentation fault) may have been disturbed by its neighbours: the items that were being computed are computed
    again, one after the other, before the rest goes on.

    Args:
        resources: The processes and devices that it may use.

    Raises:
        ValueError: For any option: it has none.
    """

    def __init__(self, resources: Resources) -> None:
        if resources.options:
            raise ValueError(f"the local executor has no option {next(iter(resources.options))!r}")
        self._resources = resources
        self._devices = _devices(resources.device)
        self._workers = resources.workers
        if resources.gpus_per_cell is not None:
            fit = resources.per_gpu * len(self._devices)
            self._workers = fit if self._workers is None else min(fit, self._workers)

    def results(self, work: Callable[[T, str], R], items: Sequence[T]) -> Iterator[ItemResult[T, R]]:
        """Compute a function of each item; see :class:`~nslightning.experiments.executors.Executor`."""
        if self._workers == 1 or len(items) < 2:
            for item in items:
                yield ItemResult(item, work(item, self._devices[0]))
            return
        pool = self._pool(len(items))
        todo, suspects = deque(items), deque[T]()
        running: dict[Future[tuple[R, Peak]], T] = {}
        side_by_side = self._workers or 1
        chosen = self._workers is not None
        try:
            while todo or suspects or running:
                alone = bool(suspects) or not chosen
                queue = suspects or todo
                while queue and len(running) < (1 if alone else side_by_side):
                    running[pool.submit(_measured, work, queue[0])] = queue[0]
                    queue.popleft()
                broken = False
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    item = running.pop(future)
                    try:
                        result, peak = future.result()
                    except BrokenProcessPool as error:
                        broken = True
                        if alone:
                            yield ItemResult(item, None, error)
                        else:
                            suspects.append(item)
                        continue
                    if not chosen:
                        chosen, side_by_side = True, self._chosen(peak)
                    yield ItemResult(item, result)
                if broken:
                    suspects.extend(running.values())
                    running.clear()
                    pool.shutdown()
                    pool = self._pool(len(items))
        except BaseException:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise
        pool.shutdown()

    def _pool(self, items: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork, nor do torch's threads
        number = min(items, self._workers or cores())
        devices: Any = context.SimpleQueue()
        # A worker that is replaced takes a further one.
        for i in range(4 * number):
            devices.put(self._devices[i % len(self._devices)])
        return ProcessPoolExecutor(number, context, _begin, (devices, self._resources.cpus_per_cell))

    def _chosen(self, peak: Peak) -> int:
        # The first process waits while this is read, and stays: what it holds is not free.
        free = free_memory()
        number, reason = processes_that_fit(
            peak,
            max(1, cores() // self._resources.cpus_per_cell),
            None if free is None else free + peak.host,
            len(self._devices),
        )
        if (say := self._resources.say) is not None:
            print(f"{number} processes side by side ({reason}); --workers N takes another number", file=say, flush=True)
        return number


def _devices(device: str) -> list[str]:
    """The devices that the processes are spread over: all GPUs for ``cuda``."""
    if device != "cuda":
        return [device]
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or [device]


_device: list[str] = []  # this worker's


def _begin(devices: Any, threads: int) -> None:
    """Start a worker process: the parent answers Ctrl-C for all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    use_threads(threads)
    _device[:] = [devices.get()]


def _measured(work: Callable[[T, str], R], item: T) -> tuple[R, Peak]:
    with Occupancy(_device[0]) as occupancy:
        result = work(item, _device[0])
    return result, measured_peak(_device[0])._replace(busy=occupancy.share)
