"""S_01 by counting: the chance over the biases that some image puts some ReLU input at 0, given the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.arithmetic import linear, sequential_product, split
from nslightning.experiments.cells import ZoneCell

__all__ = ["Chance", "Lattice", "layer_chances", "refuse_inexact"]

_LEVELS = 2**24  # of torch's float32 uniforms
_FARTHEST = 4096  # lattice points from the estimate at which a search for zeros gives up
_BLOCKS = (192, 384, 128, 256, 320, 336, 448, 512, 64)  # sizes that BLAS kernels were seen to use
_ROWS = 8192


class Chance(NamedTuple):
    """The values that one layer's biases may meet.

    Args:
        probability: The chance that at least one of its units is exactly 0 on at least one image.
        zeros: The expected number of zeros, over units and images.
        order: The order of summation that was counted with, as it was found for ``native``.
    """

    probability: float
    zeros: float
    order: str


class Lattice:
    r"""The numbers that ``torch.nn.init.uniform_(bias, -bound, bound)`` draws in float32, each equally likely.

    .. math:: b_k = \mathrm{fl}(k 2^{-24} \cdot 2B - B), \qquad k = 0, \ldots, 2^{24} - 1

    rounded once or twice, as the installed PyTorch was compiled; which, is found out by drawing.

    Args:
        bound: B.

    Raises:
        RuntimeError: If this PyTorch draws other numbers.

    Example:
        >>> lattice = Lattice(0.5)
        >>> [float(b) for b in lattice(torch.tensor([0, 2**23, 2**24 - 1]))]
        [-0.5, 0.0, 0.4999999403953552]
    """

    def __init__(self, bound: float) -> None:
        self.bound = torch.tensor(bound, dtype=torch.float32)
        self.span = self.bound - -self.bound
        g = torch.Generator()
        levels = (torch.rand(4096, generator=g.manual_seed(0)).double() * _LEVELS).long()
        drawn = torch.empty(4096).uniform_(-bound, bound, generator=g.manual_seed(0))
        for self.fused in (False, True):
            if torch.equal(self(levels), drawn):
                return
        raise RuntimeError(f"this PyTorch ({torch.__version__}) draws uniform numbers in a way that is not known here")

    def __call__(self, k: Tensor) -> Tensor:
        """The k-th numbers, float32.

        Args:
            k: Integers, any shape.

        Returns:
            The numbers, of the same shape.
        """
        u = k.double() / _LEVELS
        bound, span = self.bound.to(k.device), self.span.to(k.device)
        if self.fused:
            return (u * span.double() - bound.double()).float()
        return (u.float() * span) - bound

    def nearest(self, value: Tensor) -> Tensor:
        """Return the numbers k whose draws are nearest to some values, to within rounding.

        Args:
            value: Numbers, any shape.

        Returns:
            Integers of the same shape, which may lie outside the lattice.
        """
        bound = float(self.bound)
        return ((value.double() + bound) / (2 * bound) * _LEVELS).round().long()


def refuse_inexact(cell: ZoneCell) -> None:
    """Raise where the chance of a zero cannot be counted.

    Args:
        cell: The settings.

    Raises:
        ValueError: With the reason.
    """
    reason = ""
    if cell.precision != 32:
        reason = f"it counts float32 numbers; given precision={cell.precision}"
    elif cell.init != "torch":
        reason = f"it needs biases that are uniform on a lattice, as init=torch draws them; given init={cell.init}"
    elif set(cell.against) - {"relu"} or cell.alternative.relu == cell.jacobians.relu:
        reason = f"it counts zeros at ReLU inputs, so the choices differ in relu alone; given against={cell.against}"
    elif cell.backbone != "paper/fc":
        reason = f"it knows fully connected networks of linear layers and ReLU (paper/fc); given {cell.backbone}"
    elif cell.options.get("batch_norm") or cell.options.get("dropout") or cell.options.get("activation") == "relu6":
        reason = "it knows networks without batch norm, dropout and ReLU6"
    elif cell.batches is not None or cell.shuffle:
        reason = "it counts over all training images, in any order: give batches: null and shuffle: false"
    elif cell.computed.order == "random_order" or cell.computed.random_rounding:
        reason = f"it needs an arithmetic that repeats itself; given {cell.arithmetic}"
    if reason:
        raise ValueError(f"the exact estimator does not apply: {reason}. Sample instead: --estimator=sampling")


@torch.no_grad()
def layer_chances(network: nn.Sequential, images: Tensor, order: str, batch_size: int) -> Iterator[Chance]:
    r"""Count, layer by layer, the biases that meet a zero.

    Given the weights and the layers below, unit j of a layer is 0 on image i for a set :math:`K_{ij}` of the lattice's
    numbers, so that over its bias

    .. math:: P(\text{layer is hit}) = 1 - \prod_j \Bigl(1 - 2^{-24} \bigl|\bigcup_i K_{ij}\bigr|\Bigr).

    A unit's value does not decrease as its bias grows, whatever the order of summation, since each rounding is
    monotone: :math:`K_{ij}` is an interval, and is found by walking outwards from the bias that would cancel the sum.
    The layers above are reached with the biases that were drawn.

    Args:
        network: Flatten, then linear layers, some with a ReLU behind them.
        images: Shape ``(I, C, H, W)``, float32, on the network's device.
        order: Order of summation (:func:`nslightning.arithmetic.linear`). For ``native`` the library's own order is
            found by comparing bits on these images; where it is none of those known here, each candidate bias is put
            through the library's own kernel.
        batch_size: Number of images that the network meets at once, on which the library's kernels depend.

    Yields:
        One for each linear layer with a ReLU behind it.

    Raises:
        ValueError: If the network has another layer, or the library's order is not known and cannot be asked for.
    """
    h = images
    layers = list(network)
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Flatten):
            h = h.flatten(1)
        elif isinstance(layer, nn.ReLU):
            h = h.clamp_(min=0)
        elif isinstance(layer, nn.Linear):
            z = torch.cat([linear(part, layer.weight, layer.bias, order) for part in h.split(batch_size)])
            if i + 1 < len(layers) and isinstance(layers[i + 1], nn.ReLU):
                yield _chance(layer, h, z, order, batch_size)
            h = z
        else:
            raise ValueError(f"the exact estimator knows Flatten, Linear and ReLU; the network has {layer}")


def _chance(layer: nn.Linear, h: Tensor, z: Tensor, order: str, batch_size: int) -> Chance:
    lattice = Lattice(1 / math.sqrt(layer.in_features))
    if order == "native":
        order = _library_order(layer, h, z, batch_size)
    hit: list[Tensor] = []
    zeros = 0
    rows = max(1, _ROWS // batch_size) * batch_size  # whole batches
    for inputs, outputs in zip(h.split(rows), z.split(rows), strict=True):
        for keys in _hits(layer, inputs, outputs, order, lattice, batch_size):
            zeros += len(keys)
            hit.append(keys.unique())
    keys = torch.cat(hit).unique() if hit else torch.zeros(0, dtype=torch.long)
    each = torch.bincount(keys // _LEVELS, minlength=layer.out_features).double() / _LEVELS
    return Chance(float(-torch.expm1(torch.log1p(-each).sum())), zeros / _LEVELS, order)


def _library_order(layer: nn.Linear, h: Tensor, z: Tensor, batch_size: int) -> str:
    """The order that gives the library's bits on all of these images; ``native`` where none of those known does."""
    sizes = [f"blocks={n}" for n in _BLOCKS if n < layer.in_features]
    batches = list(zip(h.split(batch_size), z.split(batch_size), strict=True))
    for order in (*sizes, f"blocks={layer.in_features}", "bias_last"):
        if all(torch.equal(linear(a, layer.weight, layer.bias, order), b) for a, b in batches):
            return order
    return "native"


def _hits(layer: nn.Linear, h: Tensor, z: Tensor, order: str, lattice: Lattice, batch_size: int) -> Iterator[Tensor]:
    """Units and biases that meet a zero: ``unit * 2^24 + k``, one entry per image."""
    total = h @ layer.weight.t()
    estimate = lattice.nearest(-total)
    near = (estimate >= -_FARTHEST) & (estimate < _LEVELS + _FARTHEST)
    unit = near.nonzero()[:, 1]
    value = _values(layer, h, z, order, near, estimate, lattice, batch_size)
    k0 = estimate[near]
    for step in (1, -1):  # up from the estimate while the unit is not above 0, down while it is not below
        k, going = k0 if step > 0 else k0 - 1, torch.arange(len(k0), device=h.device)
        for _ in range(_FARTHEST):
            if not len(going):
                break
            y = value(k, going)
            inside = (y == 0) & (k[going] >= 0) & (k[going] < _LEVELS)
            if inside.any():
                yield unit[going[inside]] * _LEVELS + k[going[inside]]
            going = going[y * step <= 0]
            k = k + step
        else:
            raise RuntimeError(f"a unit's zeros reach over {_FARTHEST} of the lattice's numbers")


def _values(
    layer: nn.Linear,
    h: Tensor,
    z: Tensor,
    order: str,
    near: Tensor,
    estimate: Tensor,
    lattice: Lattice,
    batch_size: int,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the units' values on the images, at chosen biases: a function of k and of the entries among ``near``."""
    batches = h.split(batch_size)
    if order == "native":  # the library's own kernel, with a separate bias for each image

        def with_biases(biases: Tensor) -> Tensor:
            parts = zip(biases.split(batch_size), batches, strict=True)
            return torch.cat([torch.addmm(bias, rows, layer.weight.t()) for bias, rows in parts])

        if not torch.equal(with_biases(layer.bias.expand(len(h), -1).contiguous()), z):
            raise ValueError(
                "the exact estimator does not apply: this library adds up in an order that is not known here, and its "
                f"kernel for a bias per image gives other bits on batches of {batch_size}. Name an order, such as "
                "--arithmetic=bias_last, another --batch-size, or sample: --estimator=sampling"
            )

        def by_kernel(k: Tensor, entries: Tensor) -> Tensor:
            all_k = estimate.clone()
            all_k[near] = k
            return with_biases(lattice(all_k))[near][entries]

        return by_kernel
    whole = [torch.cat(parts) for parts in zip(*(_parts(layer, rows, order) for rows in batches), strict=True)]
    total = layer.bias.expand_as(z)
    for part in whole:
        total = total + part
    if not torch.equal(total, z):
        raise RuntimeError(f"{order}: the sums that are counted with are not those of the network")
    parts = [part[near] for part in whole]

    def by_parts(k: Tensor, entries: Tensor) -> Tensor:
        y = lattice(k[entries])
        for part in parts:
            y = y + part[entries]
        return y

    return by_parts


def _parts(layer: nn.Linear, h: Tensor, order: str) -> list[Tensor]:
    """The partial sums of an order from the place on where it adds the bias."""
    name, number = split(order)
    if name == "blocks":
        inner = layer.in_features
        starts = range(0, inner, int(number or 1))
        return [F.linear(h[:, k : k + starts.step], layer.weight[:, k : k + starts.step]) for k in starts]
    if name == "sequential":
        return [sequential_product(h, layer.weight.t())]
    return [linear(h, layer.weight, None, order)]
