"""Whether two Jacobian choices give the same gradient, another one, or another one by rounding only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nslightning.jacobians import Jacobians
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.pointwise import POINTWISE
from nslightning.ops.registry import Call, Operation
from nslightning.probes.divergence import SAME, Divergence, dense, measure
from nslightning.probes.gradients import gradients, gradients_in_turn, wanted
from nslightning.probes.graph import operation_nodes, refuse_hidden
from nslightning.probes.propagation import Recording, Starts, recording, refuse_compiled, refuse_random
from nslightning.probes.replay import Replay
from nslightning.probes.ties import observing
from nslightning.surgery import using

__all__ = ["THRESHOLDS", "Zone", "differs_bitwise", "l1_sum", "linf_sum", "zone"]

#: Above which the sum over the parameters of the L-infinity norm of the gradient difference counts as a difference, by
#: precision (Boustany 2024, section 3.3; bfloat16 was not measured there and has half precision's).
THRESHOLDS: dict[torch.dtype, float] = {
    torch.float16: 1e-3,
    torch.bfloat16: 1e-3,
    torch.float32: 1e-7,
    torch.float64: 1e-15,
}

_T = TypeVar("_T")
_SHRINK = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps  # 2^-29


@dataclass(frozen=True)
class Zone:
    """The zone that a network's parameters and a batch lie in for a pair of choices, and the evidence.

    Args:
        kind: ``"regular"``: the two gradients are the same. ``"bifurcation"``: they differ over the reals.
            ``"compensation"``: they differ as computed, and agree over the reals.
        observed: The divergence of the two gradients as computed, by subtraction; zero where no tie matters.
        noise: The divergence of one choice's gradient computed twice: the floor of what ``observed`` can tell. None
            where nothing was subtracted, since no tie matters.
        difference: Euclidean norm of the difference over the reals, as float64 has it; 0 in the regular zone, where it
            is not asked for.
        rounding: What rounding can have left of it: a norm of which float64 can tell nothing below.
    """

    kind: Literal["regular", "bifurcation", "compensation"]
    observed: Divergence
    noise: Divergence | None
    difference: float = 0.0
    rounding: float = 0.0


def zone(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    inputs: Any,
    a: Jacobians,
    b: Jacobians = Jacobians(),  # noqa: B008 # frozen
) -> Zone:
    r"""The zone of a pair of choices, at a model's parameters and on a batch, without a threshold to choose.

    If no tie was met, if what the ties make of the choices dies before it reaches a parameter, or if the two gradients
    have the same bits, the zone is *regular*. Else the difference

    .. math:: D = \sum_i J_i^T\,(J_{a,i} - J_{b,i})^T g_i

    (the sum over the ties i, :math:`J_i` what lies below one) is asked for over the reals. The forward runs again in
    float64 and each operation is made to take the branch that it took in the model's own precision: the same entries
    tie, are active, or win their window. Parameters, buffers and inputs are cast exactly, batch norm forms its
    statistics anew, dropout draws the same masks. D is then carried down (:func:`~nslightning.probes.differences`).

    What float64 finds is never quite 0 where terms cancel: over a constant background, say, every tied entry stands on
    the same patch, and its weight gets the sum of what the entries gain and lose. Two errors of D are therefore
    measured, not bounded a priori:

    * the same replay in float32, with the same branches, gives :math:`D_{32}`. Rounding is proportional to the
      precision's unit, a difference is not, so :math:`2^{-29}\,\lVert D_{32} - D \rVert` estimates what rounding left
      in D, forward and backward, whatever the conditioning;
    * random weights on the terms of D keep them from cancelling: :math:`M = \lVert \sum_i \xi_i J_i^T \ldots \rVert`
      with normal :math:`\xi` (one per tied entry) is the size of what was summed, and no sum in float64 is known better
      than to :math:`2^{-53} M`. It guards against a float32 that is exact by luck.

    ``rounding`` is the larger one. D is rounding (*compensation*) if it exceeds that by less than
    :math:`2^{29/2}`, and a difference (*bifurcation*) if by more: under the first hypothesis D shrinks by the whole
    factor :math:`2^{29}` from float32 to float64, under the second not at all, and the middle between the two, on the
    scale of digits, is the one cut that favours neither. In practice the ratio is near 1 or above :math:`10^{6}`.

    The terms are those of Bertoin et al. 2021 and Boustany 2024, section 3.3. The model, its buffers and the random
    streams stay as they were.

    Args:
        model: A patched model, or one that contains patched ones, in eager mode.
        loss_fn: Takes the model's output and returns a 0-d loss, in any precision (a cast to float32 in it rounds the
            replay, too); an ``nn.Module`` is cast like the model.
        inputs: The model's input, a tuple of positional or a dict of keyword arguments.
        a: One choice.
        b: The other; stock PyTorch's by default.

    Returns:
        The zone with its evidence.

    Raises:
        ValueError: If the model is not patched or compiled, an operation runs under ``torch.vmap``, no parameter
            requires gradients, a choice is random, or gradients are not finite even in float64.
        RuntimeError: If the forward evaluates other operations in float64 than in the model's precision.

    Example:
        >>> import nslightning
        >>> model = nn.Sequential(nn.Linear(1, 4), nn.ReLU())
        >>> _ = nn.init.ones_(model[0].weight), nn.init.zeros_(model[0].bias)
        >>> report = nslightning.patch(model, Jacobians())
        >>> x, one = torch.tensor([[0.0]]), Jacobians(relu=1.0)
        >>> zone(model, torch.sum, x, one).kind, zone(model, torch.sum, x + 1, one).kind
        ('bifurcation', 'regular')
    """
    refuse_random(a, b)
    refuse_compiled(model)
    run = Replay(model, loss_fn, inputs)
    with using(model, b):
        found = run.at(None, lambda loss: _compare(model, loss, a, b))
    if found is None:
        return Zone("regular", _nothing(model), None)
    observed, noise, met = found
    if met is None:
        return Zone("regular", observed, noise)
    branches = _Branches()
    with observing(model, branches.record):
        run.at(None, lambda loss: None)
    coarse, terms = met if run.is_in(torch.float32) else _replay(run, torch.float32, branches, a, b, _with_terms)
    exact = _replay(run, torch.float64, branches, a, b, _carried)
    difference = _norm(exact)
    if not math.isfinite(difference):
        raise ValueError("the gradients are not finite in float64 either: parameters that diverged lie in no zone")
    left = _norm(c.double() - e for c, e in zip(coarse, exact, strict=True))
    rounding = max(_SHRINK * left if math.isfinite(left) else 0.0, terms * 2.0**-53)
    real = difference > rounding / math.sqrt(_SHRINK)
    return Zone("bifurcation" if real else "compensation", observed, noise, difference, rounding)


def differs_bitwise(a: Mapping[str, Tensor], b: Mapping[str, Tensor], first: bool = False) -> bool:
    """Whether two sets of gradients differ in any bit; two NaN are the same, and so are the two zeros.

    Args:
        a: Gradients by parameter name.
        b: Gradients of the same names.
        first: Look at the first parameter only, the first layer's weight: Bertoin et al. 2021 count parameters as
            lying in their set S_01 by that.

    Returns:
        Whether they differ.
    """
    names = list(a)[:1] if first else list(a)
    pairs = [(dense(a[n]), dense(b[n])) for n in names if a[n] is not b[n]]
    return not all(bool(((x == y) | (x.isnan() & y.isnan())).all()) for x, y in pairs)


def linf_sum(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The sum over the parameters of the largest absolute difference.

    Boustany 2024 counts a mini-batch where it exceeds the precision's threshold (:data:`THRESHOLDS`).

    Args:
        a: Gradients by parameter name.
        b: Gradients of the same names.

    Returns:
        The sum, formed in float64.
    """
    return sum(d.linf for d in measure(a, b).per_layer.values())


def l1_sum(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The sum of all absolute differences, of which Boustany 2024 draws histograms to find the thresholds.

    Args:
        a: Gradients by parameter name.
        b: Gradients of the same names.

    Returns:
        The sum, formed in float64.
    """
    return measure(a, b).l1


# ------------------------------------------------------------------------------------------ the model as it is
def _compare(
    model: nn.Module, loss: Tensor, a: Jacobians, b: Jacobians
) -> tuple[Divergence, Divergence, _WithTerms | None] | None:
    """The difference of the two gradients as computed, the noise, and where a bit differs what was carried down.

    None if no tie matters. The noise of kernels that add up in no fixed order does not pass for a difference: what the
    ties make of the choices has to arrive, with weights that keep it from cancelling.
    """
    refuse_hidden(loss)
    if not any(operation_nodes(loss, (a, b))):
        return None
    named = wanted(model)
    turns = gradients_in_turn(loss, model, (b, a), named)
    with recording(model) as met:
        one = next(turns)
    if not (terms := _terms(met, a, list(named.values()))):
        return None
    (other,) = turns
    (again,) = gradients(loss, model, {"": b}).values()
    observed, noise = measure(other, one), measure(again, one)
    if not differs_bitwise(other, one):
        return observed, noise, None
    return observed, noise, _WithTerms(_carried(met, a, list(named.values())), terms)


def _nothing(model: nn.Module) -> Divergence:
    return replace(SAME, per_layer=dict.fromkeys(wanted(model), SAME))


def _scattered(starts: Starts) -> tuple[Starts, float]:
    """Every term of a difference with a random sign and size, by a factor that no precision loses; and the factor."""
    generator = torch.Generator().manual_seed(0)
    largest = max((float(d.detach().abs().max()) for _, d in starts), default=0.0)
    scale = 256.0 / largest if math.isfinite(largest) and largest > 0 else 1.0

    def weights(d: Tensor) -> Tensor:
        uniform = torch.empty(d.shape).uniform_(-1, 1, generator=generator)
        return uniform.add_(uniform.sgn()).to(d)

    return [(edge, (d * scale * weights(d)).detach()) for edge, d in starts], scale


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


# ------------------------------------------------------------------------------------- the model over the reals
class _WithTerms(NamedTuple):
    """A difference, and the Euclidean norm that its terms have where they do not cancel."""

    difference: tuple[Tensor, ...]
    terms: float


def _carried(met: Recording, a: Jacobians, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return met.carry(met.starts(a), a, tensors)


def _terms(met: Recording, a: Jacobians, tensors: Sequence[Tensor]) -> float:
    scattered, scale = _scattered(met.starts(a))
    return _norm(met.carry(scattered, a, tensors)) / scale


def _with_terms(met: Recording, a: Jacobians, tensors: Sequence[Tensor]) -> _WithTerms:
    return _WithTerms(_carried(met, a, tensors), _terms(met, a, tensors))


def _replay(
    run: Replay,
    dtype: torch.dtype,
    branches: _Branches,
    a: Jacobians,
    b: Jacobians,
    work: Callable[[Recording, Jacobians, Sequence[Tensor]], _T],
) -> _T:
    """Do something with what ties meet in another precision on the recorded branches."""

    def body(loss: Tensor) -> _T:
        branches.again = True
        with recording(run.model) as met, using(run.model, b):
            met.meet(loss, (a, b))
        return work(met, a, list(wanted(run.model).values()))

    branches.again, branches.met = False, {}
    with observing(run.model, branches.impose):
        return run.at(dtype, body)


@dataclass
class _Branches:
    """What each evaluation of each site was given, and so which branch it took.

    Args:
        seen: By site, per evaluation the floating tensors among what the operation was given.
        met: By site, how many evaluations the replay has come to.
        again: Whether the forward is over: what is evaluated now is a checkpoint computed once more.
    """

    seen: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    met: dict[str, int] = field(default_factory=dict)
    again: bool = False

    def record(self, site: str, operation: Operation, call: Call) -> None:
        """Keep what a site is given."""
        self.seen.setdefault(site, []).append([t.detach().clone() for t in _operands(call)])

    def impose(self, site: str, operation: Operation, call: Call) -> None:
        """Make a site take the recorded branch: overwrite what it is about to be given, as little as needed.

        The values belong to a replay's own tensors. They are overwritten behind autograd's back, which differentiates
        as if rounding had led to the same branch.
        """
        operands, recorded = _operands(call), self.seen.get(site, [])
        shapes = [t.shape for t in operands]
        if self.again:  # the record that is nearest, where one site was evaluated several times
            fitting = [seen for seen in recorded if [t.shape for t in seen] == shapes]
            fitting.sort(key=lambda seen: float((seen[0] - operands[0].detach()).abs().nan_to_num().sum()))
            seen = fitting[0] if fitting else None
        else:
            number = self.met.get(site, 0)
            self.met[site] = number + 1
            seen = recorded[number] if number < len(recorded) else None
        if seen is None or [t.shape for t in seen] != shapes:
            raise RuntimeError(f"in another precision the forward evaluates {site or 'the model'} otherwise")
        with torch.no_grad():
            for x, before in zip(operands, seen, strict=True):
                if (moved := _on_branch(operation, call, x.detach(), before)) is not None:
                    x.data.copy_(moved)


def _operands(call: Call) -> list[Tensor]:
    return [t for t in tree_leaves(tuple(call)) if isinstance(t, Tensor) and t.is_floating_point()]


def _on_branch(operation: Operation, call: Call, x: Tensor, seen: Tensor) -> Tensor | None:
    """``x`` where it leads to the branch that ``seen`` took, else ``seen``; None where all of it does."""
    other = seen.to(x.dtype)
    if operation.name in POINTWISE:
        moved, kinks = x, [position for position, _ in POINTWISE[operation.name].kinks(*call.parameters)]
        for kink in kinks:
            off = ((x > kink) != (seen > kink)) | ((x < kink) != (seen < kink))
            if off.any():
                moved = torch.where(off & ~seen.isnan(), other, moved)
        for kink in kinks:  # which may not be a number of the lower precision
            if (tied := seen == kink).any():
                moved = torch.where(tied, kink, moved)
        return None if moved is x else moved
    if operation.name == "max_pool":  # plane by plane: windows overlap
        planes = x.dim() - call.parameters[0].dims
        same = (_winners(operation, call, x) == _winners(operation, call, other)) | seen.isnan()
        same = same.flatten(planes).all(planes)
        return None if same.all() else torch.where(same.reshape(x.shape[:planes] + (1,) * (x.dim() - planes)), x, other)
    return other


def _winners(operation: Operation, call: Call, x: Tensor) -> Tensor:
    """Which entries reach the maximum of which pooling windows: each window has a random number, each entry a sum."""
    apart = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)  # not a checkpoint's, which would run it again
    with torch.enable_grad(), apart:
        leaf = x.detach().requires_grad_()
        pooled = operation.apply(Selection(Jacobians(max_pool="sum")), call._replace(x=leaf, return_indices=False))
        numbers = torch.rand(pooled.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (sums,) = torch.autograd.grad(pooled, leaf, numbers.to(pooled))
    return sums


def _itself(saved: Tensor) -> Tensor:
    return saved
