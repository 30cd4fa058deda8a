r"""Checks whether theorems promise that a network's gradient lies in the Clarke subdifferential.

The theorems are those of Park, Chun and Lee, *What does automatic differentiation compute for neural networks?*, ICLR
2024. A layer is an analytic function of the layers below and of its own parameters, then a piecewise analytic function
entry by entry, then perhaps max pooling. They are about real numbers: a tie here is one that floats met.

Conditions are looked at layer by layer. That is what theorem 8 of the paper allows for choices of one side: it needs,
for each layer, a direction of the layer's own parameters that moves all its entries at kinks to the chosen sides.
Choices between the sides follow, since the gradient is affine in the choice of each layer (their lemma 15).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nslightning._torch import in_functorch, outside_transforms
from nslightning.jacobians import Jacobians
from nslightning.ops.autograd.nodes import operation_of
from nslightning.ops.record import Call, Count, Operation
from nslightning.probes.same_functions import SameFunctions
from nslightning.probes.sums import numbers
from nslightning.probes.ties import observing, pools_of_zero

__all__ = ["Guarantee", "SiteGuarantee", "clarke_guarantee", "machine_numbers"]

# Where the bias stands among what a node differentiates, for nodes that add one to each entry.
_BIAS = {"AddmmBackward0": 0, "LinearBackward0": 2, "ConvolutionBackward0": 2, "NativeBatchNormBackward0": 2,
         "CudnnBatchNormBackward0": 2, "NativeLayerNormBackward0": 2, "NativeGroupNormBackward0": 2}  # fmt: skip
_SUMS = ("AddBackward0", "SubBackward0")
_SAME_ENTRIES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "TransposeBackward0",
                 "PermuteBackward0", "UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1", "CloneBackward0",
                 "ToCopyBackward0")  # fmt: skip
# The saved tensor by which a product of matrices refers to the layer below.
_BELOW = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self", "LinearBackward0": "_saved_input"}
_WEIGHT = {"AddmmBackward0": 2, "MmBackward0": 1, "LinearBackward0": 1}


@dataclass(frozen=True)
class SiteGuarantee:
    """The knowledge about one site.

    Args:
        site: Its name.
        operation: Field of :class:`~nslightning.Jacobians`.
        tied: Evaluations at a tie.
        kinks: Largest number of values of its biases that put an evaluation on a kink; None where it has no
            separate biases.
        holds: Whether a theorem covers it on this batch.
        always: Whether it does on every batch.
        reason: The theorem, or the condition that is missing.
    """

    site: str
    operation: str
    tied: int
    kinks: int | None
    holds: bool
    always: bool
    reason: str


@dataclass(frozen=True)
class Guarantee:
    """The promise of theorems that a gradient is an element of the Clarke subdifferential.

    Args:
        sites: The sites, in the order in which the forward meets them.
        dtype: Dtype of the parameters.
    """

    sites: list[SiteGuarantee]
    dtype: str

    @property
    def holds(self) -> bool:
        """Return whether the gradient on this batch is an element. False means that it is not known."""
        return all(site.holds for site in self.sites)

    @property
    def always(self) -> bool:
        """Return whether the gradient is an element whatever the parameters and the batch."""
        return all(site.always for site in self.sites)

    @property
    def missing(self) -> list[SiteGuarantee]:
        """The sites that no theorem covers on this batch."""
        return [site for site in self.sites if not site.holds]

    @property
    def bound(self) -> float | None:
        r"""An upper bound on the share of the biases' values (machine numbers) that put an evaluation on a kink.

        With all else fixed, an entry :math:`y = f + b` is at each of its kinks for one value of b. So among the
        :math:`|M|^n` values of n biases at most the share :math:`\sum k / |M|` does that, with the sum over the
        evaluations of the batch and k the kinks of each; elsewhere the loss is differentiable. Where the arithmetic
        rounds, the same is true of a bias that is added last. Lee, Park and Aiken (ICML 2023) prove a bound of this
        kind, linear in the number of kinks, for a batch of one, and that it is tight; their constants are not quoted
        here. None where some site has no biases of its own, or compares entries with each other.
        """
        counts = [site.kinks for site in self.sites]
        if any(count is None for count in counts):
            return None
        return sum(count for count in counts if count) / machine_numbers(getattr(torch, self.dtype))


def machine_numbers(dtype: torch.dtype) -> int:
    """Return how many finite numbers a floating dtype has, 0 once.

    Args:
        dtype: Such as ``torch.float32``.

    Returns:
        The count.

    Example:
        >>> machine_numbers(torch.float16), machine_numbers(torch.bfloat16)
        (63487, 65279)
    """
    info = torch.finfo(dtype)
    fraction = round(-math.log2(info.eps))
    return int(2**info.bits - 2 * 2**fraction - 1)


def clarke_guarantee(model: nn.Module, *args: Any, jacobians: Jacobians | None = None, **kwargs: Any) -> Guarantee:
    """Look for a theorem that promises an element of the Clarke subdifferential, in one forward.

    The loss is taken to be an analytic function of the model's output, as the cross-entropy is.

    Args:
        model: A patched model in eager mode.
        *args: The model's inputs: the batch.
        jacobians: The choice that the backward takes; by default the reference.
        **kwargs: The model's keyword inputs.

    Returns:
        The theorem that covers each site, or the reason why none does. A site that is not covered may have a gradient
        in the subdifferential all the same.

    Raises:
        ValueError: If the model is not patched.
        TypeError: If it is compiled.

    Example:
        >>> import nslightning
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> report = nslightning.patch(net, nslightning.Jacobians())
        >>> guarantee = clarke_guarantee(net, torch.ones(4, 2))
        >>> guarantee.always, guarantee.sites[0].reason
        (True, 'theorem 6: its own biases, and one share of the way for all its kinks')
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.enable_grad(), torch.random.fork_rng(sorted(devices, key=str)):
        look = _Look(jacobians or Jacobians())
        with observing(model, look):
            torch.func.functional_call(model, buffers, args, kwargs)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return Guarantee(list(look.guarantees()), str(dtype).removeprefix("torch."))


@dataclass
class _Seen:
    """One evaluation."""

    site: str
    operation: Operation
    tied: Count
    total: Count
    kinks: int
    shares: tuple[float, ...] | None  # the chosen derivative at each kink, as a share of the way from left to right
    biases: list[Tensor]
    size: int  # entries of the input
    weight: Tensor | None  # what a fully connected layer multiplies the samples by
    samples: Tensor | None  # the layer's input
    behind_relu: bool  # whether its entries that are 0 have the derivative 0
    dead: Tensor | bool  # whether all tied entries do
    call: Call | None  # of max pooling
    version: int  # of its input, which may be overwritten later


class _Look:
    """Looks at each evaluation of a forward."""

    def __init__(self, jacobians: Jacobians) -> None:
        self.jacobians = jacobians
        self.seen: list[_Seen] = []
        self.functions = SameFunctions()

    def __call__(self, site: str, operation: Operation, call: Call) -> None:
        # Of a transform's tensors no graph shows the layer below.
        for one in outside_transforms(tuple(call)) if in_functorch() else [call]:
            self._look(site, operation, Call(*one), None if in_functorch() else call.x.grad_fn)

    def _look(self, site: str, operation: Operation, call: Call, node: Any) -> None:
        with torch.no_grad():
            tied, total = operation.ties(call)
        weight, samples = (None, None) if node is None else _product(node, call.x)
        pools = operation.name == "max_pool"
        behind_relu = pools and self._behind_relu(node)
        if pools:
            self.functions.meet(call)
        self.seen.append(
            _Seen(
                site=site,
                operation=operation,
                tied=tied,
                total=total,
                kinks=_kinks(operation, call),
                shares=_shares(operation, self.jacobians, call.parameters),
                biases=list(_biases(node)),
                size=call.x.numel(),
                weight=weight,
                samples=samples,
                behind_relu=behind_relu,
                dead=pools_of_zero(call) if behind_relu else False,
                call=call if pools else None,
                version=call.x._version,
            )
        )

    def _behind_relu(self, node: Any) -> bool:
        relu = node is not None and (operation_of(node) == "relu" or node.name() == "ReluBackward0")
        return relu and self.jacobians.relu in (0.0, None)

    def _one_function(self, seen: _Seen) -> bool:
        """Return whether the choice at a max pooling's ties is one between copies of one function of the parameters."""
        if seen.call is None or seen.call.x._version != seen.version or self.jacobians.max_pool == "sum":
            return False
        return self.functions.one_in_each_window(seen.call, zeros=seen.behind_relu)

    def _read(self) -> None:
        """Read what lies on a device, by one transfer for all evaluations."""
        values = iter(numbers([value for seen in self.seen for value in (seen.tied, seen.total, seen.dead)]))
        for seen in self.seen:
            seen.tied, seen.total, seen.dead = int(next(values)), int(next(values)), bool(next(values))

    def guarantees(self) -> Iterator[SiteGuarantee]:
        """Return the knowledge about each evaluation."""
        self._read()
        uses = Counter(id(b) for seen in self.seen for b in seen.biases)
        weights = Counter(id(seen.weight) for seen in self.seen if seen.weight is not None and seen.tied)
        for seen in self.seen:
            own = [b for b in seen.biases if uses[id(b)] == 1]
            pointwise = seen.operation.kernels is not None
            kinks = int(seen.total) * seen.kinks if pointwise and (own or not seen.kinks) else None
            holds, always, reason = self._judge(seen, own, weights[id(seen.weight)] == 1)
            yield SiteGuarantee(seen.site, seen.operation.name, int(seen.tied), kinks, holds, always, reason)

    def _judge(self, seen: _Seen, own: list[Tensor], own_weight: bool) -> tuple[bool, bool, str]:
        if self.jacobians.rule != "exact":
            return not seen.tied, False, f"the rule {self.jacobians.rule!r} leaves the chain rule at ties"
        shares = seen.shares
        clarke = shares is not None and all(0 <= share <= 1 for share in shares)
        missing = []
        if seen.operation.kernels is not None:
            if not seen.kinks:
                return True, True, "it has no kink"
            if not clarke:
                missing.append("the chosen derivatives are no fixed numbers between the two sides")
            elif own and shares is not None and len(set(shares)) == 1:
                return True, True, "theorem 6: its own biases, and one share of the way for all its kinks"
            elif own:
                missing.append("its kinks have different shares of the way from left to right")
            else:
                missing.append("its input has no trainable bias of its own")
        if not seen.tied:
            return True, False, "no tie in this batch: it is differentiable there"
        if clarke and any(b.numel() == seen.size for b in own):
            return True, False, "theorem 1: a batch of one, and a bias of its own for each entry"
        if clarke and own_weight and seen.samples is not None and _independent(seen.samples):
            return True, False, "theorem 5: the samples are linearly independent below it"
        if seen.dead:
            return True, False, "theorem 8: its tied windows are 0 behind a ReLU with ReLU'(0) = 0"
        if self._one_function(seen):
            also = ", or 0 behind a ReLU with ReLU'(0) = 0" if seen.behind_relu else ""
            return True, False, f"its tied entries are one function of the parameters in each window{also}"
        if seen.operation.kernels is None:
            missing.append(f"{seen.tied:,} evaluations compare equal entries")
        return False, False, "; ".join(missing)


def _kinks(operation: Operation, call: Call) -> int:
    if operation.kernels is None:
        return 0
    positions = operation.positions(*call.parameters)
    return sum(not (isinstance(p, float) and math.isnan(p)) for p in positions)


def _shares(operation: Operation, jacobians: Jacobians, parameters: tuple[Any, ...]) -> tuple[float, ...] | None:
    """The chosen derivatives as shares of the way from the left side to the right; None where they are no numbers."""
    if operation.kernels is None or any(kink.jumps(*parameters) for kink in operation.kinks):
        return None
    if any(isinstance(p, Tensor) and p.requires_grad for p in parameters):
        return None  # a slope that is learned is no function of the entry alone
    choice = getattr(jacobians, operation.name)
    if choice is None or choice == getattr(Jacobians(), operation.name):
        return operation.taken or None
    shares = []
    chosen = choice if isinstance(choice, tuple) else (choice,)
    for value, kink in zip(chosen, operation.kinks, strict=False):
        left, right = kink.sides(*parameters) if kink.sides is not None else (None, None)
        if not all(isinstance(v, (int, float)) for v in (value, left, right)) or left == right:
            return None
        assert left is not None
        shares.append(float((value - left) / (right - left)))
    return tuple(shares) if len(shares) == len(operation.kinks) else None


def _biases(node: Any) -> Iterator[Tensor]:
    """The trainable biases that are added to every entry of what a node returns."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        name = node.name() if node is not None else ""
        if name in _BIAS:
            bias = node.next_functions[_BIAS[name]][0]
            if bias is not None:
                waiting.append(bias)
        elif name in _SUMS or name in _SAME_ENTRIES:
            waiting += [below for below, _ in node.next_functions]
        elif name == "torch::autograd::AccumulateGrad":
            yield node.variable


def _product(node: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The weight of a fully connected layer, and the samples that it is given."""
    below = getattr(node, _BELOW.get(node.name(), ""), None) if node.name() in _BELOW else None
    if not isinstance(below, Tensor) or below.dim() != 2 or x.dim() != 2:
        return None, None
    leaf = node.next_functions[_WEIGHT[node.name()]][0]
    while leaf is not None and leaf.name() in ("TBackward0", "TransposeBackward0"):
        leaf = leaf.next_functions[0][0]
    if leaf is None or leaf.name() != "torch::autograd::AccumulateGrad":
        return None, None
    return leaf.variable, below.detach()


def _independent(samples: Tensor) -> bool:
    return int(torch.linalg.matrix_rank(samples.double())) == len(samples)
