"""Writes docs/operations.md, and a plot of each operation, from what the code says of itself.

    python docs/make_operations.py            # writes docs/operations.md and docs/figures/operations/*.svg
    python docs/make_operations.py --text     # the page alone

The words come from `nslightning.jacobians.NONSMOOTH`, the spellings from `nslightning.ops.registry`, and the marks in
the plots are gradients taken through patched models, not copies of a table.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nslightning import Jacobians, patch
from nslightning.jacobians import NONSMOOTH, Nonsmooth
from nslightning.ops import modules
from nslightning.ops.registry import OPERATIONS, UNREACHED

HERE = Path(__file__).parent
PLOTS = HERE / "figures" / "operations"
PRESETS = ("pytorch", "jax", "tensorflow")

# Of each operation with kinks on a line: the function as a model writes it, the interval drawn, the kinks.
LINES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float], tuple[float, ...]]] = {
    "relu": (F.relu, (-1.5, 1.5), (0,)),
    "relu6": (F.relu6, (-2, 8), (0, 6)),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), (-1.5, 1.5), (0,)),
    "prelu": (lambda x: F.prelu(x, torch.tensor([0.25], dtype=x.dtype)), (-1.5, 1.5), (0,)),
    "rrelu": (lambda x: F.rrelu(x, 0.3, 0.3), (-1.5, 1.5), (0,)),
    "hardtanh": (F.hardtanh, (-2, 2), (-1, 1)),
    "clamp": (lambda x: x.clamp(-1, 1), (-2, 2), (-1, 1)),
    "hardswish": (F.hardswish, (-5, 5), (-3, 3)),
    "hardsigmoid": (F.hardsigmoid, (-5, 5), (-3, 3)),
    "hardshrink": (F.hardshrink, (-1.5, 1.5), (-0.5, 0.5)),
    "softshrink": (F.softshrink, (-1.5, 1.5), (-0.5, 0.5)),
    "threshold": (lambda x: F.threshold(x, 0.5, 0.5), (-1, 2), (0.5,)),
    "elu": (lambda x: F.elu(x, 0.5), (-2, 1.5), (0,)),
    "selu": (F.selu, (-2, 1.5), (0,)),
    "abs": (torch.abs, (-1.5, 1.5), (0,)),
    "hinge": (lambda u: F.margin_ranking_loss(u, torch.zeros_like(u), -torch.ones_like(u), reduction="none"),
              (-1.5, 1.5), (0,)),
}  # fmt: skip
# Of the others: a function of two equal entries, and choices worth a mark.
PLANES: dict[str, tuple[Callable[[Tensor], Tensor], float, tuple[Any, ...]]] = {
    "max_pool": (lambda x: F.max_pool1d(x[None], 2), 1.0, ("first", "last", "minimal", "sum", 3.0)),
    "max": (lambda x: x.amax(), 1.0, ("first", "last", "minimal", "sum", 3.0)),
    "maximum": (lambda x: torch.maximum(x[:1], x[1:]), 1.0, ("first", "last", "minimal", "sum", 3.0)),
    "norm": (lambda x: x.norm(), 0.0, (0.0, 0.5, 1.0, -0.5)),
}


def gradient(f: Callable[[Tensor], Tensor], x: Tensor, choice: Jacobians) -> Tensor:
    """The gradient of a patched function's sum."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x)

    model, x = Model(), x.clone().requires_grad_()
    patch(model, choice)
    return torch.autograd.grad(model(x).sum(), x)[0]


def line(name: str, figure: Any) -> None:
    """The function on the left; on the right its derivative, the Clarke Jacobian as bars, the presets as marks."""
    f, (low, high), kinks = LINES[name]
    left, right = figure.subplots(1, 2)
    edges = (low, *kinks, high)
    slopes: list[tuple[float, ...]] = []
    jump = False
    for i, (a, b) in enumerate(pairwise(edges)):
        x = torch.linspace(a, b, 200, dtype=torch.float64)[1:-1]
        y, slope = f(x), gradient(f, x, Jacobians())
        left.plot(x, y, color="black")
        right.plot(x, slope, color="black", label="derivative" if i == 0 else None)
    for kink in kinks:
        near = torch.tensor([kink - 1e-9, kink + 1e-9], dtype=torch.float64)
        slopes.append(tuple(gradient(f, near, Jacobians()).tolist()))
        values = f(near)
        jump |= bool((values[0] - values[1]).abs() > 1e-6)
        left.axvline(kink, color="0.7", lw=0.8, zorder=0)
    for i, (kink, ends) in enumerate(zip(kinks, slopes, strict=True)):
        style = {"color": "0.75", "lw": 7, "solid_capstyle": "butt", "zorder": 1}
        if not jump:
            right.plot([kink, kink], sorted(ends), label="Clarke Jacobian" if i == 0 else None, **style)
    at = torch.tensor(kinks, dtype=torch.float64)
    for preset, (marker, size, fill) in zip(
        PRESETS, (("o", 7, "black"), ("s", 8, "none"), ("^", 11, "none")), strict=True
    ):
        value = gradient(f, at, Jacobians.preset(preset))
        right.plot(
            at,
            value,
            marker,
            ms=size,
            mfc=fill,
            mec="black",
            label="PyTorch" if preset == "pytorch" else f"preset {preset}",
        )
    left.set_title(f"{name}(x)" if name != "hinge" else "max(u, 0)", fontsize=9)
    right.set_title("derivative", fontsize=9)
    right.margins(y=0.15)
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def plane(name: str, figure: Any) -> None:
    """What two equal entries receive of a gradient of 1: the Clarke Jacobian in the plane, the choices as marks."""
    from matplotlib.patches import Circle

    f, at, choices = PLANES[name]
    axis = figure.subplots()
    if name == "norm":
        axis.add_patch(Circle((0, 0), 1, color="0.85", label="Clarke Jacobian", zorder=0))
    else:
        axis.plot([1, 0], [0, 1], color="0.75", lw=7, solid_capstyle="butt", label="Clarke Jacobian", zorder=1)
    x = torch.full((2,), at, dtype=torch.float64)
    for choice, marker in zip(choices, "s^vDP", strict=False):
        share = gradient(f, x, Jacobians(**{name: choice}))
        label = f'"{choice}"' if isinstance(choice, str) else f"{'c' if name == 'norm' else 'beta'} = {choice:g}"
        axis.plot(*share.tolist(), marker, ms=8, mfc="none", mec="black", label=label, clip_on=False)
    axis.plot(*gradient(f, x, Jacobians()).tolist(), "o", ms=4, color="black", label="PyTorch")
    axis.set_aspect("equal")
    axis.set_xlabel("first entry receives")
    axis.set_ylabel("second receives")
    axis.margins(0.15)
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)


def plot(name: str, path: Path) -> None:
    """One operation's plot, as SVG (or PNG, by the path's ending), the same bytes each time."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from nslightning.figures import STYLE

    with mpl.rc_context(STYLE | {"svg.hashsalt": name, "svg.fonttype": "none", "axes.grid": False}):
        figure = Figure(figsize=(6.4, 2.1) if name in LINES else (4.4, 2.6), layout="constrained")
        (line if name in LINES else plane)(name, figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


def shown(value: Any) -> str:
    """A choice as one writes it."""
    return "as PyTorch" if value is None else f"`{value!r}`"


def spellings(name: str) -> list[str]:
    """What a patch reaches, by the names that people write."""
    functions, classes = OPERATIONS[name].functions, OPERATIONS[name].modules
    homes = ((torch, "torch."), (Tensor, "Tensor."), (F, "F."), (torch.linalg, "torch.linalg."))
    found = [
        f"{prefix}{attribute}"
        for home, prefix in homes
        for attribute in sorted(dir(home))
        if not attribute.startswith("_") and callable(f := getattr(home, attribute, None)) and f in functions
    ]
    return [f"nn.{cls.__name__}" for cls in classes] + found


def chosen_by(name: str) -> list[str]:
    """The modules of `ops` that take this choice, and the functions that they are."""
    classes = [getattr(modules, public) for public in modules.__all__]
    found = [cls for cls in classes if name in cls.fields]
    functions = [re.findall(r"ops\.(\w+)", cls.__doc__)[0] for cls in found]
    return [*dict.fromkeys(functions), *(cls.__name__ for cls in found)]


def section(name: str, operation: Nonsmooth) -> str:
    """One operation."""
    takes = [f'`"{n}"`' for n in operation.names]
    number = "two numbers" if len(operation.kinks) == 2 else "a number"
    lines = [
        f"## {name}",
        "",
        f"{operation.formula}",
        "",
        f"![{name}](figures/operations/{name}.svg)",
        "",
        "| kink | Clarke Jacobian | stock PyTorch |",
        "|---|---|---|",
        *(f"| {k.where} | {k.clarke} | {k.pytorch} |" for k in operation.kinks),
        "",
        f"- Choice: `Jacobians({name}=...)` takes {', '.join([number, *takes])}; `None` is the reference.",
        f"- Presets: jax {shown(operation.jax)}, tensorflow {shown(operation.tensorflow)}.",
        f"- In `nslightning.ops`: {', '.join(f'`{n}`' for n in chosen_by(name))}.",
        f"- Reached by `patch`: {', '.join(f'`{s}`' for s in spellings(name))}, and their ATen operators.",
        *([f"- {operation.note}"] if operation.note else []),
        *([f"- Paper: {operation.paper}."] if operation.paper else []),
        "",
    ]
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    head = f"""# The operations

Written by `python docs/make_operations.py` from the code's own description of each operation; do not edit.

{len(NONSMOOTH)} operations have a choice. Each is a field of `Jacobians` and is described once, in
`nslightning/jacobians.py`: validation, presets, the registry that `patch` reads and this page all read that. What the
libraries return at each kink was measured: [conventions.md](conventions.md).

In a plot the grey bar is the Clarke Jacobian (there is none where a function jumps), and the marks are the gradients
that the code returns there: of stock PyTorch, and of the presets `jax` and `tensorflow`. Where several entries reach a
maximum, the plot shows what two of them receive.

| operation | reference | `"jax"` | `"tensorflow"` |
|---|---|---|---|
"""
    rows = [
        f"| [{name}](#{name}) | {'; '.join(k.pytorch for k in op.kinks)} | {shown(op.jax)} | {shown(op.tensorflow)} |"
        for name, op in NONSMOOTH.items()
    ]
    by_reason: dict[str, list[str]] = {}
    for name, reason in UNREACHED.items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    left = [f"| {', '.join(names)} | {reason} |" for reason, names in by_reason.items()]
    tail = [
        "## Without a choice",
        "",
        "Found by `patch` and named in its report, with PyTorch's own derivative:",
        "",
        "| function | why |",
        "|---|---|",
        *left,
        "",
    ]
    return "\n".join([head + "\n".join(rows), "", *(section(n, op) for n, op in NONSMOOTH.items()), *tail])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="store_true", help="write the page alone")
    only_text = parser.parse_args().text
    (HERE / "operations.md").write_text(page(), encoding="utf-8")
    for operation_name in () if only_text else NONSMOOTH:
        plot(operation_name, PLOTS / f"{operation_name}.svg")
