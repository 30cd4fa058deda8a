"""Training steps from CUDA graphs: one or two launches in place of one for each operation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nslightning.surgery import selections

__all__ = ["CapturedNetwork", "CapturedStep", "eagerly", "refuse_capture"]


class _Kind(NamedTuple):
    """The kind of input that a captured graph was made for; another kind runs eagerly."""

    shapes: tuple[tuple[torch.Size, torch.dtype, tuple[int, ...]], ...]
    autocast: torch.dtype | None


class CapturedNetwork:
    """Runs a network's training forward from a CUDA graph, and its backward from another.

    The first training batch is captured (``torch.cuda.make_graphed_callables``). Other forwards run eagerly: on
    a batch of another shape, such as an epoch's last one; in evaluation; in a measured step, whose operations are
    watched; and inside :func:`eagerly`. The graphs read the weights, and the choice of each patched operation, from
    where these lie on the device, so both may change between steps. Buffers and random streams are after the capture
    what they were before it.

    Outputs and gradients lie in memory that the next step overwrites.

    Args:
        network: The network.

    Attributes:
        eager: Run the forwards eagerly until this is False again.
        replayed: Number of forwards that came from the graph.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._kind: _Kind | None = None
        self._graphed: Callable[..., Any] | None = None
        self.eager = False
        self.replayed = 0

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the forward.

        Args:
            *inputs: The network's inputs.

        Returns:
            Its output.
        """
        network = self._network
        if self.eager or not network.training or not torch.is_grad_enabled() or _watched(network):
            return network(*inputs)
        device_type = inputs[0].device.type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        kind = _Kind(tuple((x.shape, x.dtype, x.stride()) for x in inputs), autocast)
        if self._kind is None:
            self._capture(inputs, autocast)
            self._kind = kind
        if kind != self._kind:
            return network(*inputs)
        assert self._graphed is not None
        self.replayed += 1
        return self._graphed(*inputs)

    def _capture(self, inputs: tuple[Tensor, ...], autocast: torch.dtype | None) -> None:
        device = inputs[0].device
        buffers = {name: buffer.clone() for name, buffer in self._network.named_buffers()}
        streams = [device] if device.type == "cuda" else []
        samples = tuple(x.detach().clone(memory_format=torch.preserve_format) for x in inputs)
        with (
            torch.random.fork_rng(streams),
            torch.autocast(device.type, autocast, enabled=autocast is not None, cache_enabled=False),
        ):
            # In a wrapping module: the captured module's forward is replaced. A parameter that no output depends on
            # gets no gradient, as in an eager step.
            self._graphed = torch.cuda.make_graphed_callables(_Alone(self._network), samples, allow_unused_input=True)
        with torch.no_grad():
            for name, buffer in self._network.named_buffers():
                buffer.copy_(buffers[name])


class _Alone(nn.Module):
    """A network as a module's only part."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training  # `train` would reach parts of the network that are kept in evaluation

    def forward(self, *inputs: Tensor) -> Any:
        return self.network(*inputs)


class CapturedStep:
    """Runs a training step's forward, loss and backward from one CUDA graph.

    The first steps run eagerly: they warm up what a capture needs, and count like all others. The next batch of the
    same shape is captured, and from then on each batch of that shape is a replay. A batch of another shape, such as an
    epoch's last one, runs eagerly, and so does a step whose operations an observer or a recorder watches. Where a
    capture fails, a warning says why, and the training goes on eagerly.

    The optimizer's step is not part of the graph, so that any optimizer, schedule and loss scaler may follow. A
    replay's gradients lie in memory that the next replay overwrites. The caller clears ``.grad`` before each step, as
    ``optimizer.zero_grad()`` does.

    Args:
        network: The network that is trained.
        differentiate: Takes the batch's tensors, runs forward, loss and backward, and returns the tensors that the
            caller wants to keep, such as the loss.

    Attributes:
        replayed: Number of steps that came from the graph.
    """

    WARM_UP = 3  # steps, as PyTorch's notes on CUDA graphs advise

    def __init__(self, network: nn.Module, differentiate: Callable[..., tuple[Tensor, ...]]) -> None:
        self._network, self._differentiate = network, differentiate
        self._parameters = list(network.parameters())
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []
        self._warm = 0
        self._fails = False
        self._replay: Callable[[], None] | None = None
        self._batch: tuple[Tensor, ...] = ()
        self._results: tuple[Tensor, ...] = ()
        self._gradients: list[Tensor | None] = []
        self.replayed = 0

    def __call__(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """Form the gradients of one batch.

        Args:
            *batch: The batch's tensors, on one CUDA device.

        Returns:
            The tensors that ``differentiate`` returns; the parameters' ``.grad`` hold this batch's gradients alone.
        """
        shapes = [(tensor.shape, tensor.dtype) for tensor in batch]
        if self._fails or _watched(self._network) or (self._warm and shapes != self._shapes):
            return self._differentiate(*batch)
        if self._warm < self.WARM_UP:
            self._shapes = shapes
            self._warm += 1
            return _on_another_stream(self._differentiate, batch)
        if self._replay is None and not self._capture(batch):
            return self._differentiate(*batch)
        assert self._replay is not None
        for kept, tensor in zip(self._batch, batch, strict=True):
            kept.copy_(tensor)
        self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self.replayed += 1
        return tuple(result.clone() for result in self._results)

    def _capture(self, batch: tuple[Tensor, ...]) -> bool:
        """Capture the step of a batch, and return whether this was possible."""
        self._batch = tuple(tensor.clone() for tensor in batch)
        try:
            self._replay, self._results = _recorded(lambda: self._differentiate(*self._batch))
        except RuntimeError as error:
            self._fails, self._batch = True, ()
            for parameter in self._parameters:  # what a capture left of them was never computed
                parameter.grad = None
            warnings.warn(
                f"this training's steps run eagerly, for they cannot be captured in a CUDA graph: {error}", stacklevel=2
            )
            return False
        self._gradients = [parameter.grad for parameter in self._parameters]
        return True


def _on_another_stream(run: Callable[..., tuple[Tensor, ...]], batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run a step on another stream, as a capture will."""
    current, other = torch.cuda.current_stream(), torch.cuda.Stream()
    other.wait_stream(current)
    with torch.cuda.stream(other):
        results = run(*batch)
    current.wait_stream(other)
    return results


def _recorded(run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Capture what a function launches, without executing it.

    Returns:
        A function that executes the graph, and the results, in memory that each execution fills.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as one that pins memory, may go on with what a capture forbids in its own.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = run()
    return graph.replay, results


def _watched(network: nn.Module) -> bool:
    """Return whether somebody watches the operations of the forward that is about to run."""
    return any(s.observer is not None or s.recorder is not None for s in selections(network).values())


@contextmanager
def eagerly(module: nn.Module) -> Iterator[None]:
    """Let no forward inside the block come from a captured graph.

    Args:
        module: A module with captured networks in it, or without.
    """
    networks = [getattr(part, "_captured", None) for part in module.modules()]
    captured = [network for network in networks if isinstance(network, CapturedNetwork)]
    before = [one.eager for one in captured]
    for one in captured:
        one.eager = True
    try:
        yield
    finally:
        for one, eager in zip(captured, before, strict=True):
            one.eager = eager


def refuse_capture(device: torch.device, *, processes: int, accumulates: int, compiled: bool) -> None:
    """Raise where a training's steps cannot be captured.

    Args:
        device: The device that trains.
        processes: Number of processes that train.
        accumulates: Number of batches over which gradients are added up.
        compiled: Whether the network is to be compiled.

    Raises:
        ValueError: With the reason, and what to do.
    """
    if device.type != "cuda":
        raise ValueError(
            f"cuda_graph=True captures steps on a CUDA device, and this training is on {device.type}: give"
            " --model.cuda_graph=false, or --trainer.accelerator=gpu where there is one"
        )
    if compiled:
        raise ValueError("compile=True and cuda_graph=True exclude each other: give one of them")
    if processes > 1:
        raise ValueError(
            f"cuda_graph=True captures the step of one process, and {processes} train together: give"
            " --model.cuda_graph=false, or --trainer.devices=1"
        )
    if accumulates > 1:
        raise ValueError(
            "cuda_graph=True writes each batch's gradients over the last one's, and"
            f" accumulate_grad_batches={accumulates} adds them up: give --model.cuda_graph=false, or a larger batch"
        )
