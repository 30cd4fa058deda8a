"""Runs ``nslightning cost --step``, which measures the time of each part of a whole training step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor, nn

from nslightning.data import Synthetic
from nslightning.data.images import TensorImages
from nslightning.jacobians import Jacobians
from nslightning.probes.step_cost import StepCost, step_cost

__all__ = ["steps"]


def steps(
    build: Callable[[], nn.Module],
    images: tuple[int, tuple[int, int, int], int, int],
    choices: dict[str, Jacobians],
    repetitions: int,
) -> StepCost:
    """Measure the parts of a training step on random images that are kept as bytes on the network's device.

    Args:
        build: Makes the network.
        images: Number of classes, shape of an image, images in a batch, seed.
        choices: The Jacobian choices by name.
        repetitions: Measured rounds.

    Returns:
        The parts.
    """
    classes, shape, size, seed = images
    torch.manual_seed(seed)
    first = next(build().parameters())
    split = Synthetic(shape, classes, images=8 * size, batch_size=size, seed=seed)._split("train")
    assert isinstance(split, TensorImages)
    source = split.to(first.device)
    batches, turn = torch.arange(8 * size, device=first.device).split(size), count()

    def data() -> tuple[Tensor, Tensor]:
        x, y = source.batch(batches[next(turn) % 8], 0)
        return x.to(first.dtype), y

    return step_cost(build, data, choices, repetitions=repetitions)
