"""Networks in lockstep: same weights, same batches, a choice each; how far they come apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nslightning.experiments.cells import Outcome, Row, TwinCell
from nslightning.experiments.data import Images
from nslightning.experiments.networks import build, loaded, provenance
from nslightning.experiments.precision import PRECISIONS
from nslightning.experiments.training import Run, evaluate
from nslightning.surgery import selections

__all__ = ["twins"]


class _Closest(NamedTuple):
    """The distance of the first activation's inputs from its kinks, in one forward."""

    zero: Tensor
    six: Tensor | None


def twins(cell: TwinCell, device: str) -> Outcome:
    r"""Train several choices in lockstep and measure, before any step or epoch, how far they are from the first.

    The distance is :math:`\sum_p \lVert \theta_p - \theta^{first}_p \rVert_1` over all parameters, formed in float64
    (Bertoin et al. 2021, introduction; Boustany 2024, section 4). The control repeats the first choice: what it shows
    is not the choice's doing. For training with Lightning, with checkpoints and dashboards, see
    :class:`nslightning.models.Twins`.

    Args:
        cell: The settings.
        device: The device to compute on.

    Returns:
        By ``twin`` and ``epoch`` (or ``step``): ``l1_distance``; per epoch also ``test_accuracy``; per step, of the
        first twin, ``min_abs_input`` of the first ReLU or ReLU6, for the latter also ``min_abs_input_6``.
    """
    where = torch.device(device)
    images = loaded(cell, where)
    choices = {name: dataclasses.replace(cell.jacobians, **choice) for name, choice in cell.choices.items()}
    if cell.control:
        choices["control"] = next(iter(choices.values()))
    together: dict[str, Run] = {}
    for name, choice in choices.items():
        network, report = build(cell, images, where, cell.init, choice)
        together[name] = Run(cell, network, where)
    rows = list(_by_step(cell, together, images.train) if cell.steps else _by_epoch(cell, together, images))
    return Outcome(rows, provenance(cell, images, report, where))


def _by_epoch(cell: TwinCell, together: dict[str, Run], images: Any) -> Iterator[Row]:
    for epoch in range(cell.epochs + 1):
        first = next(iter(together.values())).network
        for name, run in together.items():
            for metric, value in (
                ("l1_distance", _distance(run.network, first)),
                ("test_accuracy", evaluate(run.cell, run.network, images.test)["accuracy"]),
            ):
                yield {"epoch": epoch, "twin": name, "metric": metric, "value": value}
        if epoch < cell.epochs:
            for run in together.values():
                run.epoch(images.train, epoch)
                run.end_epoch()


def _by_step(cell: TwinCell, together: dict[str, Run], images: Images) -> Iterator[Row]:
    first = next(iter(together))
    batches = images.batches(cell.batch_size, PRECISIONS[cell.precision], seed=cell.seed if cell.shuffle else None)
    for run in together.values():
        run.network.train()
    for step, (x, y) in enumerate(islice(batches, cell.steps)):
        for name, run in together.items():
            distance = _distance(run.network, together[first].network)
            yield {"step": step, "twin": name, "metric": "l1_distance", "value": distance}
        closest: list[_Closest] = []
        (selection,) = selections(together[first].network).values()

        def observe(site: str, operation: Any, call: Any, closest: list[_Closest] = closest) -> None:
            if not closest and operation.name in ("relu", "relu6"):
                x = call.x.detach()
                closest.append(_Closest(x.abs().min(), (x - 6).abs().min() if operation.name == "relu6" else None))

        selection.observer = observe
        together[first].step(x, y)
        selection.observer = None
        for run in list(together.values())[1:]:
            run.step(x, y)
        for nearest in closest:
            yield {"step": step, "twin": first, "metric": "min_abs_input", "value": float(nearest.zero)}
            if nearest.six is not None:
                yield {"step": step, "twin": first, "metric": "min_abs_input_6", "value": float(nearest.six)}


@torch.no_grad()
def _distance(network: nn.Module, other: nn.Module) -> float:
    pairs = zip(network.parameters(), other.parameters(), strict=True)
    return float(sum(((p.double() - q.double()).abs().sum() for p, q in pairs), torch.zeros(())))
