"""Parameter groups by rule: which parameters take another learning rate, weight decay or other setting."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nslightning.spelling import did_you_mean

__all__ = ["VECTORS", "parameter_groups", "scale_learning_rates"]

#: In a rule, the parameters of at most one dimension: biases, and the scales and shifts of norms.
VECTORS = "vectors"


def parameter_groups(
    network: nn.Module, rules: Sequence[dict[str, Any]] = (), layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Sort the trained parameters of a network into groups for an optimizer.

    Args:
        network: The network.
        rules: Settings for some of the parameters, later ones winning, such as
            ``{match: vectors, weight_decay: 0}`` or ``{match: head.*, lr_scale: 10}``. ``match`` is a pattern for
            names, a list of them, or ``vectors`` (biases, and the scales and shifts of norms). ``lr_scale`` multiplies
            the optimizer's learning rate; anything else is the optimizer's own.
        layer_decay: Learning rate of a layer as a share of the next one's, from the output down (Clark et al. 2020).
            timm says which parameters form a layer.

    Returns:
        Groups; every trained parameter is in one of them. A group without a setting takes the optimizer's.

    Raises:
        ValueError: If a rule matches no parameter, or has no ``match``; if the network names no layers.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> groups = parameter_groups(network, [{"match": "vectors", "weight_decay": 0.0}])
        >>> [(len(group["params"]), group.get("weight_decay")) for group in groups]
        [(2, None), (2, 0.0)]
    """
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    settings: dict[str, dict[str, Any]] = {name: {} for name in trained}
    if layer_decay is not None:
        for name, scale in _layer_scales(network, layer_decay).items():
            settings[name]["lr_scale"] = scale
    for rule in rules:
        changes = dict(rule)
        patterns = changes.pop("match", None)
        if not patterns:
            raise ValueError(
                f"a rule says which parameters it is for by match, such as {{match: {VECTORS}, weight_decay: 0}}; "
                f"given {rule}"
            )
        matched = _matched(trained, [patterns] if isinstance(patterns, str) else list(patterns))
        for name in matched:
            scale = settings[name].get("lr_scale", 1.0) * changes.get("lr_scale", 1.0)
            settings[name] |= changes | ({"lr_scale": scale} if scale != 1 else {})
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in trained.items():
        group = groups.setdefault(repr(sorted(settings[name].items())), {"params": [], **settings[name]})
        group["params"].append(parameter)
    return list(groups.values())


def scale_learning_rates(optimizer: Optimizer) -> None:
    """Multiply the learning rates of an optimizer's groups by their ``lr_scale``, which is removed.

    Args:
        optimizer: An optimizer with groups of :func:`parameter_groups`, before a scheduler is made for it.

    Example:
        >>> optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr_scale": 0.5}], lr=0.2)
        >>> scale_learning_rates(optimizer)
        >>> optimizer.param_groups[0]["lr"], "lr_scale" in optimizer.param_groups[0]
        (0.1, False)
    """
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.pop("lr_scale", 1.0)


def _matched(trained: dict[str, torch.nn.Parameter], patterns: list[str]) -> list[str]:
    names: list[str] = []
    for pattern in patterns:
        hits = [
            name
            for name, parameter in trained.items()
            if (parameter.ndim <= 1 if pattern == VECTORS else fnmatch.fnmatchcase(name, pattern))
        ]
        if not hits:
            raise ValueError(
                f"no trained parameter matches {pattern!r}{did_you_mean(pattern, [VECTORS, *trained])} A pattern is as "
                f"in a shell, such as layer1.* or *.bias, or {VECTORS}"
            )
        names += hits
    return list(dict.fromkeys(names))


def _layer_scales(network: nn.Module, layer_decay: float) -> dict[str, float]:
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined] # it is in its __init__

    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is a share of the next layer's learning rate, from 0 to 1; given {layer_decay}")
    if not hasattr(network, "group_matcher"):
        raise ValueError(
            f"layer_decay needs to know what a layer is, and {type(network).__name__} does not say it, as timm's "
            "networks do (group_matcher): name learning rates by rules, such as {match: layer1.*, lr_scale: 0.5}"
        )
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = param_groups_layer_decay(network, layer_decay=layer_decay)
    return {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
