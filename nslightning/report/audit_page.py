"""An audit as a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from nslightning.probes.audit import Audit, SiteTies, rounding, verdict

from . import pages
from .audit_text import advice, by_choice, share, short_number, site_label, sites_in_short, subject, where_it_arises
from .pages import Cards, Cell, Figure, Fold, Page, Section, Table, Text, table

__all__ = ["page"]

_FIRST = 40  # sites that a figure and a table show before they are asked for all
_KINDS = {"no ties": "good", "dead ties": "good", "rounding": "slight", "matters": "strong", "not finite": "bad"}
_LEAD = (
    "Where an operation has no unique derivative (ReLU at 0, a max-pooling window whose maximum is reached twice: a "
    "tie), a library picks one. This page shows how often this model meets ties, and how far its gradient would move "
    "under another pick."
)


def page(audit: Audit) -> str:
    """The audit as one HTML page that loads nothing.

    Args:
        audit: The audit.

    Returns:
        The page's source: verdicts, advice, two figures and the tables.
    """
    return pages.render(
        Page(
            title=f"Audit of {audit.model}",
            subtitle=subject(audit).removeprefix(f"{audit.model}: "),
            lead=_LEAD,
            sections=[
                Section("Verdict", [_verdicts(audit), *(Text(line, "advice") for line in advice(audit))]),
                Section("How far the gradient moves", list(_divergence(audit))),
                Section("Where the ties are", list(_ties(audit))),
            ],
        )
    )


def _verdicts(audit: Audit) -> Cards:
    cards = []
    for dtype in audit.dtypes:
        word = verdict(audit, dtype)
        largest = max((s.relative for s in audit.spreads if s.dtype == dtype), default=0.0)
        note = "gradients not finite" if word == "not finite" else f"largest {short_number(largest)}"
        cards.append((dtype, word, note, _KINDS[word]))
    cards += [(dtype, "could not be run", "", "none") for dtype in audit.not_run]
    return Cards(cards)


def _divergence(audit: Audit) -> Iterable[Text | Figure | Table]:
    groups = by_choice(audit)
    data = pd.DataFrame(
        [
            {"row": choice, "series": dtype, "value": spreads[dtype].relative, "rounding": rounding(dtype)}
            for choice, spreads in groups.items()
            for dtype in audit.dtypes
        ]
    )
    note = (
        "Relative L2 distance to the gradient of stock PyTorch's choice, the largest of the batches. Dashed: each "
        "precision's machine epsilon; a difference left of it is rounding. Hollow marks in the column 0 are exact "
        "zeros: no tie of these batches matters to that choice."
    )
    alt = (
        f"Relative divergence of {len(groups)} choices in {len(audit.dtypes)} precisions; the table holds the numbers."
    )
    yield Text(note, "quiet")
    yield Figure("dots", data, alt, axis="relative L2 divergence", extent=_extent(data["row"]))
    rows: list[list[str | Cell]] = [
        [choice, *(_divergence_cell(spreads[d].relative, rounding(d)) for d in audit.dtypes),
         where_it_arises(list(spreads.values()), 2)]
        for choice, spreads in groups.items()
    ]  # fmt: skip
    rows.append(
        ["noise floor", *(Cell(short_number(audit.noise[d]), "number") for d in audit.dtypes),
         "the same backward twice, subtracted"]
    )  # fmt: skip
    rows.append(
        ["rounding", *(Cell(short_number(rounding(d)), "number") for d in audit.dtypes), "the dtype's machine epsilon"]
    )
    marks = [""] * len(groups) + ["aside"] * 2
    yield table("divergence by choice and precision", ["choice", *audit.dtypes, "arises in"], rows, marks)
    for dtype, reason in audit.not_run.items():
        yield Text(f"{dtype} could not be run on {audit.device}: {reason}", "missing")


def _divergence_cell(value: float, epsilon: float) -> Cell:
    kind = "zero" if value == 0 else "number" if value <= epsilon else "hot"  # what is not finite is hot
    return Cell(short_number(value), kind)


def _ties(audit: Audit) -> Iterable[Text | Figure | Table | Fold]:
    tied = audit.tied_sites
    summary = sites_in_short(audit, len(tied))
    yield Text(f"{summary}. A share counts entries of the input for an activation, windows for a pool.", "quiet")
    if tied:
        data = pd.DataFrame(
            [
                {"row": site_label(site.name), "series": dtype, "value": site.fraction(dtype), "rounding": math.nan}
                for site in tied
                for dtype in audit.dtypes
            ]
        )
        alt = (
            f"Tied share of the evaluations of {len(tied)} sites, the most often tied first; the table holds the "
            "numbers."
        )
        axis = "tied share of evaluations"
        yield Figure("dots", data, alt, axis=axis, first=("row", _FIRST), extent=_extent(data["row"]))
        yield _site_table("sites with ties", tied[:_FIRST], audit.dtypes)
    else:
        yield Text("No site met a tie.")
    if len(tied) > _FIRST:
        more = _site_table("more sites with ties", tied[_FIRST:], audit.dtypes)
        yield Fold(f"More sites with ties: {len(tied) - _FIRST}", [more])
    names = {(site.name, site.operation) for site in tied}
    others = [site for site in audit.sites if (site.name, site.operation) not in names]
    if others:
        yield Fold(f"Sites without ties: {len(others)}", [_site_table("sites without ties", others, audit.dtypes)])


def _site_table(label: str, sites: Sequence[SiteTies], dtypes: Sequence[str]) -> Table:
    rows = [
        [site_label(site.name), site.operation, site.how, *(_tie_cell(site, dtype) for dtype in dtypes)]
        for site in sites
    ]
    return table(label, ["site", "operation", "reached by", *dtypes], rows)


def _tie_cell(site: SiteTies, dtype: str) -> Cell:
    if dtype not in site.ties:
        return Cell("not measured", "zero")
    tied, total = site.ties[dtype]
    return Cell(share(site.fraction(dtype)), "number" if tied else "zero", f"{tied:,} of {total:,}")


def _extent(names: pd.Series) -> int:
    return min(300, 20 + int(6.4 * names.str.len().max()))
