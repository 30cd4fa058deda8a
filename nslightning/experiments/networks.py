"""The patched network of a cell, on its device, in its precision."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from nslightning.experiments.cells import Cell
from nslightning.experiments.data import Loaded, load
from nslightning.experiments.precision import PRECISIONS, halves
from nslightning.jacobians import Jacobians
from nslightning.models.backbones import create_backbone
from nslightning.models.paper import initialize
from nslightning.ops import NormPool2d
from nslightning.surgery import PatchReport, patch, selections

__all__ = ["build", "loaded", "provenance"]


def loaded(cell: Cell, device: torch.device) -> Loaded:
    """The images of a cell."""
    return load(
        cell.data, tuple(sorted(cell.data_options.items())), device, cell.normalise, cell.augment, cell.train_images
    )


def build(
    cell: Cell, images: Loaded, device: torch.device, init: str | None, jacobians: Jacobians | None = None
) -> tuple[nn.Module, PatchReport]:
    """Draw and patch a network in training mode.

    The weights are drawn in float32 (float64 for 64 bits) from the cell's seed, on the CPU, then rounded.

    Args:
        cell: The settings.
        images: The images that it classifies.
        device: The device for the network.
        init: The initialisation; None is the backbone's own.
        jacobians: Another choice than the cell's.

    Returns:
        The network and the report of its patch.
    """
    torch.manual_seed(cell.seed)
    network = create_backbone(cell.backbone, images.num_classes, images.image_shape, False, **cell.options)
    if cell.precision == 64:
        network.double()  # then drawn again, with all bits
    if init is not None or cell.precision == 64:
        torch.manual_seed(cell.seed)  # the draws of a network that is built once, as the released scripts did
        initialize(network, init or "torch")  # type: ignore[arg-type] # it checks the name
    pools = _pool_by_norm(network) if cell.pool == "norm" else []
    report = patch(network, jacobians or cell.jacobians, seed=cell.seed)
    for pool in pools:
        (pool.selection,) = selections(network).values()
    return network.to(device, PRECISIONS[cell.precision]).train(), report


def _pool_by_norm(network: nn.Module) -> list[NormPool2d]:
    """Replace the max poolings of a network, and return what stands in their place."""
    made = []
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MaxPool2d):
                if child.kernel_size != child.stride or child.padding not in (0, (0, 0)):
                    raise ValueError(
                        f"pool='norm' takes windows side by side, without padding; the network has {child}"
                    )
                setattr(parent, name, pool := NormPool2d(child.kernel_size))
                made.append(pool)
    return made


def provenance(cell: Cell, images: Loaded, report: PatchReport, device: torch.device) -> dict[str, str]:
    """Describe everything that the numbers of a cell depend on besides its settings and the code."""
    return {
        "data": images.variant,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(PRECISIONS[cell.precision]).removeprefix("torch."),
        "arithmetic": str(replace(cell.computed, half_products=halves(cell.precision, device))),
        "patch": report.fingerprint,
    }
