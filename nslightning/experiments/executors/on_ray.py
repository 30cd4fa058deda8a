"""Tasks of a Ray cluster, or of a Ray that this process starts on its machine."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from nslightning.experiments.executors.base import ItemResult, Resources, cores, use_threads

__all__ = ["RayExecutor"]

T = TypeVar("T")
R = TypeVar("R")

#: Tasks that Ray holds at once where nothing limits them; it starts as many as there is room for.
_AT_ONCE = 1000

#: How often Ray computes an item again whose machine went away.
_AGAIN = 2


class RayExecutor:
    """Computes items as tasks of Ray, which finds the machine and the share of a GPU for each.

    The option ``address`` joins a cluster (``auto``: the one that runs on this machine); so does ``RAY_ADDRESS``, and a
    ``ray.init`` that was called before. Else a Ray of this machine is started, and ended with the last item.

    Args:
        resources: The processes, devices and options that it may use.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: For an option that it does not have.
    """

    def __init__(self, resources: Resources) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError("--executor=ray needs Ray: pip install 'nslightning[ray]'") from error
        for name in resources.options:
            if name != "address":
                raise ValueError(f"the executor ray has no option {name!r}; it has address")
        self._ray, self._resources = ray, resources

    def results(self, work: Callable[[T, str], R], items: Sequence[T]) -> Iterator[ItemResult[T, R]]:
        """Compute a function of each item; see :class:`~nslightning.experiments.executors.Executor`."""
        ray, resources = self._ray, self._resources
        ours = not ray.is_initialized()
        if ours:
            with _own_sigterm():
                self._start()
        on_gpu = resources.device.startswith("cuda")
        share = (resources.gpus_per_cell or 1) if on_gpu else 0
        task = ray.remote(num_cpus=resources.cpus_per_cell, num_gpus=share, max_retries=_AGAIN)(_on_worker)
        todo, running = deque(items), dict[Any, T]()
        try:
            shared = ray.put(work)
            while todo or running:
                while todo and len(running) < (resources.workers or _AT_ONCE):
                    item = todo.popleft()
                    running[task.remote(shared, item, resources.device, resources.cpus_per_cell)] = item
                done, _ = ray.wait(list(running), timeout=1)  # a signal is handled between two calls
                for reference in done:
                    item = running.pop(reference)
                    try:
                        yield ItemResult(item, ray.get(reference))
                    except ray.exceptions.RayError as error:  # the process or its machine ended
                        yield ItemResult(item, None, error)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            if ours:
                ray.shutdown()

    def _start(self) -> None:
        address = self._resources.options.get("address") or os.environ.get("RAY_ADDRESS")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
        if address:
            self._ray.init(address=address, **quiet)
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would send them
        number = (self._resources.workers or cores()) * self._resources.cpus_per_cell
        self._ray.init(address="local", num_cpus=number, include_dashboard=False, **quiet)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM. Ray sets two: one exits while Ray starts, the other aborts afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    try:
        yield
    except SystemExit:  # Ray's answer to a SIGTERM while it starts
        signal.signal(signal.SIGTERM, own)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, own)


def _on_worker(work: Callable[[T, str], R], item: T, device: str, threads: int) -> R:
    use_threads(threads)
    return work(item, "cuda" if device.startswith("cuda") else device)  # Ray shows the worker its own GPU only
