"""An audit in words: what its numbers mean and what to change, and its tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nslightning.jacobians import Jacobians
from nslightning.ops.record import OPERATIONS
from nslightning.probes.audit import Audit, Spread, matters, rounding, verdict, visible
from nslightning.text_table import aligned

__all__ = [
    "advice", "by_choice", "percent", "share", "short_number", "site_label", "sites_in_short", "subject", "table",
    "where_it_arises",
]  # fmt: skip

_SHOWN = 20  # tied sites in the terminal; the files have all


def advice(audit: Audit) -> list[str]:
    """Explain the numbers of an audit, and what to change.

    Args:
        audit: The audit.

    Returns:
        A paragraph each: of every verdict, of every operation whose choice matters, of what was not measured.
    """
    groups: dict[str, list[str]] = {}
    for dtype in audit.dtypes:
        groups.setdefault(verdict(audit, dtype), []).append(dtype)
    names = {key: ", ".join(f"{d}" for d in dtypes) for key, dtypes in groups.items()}
    untouched = {
        site.operation
        for site in audit.tied_sites
        if all(c.get(site.operation) == getattr(Jacobians(), site.operation) for c in audit.choices.values())
    }
    all_known = not (untouched or audit.by_hand)
    lines = []
    if not any(site.how != "unreached" for site in audit.sites):
        lines.append("No operation with a Jacobian choice was found: there was nothing to choose.")
    elif "no ties" in groups:
        lines.append(
            f"In {names['no ties']}: no ties. On this data your gradients do not depend on the Jacobian choice; a "
            "library that chooses otherwise gives the same ones."
        )
    if "dead ties" in groups:
        lines.append(
            f"In {names['dead ties']}: only dead ties. {_most(audit, groups['dead ties'])}, and the gradients of all "
            "choices agree exactly: no tie receives a gradient and passes it on to a parameter."
            + (" Nothing to change." if all_known else "")
            if not untouched
            else f"In {names['dead ties']}: {_most(audit, groups['dead ties'])}, and the gradients of all measured "
            "choices agree exactly."
        )
    if "rounding" in groups:
        largest = max((s for s in audit.spreads if s.dtype in groups["rounding"]), key=lambda s: s.relative)
        floor = visible(audit, largest.dtype)
        reason = (
            f"is below {floor:.1e}, what another order of summation may change."
            if largest.relative <= floor
            else f"is above {floor:.1e}, but large terms cancel in it: over the real numbers the gradients agree "
            "(docs: compensation)."
        )
        lines.append(
            f"In {names['rounding']}: ties, but no more than rounding. The largest relative difference, "
            f"{largest.relative:.1e} ({largest.choice}, {largest.dtype}), {reason}"
            + (" Nothing to change." if all_known and "matters" not in groups else "")
        )
    if "matters" in groups:
        lines += _matters(audit, groups["matters"])
    if "not finite" in groups:
        lines.append(
            f"In {names['not finite']}: gradients that are not finite, or a reference gradient that is 0: a relative "
            "difference says nothing there. Scale the inputs or the loss, or train in bf16 or 32."
        )
    if untouched:
        operations = ", ".join(sorted(untouched))
        lines.append(f"Ties of {operations} were met, and no measured choice changes them: their effect is not known.")
    # Once for each module, whose code may have several rows.
    unreached = list(dict.fromkeys(site_label(s.name) for s in audit.sites if s.how == "unreached"))
    if unreached:
        shown = ", ".join(unreached[:3]) + (f" and {len(unreached) - 3} more" if len(unreached) > 3 else "")
        lines.append(
            f"Not measured: {shown} {'keeps' if len(unreached) == 1 else 'keep'} PyTorch's own derivative, which this "
            "package has no choice for yet."
        )
    lines += _clarke(audit)
    for line in audit.by_hand:
        dtype = max(line.relative, key=lambda d: line.relative[d])
        size = line.relative[dtype]
        moved = f"changes the gradient by {size:.2g} of its norm"
        much = moved if math.isfinite(size) else "makes the gradient not finite, or changes one of 0"
        tied, total = line.ties[dtype]
        lines.append(
            f"A kink written by hand: {line.name} compares at {line.place}, `{line.code}`. In {dtype} it ties in "
            f"{percent(tied / total)} of its evaluations, and to decide them otherwise {much}. No choice reaches it: "
            "write it with F.relu, torch.maximum, abs or amax."
        )
    if audit.not_run:
        lines.append(
            f"{', '.join(audit.not_run)} could not be run on {audit.device}, so nothing is known about it; the reason "
            "is given with the divergences."
        )
    return lines


def _clarke(audit: Audit) -> list[str]:
    """Say in which precisions theorems promise an element of the Clarke subdifferential; name a site that they miss."""
    groups: dict[str, list[str]] = {}
    for dtype, check in audit.clarke.items():
        batches = "on every batch" if check.always else "on these batches"
        text = f"Stock PyTorch's gradient is an element of the Clarke subdifferential {batches} (docs: Clarke)."
        if not check.holds:
            site, reason = next(iter(check.missing.items()))
            others = len(check.missing) - 1
            more = f", and {others} more site{'s' * (others > 1)}" if others else ""
            text = (
                "No theorem promises that stock PyTorch's gradient is an element of the Clarke subdifferential "
                f"(docs: Clarke): {site_label(site)} ({reason}){more}."
            )
        groups.setdefault(text, []).append(dtype)
    lines = [f"In {', '.join(dtypes)}: {text}" for text, dtypes in groups.items()]
    if bounds := {dtype: check.bound for dtype, check in audit.clarke.items() if check.bound}:
        shares = ", ".join(f"{percent(bound)} in {dtype}" for dtype, bound in bounds.items() if bound < 1)
        if shares:
            lines.append(f"Of the numbers that its biases may be, at most {shares} put such a batch on a kink.")
    return lines


def _matters(audit: Audit, dtypes: list[str]) -> list[str]:
    """Say how far each operation's choice moves the gradient, where its ties are, and what to change.

    Operations that one choice changes together share a paragraph.
    """
    tied = {site.operation for site in audit.tied_sites}
    groups: dict[tuple[str, ...], list[Spread]] = {}
    for spread in audit.spreads:
        if spread.dtype in dtypes and matters(audit, spread):
            changed = audit.choices[spread.choice]
            groups.setdefault(tuple(o for o in sorted(tied) if changed[o] != getattr(Jacobians(), o)), []).append(
                spread
            )
    lines = []
    for operations, spreads in groups.items():
        where = [dtype for dtype in audit.dtypes if any(s.dtype == dtype for s in spreads)]
        worst = max(spreads, key=lambda s: s.relative)
        layer, share = next(iter(worst.layers.items()))
        lines.append(
            f"{_listed(operations)}: the choice matters in {', '.join(where)}. {worst.choice} changes the "
            f"gradient by {worst.relative:.2g} of its norm in {worst.dtype} (rounding: {rounding(worst.dtype):.1e}), "
            f"most in {layer} ({100 * share:.1f} % of the squared difference). {_places(audit, operations, where)}"
        )
        rounded = "64" in audit.dtypes and "64" not in where
        records = [OPERATIONS[name] for name in operations if name in OPERATIONS]
        lines[-1] += "".join(f" {record.rounding_advice if rounded else record.advice}" for record in records)
        if presets := [name for name in ("jax", "tensorflow") if any(s.choice == name for s in spreads)]:
            lines[-1] += (
                f" {' and '.join(presets)} choose{'s' * (len(presets) == 1)} otherwise: a port there gets other "
                f"gradients, which Jacobians.preset('{presets[0]}') reproduces here."
            )
    return lines


def _listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them: commas, and "and" before the last one."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _places(audit: Audit, operations: Sequence[str], dtypes: Sequence[str]) -> str:
    """The sites with ties of some operations, and whether rounding or the network made the ties."""
    sites = [s for s in audit.tied_sites if s.operation in operations and any(map(s.fraction, dtypes))]
    shown = []
    for site in sites[:3]:
        most = max(dtypes, key=site.fraction)
        shown.append(f"{site_label(site.name)} ({percent(site.fraction(most))} in {most})")
    more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
    its = "Its" if len(operations) == 1 else "Their"
    text = f"{its} ties are at {', '.join(shown)}{more}."
    if "64" not in audit.dtypes or dtypes == ["64"]:
        return text
    if "64" not in dtypes:
        return f"{text} In 64 no such tie matters: rounding makes the ones that do."
    lasting = sum(site.fraction("64") > 0 for site in sites)
    every = "They tie" if lasting == len(sites) else f"{lasting} of the {len(sites)} tie"
    return f"{text} {every} in 64 as well: there the network or the data makes ties, not rounding alone."


def _most(audit: Audit, dtypes: list[str]) -> str:
    site, dtype = max(
        ((site, dtype) for site in audit.tied_sites for dtype in dtypes), key=lambda pair: pair[0].fraction(pair[1])
    )
    count = sum(any(site.fraction(d) for d in dtypes) for site in audit.tied_sites)
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


# ------------------------------------------------------------------------------------------------- in a terminal
def table(audit: Audit) -> str:
    """The audit for a terminal.

    Args:
        audit: The audit.

    Returns:
        Two aligned tables, ties by site and divergence by choice, and the advice.
    """
    tied = audit.tied_sites
    blocks = [f"Audit of {subject(audit)}"]
    if tied:
        rows = [["site", "operation", *audit.dtypes]]
        rows += [
            [site_label(s.name), s.operation, *(share(s.fraction(d)) for d in audit.dtypes)] for s in tied[:_SHOWN]
        ]
        blocks.append("Ties, as a share of evaluations\n" + "\n".join(aligned(rows, texts=2)))
    blocks.append(sites_in_short(audit, min(len(tied), _SHOWN)))
    rows = [["choice", *audit.dtypes, "arises in"]]
    rows += [
        [choice, *(short_number(by[d].relative) for d in audit.dtypes), where_it_arises(list(by.values()), 1)]
        for choice, by in by_choice(audit).items()
    ]
    rows.append(["(noise floor)", *(short_number(audit.noise[d]) for d in audit.dtypes), "the same backward twice"])
    rows.append(["(rounding)", *(short_number(rounding(d)) for d in audit.dtypes), "the dtype's machine epsilon"])
    title = "Divergence of the gradient from stock PyTorch's choice, relative L2, the largest of the batches"
    blocks.append("\n".join([title, *aligned(rows, last_is_text=True)]))
    blocks += [f"{dtype} could not be run on {audit.device}: {reason}" for dtype, reason in audit.not_run.items()]
    return "\n\n".join([*blocks, "\n".join(f"* {line}" for line in advice(audit))])


def subject(audit: Audit) -> str:
    """Describe in one line what was audited, and how.

    Args:
        audit: The audit.

    Returns:
        Model, batches, mode, device and version of torch.
    """
    batches = f"{audit.batches} batch{'es' if audit.batches > 1 else ''} of {' x '.join(map(str, audit.shape))}"
    mode = "training" if audit.training else "evaluation"
    return f"{audit.model}: {batches}, {audit.data}; {mode} mode, {audit.device}, torch {audit.torch}"


def by_choice(audit: Audit) -> dict[str, dict[str, Spread]]:
    """The divergences of an audit by choice and dtype.

    Args:
        audit: The audit.

    Returns:
        ``{choice: {dtype: spread}}``, in the order in which they were measured.
    """
    grouped: dict[str, dict[str, Spread]] = {}
    for spread in audit.spreads:
        grouped.setdefault(spread.choice, {})[spread.dtype] = spread
    return grouped


def where_it_arises(spreads: Sequence[Spread], count: int) -> str:
    """The layers of the dtype in which the choice matters most, in units of its rounding.

    Args:
        spreads: One choice's divergence in each dtype.
        count: Largest number of layers.

    Returns:
        The layers with their shares of the squared difference; empty where there is no difference.
    """
    worst = max(spreads, key=lambda s: s.relative / rounding(s.dtype) if math.isfinite(s.relative) else math.inf)
    shown = [(name, part) for name, part in worst.layers.items() if part >= 1e-3][:count]
    layers = ", ".join(f"{name} {100 * part:.1f} %" for name, part in shown)
    return f"{layers} ({worst.dtype})" if layers else ""


def sites_in_short(audit: Audit, shown: int) -> str:
    """Say how many sites tied, how many did not, and how many were not measured.

    Args:
        audit: The audit.
        shown: Number of the tied sites that are listed beside it.

    Returns:
        One line.
    """
    unreached = sum(site.how == "unreached" for site in audit.sites)
    tied = {id(site) for site in audit.tied_sites}
    untied = [site.name for site in audit.sites if site.how != "unreached" and id(site) not in tied]
    names = f" ({', '.join(map(site_label, untied))})" if 0 < len(untied) <= 4 else ""
    part = f"{len(tied)} tied" + (f" ({shown} shown; --json and --html list all)" if shown < len(tied) else "")
    parts = [part] + [f"{len(untied)} without a tie{names}"] * bool(untied)
    parts += [f"{unreached} not measured"] * (unreached > 0)
    return f"{len(audit.sites)} site{'s' * (len(audit.sites) != 1)}: {', '.join(parts)}"


def share(fraction: float) -> str:
    """A share in percent.

    Args:
        fraction: Such as 0.5, or 0.

    Returns:
        Such as ``"50 %"``; ``"0"`` for an exact 0.
    """
    return percent(fraction) if fraction else "0"


def short_number(value: float) -> str:
    """A number to two digits.

    Args:
        value: Any number.

    Returns:
        Such as ``"0.25"``, ``"1.0e-07"``, ``"0"`` and ``"not finite"``.
    """
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2g}" if 1e-3 <= value < 1e4 else f"{value:.1e}" if value else "0"
