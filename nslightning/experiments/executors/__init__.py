"""Who computes the items of a grid or a search: processes of this machine, Ray, or the jobs of a cluster.

An executor takes a function and items, and yields each item with its result when it is done. The caller
decides what the items are, where results are written, and which items are finished.
"""

from __future__ import annotations

from pathlib import Path

from nslightning.experiments.executors.base import Executor, ItemResult, Resources
from nslightning.spelling import did_you_mean

__all__ = ["EXECUTORS", "Executor", "ItemResult", "Resources", "make_executor"]

#: The executors' names.
EXECUTORS = ("local", "ray", "submitit")


def make_executor(name: str, resources: Resources, folder: Path) -> Executor:
    """Make an executor.

    Args:
        name: One of :data:`EXECUTORS`.
        resources: The processes, devices and options that it may use.
        folder: The folder for the logs of its jobs, if it has any; all machines see this folder.

    Returns:
        The executor.

    Raises:
        ValueError: If no executor has that name, or it has no such option.
        ImportError: If it needs an extra that is not installed.
    """
    if name == "local":
        from nslightning.experiments.executors.local import LocalExecutor

        return LocalExecutor(resources)
    if name == "ray":
        from nslightning.experiments.executors.on_ray import RayExecutor

        return RayExecutor(resources)
    if name == "submitit":
        from nslightning.experiments.executors.on_submitit import SubmititExecutor

        return SubmititExecutor(resources, folder / "jobs")
    raise ValueError(f"--executor={name} is not one of {', '.join(EXECUTORS)}{did_you_mean(name, EXECUTORS)}")
