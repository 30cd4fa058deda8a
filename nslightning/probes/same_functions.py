"""Finds positions of a layer that compute one function of the parameters, as those of a constant background do."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nslightning.ops.autograd.nodes import operation_of
from nslightning.ops.autograd.windows import Regular
from nslightning.ops.record import Call

__all__ = ["SameFunctions"]

# Nodes that treat all positions of a channel alike: entry by entry, or by a number for each channel.
_ALIKE = frozenset(
    f"{name}Backward0"
    for name in (
        *("Relu", "Threshold", "LeakyRelu", "Hardtanh", "Hardswish", "Hardsigmoid", "Elu", "Gelu", "Silu", "Mish"),
        *("Softplus", "Sigmoid", "Tanh", "NativeBatchNorm", "CudnnBatchNorm", "Clone"),
    )
)
_ALIKE_OPERATIONS = ("relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid", "abs")  # of one tensor


class SameFunctions:
    r"""Follow convolutions and poolings of images, and number the functions of the parameters that they compute.

    Two positions of a convolution's output are the same function, in every channel, where their patches hold the same
    constants, or the same functions of the layer below. So a window of max pooling whose tied entries are one function
    is that function nearby: it has no kink there, and every share of the gradient over these entries is the same.

    Known are two-dimensional convolutions, max poolings with fixed windows, functions of each entry, batch norm, and
    sums of branches. The functions of all other nodes are not known.
    """

    def __init__(self) -> None:
        self._pools: dict[Any, tuple[Regular, Tensor]] = {}  # by the node below
        self._known: dict[Any, Tensor | None] = {}

    def meet(self, call: Call) -> None:
        """Note a max pooling, so that what lies above can be followed through it.

        Args:
            call: The call, in a forward that keeps its graph.
        """
        geometry = call.parameters[0]
        if isinstance(geometry, Regular) and geometry.dims == 2 and call.x.dim() == 4 and not geometry.ceil_mode:
            self._pools[call.x.grad_fn] = (geometry, call.x)

    def of(self, node: Any) -> Tensor | None:
        """The functions that a node of the graph returns.

        Args:
            node: A backward node, or None for a tensor without one.

        Returns:
            Whole numbers of shape (N, H, W), equal where the function is; None where it is not known.
        """
        if node not in self._known:
            self._known[node] = None  # while it is looked for
            with suppress(RuntimeError):  # a saved tensor was overwritten
                self._known[node] = self._find(node)
        return self._known[node]

    def one_in_each_window(self, call: Call, zeros: bool) -> bool:
        """Return whether in each window of a max pooling that ties the tied entries are one function.

        Args:
            call: The call, which :meth:`meet` met.
            zeros: Whether windows with the maximum 0 are left out.

        Returns:
            Whether they are; False where it is not known.
        """
        known = self._pools.get(call.x.grad_fn)
        functions = self.of(call.x.grad_fn) if known is not None and known[1] is call.x else None
        if known is None or functions is None:
            return False
        geometry, x = known
        if functions.shape != (len(x), *x.shape[2:]):
            return False
        for image, numbers in zip(x.detach().double(), functions.double(), strict=True):
            entries = _windows(image[:, None], geometry, -torch.inf)
            largest = entries.amax(1, keepdim=True)
            tied = entries == largest
            own = _windows(numbers[None, None], geometry, -1.0)
            differ = torch.where(tied, own, -torch.inf).amax(1) != torch.where(tied, own, torch.inf).amin(1)
            if bool((differ & ~((largest[:, 0] == 0) & zeros)).any()):
                return False
        return True

    def _find(self, node: Any) -> Tensor | None:
        name = node.name() if node is not None else ""
        below = [n for n, _ in node.next_functions] if node is not None else []
        operation = operation_of(node) if node is not None else None
        if name == "ConvolutionBackward0":
            return self._convolved(node, below[0])
        if name in _ALIKE or operation in _ALIKE_OPERATIONS:
            return self.of(below[0]) if below[:1] != [None] else None
        if name == "AddBackward0" and None not in below:
            one, other = map(self.of, below)
            alike = one is not None and other is not None and one.shape == other.shape
            return _numbered(torch.stack([one, other], -1)) if alike else None  # type: ignore[list-item] # both are known
        pooled = operation == "max_pool" or name == "MaxPool2DWithIndicesBackward0"
        if pooled and below[0] in self._pools and (functions := self.of(below[0])) is not None:
            geometry, _ = self._pools[below[0]]
            return _patches(functions, geometry)
        return None

    def _convolved(self, node: Any, below: Any) -> Tensor | None:
        x, weight = node._saved_input, node._saved_weight
        if x.dim() != 4 or node._saved_transposed:
            return None
        padding, step, spread = (
            tuple(map(int, getattr(node, f"_saved_{n}"))) for n in ("padding", "stride", "dilation")
        )
        geometry = Regular(tuple(weight.shape[2:]), step, padding, spread)
        if below is None:  # constants: the padding is one of them
            height, width = padding
            padded = F.pad(x.detach(), (width, width, height, height))
            return _patches(_numbered(padded.movedim(1, -1)), Regular(geometry.kernel, step, (0, 0), spread))
        functions = self.of(below)
        fits = functions is not None and functions.shape == (len(x), *x.shape[2:])
        return _patches(functions, geometry) if functions is not None and fits else None


def _windows(x: Tensor, geometry: Regular, outside: float) -> Tensor:
    """The entries of each window: shape (N, places, windows) for one of (N, 1, H, W)."""
    height, width = geometry.padding
    padded = F.pad(x, (width, width, height, height), value=outside)
    return F.unfold(padded, geometry.kernel, dilation=geometry.dilation, stride=geometry.stride)


def _patches(functions: Tensor, geometry: Regular) -> Tensor:
    """Number the windows by the functions that they hold; the padding counts as one more function."""
    numbers = functions[:, None].double()
    entries = _windows(numbers, geometry, -1.0).transpose(1, 2)
    height, width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            numbers.shape[2:], geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True
        )
    )
    return _numbered(entries).view(-1, height, width)


def _numbered(rows: Tensor) -> Tensor:
    """Whole numbers for the vectors along the last dimension, equal where these are."""
    flat = rows.reshape(-1, rows.shape[-1])
    numbers: Tensor = flat.unique(dim=0, return_inverse=True)[1]
    return numbers.view(rows.shape[:-1])
