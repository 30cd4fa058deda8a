"""Writes docs/operations.md, and a plot of each operation, from what the code says of itself.

    python docs/make_operations.py            # writes docs/operations.md and docs/figures/operations/*.svg
    python docs/make_operations.py --text     # the page alone

All of it comes from the records of `nslightning.ops`, and the marks in the plots are gradients taken through patched
models, not copies of a table.
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

from nslightning import Jacobians, ops, patch
from nslightning.jacobians import PRESETS
from nslightning.ops.record import OPERATIONS, Kink, Operation, as_words
from nslightning.ops.unreached import UNREACHED

HERE = Path(__file__).parent
PLOTS = HERE / "figures" / "operations"


def example(operation: Operation) -> Callable[[Tensor], Tensor]:
    """The function as a model writes it."""
    if operation.example is None:
        raise ValueError(f"the record of {operation.name} has no example to plot")
    return operation.example


def on_a_line(name: str) -> bool:
    """Whether an operation has kinks at numbers, and not where entries are equal."""
    return all(kink.sides is not None for kink in OPERATIONS[name].kinks)


def positions(operation: Operation) -> list[float]:
    """Where the example has its kinks."""
    return operation.positions(*operation.at) or [0.0]


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
    operation = OPERATIONS[name]
    f, kinks = example(operation), positions(operation)
    margin = max(1.5, (kinks[-1] - kinks[0]) / 3)
    low, high = kinks[0] - margin, kinks[-1] + margin
    left, right = figure.subplots(1, 2)
    edges = (low, *kinks, high)
    slopes: list[tuple[float, ...]] = []
    for i, (a, b) in enumerate(pairwise(edges)):
        x = torch.linspace(a, b, 200, dtype=torch.float64)[1:-1]
        y, slope = f(x), gradient(f, x, Jacobians())
        left.plot(x, y, color="black")
        right.plot(x, slope, color="black", label="derivative" if i == 0 else None)
    for kink in kinks:
        near = torch.tensor([kink - 1e-9, kink + 1e-9], dtype=torch.float64)
        slopes.append(tuple(gradient(f, near, Jacobians()).tolist()))
        left.axvline(kink, color="0.7", lw=0.8, zorder=0)
    for i, (kink, ends) in enumerate(zip(kinks, slopes, strict=True)):
        style = {"color": "0.75", "lw": 7, "solid_capstyle": "butt", "zorder": 1}
        if not operation.kinks[i].jumps(*operation.at):
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
    """The shares of two equal entries in a gradient of 1: the Clarke Jacobian in the plane, the choices as marks."""
    from matplotlib.patches import Circle

    operation = OPERATIONS[name]
    f, (at,) = example(operation), operation.at
    choices = ("first", "last", "minimal", "sum", 3.0) if operation.shares else (0.0, 0.5, 1.0, -0.5)
    axis = figure.subplots()
    if not operation.shares:
        axis.add_patch(Circle((0, 0), 1, color="0.85", label="Clarke Jacobian", zorder=0))
    else:
        axis.plot([1, 0], [0, 1], color="0.75", lw=7, solid_capstyle="butt", label="Clarke Jacobian", zorder=1)
    x = torch.full((2,), at, dtype=torch.float64)
    for choice, marker in zip(choices, "s^vDP", strict=False):
        share = gradient(f, x, Jacobians(**{name: choice}))
        label = f'"{choice}"' if isinstance(choice, str) else f"{'beta' if operation.shares else 'c'} = {choice:g}"
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
        figure = Figure(figsize=(6.4, 2.1) if on_a_line(name) else (4.4, 2.6), layout="constrained")
        (line if on_a_line(name) else plane)(name, figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


def shown(value: Any) -> str:
    """A choice as one writes it."""
    if value is None:
        return "as PyTorch"
    if isinstance(value, str):
        return f"`{value}`"
    return summary([as_words(number) for number in (value if isinstance(value, tuple) else (value,))])


def spellings(name: str) -> list[str]:
    """The spellings that a patch reaches, by the names that people write."""
    functions, classes = OPERATIONS[name].functions, OPERATIONS[name].modules
    homes = ((torch, "torch."), (Tensor, "Tensor."), (F, "F."), (torch.linalg, "torch.linalg."))
    of_functions = [
        f"{prefix}{attribute}"
        for home, prefix in homes
        for attribute in sorted(dir(home))
        if not attribute.startswith("_") and callable(f := getattr(home, attribute, None)) and f in functions
    ]
    return [f"nn.{cls.__name__}" for cls in classes] + of_functions


def chosen_by(name: str) -> list[str]:
    """The modules of `ops` that take this choice, and the functions that they are."""
    exported = [getattr(ops, public) for public in ops.__all__]
    modules = [cls for cls in exported if isinstance(cls, type) and name in getattr(cls, "fields", ())]
    functions = [re.findall(r"ops\.(\w+)", cls.__doc__)[0] for cls in modules]
    return [*dict.fromkeys(functions), *(cls.__name__ for cls in modules)]


def clarke(kink: Kink, operation: Operation) -> str:
    """The Clarke Jacobian at a kink, in words."""
    if kink.clarke or kink.sides is None:
        return kink.clarke
    if kink.jumps(*operation.at):
        return "none: a jump"
    return f"[{', '.join(as_words(side) for side in sorted(kink.sides(*operation.at)))}]"


def references(operation: Operation) -> list[str]:
    """Stock PyTorch's derivative at each kink, in words."""
    values = operation.stock(*operation.at) if operation.taken else [None] * len(operation.kinks)
    numbers = ("" if value is None else as_words(value) for value in values)
    return [kink.stock or number for kink, number in zip(operation.kinks, numbers, strict=True)]


def summary(values: list[str]) -> str:
    """The references of one operation in one cell; equal ones stand once."""
    return f"{values[0]}, at both kinks" if len(values) == 2 and len(set(values)) == 1 else "; ".join(values)


def section(name: str, operation: Operation) -> str:
    """One operation."""
    takes = [f'`"{n}"`' for n in operation.choices]
    if operation.shares:
        number = "a number [beta](glossary.md#beta)"
    elif len(operation.kinks) == 2:
        number = "two numbers (the derivatives at the two kinks)"
    else:
        number = "a number (the derivative at the kink)" if on_a_line(name) else "a number"
    lines = [
        f"## {name}",
        "",
        f"{operation.formula}",
        "",
        f"![{name}](figures/operations/{name}.svg)",
        "",
        "| kink | Clarke Jacobian | native |",
        "|---|---|---|",
        *(
            f"| {kink.where} | {clarke(kink, operation)} | {stock} |"
            for kink, stock in zip(operation.kinks, references(operation), strict=True)
        ),
        "",
        f"- Choice: `Jacobians({name}=...)` takes {', '.join([number, *takes])}; `None` is the native choice.",
        f"- Presets: jax {shown(operation.jax)}, tensorflow {shown(operation.tensorflow)}.",
        f"- In `nslightning.ops`: {', '.join(f'`{n}`' for n in chosen_by(name))}.",
        f"- Reached by `patch`: {', '.join(f'`{s}`' for s in spellings(name))}, and their ATen operators.",
        *([f"- {operation.note}"] if operation.note else []),
        *([f"- Paper: {operation.references}."] if operation.references else []),
        "",
    ]
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    head = f"""# The operations

`python docs/make_operations.py` writes this page from the records of the code; do not edit it.

{len(OPERATIONS)} operations have a choice. Each is a field of `Jacobians`. One record in the code describes each
operation; `Jacobians`, `patch`, the probes, the audit and this page read these records
([how to add one](how-to-add-an-operation.md)). [Conventions of the libraries](conventions.md) has the measured
values at each kink.

In a plot the grey bar is the [Clarke Jacobian](glossary.md#clarke-jacobian); there is none where a function jumps. The
marks are the gradients that the code returns at the kink under stock PyTorch's choice and under the presets `jax` and
`tensorflow`. Where several entries reach a maximum, the plot shows what two of them receive.

[Native](glossary.md#native) is stock PyTorch's choice. Two values in one cell belong to two kinks, the lower
one first.

| operation | native | `"jax"` | `"tensorflow"` |
|---|---|---|---|
"""
    rows = [
        f"| [{name}](#{name}) | {summary(references(op))} | {shown(op.jax)} | {shown(op.tensorflow)} |"
        for name, op in OPERATIONS.items()
    ]
    by_reason: dict[str, list[str]] = {}
    for name, reason in UNREACHED.items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    left = [f"| {', '.join(names)} | {reason} |" for reason, names in by_reason.items()]
    tail = [
        "## Without a choice",
        "",
        "`patch` finds these and [raises an error](surgery.md#strictness).",
        "With `strict=False` it leaves them to PyTorch and names them in its report:",
        "",
        "| function | why |",
        "|---|---|",
        *left,
        "",
    ]
    return "\n".join([head + "\n".join(rows), "", *(section(n, op) for n, op in OPERATIONS.items()), *tail])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="store_true", help="write the page alone")
    only_text = parser.parse_args().text
    (HERE / "operations.md").write_text(page(), encoding="utf-8")
    for operation_name in () if only_text else OPERATIONS:
        plot(operation_name, PLOTS / f"{operation_name}.svg")
