"""The cost of a gradient, as tables for a terminal."""

from __future__ import annotations

from nslightning.probes.cost_data import STOCK, CostReport, CostScaling
from nslightning.text_table import aligned

__all__ = ["scaling_table", "table"]


def table(report: CostReport) -> str:
    """A cost report for a terminal.

    Args:
        report: The report.

    Returns:
        Aligned tables of choices and modules, and the verdicts.
    """
    env, f = report.environment, report.forward
    jvp = (
        f"one JVP (stock model) {report.jvp_ratio:.2f} F, "
        f"a gradient by forward mode about {report.forward_mode_ratio:.1e} F"
        if report.jvp
        else f"no JVP: {report.jvp_note}"
    )
    flops = f"FLOP ratio {_cell(report.flop_ratio)}"
    lines = [
        f"{report.model}: {report.parameters:,} parameters, batch {report.batch}, {report.dtype}, "
        + ("training" if report.training else "evaluation"),
        f"{env['machine']}, {env['cores']} cores; {env['clock']}, {env['threads']} thread(s), "
        f"torch {env['torch']}; n = {f.n} interleaved rounds",
        f"forward F {f.minimum:.3g} ms (quartiles {f.lower:.3g}, {f.median:.3g}, {f.upper:.3g}), "
        f"recording the graph {report.recorded_ratio:.2f} F",
        jvp,
        f"{flops}; {report.ties:,} ties in {report.evaluations:,} evaluations"
        + (", so that the choices cannot differ" if not report.ties else ""),
        "",
        *aligned(
            [
                ("choice", "B ms", "B/F", "quartiles of B/F", "memory B/F", "max |dg|", f"<= {report.bound:g}"),
                *(
                    (
                        c.name,
                        f"{c.gradient.minimum:.3g}",
                        f"{report.ratio(c.name):.2f}",
                        "  ".join(f"{q:.2f}" for q in c.spread),
                        _cell(report.memory_ratio(c.name)),
                        f"{c.max_difference:.3g}",
                        "yes" if report.holds(c.name) else "NO",
                    )
                    for c in report.choices
                ),
            ]
        ),
        "B: forward and backward. Ratios are of minima; memory by " + report.memory_method,
    ]
    if report.modules:
        lines += ["", "The modules that take most time, each called alone:", *_module_table(report)]
    if report.unmeasured:
        lines += [f"Not measured alone: {name} ({reason})" for name, reason in report.unmeasured.items()]
    return "\n".join([*lines, "", *(report.verdict(c.name) for c in report.choices)])


def scaling_table(scaling: CostScaling) -> str:
    """A scaling for a terminal.

    Args:
        scaling: The scaling.

    Returns:
        An aligned table of the ratios by width, and their slopes.
    """
    names = [c.name for c in scaling.reports[0].choices]
    rows = [
        (
            str(w),
            f"{r.parameters:,}",
            f"{r.forward.minimum:.3g}",
            *(f"{r.ratio(name):.2f}" for name in names),
            "-" if r.forward_mode_ratio is None else f"{r.forward_mode_ratio:.1e}",
        )
        for w, r in zip(scaling.widths, scaling.reports, strict=True)
    ]
    slopes = scaling.slopes()
    forward = f"{slopes['forward mode']:+.2f}" if "forward mode" in slopes else "-"
    rows.append(("slope", "", "", *(f"{slopes[name]:+.2f}" for name in names), forward))
    header = ("width", "parameters", "F ms", *(f"B/F {name}" for name in names), "p J/F")
    note = "Slopes of log(ratio) against log(parameters); theory: 0 for B/F, 1 for p J/F (forward mode)."
    return "\n".join([*aligned([header, *rows]), note])


def _module_table(report: CostReport, most: int = 12) -> list[str]:
    stock = sorted((m for m in report.modules if m.choice == STOCK), key=lambda m: -m.calls * m.gradient.minimum)
    ratio = {(m.name, m.choice): f"{m.ratio:.2f}" for m in report.modules}
    names = [c.name for c in report.choices]
    rows = [
        (
            m.name,
            m.kind,
            str(m.calls),
            f"{m.forward.minimum:.3g}",
            f"{m.gradient.minimum:.3g}",
            *(ratio.get((m.name, name), "=") for name in names),
        )
        for m in stock[:most]
    ]
    header = ("module", "kind", "calls", "F ms", "B ms", *(f"B/F {name}" for name in names))
    return [*aligned([header, *rows], texts=2), "=: not patched, so as stock"]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
