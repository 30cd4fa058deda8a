"""Gradients under many Jacobian choices, from one forward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nslightning.jacobians import Jacobians
from nslightning.surgery import using

__all__ = ["gradients", "wanted"]


def gradients(
    loss: Tensor,
    model: nn.Module,
    choices: Mapping[str, Jacobians],
    *,
    inputs: Mapping[str, Tensor] | None = None,
    retain_graph: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """The parameter gradients of one loss under several choices: one forward, one backward per choice.

    The parameters' ``grad`` fields are left alone.

    Args:
        loss: A 0-d tensor computed by a forward of the patched ``model``, its graph not yet freed.
        model: A patched model, or one that contains patched ones.
        choices: The choices by name.
        inputs: Further tensors to differentiate for, by name, such as ``{"input": x}`` where ``x`` requires gradients.
        retain_graph: Keep the graph after the last backward, for whatever comes next on the same loss.

    Returns:
        For each choice ``{parameter name: gradient}``, with a zero gradient where the loss does not depend on
        the parameter. Only parameters that require gradients appear, then ``inputs``.

    Raises:
        ValueError: If the model is not patched, no choice is given, or there is nothing to differentiate for.

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
    named = wanted(model, inputs)
    found = {}
    for i, (choice, jacobians) in enumerate(choices.items()):
        keep = retain_graph or i + 1 < len(choices)
        with using(model, jacobians):
            values = torch.autograd.grad(
                loss, list(named.values()), retain_graph=keep, allow_unused=True, materialize_grads=True
            )
        found[choice] = dict(zip(named, values, strict=True))
    return found


def wanted(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What to differentiate for: a model's parameters, and other tensors if asked.

    Args:
        model: Any module.
        inputs: Further tensors by name.

    Returns:
        The parameters that require gradients, then ``inputs``.

    Raises:
        ValueError: If there is nothing, an input does not require gradients, or it has a parameter's name.
    """
    named: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in (inputs or {}).items():
        if not tensor.requires_grad:
            raise ValueError(f"input {name!r} does not require gradients: call `requires_grad_()` before the forward")
        if name in named:
            raise ValueError(f"input {name!r} has the name of a parameter: give it another one")
        named[name] = tensor
    if not named:
        raise ValueError(f"no parameter of {type(model).__name__} requires gradients")
    return named
