"""ReLU inside recurrent kernels: step by step as PyTorch computes them on a CPU, with the relu that has a choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nslightning.ops.autograd.pointwise import pointwise
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.record import Call, Count

__all__ = ["RECURRENT", "Recurrence"]

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Recurrence:
    """The computation of a recurrent kernel with a relu, as a function of the input and the relu.

    PyTorch's kernel for a CPU runs these very operations, so that the results have its bits. Other devices have other
    kernels.

    Args:
        run: Computes it from the input and the relu.
    """

    run: Callable[[Tensor, Callable[[Tensor], Tensor]], Any] = field(repr=False)

    def __call__(self, selection: Selection, x: Tensor) -> Any:
        """Evaluate it under a choice.

        Args:
            selection: The choice, read when the backward runs.
            x: The input.

        Returns:
            The kernel's result.
        """
        return self.run(x, lambda y: pointwise("relu", y, selection))

    def ties(self, x: Tensor) -> tuple[Count, int]:
        """Count the ties of all steps.

        Args:
            x: The input.

        Returns:
            ``(tied evaluations, all evaluations)``, the first on the input's device.
        """
        tied: list[Tensor] = []
        total = 0

        def counted(y: Tensor) -> Tensor:
            nonlocal total
            tied.append(torch.count_nonzero(y == 0))
            total += y.numel()
            return y.relu()

        with torch.no_grad():
            self.run(x, counted)
        return sum(tied), total


def _layers(params: Sequence[Tensor], biased: bool) -> list[Weights]:
    if biased:
        return [tuple(params[i : i + 4]) for i in range(0, len(params), 4)]  # type: ignore[misc] # four of each layer, which a slice does not say
    return [(params[i], params[i + 1], None, None) for i in range(0, len(params), 2)]


def _step(x: Tensor, hidden: Tensor, weights: Weights, relu: Callable[[Tensor], Tensor]) -> Tensor:
    return relu(F.linear(hidden, weights[1], weights[3]).add_(x))


def _padded(x: Tensor, hidden: Tensor, weights: Weights, relu: Any, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """One layer in one direction over (L, N, H)."""
    steps = list(F.linear(x, weights[0], weights[2]).unbind(0))
    outputs = []
    for step in reversed(steps) if reverse else steps:
        hidden = _step(step, hidden, weights, relu)
        outputs.append(hidden)
    return torch.stack(outputs[::-1] if reverse else outputs), hidden


def _packed(sizes: list[int]) -> Callable[..., tuple[Tensor, Tensor]]:
    """One layer in one direction over a packed sequence, whose batch sizes count the sequences at each step."""

    def layer(x: Tensor, hidden: Tensor, weights: Weights, relu: Any, *, reverse: bool) -> tuple[Tensor, Tensor]:
        steps, start = F.linear(x, weights[0], weights[2]).split(sizes), hidden
        outputs, ended = [], []
        if reverse:
            hidden = start[: sizes[-1]]
            for step in reversed(steps):
                if len(step) > len(hidden):
                    hidden = torch.cat([hidden, start[len(hidden) : len(step)]])
                hidden = _step(step, hidden, weights, relu)
                outputs.append(hidden)
            return torch.cat(outputs[::-1]), hidden
        for step in steps:
            if len(step) < len(hidden):
                ended.append(hidden[len(step) :])
                hidden = hidden[: len(step)]
            hidden = _step(step, hidden, weights, relu)
            outputs.append(hidden)
        return torch.cat(outputs), torch.cat([hidden, *reversed(ended)])

    return layer


def _stack(
    layer: Callable[..., tuple[Tensor, Tensor]],
    hx: Tensor,
    params: Sequence[Tensor],
    biased: bool,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Recurrence:
    def run(x: Tensor, relu: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        if batch_first:
            x = x.transpose(0, 1)
        weights, hidden, final = _layers(params, biased), hx.unbind(0), []
        directions = 1 + bidirectional
        for i in range(0, len(weights), directions):
            ways = [layer(x, hidden[i + j], weights[i + j], relu, reverse=bool(j)) for j in range(directions)]
            final += [last for _, last in ways]
            x = torch.cat([out for out, _ in ways], -1) if bidirectional else ways[0][0]
            if i + directions < len(weights):
                x = torch.dropout(x, dropout, train)
        return (x.transpose_(0, 1) if batch_first else x), torch.stack(final)

    return Recurrence(run)


def _composed(x: Tensor) -> bool:
    """Return whether PyTorch composes its kernel of the operations above."""
    return x.device.type == "cpu"


def _rnn_call(x: Tensor, *args: Any, **kwargs: Any) -> Call | None:
    """``torch.rnn_relu`` of a padded, or of a packed sequence."""
    if kwargs or not _composed(x):
        return None
    if isinstance(args[1], Tensor):
        sizes, hx, params, biased, _, dropout, train, bidirectional = args
        layer = _packed(sizes.tolist())
        recurrence = _stack(layer, hx, params, biased, dropout, train, bidirectional, False)
    else:
        hx, params, biased, _, dropout, train, bidirectional, batch_first = args
        recurrence = _stack(_padded, hx, params, biased, dropout, train, bidirectional, batch_first)
    return Call(x, within=recurrence)


def _cell_call(
    x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Call | None:
    if not _composed(x):
        return None
    weights = (w_ih, w_hh, b_ih, b_hh)
    return Call(x, within=Recurrence(lambda y, relu: _step(F.linear(y, w_ih, b_ih), hx, weights, relu)))


RECURRENT: dict[Callable[..., Any], Callable[..., Call | None]] = {
    torch.rnn_relu: _rnn_call,
    torch.rnn_relu_cell: _cell_call,
}
