"""The divergence of other choices, measured on a backward that a training loop runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nslightning.choices import Choice, named_choices
from nslightning.probes.divergence import Divergence, measure_differences
from nslightning.probes.propagation import Recording, recording, refuse_random
from nslightning.surgery import selections

__all__ = ["measured_backward"]


@contextmanager
def measured_backward(model: nn.Module, choices: Mapping[str, Choice]) -> Iterator[dict[str, Divergence]]:
    """Measure other choices on the first ``loss.backward()`` inside the block, from any caller.

    For your own training loop, and those of timm or Accelerate. The gradients that the loop gets are bit for bit those
    that it gets without the measurement. Of other choices only the differences are computed, carried down from the
    ties.

    Args:
        model: A patched model in eager mode.
        choices: The choices to compare with the one in use, by name.

    Yields:
        The divergence of each choice, filled when the backward has run. Norms are those of the loss as it was given:
        a loss scaled for float16 scales ``l1``, ``l2`` and ``linf``, but not ``relative`` and ``cosine``.

    Raises:
        ValueError: If the model is not patched or is compiled, or a choice, or the one in use, is random.

    Example:
        >>> from nslightning import Jacobians, patch
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> _, report = nn.init.constant_(model[0].weight, 0.5), patch(model, Jacobians())
        >>> with measured_backward(model, {"relu1": Jacobians(relu=1.0)}) as measured:
        ...     model(torch.tensor([[1.0, -1.0], [1.0, 1.0]])).sum().backward()
        >>> measured["relu1"].l2, measured["relu1"].relative
        (2.0, 1.0)
    """
    if not selections(model):
        raise ValueError(f"{type(model).__name__} is not patched; call `patch(model, Jacobians())` before the loop")
    others = named_choices(choices)
    refuse_random(*others.values(), *(selection.jacobians for selection in selections(model).values()))
    measured: dict[str, Divergence] = {}

    def run(recorded: Recording, loss: Tensor, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        own: dict[str, Tensor] = {}
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # A copy: the engine may hand this very tensor on to `grad`, where a scaler overwrites it.
        hooks = [p.register_hook(lambda g, n=name: own.__setitem__(n, g.detach().clone())) for name, p in named.items()]
        keep = bool(settings.get("retain_graph"))
        try:
            if keep:
                loss.backward(*args, **settings | {"retain_graph": True})
            else:
                recorded.backward(loss, *args, **settings)
        finally:
            for hook in hooks:
                hook.remove()
        whole = {name: own.get(name, torch.zeros_like(p)) for name, p in named.items()}
        devices = sorted({p.device.index or 0 for p in named.values() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices):  # a checkpointed part draws again when it is computed again
            measured.update(measure_differences(recorded.carried(others, named, retain_graph=keep), whole))

    with recording(model) as recorded, _FirstBackward(lambda *arguments: run(recorded, *arguments)):
        yield measured


class _FirstBackward(TorchFunctionMode):
    """Passes the first call of ``Tensor.backward`` to a function."""

    def __init__(self, run: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__()
        self.run: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], None] | None = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward and self.run is not None:
            run, self.run = self.run, None
            return run(args[0], args[1:], kwargs)
        return func(*args, **kwargs)
