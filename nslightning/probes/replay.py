"""Running a model and a loss without side effects, as they are or in another precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from nslightning._torch import hooks_of

__all__ = ["Replay"]

_T = TypeVar("_T")


class Replay(nn.Module):
    """Runs a model and a loss, as they are or cast, and leaves no trace in the model or the random streams.

    Args:
        model: A patched model.
        loss_fn: Takes the model's output and returns a 0-d loss; an ``nn.Module`` is cast like the model.
        inputs: The model's input, a tuple of positional or a dict of keyword arguments.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any], Tensor], inputs: Any) -> None:
        super().__init__()
        self.model, self.loss_fn, self.inputs = model, loss_fn, inputs

    def forward(self, body: Callable[[], Any]) -> Any:
        """Call a function; here the model's tensors are those of the run."""
        return body()

    def is_in(self, dtype: torch.dtype) -> bool:
        """Return whether the model runs in a precision as it is, so that casting it would change nothing.

        Args:
            dtype: The precision.

        Returns:
            Whether its tensors and inputs are of it, and autocast is off.
        """
        tensors = [t for t in (*self.parameters(), *self.buffers(), *tree_leaves(self.inputs)) if isinstance(t, Tensor)]
        autocast = any(torch.is_autocast_enabled(t.device.type) for t in tensors)
        kinds = {t.dtype for t in tensors if t.is_floating_point() or t.is_complex()}
        return not autocast and kinds <= {dtype, dtype.to_complex()}

    def at(self, dtype: torch.dtype | None, work: Callable[[Tensor], _T]) -> _T:
        """Call a function of the loss, backwards included, while the model's tensors are those of the run.

        Every run draws the same random numbers. Autocast holds where the model runs as it is.

        Args:
            dtype: The precision to cast parameters, buffers and inputs to; None leaves all but the buffers, which are
                copied, the model's own.
            work: The function; it takes the loss.

        Returns:
            The function's result.
        """

        def cast(t: Any) -> Any:
            if not (isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()) and dtype):
                return t
            return t.detach().to(dtype.to_complex() if t.is_complex() else dtype)

        def body() -> _T:
            inputs = tree_map(cast, self.inputs)
            args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
            output = self.model(*(args if isinstance(args, tuple) else (args,)), **kwargs)
            return work(self.loss_fn(output))

        tensors = {name: cast(buffer).clone() for name, buffer in self.named_buffers()}
        if dtype is not None:
            for name, parameter in self.named_parameters():
                tensors[name] = cast(parameter).clone().requires_grad_(parameter.requires_grad)
                for hook in hooks_of(parameter):
                    tensors[name].register_hook(hook)
        all_devices = {t.device for t in (*self.parameters(), *self.buffers())}
        devices = sorted((d for d in all_devices if d.type == "cuda"), key=str)
        exact = torch.autocast(devices[0].type if devices else "cpu", enabled=False) if dtype else nullcontext()
        with torch.random.fork_rng(devices), torch.enable_grad(), exact:
            result: _T = functional_call(self, tensors, (body,))
        return result
