"""An audit as text for a terminal, and as one HTML page with its figures inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from nslightning.probes.audit import Audit, SiteTies, Spread, percent, rounding, site_label, verdict

__all__ = ["page", "table"]

_SHOWN = 20  # tied sites in the terminal; the files have all


def table(found: Audit) -> str:
    """The audit for a terminal.

    Args:
        found: The audit.

    Returns:
        Two aligned tables, ties by site and divergence by choice, and the advice.
    """
    tied = found.tied_sites
    blocks = [f"Audit of {_subject(found)}"]
    if tied:
        rows = [["site", "operation", *found.dtypes]]
        rows += [
            [site_label(s.name), s.operation, *(_share(s.fraction(d)) for d in found.dtypes)] for s in tied[:_SHOWN]
        ]
        blocks.append("Ties, as a share of evaluations\n" + _aligned(rows, left=2))
    blocks.append(_rest(found, min(len(tied), _SHOWN)))
    rows = [["choice", *found.dtypes, "arises in"]]
    rows += [
        [choice, *(_number(by[d].relative) for d in found.dtypes), _where(list(by.values()), 1)]
        for choice, by in _by_choice(found).items()
    ]
    rows.append(["(noise floor)", *(_number(found.noise[d]) for d in found.dtypes), "the same backward twice"])
    rows.append(["(rounding)", *(_number(rounding(d)) for d in found.dtypes), "the dtype's machine epsilon"])
    title = "Divergence of the gradient from stock PyTorch's choice, relative L2, the largest of the batches"
    blocks.append(f"{title}\n{_aligned(rows, left=1, last_left=True)}")
    blocks += [f"{dtype} could not be run on {found.device}: {reason}" for dtype, reason in found.not_run.items()]
    return "\n\n".join([*blocks, "\n".join(f"* {line}" for line in found.advice)])


def _subject(found: Audit) -> str:
    batches = f"{found.batches} batch{'es' if found.batches > 1 else ''} of {' x '.join(map(str, found.shape))}"
    mode = "training" if found.training else "evaluation"
    return f"{found.model}: {batches}, {found.data}; {mode} mode, {found.device}, torch {found.torch}"


def _by_choice(found: Audit) -> dict[str, dict[str, Spread]]:
    grouped: dict[str, dict[str, Spread]] = {}
    for spread in found.spreads:
        grouped.setdefault(spread.choice, {})[spread.dtype] = spread
    return grouped


def _where(spreads: Sequence[Spread], count: int) -> str:
    """The layers of the dtype in which the choice matters most, in units of its rounding."""
    worst = max(spreads, key=lambda s: s.relative / rounding(s.dtype) if math.isfinite(s.relative) else math.inf)
    shown = [(name, share) for name, share in worst.layers.items() if share >= 1e-3][:count]
    layers = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shown)
    return f"{layers} ({worst.dtype})" if layers else ""


def _rest(found: Audit, shown: int) -> str:
    unreached = sum(site.how == "unreached" for site in found.sites)
    tied = len(found.tied_sites)
    untied = len(found.sites) - unreached - tied
    part = f"{tied} tied" + (f" ({shown} shown; --json and --html list all)" if shown < tied else "")
    parts = [part] + [f"{untied} without a tie"] * (untied > 0) + [f"{unreached} not measured"] * (unreached > 0)
    return f"{len(found.sites)} site{'s' * (len(found.sites) != 1)}: {', '.join(parts)}"


def _share(fraction: float) -> str:
    return percent(fraction) if fraction else "0"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2g}" if 1e-3 <= value < 1e4 else f"{value:.1e}" if value else "0"


def _aligned(rows: Sequence[Sequence[str]], left: int, last_left: bool = False) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    end = len(widths) - last_left

    def line(row: Sequence[str]) -> str:
        cells = [
            c.ljust(w) if i < left or i >= end else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    lines = [line(row) for row in rows]
    return "\n".join([lines[0], "  ".join("─" * w for w in widths), *lines[1:]])


# ---------------------------------------------------------------------------------------------------- HTML
# Okabe and Ito's colours, told apart by the colour-blind, and a shape each.
_LOOKS = {"16": ("#d55e00", "circle"), "bf16": ("#0072b2", "square"), "32": ("#009e73", "diamond"),
          "64": ("#7a5195", "triangle")}  # fmt: skip
_COLOURS = {"no ties": "#e3f1ea", "dead ties": "#e3f1ea", "rounding": "#e8eef6", "matters": "#fbe5d6",
            "not finite": "#f7d9d9"}  # fmt: skip
_STYLE = """
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1c2733; background: #fff;
  max-width: 62rem; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; } .quiet { color: #5b6875; } code { font-size: .92em; }
.verdicts { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0; }
.verdicts div { border-radius: 8px; padding: .6rem 1rem; min-width: 8.5rem; }
.verdicts b { display: block; font-size: 1.05rem; }
.advice { border-left: 4px solid #0072b2; background: #f5f8fb; padding: .5rem 1.1rem; border-radius: 0 8px 8px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem; text-align: right; border-bottom: 1px solid #e3e8ed; white-space: nowrap; }
th { border-bottom: 2px solid #b9c3cd; } tr.aside td { color: #5b6875; font-style: italic; }
.l { text-align: left; } td.l:last-child { white-space: normal; }
td.zero { color: #9aa5b0; } td.hot { background: #fbe5d6; font-weight: 600; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
summary { cursor: pointer; color: #0072b2; margin: .6rem 0; }
"""


def page(found: Audit) -> str:
    """The audit as one HTML page that loads nothing.

    Args:
        found: The audit.

    Returns:
        The page's source: verdicts, advice, two figures (inline SVG) and the tables.
    """
    title = f"Audit of {found.model}"
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="quiet">{escape(_subject(found).removeprefix(f"{found.model}: "))}</p>',
            "<p>Where an operation has no unique derivative (ReLU at 0, a max-pooling window whose maximum is reached "
            "twice: a <i>tie</i>), a library picks one. This page shows how often this model meets ties, and how far "
            "its gradient would move under another pick.</p>",
            _verdicts(found),
            '<div class="advice">',
            *(_paragraph(line) for line in found.advice),
            "</div>",
            "<h2>How far the gradient moves</h2>",
            '<p class="quiet">Relative L2 distance to the gradient of stock PyTorch\'s choice, the largest of the '
            "batches. Dashed: each dtype's machine epsilon; a difference left of it is rounding. Marks in the column "
            "“0” are exact zeros: no tie of these batches matters to that choice.</p>",
            _figure(
                [(choice, {d: s.relative for d, s in by.items()}) for choice, by in _by_choice(found).items()],
                found.dtypes,
                "relative divergence",
                {dtype: rounding(dtype) for dtype in found.dtypes},
            ),
            _divergences(found),
            *(
                f"<p><b>{escape(dtype)} could not be run</b> on {escape(found.device)}: {escape(reason)}</p>"
                for dtype, reason in found.not_run.items()
            ),
            "<h2>Where the ties are</h2>",
            f'<p class="quiet">{escape(_rest(found, len(found.tied_sites)))}. A share counts entries of the input for '
            "an activation, windows for a pool.</p>",
            _figure(
                [(site_label(s.name), {d: s.fraction(d) for d in found.dtypes}) for s in found.tied_sites],
                found.dtypes,
                "tied share of evaluations",
                {},
            ),
            _site_tables(found),
            "</body></html>\n",
        ]
    )


def _paragraph(text: str) -> str:
    """A paragraph, its first sentence set off where others follow."""
    first, stop, rest = text.partition(". ")
    return f"<p><b>{escape(first)}.</b> {escape(rest)}</p>" if stop else f"<p>{escape(text)}</p>"


def _verdicts(found: Audit) -> str:
    cards = []
    for dtype in found.dtypes:
        word = verdict(found, dtype)
        worst = max((s.relative for s in found.spreads if s.dtype == dtype), default=0.0)
        note = {"not finite": "gradients not finite"}.get(word, f"largest {_number(worst)}")
        cards.append(f'<div style="background:{_COLOURS[word]}">{dtype}<b>{word}</b>{note}</div>')
    cards += [f'<div style="background:#eee">{dtype}<b>could not be run</b></div>' for dtype in found.not_run]
    return f'<div class="verdicts">{"".join(cards)}</div>'


def _divergences(found: Audit) -> str:
    head = "".join(f"<th>{d}</th>" for d in found.dtypes)
    rows = [f'<tr><th class="l">choice</th>{head}<th class="l">arises in</th></tr>']
    for choice, by in _by_choice(found).items():
        cells = "".join(_cell(by[d].relative, rounding(d)) for d in found.dtypes)
        layers = escape(_where(list(by.values()), 2))
        rows.append(f'<tr><td class="l">{escape(choice)}</td>{cells}<td class="l">{layers}</td></tr>')
    for label, values, note in (
        ("noise floor", found.noise, "the same backward twice, subtracted"),
        ("rounding", {d: rounding(d) for d in found.dtypes}, "the dtype's machine epsilon"),
    ):
        cells = "".join(f"<td>{_number(values[d])}</td>" for d in found.dtypes)
        rows.append(f'<tr class="aside"><td class="l">{label}</td>{cells}<td class="l">{note}</td></tr>')
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _cell(value: float, eps: float) -> str:
    kind = "zero" if value == 0 else "" if value <= eps else "hot"  # what is not finite is hot
    return f'<td class="{kind}">{_number(value)}</td>'


def _site_tables(found: Audit) -> str:
    head = "".join(f"<th>{d}</th>" for d in found.dtypes)
    header = f'<tr><th class="l">site</th><th class="l">operation</th><th class="l">reached by</th>{head}</tr>'

    def rows(sites: Sequence[SiteTies]) -> str:
        lines = []
        for site in sites:
            cells = []
            for d in found.dtypes:
                tied, total = site.ties.get(d, (0, 0))
                text = "not measured" if d not in site.ties else _share(site.fraction(d))
                cells.append(f'<td class="{"" if tied else "zero"}" title="{tied:,} of {total:,}">{text}</td>')
            names = "".join(
                f'<td class="l">{escape(t)}</td>' for t in (site_label(site.name), site.operation, site.how)
            )
            lines.append(f"<tr>{names}{''.join(cells)}</tr>")
        return f'<div class="scroll"><table>{header}{"".join(lines)}</table></div>'

    tied = found.tied_sites
    names = {(site.name, site.operation) for site in tied}
    others = [site for site in found.sites if (site.name, site.operation) not in names]
    parts = [rows(tied)] if tied else []
    if others:
        parts.append(f"<details><summary>Sites without ties: {len(others)}</summary>{rows(others)}</details>")
    return "".join(parts)


def _figure(
    rows: Sequence[tuple[str, Mapping[str, float]]], dtypes: Sequence[str], label: str, marks: Mapping[str, float]
) -> str:
    """Points on a log axis, one row per name and one mark per dtype; zeros and what is not finite have columns."""
    if not rows:
        return "<p>No site met a tie.</p>"
    names = [name if len(name) <= 44 else f"…{name[-43:]}" for name, _ in rows]
    left, width, pitch = 7 * max(map(len, names)) + 20, 920, 7 if len(rows) <= 25 else 5
    row_height = 10 + pitch * len(dtypes)
    positive = [v for _, by in rows for v in by.values() if 0 < v < math.inf] + list(marks.values())
    low = math.floor(math.log10(min(positive))) if positive else -1
    high = max(math.ceil(math.log10(max(positive))) if positive else 0, low + 1)
    strange = any(not math.isfinite(v) for _, by in rows for v in by.values())
    zero, start, stop = left + 24, left + 70, width - (100 if strange else 30)
    top, bottom = 34, 34 + row_height * len(rows)

    def at(value: float) -> float:
        return start + (math.log10(value) - low) / (high - low) * (stop - start)

    parts = [f'<svg viewBox="0 0 {width} {bottom + 44}" role="img" aria-label="{escape(label)}">']
    x = float(left)
    for dtype in dtypes:
        parts.append(_mark(dtype, x, 12, ""))
        parts.append(f'<text x="{x + 9:.0f}" y="16" fill="#1c2733">{dtype}</text>')
        x += 70
    for i, name in enumerate(names):
        y = top + row_height * i
        if i % 2 == 0:
            parts.append(f'<rect x="0" y="{y}" width="{width}" height="{row_height}" fill="#f5f8fb"/>')
        parts.append(
            f'<text x="{left - 10}" y="{y + row_height / 2 + 4:.1f}" text-anchor="end" fill="#1c2733">'
            f"<title>{escape(rows[i][0])}</title>{escape(name)}</text>"
        )
    step = max(1, math.ceil((high - low) / 10))
    ticks = [(at(10.0**k), f'10<tspan dy="-5" font-size="9">{k}</tspan>') for k in range(low, high + 1, step)]
    ticks = [(float(zero), "0"), *ticks] + ([(width - 50.0, "not finite")] if strange else [])
    for x, text in ticks:
        parts.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="#dde3e9"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#5b6875">{text}</text>')
    parts.append(
        f'<line x1="{start - 22}" y1="{top}" x2="{start - 22}" y2="{bottom}" stroke="#b9c3cd"/>'
        f'<text x="{(start + stop) / 2:.0f}" y="{bottom + 38}" text-anchor="middle" fill="#1c2733">'
        f"{escape(label)}</text>"
    )
    for dtype, value in marks.items():
        x = at(value)
        parts.append(
            f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="{_LOOKS[dtype][0]}" '
            'stroke-dasharray="4 3"/>'
        )
    for i, (_, by) in enumerate(rows):
        for j, dtype in enumerate(dtypes):
            value = by[dtype]
            x = width - 50.0 if not math.isfinite(value) else at(value) if value else zero
            at_y = top + row_height * i + 5 + pitch * (j + 0.5)
            parts.append(_mark(dtype, x, at_y, f"{rows[i][0]}, {dtype}: {value:.4g}", hollow=value == 0))
    return "".join([*parts, "</svg>"])


def _mark(dtype: str, x: float, y: float, title: str, hollow: bool = False) -> str:
    colour, shape = _LOOKS[dtype]
    fill = f'fill="{"#fff" if hollow else colour}" stroke="{colour}" stroke-width="1.5"'
    told = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" {fill}>{told}</circle>'
    corners = {
        "square": ((-3, -3), (3, -3), (3, 3), (-3, 3)),
        "diamond": ((0, -4.5), (4.5, 0), (0, 4.5), (-4.5, 0)),
        "triangle": ((0, -4), (4, 3), (-4, 3)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" {fill}>{told}</polygon>'
