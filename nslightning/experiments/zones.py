"""Estimates how often the gradients of two choices differ: Monte Carlo over parameters and mini-batches."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.experiments.cells import Outcome, Row, ZoneCell
from nslightning.experiments.data import Images, Loaded
from nslightning.experiments.exact import layer_chances
from nslightning.experiments.networks import build, loaded, provenance
from nslightning.experiments.precision import PRECISIONS, computing
from nslightning.models.paper import initialize
from nslightning.models.patched import at_least_float32
from nslightning.probes import zone
from nslightning.probes.gradients import gradients_in_turn, wanted
from nslightning.probes.graph import opaque_nodes, operation_nodes
from nslightning.surgery import PatchReport, unpatch

__all__ = ["difference_norm", "zones"]


def zones(cell: ZoneCell, device: str) -> Outcome:
    r"""Draw parameters, walk through mini-batches without updating, and count those where the gradients differ.

    Paper A (section 3): theta lies in S_01 if on some mini-batch the first layer's gradient under ReLU'(0) = 0 and
    under ReLU'(0) = 1 are not the same floats. Paper B (section 3): the share of mini-batches on which

    .. math:: \sum_p \lVert \nabla_p L_{choice} - \nabla_p L_{reference} \rVert_\infty > \tau.

    Both gradients are taken from one forward, in the cell's precision, and subtracted in float64. A forward that meets
    no tie that may matter proves that nothing differs, and no backward is taken.

    Args:
        cell: The settings.
        device: The device to compute on.

    Returns:
        Per parameter vector: ``batches`` seen, ``differing`` ones, the first of them (``first_differing``, counted
        from 1; NaN where there is none) and ``not_finite``; with ``histogram`` also ``norm_zero`` and
        ``norm_1e<k>``: how many norms lie in [10^k, 10^(k+1)); with the norm ``zone`` also how many mini-batches lie in
        each, ``noise_floor`` (by how much the reference's gradient differs from itself where it is computed twice,
        relative to its norm; the largest of the mini-batches) and ``within_noise``: how many of those that differ do so
        by no more than that. Of the estimator ``exact``: ``probability`` (the chance over the biases that some ReLU
        input is 0 on some image, given the weights), ``expected_zeros``, and both for the first d layers, as
        ``probability_depth<d>``.
    """
    where = torch.device(device)
    images = loaded(cell, where)
    if cell.estimator == "exact":
        return _counted(cell, images, where)
    pair, report = _networks(cell, images, where)
    # Drawn as in `build`: with all bits, then rounded.
    drawn, _ = build(cell, images, torch.device("cpu"), None)
    drawn.to(torch.float64 if cell.precision == 64 else torch.float32)
    rows: list[Row] = []
    for theta in range(cell.thetas):
        torch.manual_seed(_theta_seed(cell, theta))
        initialize(drawn, cell.init)  # type: ignore[arg-type] # it checks the name
        for network in pair:
            network.load_state_dict(drawn.state_dict())
        counts = _walk(cell, pair, images.train, theta)
        rows += [{"theta": theta, "metric": name, "value": float(value)} for name, value in counts.items()]
    return Outcome(rows, provenance(cell, images, report, where))


def _counted(cell: ZoneCell, images: Loaded, device: torch.device) -> Outcome:
    network, report = build(cell, images, torch.device("cpu"), None)
    unpatch(network)
    assert isinstance(network, nn.Sequential)  # paper/fc is one
    drawn = network.to(torch.float32)
    pixels = torch.cat([x for x, _ in images.train.batches(8192, torch.float32)])
    rows: list[Row] = []
    orders: dict[str, None] = {}
    for theta in range(cell.thetas):
        torch.manual_seed(_theta_seed(cell, theta))
        initialize(drawn.cpu(), cell.init)  # type: ignore[arg-type] # it checks the name
        none, zeros = 1.0, 0.0
        for depth, chance in enumerate(
            layer_chances(drawn.to(device), pixels, cell.computed.order, cell.batch_size), 1
        ):
            none, zeros = none * (1 - chance.probability), zeros + chance.zeros
            orders[chance.order] = None
            for metric, value in (("probability", 1 - none), ("expected_zeros", zeros)):
                rows.append({"theta": theta, "metric": f"{metric}_depth{depth}", "value": value})
        rows += [{**row, "metric": str(row["metric"]).partition("_depth")[0]} for row in rows[-2:]]
    summation = {"orders": ", ".join(orders)}
    return Outcome(rows, {**provenance(cell, images, report, device), **summation})


def _theta_seed(cell: ZoneCell, theta: int) -> int:
    """Networks of other shapes are other draws; rules, precisions and batch sizes meet the same parameters."""
    network = zlib.crc32(f"{cell.backbone} {sorted(cell.options.items())}".encode())
    return int(np.random.SeedSequence((cell.seed, theta, network)).generate_state(1, np.uint64)[0])


def _networks(cell: ZoneCell, images: Loaded, device: torch.device) -> tuple[tuple[nn.Module, ...], PatchReport]:
    """One network that takes both choices; one for each where the published pooling computes another forward."""
    network, report = build(cell, images, device, None)
    if cell.rule == "exact" or cell.jacobians.max_pool == cell.alternative.max_pool:
        return (network,), report
    return (network, build(cell, images, device, None, cell.alternative)[0]), report


def _walk(cell: ZoneCell, pair: tuple[nn.Module, ...], images: Images, theta: int) -> dict[str, float]:
    counts: defaultdict[str, float] = defaultdict(float, batches=0, differing=0, not_finite=0)
    if cell.norm == "zone":
        counts.update(regular=0, compensation=0, bifurcation=0, noise_floor=0, within_noise=0)
    first = math.nan
    order = _theta_seed(cell, theta) if cell.shuffle else None
    for x, y in images.batches(cell.batch_size, PRECISIONS[cell.precision], seed=order, limit=cell.batches):
        counts["batches"] += 1
        norm = _zone(cell, pair[0], x, y, counts) if cell.norm == "zone" else difference_norm(cell, pair, x, y)
        counts["not_finite"] += not math.isfinite(norm)
        differs = norm > cell.tau or (cell.nan_differs and math.isnan(norm))
        counts["differing"] += differs
        if cell.histogram and math.isfinite(norm):
            counts["norm_zero" if norm == 0 else f"norm_1e{math.floor(math.log10(norm))}"] += 1
        if differs and math.isnan(first):
            first = counts["batches"]
            if cell.stop_at_first:
                break
    return {**counts, "first_differing": first}


def _zone(cell: ZoneCell, network: nn.Module, x: Tensor, y: Tensor, counts: defaultdict[str, float]) -> float:
    """Count a mini-batch's zone: 1.0 where the gradients differ, NaN where they are not finite."""

    def loss(output: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(output), y)

    try:
        lies = zone(network, loss, x, cell.alternative, cell.jacobians)
    except ValueError:  # diverged parameters lie in no zone
        return math.nan
    counts[lies.kind] += 1
    differs = lies.kind != "regular"
    if lies.noise is not None:
        counts["noise_floor"] = max(counts["noise_floor"], lies.noise.relative)
        counts["within_noise"] += differs and lies.observed.l2 <= lies.noise.l2
    return float(differs)


def difference_norm(cell: ZoneCell, pair: tuple[nn.Module, ...], x: Tensor, y: Tensor) -> float:
    """The norm of the difference of the two choices' gradients on one mini-batch.

    Args:
        cell: The choices, the norm and the precision.
        pair: The patched network in training mode; or one under each choice, with the same weights.
        x: Images, in its dtype.
        y: Labels.

    Returns:
        The norm; for ``bitwise_first_layer`` 1 where any bit differs and 0 elsewhere. NaN where a gradient is NaN under
        both choices.
    """
    if len(pair) == 2:  # each was patched with its choice
        a, b = (torch.autograd.grad(_loss(cell, n, x, y), list(_parameters(cell, n).values())) for n in pair)
    else:
        (network,) = pair
        loss = _loss(cell, network, x, y)
        visible = not any(opaque_nodes(loss))
        if visible and loss.isfinite() and not any(operation_nodes(loss, (cell.jacobians, cell.alternative))):
            return 0.0
        choices, named = [cell.jacobians, cell.alternative], _parameters(cell, network)
        turns = gradients_in_turn(loss, network, choices, named, retain_graph=False)
        a, b = (tuple(of_choice.values()) for of_choice in turns)
    if cell.norm == "bitwise_first_layer":
        if bool(a[0].isnan().any()) and torch.equal(a[0].isnan(), b[0].isnan()):
            return math.nan
        return float(not torch.equal(a[0], b[0]))
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for one, two in zip(a, b, strict=True):
        if one is two and one.isfinite().all():
            continue
        change = (one.double() - two).abs()
        total += change.max() if cell.norm == "linf_sum" else change.sum()
    return float(total)


def _loss(cell: ZoneCell, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Compute the loss in the cell's precision."""
    with computing(cell.precision, x.device):
        return F.cross_entropy(at_least_float32(network(x)), y)


def _parameters(cell: ZoneCell, network: nn.Module) -> dict[str, Tensor]:
    """The parameters whose gradients the norm reads, by name."""
    named = wanted(network)
    if cell.norm == "bitwise_first_layer":
        first = next(name for name, p in named.items() if p.dim() > 1)
        return {first: named[first]}
    return named
