"""Audits how far a model's gradients depend on the Jacobian choice: ties, divergence, and a one-word verdict."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning.jacobians import Jacobians
from nslightning.ops.record import OPERATIONS
from nslightning.probes.by_hand import Handwritten, handwritten
from nslightning.probes.divergence import Divergence, divergence, measure
from nslightning.probes.gradients import gradients
from nslightning.probes.guarantee import Guarantee, clarke_guarantee
from nslightning.probes.ties import Ties, counting
from nslightning.probes.zone import zone
from nslightning.surgery import PatchReport, PatchWarning, patch

__all__ = [
    "CHOICES",
    "DTYPES",
    "Audit",
    "ByHand",
    "NotRunningError",
    "SiteTies",
    "Spread",
    "audit",
    "choices_of_an_audit",
    "matters",
    "rounding",
    "verdict",
    "visible",
]

DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}

#: The choices that an audit always compares with stock PyTorch's; :func:`choices_of_an_audit` adds others.
CHOICES: dict[str, Jacobians] = {
    "jax": Jacobians.preset("jax"),
    "tensorflow": Jacobians.preset("tensorflow"),
    "relu1": Jacobians(relu=1.0, relu6=(1.0, 1.0)),
    "minimal": Jacobians(max_pool="minimal"),
    "beta10": Jacobians(max_pool=10.0),
}


def choices_of_an_audit() -> dict[str, Jacobians]:
    """The choices that an audit compares with stock PyTorch's by default.

    Returns:
        :data:`CHOICES`, and for each operation that these leave alone the ends of its Clarke Jacobian that stock does
        not take, each by itself. Operations that were registered from outside the package are among them.

    Example:
        >>> [name for name in choices_of_an_audit() if "hardswish" in name]
        ['hardswish=(0.0, 1.5)', 'hardswish=(-0.5, 1.0)']
    """
    reference = Jacobians()
    added: dict[str, Jacobians] = {}
    for name, record in OPERATIONS.items():
        if all(getattr(choice, name) == getattr(reference, name) for choice in CHOICES.values()):
            ends = [end for end in dict.fromkeys(record.elements(*record.at)) if end not in (None, "random")]
            added |= {f"{name}={end}": Jacobians(**{name: end}) for end in ends}
    return CHOICES | added


class NotRunningError(RuntimeError):
    """A model fails in every precision that was asked for."""


@dataclass(frozen=True)
class SiteTies:
    """One site, and the ties it met.

    Args:
        name: The site; a functional call is ``"<module>:<function>"``.
        operation: Field of :class:`~nslightning.Jacobians`, or the function where it has no choice.
        how: ``"module"``, ``"functional"`` or ``"unreached"``.
        kind: The module's class or the function.
        ties: Per dtype (tied evaluations, all evaluations), over all batches; empty where unreached.
    """

    name: str
    operation: str
    how: str
    kind: str
    ties: dict[str, tuple[int, int]] = field(default_factory=dict)

    def fraction(self, dtype: str) -> float:
        """Tied evaluations as a share of all.

        Args:
            dtype: A name in :data:`DTYPES`.

        Returns:
            The share; 0 where nothing was evaluated.
        """
        tied, total = self.ties.get(dtype, (0, 0))
        return tied / total if total else 0.0


@dataclass(frozen=True)
class Spread:
    """The distance of one choice's gradient from the reference's, in one dtype.

    Args:
        choice: Name of the choice.
        dtype: A name in :data:`DTYPES`.
        relative: ``||g_choice - g_reference|| / ||g_reference||`` over all parameters, the largest over the
            batches (NaN, where gradients are not finite, counts as largest); exactly 0 where no tie matters.
        cosine: Cosine between the two gradients on that batch.
        per_batch: ``relative`` of every batch.
        layers: The parameters with the largest share of the squared difference on that batch.
        zone: ``"bifurcation"`` where the gradients of that batch differ over the reals, ``"compensation"`` where the
            difference is rounding; None where this was not asked (:func:`~nslightning.probes.zone`).
    """

    choice: str
    dtype: str
    relative: float
    cosine: float
    per_batch: list[float]
    layers: dict[str, float] = field(default_factory=dict)
    zone: str | None = None


@dataclass(frozen=True)
class ClarkeCheck:
    """The promise of theorems that stock PyTorch's gradient lies in the Clarke subdifferential.

    Args:
        holds: Whether theorems promise it on these batches. False means that it is not known.
        always: Whether theorems promise it on every batch.
        bound: At most this share of the values that its biases may have puts an evaluation of a batch on a kink, the
            largest of the batches; None where that is not known (:attr:`nslightning.probes.Guarantee.bound`).
        missing: The sites that no theorem covers, with the reason.
    """

    holds: bool
    always: bool
    bound: float | None
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ByHand:
    """A line of the model's code that has a kink without an operation, and met ties.

    Args:
        name: The module whose code it is.
        place: File and line.
        code: The line.
        ties: Per dtype (tied evaluations, all evaluations), over all batches.
        relative: Per dtype, how much of its norm the gradient changes where the ties are decided otherwise, the largest
            over the batches.
    """

    name: str
    place: str
    code: str
    ties: dict[str, tuple[int, int]] = field(default_factory=dict)
    relative: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Audit:
    """The findings of an audit.

    Args:
        model: The model's name.
        data: Name of the batches, such as the data set and the seed.
        device: The device on which it ran.
        training: Whether in training mode, else in evaluation mode.
        torch: Version of torch: the reference choice depends on it.
        batches: Number of batches.
        shape: Shape of the first batch.
        choices: The choices compared with stock PyTorch's, as plain values.
        dtypes: The dtypes measured.
        not_run: Dtypes that could not be run, and why.
        sites: Every site of the patch report.
        spreads: One per dtype and choice.
        noise: Per dtype, the largest relative difference of the reference's gradient taken twice, by
            subtraction.
        clarke: Per dtype, whether theorems promise an element of the Clarke subdifferential; empty in findings that
            were written before this was looked at.
        by_hand: Kinks that are written by hand, and met ties (:func:`~nslightning.probes.handwritten`).
    """

    model: str
    data: str
    device: str
    training: bool
    torch: str
    batches: int
    shape: tuple[int, ...]
    choices: dict[str, dict[str, Any]]
    dtypes: list[str]
    not_run: dict[str, str]
    sites: list[SiteTies]
    spreads: list[Spread]
    noise: dict[str, float]
    clarke: dict[str, ClarkeCheck] = field(default_factory=dict)
    by_hand: list[ByHand] = field(default_factory=list)

    @property
    def largest(self) -> float:
        """The largest relative divergence; NaN if one is NaN, 0 if there is none."""
        return max((spread.relative for spread in self.spreads), key=_badness, default=0.0)

    @property
    def tied_sites(self) -> list[SiteTies]:
        """The sites that met a tie in some dtype, the most often tied first."""
        tied_sites = [site for site in self.sites if any(tied for tied, _ in site.ties.values())]
        return sorted(tied_sites, key=lambda site: -max(map(site.fraction, site.ties)))

    def to_dict(self) -> dict[str, Any]:
        """The audit as plain data.

        Returns:
            JSON-ready values; numbers that are not finite are the words ``"nan"``, ``"inf"`` and ``"-inf"``, since
            JSON has no number for them.
        """
        plain: dict[str, Any] = _finite(asdict(self) | {"largest": self.largest})
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Audit:
        """The audit that :meth:`to_dict` wrote.

        Args:
            plain: Its result, also after a trip through JSON.

        Returns:
            An equal audit.

        Example:
            >>> import json
            >>> measured = Audit("net", "synthetic", "cpu", True, "2", 1, (1, 2), {}, ["32"], {}, [], [], {"32": 0.0})
            >>> Audit.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured
            True
        """
        values = {f.name: plain[f.name] for f in fields(cls) if f.name in plain or f.name not in ("by_hand", "clarke")}
        values["by_hand"] = [
            ByHand(
                **line
                | {"ties": {d: (tied, total) for d, (tied, total) in line["ties"].items()}}
                | {"relative": {d: float(value) for d, value in line["relative"].items()}}
            )
            for line in values.get("by_hand", [])
        ]
        values["shape"] = tuple(values["shape"])
        values["choices"] = {name: Jacobians(**choice).to_dict() for name, choice in values["choices"].items()}
        values["noise"] = {dtype: float(value) for dtype, value in values["noise"].items()}
        values["sites"] = [
            SiteTies(**site | {"ties": {d: (tied, total) for d, (tied, total) in site["ties"].items()}})
            for site in values["sites"]
        ]
        values["spreads"] = [
            Spread(
                **s
                | {name: float(s[name]) for name in ("relative", "cosine")}
                | {"per_batch": [float(value) for value in s["per_batch"]]}
            )
            for s in values["spreads"]
        ]
        values["clarke"] = {dtype: ClarkeCheck(**check) for dtype, check in plain.get("clarke", {}).items()}
        return cls(**values)


def audit(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor | None]],
    *,
    dtypes: Sequence[str] = tuple(DTYPES),
    choices: Mapping[str, Jacobians] | None = None,
    device: str | torch.device = "cpu",
    training: bool = True,
    seed: int = 0,
    top: int = 5,
    name: str | None = None,
    data: str = "given batches",
    progress: Callable[[str], None] | None = None,
) -> Audit:
    """Count ties and measure divergence in several precisions.

    For each dtype a copy of the model runs in that dtype throughout (no mixed precision, no loss scaling), on every
    batch once: the ties are those of that very forward, and the divergence is carried down from them
    (:func:`~nslightning.probes.divergence` with ``method="propagate"``), so a zero means that no tie of this batch
    matters. A difference above machine epsilon may still be rounding, where large terms cancel: for the largest one
    of each group of operations :func:`~nslightning.probes.zone` decides, until one is real. The loss is the cross-
    entropy of the logits, formed in at least float32. The copy is in training mode by default, and its buffers (batch
    norm's running statistics) are put back before each batch; the model and the global random state are left
    untouched, and dropout draws the same stream in every dtype.

    Args:
        model: A network that is not patched, ``images (N, ...) -> logits (N, K, ...)`` with K >= 2; of a tuple or a
            dict of outputs the first counts.
        batches: Images, and labels or None for random ones.
        dtypes: Names in :data:`DTYPES`. One that the device cannot run is listed in ``not_run``.
        choices: The choices to compare with stock PyTorch's, by name. None is :func:`choices_of_an_audit`; of the
            choices that it adds, the findings list those of operations that met ties.
        device: The device to run on.
        training: Training rather than evaluation mode.
        seed: Seeds random labels, dropout and random choices.
        top: Number of parameters named per divergence.
        name: Name of the model in the findings; its class by default.
        data: Name of the batches in the findings.
        progress: Called with a line before each batch of each dtype.

    Returns:
        The findings.

    Raises:
        ValueError: If an argument is not admissible, the model is patched, or its outputs or labels do not fit.
        NotRunningError: If the model fails in every dtype.
        KeyboardInterrupt: If it is interrupted before one of the dtypes is done. Later on the findings are those of the
            dtypes that are, and the others are ``not_run``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        >>> _ = nn.init.zeros_(net[0].weight), nn.init.zeros_(net[0].bias)
        >>> measured = audit(net, [(torch.ones(2, 1, 4, 4), None)], dtypes=["32"])
        >>> measured.sites[0].ties["32"], measured.largest > 0
        ((16, 16), True)
    """
    always = CHOICES if choices is None else choices
    choices = choices_of_an_audit() if choices is None else choices
    if not batches or not dtypes or not choices:
        raise ValueError("an audit takes at least one batch, one dtype and one choice")
    if top < 1:
        raise ValueError(f"top is at least 1; given {top}")
    if unknown := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise ValueError(f"dtype {unknown[0]!r} is not known. Allowed: {', '.join(DTYPES)}")
    device = torch.device(device)
    reports: dict[str, PatchReport] = {}
    ties: dict[str, dict[str, Ties]] = {}
    spreads: list[Spread] = []
    noise: dict[str, float] = {}
    clarke: dict[str, ClarkeCheck] = {}
    by_hand: dict[tuple[str, str], ByHand] = {}
    failed: dict[str, BaseException] = {}
    tell = progress or (lambda line: None)
    wanted = list(dict.fromkeys(dtypes))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for dtype in wanted:
            try:
                network = copy.deepcopy(model).to(device, DTYPES[dtype]).train(training)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", PatchWarning)  # nothing to patch: the audit's advice covers it
                    report = patch(network, Jacobians(), seed=seed, strict=False)
                    counts, differences, floor, guarantees, lines, zones = _measure(
                        network, batches, dtype, choices, seed, tell
                    )
            except KeyboardInterrupt:  # what is measured is kept, where there is something
                if not reports:
                    raise
                failed |= dict.fromkeys(wanted[wanted.index(dtype) :], RuntimeError("interrupted"))
                break
            except (RuntimeError, TypeError, AssertionError, AttributeError, LookupError) as error:  # of its forward
                failed[dtype] = error
                continue
            reports[dtype], ties[dtype], noise[dtype] = report, counts, floor
            for line in lines:
                _add(by_hand, line, dtype, floor)
            clarke[dtype] = _check(report, guarantees, lines)
            for choice, per_batch in differences.items():
                spreads.append(_spread(choice, dtype, per_batch, top, zones.get(choice)))
    if not reports:
        first = next(iter(failed.values()))
        raise NotRunningError(f"the model runs in none of {', '.join(failed)}: {_line(first)}") from first
    sites = _sites(reports, ties)
    tied = {site.operation for site in sites if any(n for n, _ in site.ties.values())}
    listed = {choice: j for choice, j in choices.items() if choice in always or not tied.isdisjoint(_changed(j))}
    return Audit(
        model=name or type(model).__name__,
        data=data,
        device=str(device),
        training=training,
        torch=torch.__version__,
        batches=len(batches),
        shape=tuple(batches[0][0].shape),
        choices={choice: jacobians.to_dict() for choice, jacobians in listed.items()},
        dtypes=list(reports),
        not_run={dtype: _line(error) for dtype, error in failed.items()},
        sites=sites,
        spreads=[spread for spread in spreads if spread.choice in listed],
        noise=noise,
        clarke=clarke,
        by_hand=list(by_hand.values()),
    )


def _measure(
    network: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor | None]],
    dtype: str,
    choices: Mapping[str, Jacobians],
    seed: int,
    tell: Callable[[str], None],
) -> tuple[dict[str, Ties], dict[str, list[Divergence]], float, list[Guarantee], list[Handwritten], dict[str, str]]:
    """Ties over all batches, divergences per batch, the noise floor, theorems' promises, kinks by hand, and zones."""
    counts: dict[str, Ties] = {}
    differences: dict[str, list[Divergence]] = {choice: [] for choice in choices}
    floors = []
    guarantees = []
    lines: list[Handwritten] = []
    buffers = {key: buffer.clone() for key, buffer in network.named_buffers()}
    device = next((p.device for p in network.parameters()), torch.device("cpu"))

    def inputs(i: int) -> Tensor:
        images = batches[i][0]
        return images.to(device, DTYPES[dtype] if images.is_floating_point() else None)

    def begin(i: int) -> None:
        with torch.no_grad():
            for key, buffer in network.named_buffers():
                buffer.copy_(buffers[key])
        torch.manual_seed(seed + i)

    for i, (images, labels) in enumerate(batches):
        tell(f"{dtype}: batch {i + 1} of {len(batches)}, {' x '.join(map(str, images.shape))} on {device}")
        x = inputs(i)

        def forward(x: Tensor = x, labels: Tensor | None = labels, i: int = i) -> Tensor:
            begin(i)
            with torch.enable_grad():
                return _loss(network(x), labels, seed + i)

        begin(i)
        guarantees.append(clarke_guarantee(network, x))
        with counting(network) as here:
            loss = forward()
        for site, met in here.items():
            total = counts.setdefault(site, Ties(met.operation))
            total.tied += met.tied
            total.total += met.total
        for choice, value in divergence(loss, network, choices, method="propagate", retain_graph=True).items():
            differences[choice].append(value)
        once, again = (gradients(loss, network, {"": Jacobians()})[""] for _ in range(2))
        floors.append(measure(again, once).relative)
        lines += handwritten(network, forward)
    floor = max(floors, key=_badness)

    def zone_of(choice: str) -> str | None:
        relative = [_badness(d.relative) for d in differences[choice]]
        i = relative.index(max(relative))
        tell(f"{dtype}: whether {choice} changes the gradient over the reals, batch {i + 1}")
        begin(i)
        try:
            return zone(network, lambda output: _loss(output, batches[i][1], seed + i), inputs(i), choices[choice]).kind
        except (ValueError, RuntimeError):  # a random choice, a forward that other precisions evaluate otherwise
            return None

    return (
        counts,
        differences,
        floor,
        guarantees,
        lines,
        _zones(choices, differences, max(rounding(dtype), floor), zone_of),
    )


def _zones(
    choices: Mapping[str, Jacobians],
    differences: Mapping[str, Sequence[Divergence]],
    floor: float,
    zone_of: Callable[[str], str | None],
) -> dict[str, str]:
    """The zones of choices whose difference is above a floor.

    Among choices that change the same operations the one with the largest difference is examined first; the next one
    is examined only if that difference is rounding.
    """
    largest = {choice: max(d.relative for d in per_batch) for choice, per_batch in differences.items()}
    zones: dict[str, str] = {}
    settled = set()
    for choice in sorted(largest, key=lambda name: -_badness(largest[name])):
        operations = _changed(choices[choice])
        if math.isfinite(largest[choice]) and largest[choice] > floor and operations not in settled:
            kind = zone_of(choice)
            if kind is not None:
                zones[choice] = kind
            if kind != "compensation":
                settled.add(operations)
    return zones


def _changed(choice: Jacobians) -> frozenset[str]:
    """The operations, and the rule, that a choice sets otherwise than stock PyTorch does."""
    return frozenset(name for name, _ in choice.to_dict().items() - Jacobians().to_dict().items())


def _check(report: PatchReport, guarantees: Sequence[Guarantee], lines: Sequence[Handwritten]) -> ClarkeCheck:
    """Join the promises of the theorems over all batches."""
    missing = {
        f"{row.name}:{row.kind}" if row.name else row.kind: "it keeps PyTorch's own derivative, which was not looked at"
        for row in report.sites
        if row.how == "unreached"
    }
    missing |= {s.site: f"{s.operation}, {s.reason}" for guarantee in guarantees for s in guarantee.missing}
    missing |= {f"{line.module}:{line.place}": "a kink written by hand" for line in lines}
    bounds = [guarantee.bound for guarantee in guarantees]
    known = not missing and all(bound is not None for bound in bounds)
    return ClarkeCheck(
        holds=not missing,
        always=not missing and all(guarantee.always for guarantee in guarantees),
        bound=max(bound for bound in bounds if bound is not None) if known else None,
        missing=missing,
    )


def _add(by_place: dict[tuple[str, str], ByHand], line: Handwritten, dtype: str, floor: float) -> None:
    """Merge one batch's result for a line into the results so far; a change within the noise is ignored."""
    if line.relative <= floor:
        return
    known = by_place.setdefault((line.module, line.place), ByHand(line.module or "(model)", line.place, line.code))
    tied, total = known.ties.get(dtype, (0, 0))
    known.ties[dtype] = tied + line.tied, total + line.total
    known.relative[dtype] = max(known.relative.get(dtype, 0.0), line.relative)


def _loss(output: Any, labels: Tensor | None, seed: int) -> Tensor:
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            output = next(iter(output.values()), None)
        elif isinstance(output, (tuple, list)) and output:
            output = output[0]
        else:
            raise ValueError(f"the model returns {type(output).__name__}; an audit needs logits, a tensor (N, K, ...)")
    if output.dim() < 2 or output.shape[1] < 2:
        raise ValueError(
            f"the model returns a tensor {tuple(output.shape)}; an audit takes the cross-entropy of logits (N, K, ...) "
            "of K >= 2 classes"
        )
    classes, shape = output.shape[1], (output.shape[0], *output.shape[2:])
    if labels is None:
        labels = torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))
    elif tuple(labels.shape) != shape:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit the model's output {tuple(output.shape)}")
    elif labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"the data's labels go from {int(labels.min())} to {int(labels.max())}, and the model has {classes} classes"
        )
    exact = torch.promote_types(output.dtype, torch.float32)
    return F.cross_entropy(output.to(exact), labels.to(output.device))


def _spread(choice: str, dtype: str, per_batch: list[Divergence], top: int, zone: str | None) -> Spread:
    worst = max(per_batch, key=lambda d: _badness(d.relative))
    shares = {name: (d.l2 / worst.l2) ** 2 for name, d in worst.per_layer.items()} if worst.l2 else {}
    ranked = sorted(((n, s) for n, s in shares.items() if s > 0), key=lambda item: -item[1])
    relative = [d.relative for d in per_batch]
    return Spread(choice, dtype, worst.relative, worst.cosine, relative, dict(ranked[:top]), zone)


def _sites(reports: Mapping[str, PatchReport], ties: Mapping[str, Mapping[str, Ties]]) -> list[SiteTies]:
    sites: dict[tuple[str, str], SiteTies] = {}
    for dtype, report in reports.items():
        for row in report.sites:
            # A module's own ties are counted under its name, those of a call under the module and the function.
            called = row.how == "functional" or (row.how == "unreached" and row.kind.islower())
            name = f"{row.name}:{row.kind}" if called else row.name
            site = sites.setdefault(
                (name, row.operation), SiteTies(name or "(model)", row.operation, row.how, row.kind)
            )
            if row.how != "unreached":
                met = ties[dtype].get(name, Ties(row.operation))
                site.ties[dtype] = (met.tied, met.total)
    return list(sites.values())


def _badness(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def rounding(dtype: str) -> float:
    """The relative distance of two neighbouring numbers, below which a difference is like another order of sums.

    Args:
        dtype: A name in :data:`DTYPES`.

    Returns:
        The machine epsilon, such as 1.19e-07 for ``"32"``.
    """
    return float(torch.finfo(DTYPES[dtype]).eps)


def visible(measured: Audit, dtype: str) -> float:
    """The relative difference above which a choice, and neither rounding nor the kernels, changed the gradient.

    Args:
        measured: The audit.
        dtype: One of its dtypes.

    Returns:
        The larger one of the dtype's machine epsilon and the noise floor.
    """
    return max(rounding(dtype), measured.noise[dtype])


def matters(measured: Audit, spread: Spread) -> bool:
    """Return whether one choice changed the gradient, by more than rounding and the kernels did.

    Args:
        measured: The audit.
        spread: One of its divergences.

    Returns:
        True above :func:`visible`, but where the difference is known to be rounding.
    """
    return spread.relative > visible(measured, spread.dtype) and spread.zone != "compensation"


def verdict(measured: Audit, dtype: str) -> str:
    """Name the effect of the Jacobian choice on the gradient in one dtype.

    Args:
        measured: The audit.
        dtype: One of its dtypes.

    Returns:
        ``"no ties"``, ``"dead ties"`` (met, and the divergence exactly 0), ``"rounding"`` (below the dtype's, below the
        noise floor, or 0 over the reals), ``"matters"`` or ``"not finite"``.
    """
    spreads = [spread for spread in measured.spreads if spread.dtype == dtype]
    if not all(math.isfinite(spread.relative) for spread in spreads):
        return "not finite"
    if not any(site.ties.get(dtype, (0, 0))[0] for site in measured.sites):
        return "no ties"
    if any(matters(measured, spread) for spread in spreads):
        return "matters"
    return "rounding" if any(spread.relative for spread in spreads) else "dead ties"
