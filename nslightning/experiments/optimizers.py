"""Optimizers by name, for training runs of a grid."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import torch
from torch import nn

from nslightning.spelling import did_you_mean

__all__ = ["check_optimizer", "make_optimizer"]

_OWN = ("INNA", "INNAprop")


def _classes() -> dict[str, type[torch.optim.Optimizer]]:
    kinds = vars(torch.optim).items()
    return {n: k for n, k in kinds if inspect.isclass(k) and issubclass(k, torch.optim.Optimizer) and n != "Optimizer"}


def check_optimizer(name: str) -> None:
    """Raise where there is no such optimizer.

    Args:
        name: ``sgd``, ``adam``, a class of torch.optim, ``INNA``, ``INNAprop``, ``timm/<name>`` or a class' path.

    Raises:
        ValueError: With the name that was probably meant.

    Example:
        >>> check_optimizer("AdamW"), check_optimizer("INNAprop")
        (None, None)
    """
    if name in ("sgd", "adam", *_OWN) or name in _classes():
        return
    if name.startswith("timm/"):
        from timm.optim._optim_factory import list_optimizers

        known = [f"timm/{n}" for n in list_optimizers()]
        if name in known:
            return
        raise ValueError(
            f"optimizer={name!r} is not one of timm's{did_you_mean(name, known)} See timm.optim.list_optimizers()"
        )
    module, _, kind = name.rpartition(".")
    if module:
        try:
            if issubclass(getattr(import_module(module), kind), torch.optim.Optimizer):
                return
        except (ImportError, AttributeError, TypeError):
            pass
    known = ["sgd", "adam", *_OWN, *_classes()]
    raise ValueError(
        f"optimizer={name!r} is not known{did_you_mean(name, known)} There are: {', '.join(known)}; timm/<name>; "
        "or the path of a class, as package.module.Class"
    )


def make_optimizer(name: str, network: nn.Module, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    """Make an optimizer of a network's parameters.

    Args:
        name: As for :func:`check_optimizer`.
        network: The network.
        lr: The learning rate.
        options: Its other arguments.

    Returns:
        The optimizer.

    Raises:
        TypeError: If it has no such argument.
    """
    if name.startswith("timm/"):
        from timm.optim._optim_factory import create_optimizer_v2

        # Without a decay of timm's own, and one group for all parameters, as everywhere else here.
        arguments = {"weight_decay": 0.0, "filter_bias_and_bn": False, **options}
        created: torch.optim.Optimizer = create_optimizer_v2(
            network, opt=name.removeprefix("timm/"), lr=lr, **arguments
        )
        return created
    if name in _OWN:
        kind = getattr(import_module("nslightning.optim"), name)
    elif "." in name:
        module, _, attribute = name.rpartition(".")
        kind = getattr(import_module(module), attribute)
    else:
        kind = _classes()[{"sgd": "SGD", "adam": "Adam"}.get(name, name)]
    made: torch.optim.Optimizer = kind(network.parameters(), lr=lr, **options)
    return made
