"""How far a model's gradients depend on the Jacobian choice: its ties, the divergence, and what to make of it."""

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
from nslightning.surgery import PatchReport, PatchWarning, patch

__all__ = ["CHOICES", "DTYPES", "Audit", "ByHand", "NotRunningError", "SiteTies", "Spread", "audit"]

DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}

#: The choices that an audit compares with stock PyTorch's.
CHOICES: dict[str, Jacobians] = {
    "jax": Jacobians.preset("jax"),
    "tensorflow": Jacobians.preset("tensorflow"),
    "alpha=1": Jacobians(relu=1.0, relu6=(1.0, 1.0)),
    "beta=minimal": Jacobians(max_pool="minimal"),
    "beta=10": Jacobians(max_pool=10.0),
}


class NotRunningError(RuntimeError):
    """A model that runs in none of the precisions that were asked for."""


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
    """How far one choice's gradient is from the reference's, in one dtype.

    Args:
        choice: Name of the choice.
        dtype: A name in :data:`DTYPES`.
        relative: ``||g_choice - g_reference|| / ||g_reference||`` over all parameters, the largest over the
            batches (NaN, where gradients are not finite, counts as largest); exactly 0 where no tie matters.
        cosine: Cosine between the two gradients on that batch.
        per_batch: ``relative`` of every batch.
        layers: The parameters with the largest share of the squared difference on that batch.
    """

    choice: str
    dtype: str
    relative: float
    cosine: float
    per_batch: list[float]
    layers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ClarkeCheck:
    """Whether theorems promise that stock PyTorch's gradient lies in the Clarke subdifferential.

    Args:
        holds: Whether they do on these batches. False means that it is not known.
        always: Whether they do on every batch.
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
    """What an audit found.

    Args:
        model: The model's name.
        data: What the batches were.
        device: Where it ran.
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
        found = [site for site in self.sites if any(tied for tied, _ in site.ties.values())]
        return sorted(found, key=lambda site: -max(map(site.fraction, site.ties)))

    @property
    def advice(self) -> list[str]:
        """What the numbers mean and what to change, a paragraph each."""
        return _advice(self)

    def to_dict(self) -> dict[str, Any]:
        """The audit as plain data.

        Returns:
            JSON-ready values; numbers that are not finite are the words ``"nan"``, ``"inf"`` and ``"-inf"``, since
            JSON has no number for them.
        """
        plain: dict[str, Any] = _finite(asdict(self) | {"advice": self.advice, "largest": self.largest})
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
            >>> found = Audit("net", "synthetic", "cpu", True, "2", 1, (1, 2), {}, ["32"], {}, [], [], {"32": 0.0})
            >>> Audit.from_dict(json.loads(json.dumps(found.to_dict()))) == found
            True
        """
        given = {f.name: plain[f.name] for f in fields(cls) if f.name in plain or f.name not in ("by_hand", "clarke")}
        given["by_hand"] = [
            ByHand(
                **line
                | {"ties": {d: (tied, total) for d, (tied, total) in line["ties"].items()}}
                | {"relative": {d: float(value) for d, value in line["relative"].items()}}
            )
            for line in given.get("by_hand", [])
        ]
        given["shape"] = tuple(given["shape"])
        given["choices"] = {name: Jacobians(**choice).to_dict() for name, choice in given["choices"].items()}
        given["noise"] = {dtype: float(value) for dtype, value in given["noise"].items()}
        given["sites"] = [
            SiteTies(**site | {"ties": {d: (tied, total) for d, (tied, total) in site["ties"].items()}})
            for site in given["sites"]
        ]
        given["spreads"] = [
            Spread(
                **s
                | {name: float(s[name]) for name in ("relative", "cosine")}
                | {"per_batch": [float(value) for value in s["per_batch"]]}
            )
            for s in given["spreads"]
        ]
        given["clarke"] = {dtype: ClarkeCheck(**check) for dtype, check in plain.get("clarke", {}).items()}
        return cls(**given)


def audit(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor | None]],
    *,
    dtypes: Sequence[str] = tuple(DTYPES),
    choices: Mapping[str, Jacobians] = CHOICES,
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
    matters. The loss is the cross-entropy of the logits, formed in at least float32. The copy is in training mode by
    default, and its buffers (batch norm's running statistics) are put back before each batch; the given model and the
    global random state are left untouched, and dropout draws the same stream in every dtype.

    Args:
        model: A network that is not patched, ``images (N, ...) -> logits (N, K, ...)`` with K >= 2; of a tuple or a
            dict of outputs the first counts.
        batches: Images, and labels or None for random ones.
        dtypes: Names in :data:`DTYPES`. One that the device cannot run is listed in ``not_run``.
        choices: What to compare with stock PyTorch's choice.
        device: Where to run.
        training: Training rather than evaluation mode.
        seed: Seeds random labels, dropout and random choices.
        top: Number of parameters named per divergence.
        name: What to call the model; its class by default.
        data: What to call the batches.
        progress: Called with a line before each batch of each dtype.

    Returns:
        The findings.

    Raises:
        ValueError: If an argument is not admissible, the model is patched, or its outputs or labels do not fit.
        NotRunningError: If the model runs in none of the dtypes.
        KeyboardInterrupt: If it is interrupted before one of the dtypes is done. Later on the findings are those of the
            dtypes that are, and the others are ``not_run``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        >>> _ = nn.init.zeros_(net[0].weight), nn.init.zeros_(net[0].bias)
        >>> found = audit(net, [(torch.ones(2, 1, 4, 4), None)], dtypes=["32"])
        >>> found.sites[0].ties["32"], found.largest > 0
        ((16, 16), True)
    """
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
                    warnings.simplefilter("ignore", PatchWarning)  # nothing to patch: the advice says it
                    report = patch(network, Jacobians(), seed=seed, strict=False)
                    counts, found, floor, guarantees, lines = _measure(network, batches, dtype, choices, seed, tell)
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
            for choice, per_batch in found.items():
                spreads.append(_spread(choice, dtype, per_batch, top))
    if not reports:
        first = next(iter(failed.values()))
        raise NotRunningError(f"the model runs in none of {', '.join(failed)}: {_line(first)}") from first
    return Audit(
        model=name or type(model).__name__,
        data=data,
        device=str(device),
        training=training,
        torch=torch.__version__,
        batches=len(batches),
        shape=tuple(batches[0][0].shape),
        choices={choice: jacobians.to_dict() for choice, jacobians in choices.items()},
        dtypes=list(reports),
        not_run={dtype: _line(error) for dtype, error in failed.items()},
        sites=_sites(reports, ties),
        spreads=spreads,
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
) -> tuple[dict[str, Ties], dict[str, list[Divergence]], float, list[Guarantee], list[Handwritten]]:
    """Ties over all batches, divergences per batch, the noise floor, what theorems promise, kinks written by hand."""
    counts: dict[str, Ties] = {}
    found: dict[str, list[Divergence]] = {choice: [] for choice in choices}
    floors = []
    guarantees = []
    lines: list[Handwritten] = []
    buffers = {key: buffer.clone() for key, buffer in network.named_buffers()}
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    for i, (images, labels) in enumerate(batches):
        tell(f"{dtype}: batch {i + 1} of {len(batches)}, {' x '.join(map(str, images.shape))} on {device}")
        x = images.to(device, DTYPES[dtype] if images.is_floating_point() else None)

        def begin(seed: int = seed + i) -> None:
            with torch.no_grad():
                for key, buffer in network.named_buffers():
                    buffer.copy_(buffers[key])
            torch.manual_seed(seed)

        def forward(x: Tensor = x, labels: Tensor | None = labels, seed: int = seed + i) -> Tensor:
            begin(seed)
            with torch.enable_grad():
                return _loss(network(x), labels, seed)

        begin()
        guarantees.append(clarke_guarantee(network, x))
        with counting(network) as here:
            loss = forward()
        for site, met in here.items():
            total = counts.setdefault(site, Ties(met.operation))
            total.tied += met.tied
            total.total += met.total
        for choice, value in divergence(loss, network, choices, method="propagate", retain_graph=True).items():
            found[choice].append(value)
        once, again = (gradients(loss, network, {"": Jacobians()})[""] for _ in range(2))
        floors.append(measure(again, once).relative)
        lines += handwritten(network, forward)
    return counts, found, max(floors, key=_badness), guarantees, lines


def _check(report: PatchReport, guarantees: Sequence[Guarantee], lines: Sequence[Handwritten]) -> ClarkeCheck:
    """What theorems promise over all batches."""
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


def _add(found: dict[tuple[str, str], ByHand], line: Handwritten, dtype: str, floor: float) -> None:
    """Add what one batch shows of a line to what is known of it; below the noise nothing is shown."""
    if line.relative <= floor:
        return
    known = found.setdefault((line.module, line.place), ByHand(line.module or "(model)", line.place, line.code))
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


def _spread(choice: str, dtype: str, per_batch: list[Divergence], top: int) -> Spread:
    worst = max(per_batch, key=lambda d: _badness(d.relative))
    shares = {name: (d.l2 / worst.l2) ** 2 for name, d in worst.per_layer.items()} if worst.l2 else {}
    ranked = sorted(((n, s) for n, s in shares.items() if s > 0), key=lambda item: -item[1])
    return Spread(choice, dtype, worst.relative, worst.cosine, [d.relative for d in per_batch], dict(ranked[:top]))


def _sites(reports: Mapping[str, PatchReport], ties: Mapping[str, Mapping[str, Ties]]) -> list[SiteTies]:
    found: dict[tuple[str, str], SiteTies] = {}
    for dtype, report in reports.items():
        for row in report.sites:
            # What a module evaluates itself is counted under its name, a call under the module and the function.
            called = row.how == "functional" or (row.how == "unreached" and row.kind.islower())
            name = f"{row.name}:{row.kind}" if called else row.name
            site = found.setdefault(
                (name, row.operation), SiteTies(name or "(model)", row.operation, row.how, row.kind)
            )
            if row.how != "unreached":
                met = ties[dtype].get(name, Ties(row.operation))
                site.ties[dtype] = (met.tied, met.total)
    return list(found.values())


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


# ---------------------------------------------------------------------------------------------------- advice
def rounding(dtype: str) -> float:
    """The relative distance of two neighbouring numbers, below which a difference is like another order of sums.

    Args:
        dtype: A name in :data:`DTYPES`.

    Returns:
        The machine epsilon, such as 1.19e-07 for ``"32"``.
    """
    return float(torch.finfo(DTYPES[dtype]).eps)


def _visible(found: Audit, dtype: str) -> float:
    """The relative difference that can be told from rounding, and from what kernels do anew at each run."""
    return max(rounding(dtype), found.noise[dtype])


def verdict(found: Audit, dtype: str) -> str:
    """What the Jacobian choice does to the gradient in one dtype.

    Args:
        found: The audit.
        dtype: One of its dtypes.

    Returns:
        ``"no ties"``, ``"dead ties"`` (met, and the divergence exactly 0), ``"rounding"`` (below the dtype's, or below
        the noise floor),
        ``"matters"`` or ``"not finite"``.
    """
    values = [spread.relative for spread in found.spreads if spread.dtype == dtype]
    if not all(map(math.isfinite, values)):
        return "not finite"
    if not any(site.ties.get(dtype, (0, 0))[0] for site in found.sites):
        return "no ties"
    largest = max(values)
    return "matters" if largest > _visible(found, dtype) else "rounding" if largest else "dead ties"


def _advice(found: Audit) -> list[str]:
    groups: dict[str, list[str]] = {}
    for dtype in found.dtypes:
        groups.setdefault(verdict(found, dtype), []).append(dtype)
    names = {key: ", ".join(f"{d}" for d in dtypes) for key, dtypes in groups.items()}
    lines = []
    if not any(site.how != "unreached" for site in found.sites):
        lines.append("No operation with a Jacobian choice was found: there was nothing to choose.")
    elif "no ties" in groups:
        lines.append(
            f"In {names['no ties']}: no ties. On this data your gradients do not depend on the Jacobian choice; a "
            "library that chooses otherwise gives the same ones."
        )
    if "dead ties" in groups:
        lines.append(
            f"In {names['dead ties']}: only dead ties. {_most(found, groups['dead ties'])}, and the gradients of all "
            "choices agree exactly: no tie receives a gradient and passes it on to a parameter. Nothing to change."
        )
    if "rounding" in groups:
        largest = max((s for s in found.spreads if s.dtype in groups["rounding"]), key=lambda s: s.relative)
        lines.append(
            f"In {names['rounding']}: ties, but no more than rounding. The largest relative difference, "
            f"{largest.relative:.1e} ({largest.choice}, {largest.dtype}), is below "
            f"{_visible(found, largest.dtype):.1e}, what another order of summation may change."
            + ("" if "matters" in groups else " Nothing to change.")
        )
    if "matters" in groups:
        lines += _matters(found, groups["matters"])
    if "not finite" in groups:
        lines.append(
            f"In {names['not finite']}: gradients that are not finite, or a reference gradient that is 0: a relative "
            "difference says nothing there. Scale the inputs or the loss, or train in bf16 or 32."
        )
    untouched = {
        site.operation
        for site in found.tied_sites
        if all(c.get(site.operation) == getattr(Jacobians(), site.operation) for c in found.choices.values())
    }
    if untouched:
        lines.append(f"Ties of {', '.join(sorted(untouched))} were met, and none of the choices measured changes them.")
    # Once for each module, whose code may have several rows.
    unreached = list(dict.fromkeys(site_label(s.name) for s in found.sites if s.how == "unreached"))
    if unreached:
        shown = ", ".join(unreached[:3]) + (f" and {len(unreached) - 3} more" if len(unreached) > 3 else "")
        lines.append(
            f"Not measured: {shown} {'keeps' if len(unreached) == 1 else 'keep'} PyTorch's own derivative, which this "
            "package has no choice for yet."
        )
    lines += _clarke(found)
    for line in found.by_hand:
        dtype = max(line.relative, key=lambda d: line.relative[d])
        size = line.relative[dtype]
        much = f"changes the gradient by {size:.2g} of its norm" if math.isfinite(size) else "makes a gradient of none"
        tied, total = line.ties[dtype]
        lines.append(
            f"A kink written by hand: {line.name} compares at {line.place}, `{line.code}`. In {dtype} it ties in "
            f"{percent(tied / total)} of its evaluations, and to decide them otherwise {much}. No choice reaches it: "
            "write it with F.relu, torch.maximum, abs or amax."
        )
    if found.not_run:
        lines.append(
            f"{', '.join(found.not_run)} could not be run on {found.device}, so nothing is known about it; the reason "
            "is given with the divergences."
        )
    return lines


def _clarke(found: Audit) -> list[str]:
    """Where theorems promise an element of the Clarke subdifferential, and why not elsewhere."""
    groups: dict[str, list[str]] = {}
    for dtype, check in found.clarke.items():
        batches = "on every batch" if check.always else "on these batches"
        text = f"Stock PyTorch's gradient is an element of the Clarke subdifferential {batches} (docs: Clarke)."
        if not check.holds:
            site, reason = next(iter(check.missing.items()))
            more = f", and {len(check.missing) - 1} more sites" if len(check.missing) > 1 else ""
            text = (
                "No theorem promises that stock PyTorch's gradient is an element of the Clarke subdifferential "
                f"(docs: Clarke): {site_label(site)} ({reason}){more}."
            )
        groups.setdefault(text, []).append(dtype)
    lines = [f"In {', '.join(dtypes)}: {text}" for text, dtypes in groups.items()]
    if bounds := {dtype: check.bound for dtype, check in found.clarke.items() if check.bound}:
        shares = ", ".join(f"{percent(bound)} in {dtype}" for dtype, bound in bounds.items() if bound < 1)
        if shares:
            lines.append(f"Of the numbers that its biases may be, at most {shares} put such a batch on a kink.")
    return lines


def _matters(found: Audit, dtypes: list[str]) -> list[str]:
    """For each operation, or the few that one choice changes together: how much, since where, and the remedy."""
    tied = {site.operation for site in found.tied_sites}
    groups: dict[tuple[str, ...], list[Spread]] = {}
    for spread in found.spreads:
        if spread.dtype in dtypes and spread.relative > _visible(found, spread.dtype):
            changed = found.choices[spread.choice]
            groups.setdefault(tuple(o for o in sorted(tied) if changed[o] != getattr(Jacobians(), o)), []).append(
                spread
            )
    lines = []
    for operations, spreads in groups.items():
        where = [dtype for dtype in found.dtypes if any(s.dtype == dtype for s in spreads)]
        worst = max(spreads, key=lambda s: s.relative)
        layer, share = next(iter(worst.layers.items()))
        lines.append(
            f"{' and '.join(operations)}: the choice matters in {', '.join(where)}. {worst.choice} changes the "
            f"gradient by {worst.relative:.2g} of its norm in {worst.dtype} (rounding: {rounding(worst.dtype):.1e}), "
            f"most in {layer} ({100 * share:.1f} % of the squared difference). {_places(found, operations, where)}"
        )
        rounded = "64" in found.dtypes and "64" not in where
        records = [OPERATIONS[name] for name in operations if name in OPERATIONS]
        lines[-1] += "".join(f" {record.rounding_advice if rounded else record.advice}" for record in records)
        if presets := [name for name in ("jax", "tensorflow") if any(s.choice == name for s in spreads)]:
            lines[-1] += (
                f" {' and '.join(presets)} choose otherwise: a port there gets other gradients, which "
                f"Jacobians.preset('{presets[0]}') reproduces here."
            )
    return lines


def _places(found: Audit, operations: Sequence[str], dtypes: Sequence[str]) -> str:
    """The sites with ties of some operations, and whether rounding or the network made the ties."""
    sites = [s for s in found.tied_sites if s.operation in operations and any(map(s.fraction, dtypes))]
    shown = []
    for site in sites[:3]:
        most = max(dtypes, key=site.fraction)
        shown.append(f"{site_label(site.name)} ({percent(site.fraction(most))} in {most})")
    more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
    text = f"Its ties are at {', '.join(shown)}{more}."
    if "64" not in found.dtypes or dtypes == ["64"]:
        return text
    if "64" not in dtypes:
        return f"{text} In 64 none of its ties matters: rounding makes the ones that do."
    lasting = sum(site.fraction("64") > 0 for site in sites)
    every = "They tie" if lasting == len(sites) else f"{lasting} of the {len(sites)} tie"
    return f"{text} {every} in 64 as well: there the network or the data makes ties, not rounding alone."


def _most(found: Audit, dtypes: list[str]) -> str:
    site, dtype = max(
        ((site, dtype) for site in found.tied_sites for dtype in dtypes), key=lambda pair: pair[0].fraction(pair[1])
    )
    count = sum(any(site.fraction(d) for d in dtypes) for site in found.tied_sites)
    where = "1 site meets" if count == 1 else f"{count} sites meet"
    return f"{where} ties, most often {site_label(site.name)} ({percent(site.fraction(dtype))} in {dtype})"


def percent(fraction: float) -> str:
    """A share that is not 0, in percent, never rounded to 0 or to 100.

    Args:
        fraction: Such as 0.5.

    Returns:
        Such as ``"50 %"``.

    Example:
        >>> percent(0.5), percent(1.0), percent(3e-6), percent(0.99999)
        ('50 %', '100 %', '0.0003 %', '99.999 %')
    """
    digits = 3
    while digits < 9 and fraction < 1 and float(f"{100 * fraction:.{digits}g}") == 100:
        digits += 1
    return f"{100 * fraction:.{digits}g} %"


def site_label(name: str) -> str:
    """A site's name for people: a call made by the model itself has no module's name before the colon.

    Args:
        name: A site's name.

    Returns:
        Such as ``"(model):relu"`` for ``":relu"``.
    """
    return f"(model){name}" if name.startswith(":") else name
