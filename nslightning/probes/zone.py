"""Decides whether two Jacobian choices give one gradient, two, or two by rounding only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nslightning.choices import Choice, to_jacobians
from nslightning.jacobians import Jacobians
from nslightning.probes.branches import Branches
from nslightning.probes.divergence import SAME, Divergence, Method, measure
from nslightning.probes.gradients import gradients_in_turn, wanted
from nslightning.probes.graph import (
    UnseenError,
    check_loss,
    communicates,
    opaque_nodes,
    operation_nodes,
    refuse_compiled,
    reruns_forward,
)
from nslightning.probes.propagation import Recording, Starts, agrees, recording, refuse_eager_only, refuse_random
from nslightning.probes.replay import Replay
from nslightning.probes.shards import is_shard
from nslightning.probes.sums import dense, numbers, waits, wide
from nslightning.probes.ties import observing
from nslightning.surgery import using

__all__ = ["THRESHOLDS", "NoZoneError", "Zone", "differs_bitwise", "l1_sum", "linf_sum", "zone"]

#: Above which the sum over the parameters of the L-infinity norm of the gradient difference counts as a difference, by
#: precision (Boustany 2024, section 3.3; bfloat16 was not measured there and has half precision's).
THRESHOLDS: dict[torch.dtype, float] = {
    torch.float16: 1e-3,
    torch.bfloat16: 1e-3,
    torch.float32: 1e-7,
    torch.float64: 1e-15,
}

_FACTORS = (1 / 3, 0.7, 1.1)  # no powers of two
_SHRINK = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps  # 2^-29


class NoZoneError(ValueError):
    """The gradients lie in no zone: they are not finite in float64 either."""


@dataclass(frozen=True)
class Zone:
    """The zone that a network's parameters and a batch lie in for a pair of choices, and the evidence.

    Args:
        kind: ``"regular"``: the two gradients are the same. ``"bifurcation"``: they differ over the reals.
            ``"compensation"``: they differ as computed, and agree over the reals.
        observed: The divergence of the two gradients as computed, by subtraction; zero where no tie matters.
        noise: The divergence of one choice's gradient computed twice: an ``observed`` below it means nothing. It is
            exactly 0 where sums repeat themselves, and not under :class:`~nslightning.arithmetic.RandomRounding` or
            with kernels that add up in no fixed order. None where nothing was subtracted, since no tie matters.
        difference: Euclidean norm of the difference over the reals, as float64 has it; 0 in the regular zone, where it
            is not asked for.
        rounding: The largest norm that rounding alone can have left; a smaller ``difference`` is not resolved.
        method: The way to the difference over the reals: carried down from the ties, or, where the loss's graph does
            not show them all or a hook is not linear, as the difference of two gradients in float64.
    """

    kind: Literal["regular", "bifurcation", "compensation"]
    observed: Divergence
    noise: Divergence | None
    difference: float = 0.0
    rounding: float = 0.0
    method: Method = "propagate"

    def __str__(self) -> str:
        """The kind and the norms that decide it, on one line."""
        text = f"{self.kind}: the gradients differ by {self.observed.l2:.3g} as computed"
        if self.noise is not None and self.noise.l2:
            text += f" (one choice's from itself by {self.noise.l2:.3g})"
        if self.kind == "regular":
            return text
        return (
            f"{text}, by {self.difference:.3g} over the reals, of which rounding can be {self.rounding:.2g} "
            f"({self.method})"
        )


def zone(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    inputs: Any,
    a: Choice,
    b: Choice = Jacobians(),  # noqa: B008 # frozen
) -> Zone:
    r"""The zone of a pair of choices, at a model's parameters and on a batch, without a threshold to choose.

    If no tie was met, if what the ties make of the choices dies before it reaches a parameter, or if the two gradients
    are finite and have the same bits, the zone is *regular*. Else the difference

    .. math:: D = \sum_i J_i^T\,(J_{a,i} - J_{b,i})^T g_i

    (the sum over the ties i, :math:`J_i` what lies below one) is asked for over the reals. The forward runs again in
    float64 and each operation is made to take the branch that it took in the model's own precision: the same entries
    tie, are active, or win their window. Parameters, buffers and inputs are cast exactly, batch norm computes its
    statistics again, dropout draws the same masks. D is then carried down (:func:`~nslightning.probes.differences`).

    D in float64 is never quite 0 where terms cancel: over a constant background, say, every tied entry stands on
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

    Where operations hide from the loss's graph (in reentrant checkpoints, in custom functions that run patched parts),
    or where hooks or custom backwards are not linear, D cannot be carried down. It is then the difference of the two
    gradients on the imposed branches, the second error what becomes of it if the loss is multiplied by numbers that
    are no powers of two, and ``method`` says ``"subtract"``. Where twice the loss has not twice the difference, since a
    hook clips, say, M is the norm of the two gradients instead.

    The terms are those of Bertoin et al. 2021 and Boustany 2024, section 3.3. The model, its buffers and the random
    streams stay as they were.

    Args:
        model: A patched model, or one that contains patched ones, in eager mode.
        loss_fn: Takes the model's output and returns a 0-d loss, in any precision (a cast to float32 in it, or in the
            model, rounds the replay, too: what is a compensation may be called a bifurcation); an ``nn.Module`` is
            cast like the model.
        inputs: The model's input, a tuple of positional or a dict of keyword arguments.
        a: One choice.
        b: The other; stock PyTorch's by default.

    Returns:
        The zone with its evidence.

    Raises:
        ValueError: If the model is not patched or a part of it is compiled, an operation runs under ``torch.vmap``, no
            parameter requires gradients, a choice is random, the parameters are distributed over processes, or the
            backward exchanges values between them.
        NoZoneError: If gradients are not finite even in float64; it is a ``ValueError``.
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
    one, other = to_jacobians(a), to_jacobians(b)
    refuse_random(one, other)
    refuse_eager_only(model)
    if any(map(is_shard, model.parameters())):  # a replay would differentiate for whole ones, which it does not know
        raise UnseenError(
            "a zone is one process's, and the parameters are distributed over processes (FSDP2, tensor parallel)",
            "look for zones in one process",
        )
    run = Replay(model, loss_fn, inputs)
    with using(model, other):
        compared = run.at(None, lambda loss: _compare(model, loss, one, other))
    if compared is None:
        return Zone("regular", _nothing(model), None)
    observed, noise, computed, method = compared
    if computed is None:
        return Zone("regular", observed, noise, method=method)
    branches = Branches()
    with observing(model, branches.record):
        run.at(None, lambda loss: None)
    work = _subtracted if method == "subtract" else _carried
    coarse = computed if run.is_in(torch.float32) else _replay(run, torch.float32, branches, one, other, work)
    exact = _replay(run, torch.float64, branches, one, other, work if method == "subtract" else _carried_alone)
    difference = _norm(exact.difference)
    if not math.isfinite(difference):
        raise NoZoneError("the gradients are not finite in float64 either: parameters that diverged lie in no zone")
    left = _norm(c.to(e.dtype) - e for c, e in zip(coarse.difference, exact.difference, strict=True))
    terms = exact.terms if method == "subtract" else coarse.terms
    rounding = max(_SHRINK * left if math.isfinite(left) else 0.0, terms * 2.0**-53)
    real = difference > rounding / math.sqrt(_SHRINK)
    return Zone("bifurcation" if real else "compensation", observed, noise, difference, rounding, method)


def differs_bitwise(a: Mapping[str, Tensor], b: Mapping[str, Tensor], first: bool = False) -> bool:
    """Return whether two sets of gradients differ in any bit; two NaN are the same, and so are the two zeros.

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
    same = (((x == y) | (x.isnan() & y.isnan())).all() for x, y in pairs)
    on_device = any(waits(x.device) for x, _ in pairs)
    return not all(numbers(list(same)) if on_device else same)  # a CPU stops at the first that differs


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
class _Difference(NamedTuple):
    """A difference, and the Euclidean norm of what it was summed up from."""

    difference: tuple[Tensor, ...]
    terms: float


def _compare(
    model: nn.Module, loss: Tensor, a: Jacobians, b: Jacobians
) -> tuple[Divergence, Divergence, _Difference | None, Method] | None:
    """The difference of the two gradients as computed, the noise, and where a bit differs the difference of its terms.

    None if no tie matters. The noise of kernels that add up in no fixed order does not pass for a difference: what the
    ties make of the choices has to arrive, with weights that keep it from cancelling.
    """
    check_loss(loss, model)
    refuse_compiled(loss)
    if communicates(loss):
        raise UnseenError(
            "a zone is one process's, and this backward exchanges values between processes (SyncBatchNorm, say)",
            "look for zones in one process",
        )
    if not any(operation_nodes(loss, (a, b))) and not any(opaque_nodes(loss)):
        return None
    named = wanted(model)
    tensors = list(named.values())
    turns = gradients_in_turn(loss, model, [b, a], named)
    with recording(model) as met:
        one = next(turns)
    method: Method = "propagate"
    try:
        if reruns_forward(loss):
            raise UnseenError("its operations are computed again in the backward", "")
        met.refuse_strangers(loss)
    except UnseenError:
        method = "subtract"
    terms = _terms(met, a, tensors) if method == "propagate" else math.inf
    if not terms:
        return None
    (other,) = turns
    (again,) = gradients_in_turn(loss, model, [b], named)
    observed, noise = measure(other, one), measure(again, one)
    if not differs_bitwise(other, one) and math.isfinite(observed.l1):
        return observed, noise, None, method
    if method == "propagate":
        carried = met.carry(met.starts(a), a, tensors)
        try:
            agrees(loss, other, one, dict(zip(named, carried, strict=True)))
            return observed, noise, _Difference(carried, terms), method
        except UnseenError:
            method = "subtract"
    return observed, noise, _between(other, one), method


def _nothing(model: nn.Module) -> Divergence:
    return replace(SAME, per_layer=dict.fromkeys(wanted(model), SAME))


def _between(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> _Difference:
    pairs = [(dense(a[name]), dense(b[name])) for name in b]
    pairs = [(x.to(wide(x.dtype)), y.to(wide(y.dtype))) for x, y in pairs]
    return _Difference(tuple(x - y for x, y in pairs), _norm(t for pair in pairs for t in pair))


def _scattered(starts: Starts) -> tuple[Starts, float]:
    """Every term of a difference with a random sign and size, by a factor that no precision loses; and the factor."""
    generator = torch.Generator().manual_seed(0)
    largest = max(numbers([d.detach().abs().max() for _, d in starts]), default=0.0)
    scale = 256.0 / largest if math.isfinite(largest) and largest > 0 else 1.0

    def weights(d: Tensor) -> Tensor:
        uniform = torch.empty(d.shape).uniform_(-1, 1, generator=generator)
        return uniform.add_(uniform.sgn()).to(d)

    return [(edge, (d * scale * weights(d)).detach()) for edge, d in starts], scale


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(numbers([t.to(wide(t.dtype)).abs().square().sum() for t in tensors])))


# ------------------------------------------------------------------------------------- the model over the reals
def _terms(met: Recording, a: Jacobians, tensors: Sequence[Tensor]) -> float:
    scattered, scale = _scattered(met.starts(a))
    return _norm(met.carry(scattered, a, tensors)) / scale


def _carried_alone(run: Replay, loss: Tensor, a: Jacobians, b: Jacobians) -> _Difference:
    tensors = list(wanted(run.model).values())
    with recording(run.model) as met, using(run.model, b):
        met.meet(loss, (a, b))
    return _Difference(met.carry(met.starts(a), a, tensors), 0.0)


def _carried(run: Replay, loss: Tensor, a: Jacobians, b: Jacobians) -> _Difference:
    tensors = list(wanted(run.model).values())
    with recording(run.model) as met, using(run.model, b):
        met.meet(loss, (a, b))
    return _Difference(met.carry(met.starts(a), a, tensors), _terms(met, a, tensors))


def _subtracted(run: Replay, loss: Tensor, a: Jacobians, b: Jacobians) -> _Difference:
    """By whole gradients, of the loss and of its multiples by numbers that make it round in another way each time."""
    named = wanted(run.model)
    unscaled = _between(*gradients_in_turn(loss, run.model, [a, b], named))

    def gap(factor: float) -> float:
        scaled = _between(*gradients_in_turn(loss * factor, run.model, [a, b], named))
        return _norm(s / factor - d for s, d in zip(scaled.difference, unscaled.difference, strict=True))

    # Twice a number has the same digits: what differs there is a hook that does not scale, such as one that clips.
    if gap(2.0) > math.sqrt(torch.finfo(torch.float64).eps) * unscaled.terms:
        return unscaled
    return unscaled._replace(terms=max(unscaled.terms, *(gap(factor) * 2.0**53 for factor in _FACTORS)))


def _replay(
    run: Replay,
    dtype: torch.dtype,
    branches: Branches,
    a: Jacobians,
    b: Jacobians,
    work: Callable[[Replay, Tensor, Jacobians, Jacobians], _Difference],
) -> _Difference:
    """The difference in another precision on the recorded branches."""

    def body(loss: Tensor) -> _Difference | None:
        branches.again = True
        return work(run, loss, a, b) if branches.holds() else None

    # A CPU sees at once that a pooling is on its branch.
    on_device = any(waits(p.device) for p in run.model.parameters())
    for leave_poolings in (True, False) if on_device else (False,):
        branches.begin(leave_poolings)
        with observing(run.model, branches.impose):
            difference = run.at(dtype, body)
        if difference is not None:
            return difference
    raise AssertionError("a replay whose poolings are moved holds")
