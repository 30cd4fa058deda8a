"""Gradients under many Jacobian choices, from one forward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nslightning.jacobians import Jacobians
from nslightning.surgery import using

__all__ = ["gradients"]


def gradients(
    loss: Tensor, model: nn.Module, choices: Mapping[str, Jacobians], *, retain_graph: bool = False
) -> dict[str, dict[str, Tensor]]:
    """The parameter gradients of one loss under several choices: one forward, one backward per choice.

    The parameters' ``grad`` fields are left alone.

    Args:
        loss: A 0-d tensor computed by a forward of the patched ``model``, its graph not yet freed.
        model: A patched model, or one that contains patched ones.
        choices: The choices by name.
        retain_graph: Keep the graph after the last backward.

    Returns:
        For each choice ``{parameter name: gradient}``, with a zero gradient where the loss does not depend on
        the parameter. Only parameters that require gradients appear.

    Raises:
        ValueError: If the model is not patched, no parameter requires gradients, or no choice is given.

    Example:
        >>> import nslightning
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> _ = nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
        >>> report = nslightning.patch(model, Jacobians())
        >>> loss = model(torch.ones(1, 2)).sum()
        >>> found = gradients(loss, model, {"relu0": Jacobians(), "relu1": Jacobians(relu=1.0)})
        >>> found["relu0"]["0.bias"], found["relu1"]["0.bias"]
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    if not choices:
        raise ValueError("gradients takes at least one choice, such as {'relu1': Jacobians(relu=1.0)}")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(f"no parameter of {type(model).__name__} requires gradients")
    found = {}
    for i, (choice, jacobians) in enumerate(choices.items()):
        keep = retain_graph or i + 1 < len(choices)
        with using(model, jacobians):
            values = torch.autograd.grad(
                loss, list(named.values()), retain_graph=keep, allow_unused=True, materialize_grads=True
            )
        found[choice] = dict(zip(named, values, strict=True))
    return found
