"""Gradients under many Jacobian choices, from one forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nslightning._torch import runs_module_hooks, without_post_accumulate_hooks
from nslightning.jacobians import Jacobians
from nslightning.probes.graph import (
    bottleneck,
    check_loss,
    communicates,
    freeing,
    opaque_nodes,
    operation_nodes,
    reachable,
    reruns_forward,
)
from nslightning.probes.shards import is_shard, reshard
from nslightning.surgery import AnyChoice, Plan, to_choices, using

__all__ = ["gradients", "gradients_in_turn", "wanted"]


def gradients(
    loss: Tensor,
    model: nn.Module,
    choices: Mapping[str, AnyChoice],
    *,
    inputs: Mapping[str, Tensor] | None = None,
    retain_graph: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """The parameter gradients of one loss under several choices: one forward, one backward per choice.

    The backward of the second and further choices starts where the choices part: above that place the gradients equal
    those of the first choice. The parameters' ``grad`` fields are left alone. A compiled model must have been compiled
    under ``torch._functorch.config.patch(donated_buffer=False)``, or PyTorch refuses a second backward.

    Where a part of the model runs in a checkpoint of ``use_reentrant=True``, or its parameters are the shards of
    FSDP2, gradients arrive in ``grad`` alone: each choice's whole ``backward`` runs there, and ``grad`` is put back.

    A loss may be made of gradients, as a gradient penalty or MAML's outer loss is. Those inner gradients were taken
    when the loss was formed, under the choice in force there: the one that the model was patched with, or that of
    :func:`~nslightning.using`. They are numbers of this loss, so that no choice given here changes them. To compare
    models that were patched outright, form the loss under each choice.

    Args:
        loss: A 0-d tensor computed by a forward of the patched ``model``, its graph not yet freed.
        model: A patched model, or one that contains patched ones.
        choices: The choices by name; one may be a plan with a choice for each site.
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
        >>> by_choice = gradients(loss, model, {"relu0": Jacobians(), "relu1": Jacobians(relu=1.0)})
        >>> by_choice["relu0"]["0.bias"], by_choice["relu1"]["0.bias"]
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    if not choices:
        raise ValueError("gradients takes at least one choice, such as {'relu1': Jacobians(relu=1.0)}")
    check_loss(loss, model)
    by_name = to_choices(choices)
    turns = gradients_in_turn(loss, model, by_name.values(), wanted(model, inputs), retain_graph=retain_graph)
    return dict(zip(by_name, turns, strict=True))


def gradients_in_turn(
    loss: Tensor,
    model: nn.Module,
    choices: Iterable[Jacobians | Plan],
    named: Mapping[str, Tensor],
    *,
    retain_graph: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """Yield the items of :func:`gradients` one choice at a time, so that not all need be in memory.

    Args:
        loss: A 0-d tensor computed by a forward of the patched ``model``, its graph not yet freed.
        model: A patched model, or one that contains patched ones.
        choices: The choices.
        named: The tensors to differentiate for, by name.
        retain_graph: Keep the graph after the last backward. If not, the part in which choices cannot matter is freed
            after the first.

    Yields:
        ``{name: gradient}`` for each choice; one and the same tensor wherever the choices cannot matter.

    Raises:
        ValueError: If the model is not patched, or was patched after the loss was computed.
    """
    check_loss(loss, model)
    every = list(choices)
    if reruns_forward(loss) or any(map(is_shard, named.values())):
        for i, jacobians in enumerate(every, 1):
            with using(model, jacobians):
                yield _accumulated(loss, model, named, retain_graph=retain_graph or i < len(every))
        return
    start, lower = _start(loss, every, named) if len(every) > 1 else (loss, {})
    freed: list[Any] = []
    if lower and not retain_graph:
        kept = set(reachable([loss.grad_fn if isinstance(start, Tensor) else start.node]))
        freed = [node for node in reachable([loss.grad_fn]) if node not in kept]
    with using(model, every[0]), freeing(freed):
        goals = [*named.values(), start]
        values: Sequence[Tensor | None] = torch.autograd.grad(
            loss,
            goals,  # type: ignore[arg-type] # its annotation takes no mixture
            retain_graph=retain_graph or bool(lower),
            allow_unused=True,
        )
    *values, passing = values
    first = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(named.items(), values, strict=True)}
    yield first
    for i, jacobians in enumerate(every[1:], 2):
        lower_gradients: Sequence[Tensor] = ()
        if lower and passing is not None:  # else nothing came down
            with using(model, jacobians):
                lower_gradients = torch.autograd.grad(
                    start,
                    list(lower.values()),
                    passing,
                    retain_graph=retain_graph or i < len(every),
                    allow_unused=True,
                    materialize_grads=True,
                )
        yield first | dict(zip(lower, lower_gradients, strict=False))


def _start(
    loss: Tensor, choices: list[Jacobians | Plan], named: Mapping[str, Tensor]
) -> tuple[Tensor | GradientEdge, dict[str, Tensor]]:
    """Return where the backwards under all choices but the first may start, and the tensors that they have to reach."""
    # Inputs that were computed may depend on a choice with no leaf below; other processes may have other ties.
    if not all(t.is_leaf for t in named.values()) or communicates(loss):
        return loss, dict(named)
    goals = {*operation_nodes(loss, choices), *opaque_nodes(loss)}
    start = bottleneck(loss, goals)
    if start is None:
        return loss, dict(named) if goals else {}
    below = set(reachable([start.node])) - {start.node}
    if any(map(runs_module_hooks, below)):  # PyTorch skips those of a module whose output lies above
        return loss, dict(named)
    lower = {n: t for n, t in named.items() if get_gradient_edge(t).node in below}
    return start if lower else loss, lower


def _accumulated(
    loss: Tensor, model: nn.Module, named: Mapping[str, Tensor], *, retain_graph: bool
) -> dict[str, Tensor]:
    """The gradients that one ``backward`` accumulates, whose traces are removed."""
    inner: dict[str, Tensor] = {}

    def catch(name: str, gradient: Tensor) -> None:
        inner[name] = inner[name] + gradient if name in inner else gradient

    handles = [t.register_hook(partial(catch, name)) for name, t in named.items() if not t.is_leaf]
    nodes = reachable([loss.grad_fn])
    leaves = [*named.values(), *model.parameters(), *(n.variable for n in nodes if hasattr(n, "variable"))]
    before = {id(t): (t, t.grad) for t in leaves if t.is_leaf}
    for t, _ in before.values():
        t.grad = None
    try:
        with without_post_accumulate_hooks([t for t, _ in before.values()]):
            loss.backward(retain_graph=retain_graph)
        accumulated = {name: t.grad if t.is_leaf else inner.get(name) for name, t in named.items()}
    finally:
        for handle in handles:
            handle.remove()
        for t, gradient in before.values():
            t.grad = gradient
    return {name: torch.zeros_like(t) if (g := accumulated[name]) is None else g for name, t in named.items()}


def wanted(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the tensors to differentiate for: a model's parameters, and other tensors on request.

    Args:
        model: Any module.
        inputs: Further tensors by name.

    Returns:
        The parameters that require gradients, then ``inputs``.

    Raises:
        ValueError: If no tensor requires gradients, an input does not require gradients, or it has a parameter's name.
    """
    reshard(model)
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
