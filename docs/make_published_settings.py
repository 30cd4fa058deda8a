"""Writes docs/published-settings.md: each published setting, the grid that has it, and how ours compares.

    python docs/make_published_settings.py

All of it comes from the published numbers that the package holds, the grids in configs/experiments, and results/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from nslightning.experiments import Experiment, comparison
from nslightning.experiments.cells import Cell, TrainCell
from nslightning.experiments.grid import Planned, setting
from nslightning.experiments.published import table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "published-settings.md"
COLUMNS = ("paper", "data", "backbone", "batch_norm", "optimizer", "precision", "parameter")
NETWORKS = {
    "fc": "MLP 3 x 2048", "fc_dropout": "MLP 3 x 2048", "lenet5": "LeNet-5", "vgg11": "VGG11", "resnet18": "ResNet-18",
    "densenet121": "DenseNet-121",
}  # fmt: skip
PARAMETERS = {"alpha": "ReLU'(0)", "beta": "MaxPool", "dropout_p": "dropout"}
#: The setting of a cell that a published parameter is.
CHOICES = {"alpha": "relu", "beta": "max_pool", "dropout_p": "dropout"}
#: The differences between our scale and the papers', in words.
DIFFERING = {
    "epochs": "{ours} epochs of {theirs}",
    "width": "width {ours} of {theirs}",
    "train_images": "{ours} images",
}

HEAD = """\
# Published settings

The trainings of the two papers, one line for each setting: which grid of `configs/experiments/` has it, at which
scale it ran here, and how many of the published values of the choice lie within two of the published standard
deviations, under the papers' rule and under the exact one. Written by `docs/make_published_settings.py` from the
published numbers, the grids and [`results/`](findings.md); a test keeps it so.

Inside and outside are said of the last epoch's test accuracy in per cent, ours against the published one. A published
spread is not known where a paper released medians (read from its box plots), or ran once. Only at the scale `paper`
is a setting the published one: elsewhere an "inside" says that the shorter run came as far, no more, and a small
difference outside may be the epochs that it lacks. At the scale `paper`, too, few of the published runs ran here: the
last column says how many seeds and values. At MaxPool's beta 0 and 1 both rules are one program, which is counted as
exact. In 16 bits at beta 10³ and 10⁴ the exact rule is outside because it does not take part in what diverges there:
the forward of the published pooling ([findings](findings.md)). The settings that did not run would take these two
cores days to weeks.

| paper | data | network | batch norm | optimizer | bits | choice (values of it) | grid | ran here | inside, outside \
| why |
|---|---|---|---|---|---|---|---|---|---|---|
"""

IMAGENET = """
ImageNet (paper B's ResNet-50 with MaxPool's beta, and paper A's with ReLU'(0)) has the configs `imagenet_beta` and
`imagenet_alpha`, for `nslightning fit`. Neither ran here: 80 and 90 epochs of 1.3 million images.

The papers' other measurements, which train nothing, are in the [findings](findings.md): S_01, the shares of
mini-batches that pass a threshold, and the histograms. INNAprop's 1,200 heat-map cells are the grid
`cifar10_innaprop`, of which no cell ran.
"""


@dataclass
class Setting:
    """A published setting, and what is known here of it."""

    key: tuple[Any, ...]
    values: set[Any]  # in the grid
    published: int  # values in the paper
    grid: Experiment
    runs: list[Planned] = field(default_factory=list)  # at the paper's scale, under the published rule


@cache
def grids() -> list[Experiment]:
    """The trainings of configs/experiments, at the papers' scale."""
    files = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))
    return [Experiment.read(f, "paper") for f in files if yaml.safe_load(f.read_text())["kind"] == "train"]


def rows_of(entry: Mapping[str, Any], cell: Cell, rows: pd.DataFrame) -> pd.DataFrame:
    """The published rows that an entry holds a cell against."""
    wanted = {"data": cell.data, **entry.get("where", {})}
    wanted |= {column: setting(cell, name) for column, name in entry.get("match", {}).items()}
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    return rows


def settings() -> list[Setting]:
    """Each published setting once, in the order of the published table."""
    rows = table("training")
    rows = rows[rows["metric"] == "test_accuracy"]
    counts = rows.groupby(list(COLUMNS))["value"].nunique().to_dict()
    by_key: dict[tuple[Any, ...], Setting] = {}
    for grid in grids():
        for entry in grid.compare:
            if entry["published"] != "training":
                continue
            for planned in grid.cells({"rule": ["published"]}):
                for row in rows_of(entry, planned.cell, rows).to_dict("records"):
                    key = tuple(row[c] for c in COLUMNS)
                    one = by_key.setdefault(key, Setting(key, set(), counts[key], grid))
                    assert one.grid.name == grid.name, f"two grids have {key}"
                    one.values.add(row["value"])
                    one.runs.append(planned)
    order = [tuple(row) for row in rows[list(COLUMNS)].drop_duplicates().itertuples(index=False)]
    return [by_key[key] for key in order]


def ran(one: Setting) -> Iterator[tuple[Experiment, pd.DataFrame, pd.DataFrame]]:
    """Each run whose results are here, the largest scale first: its grid, its results, the lines of its comparison."""
    known = dict(zip(COLUMNS, one.key, strict=True))
    for scale in ("paper", "small"):
        for file in sorted((ROOT / "results").glob(f"{one.grid.name}*/{scale}/results.csv")):
            name, *overrides = file.parents[1].name.split("+")
            if name != one.grid.name:
                continue
            settings = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in overrides)}
            grid = Experiment.read(ROOT / "configs" / "experiments" / f"{name}.yaml", scale, settings)
            results = pd.read_csv(file, keep_default_na=False, na_values=[""])
            compared = comparison(grid, results)
            mine = compared[compared["published_mean"].notna()]
            keys = {column: known[column] for column in ("batch_norm", "precision")}
            for column, value in keys.items():
                if column in mine:
                    mine = mine[mine[column] == value]
            here = {p.id for p in grid.cells() if all(getattr(p.cell, key) == value for key, value in keys.items())}
            if len(mine) and here & set(results["cell"]):
                yield grid, results[results["cell"].isin(here)], mine


def counted(lines: pd.DataFrame) -> str:
    """How many lines of a comparison are inside and outside, by rule."""
    texts = []
    for rule in ("published", "exact"):
        of_rule = lines[lines["rule"] == rule] if "rule" in lines else lines
        if len(of_rule):
            inside, outside = ((of_rule["inside"] == word).sum() for word in ("yes", "no"))
            unknown = len(of_rule) - inside - outside
            parts = [f"{inside} inside, {outside} outside"] if inside + outside else []
            parts += [f"{unknown} without a published spread"] if unknown else []
            texts.append(f"{rule}: {', '.join(parts)}")
    return "; ".join(texts)


def scale_differs(grid: Experiment, one: Setting, results: pd.DataFrame) -> str:
    """The quantities that our scale reduces, in words."""
    ours = next(p.cell for p in grid.cells() if p.id in set(results["cell"]))
    theirs = one.runs[0].cell
    assert isinstance(theirs, TrainCell)
    words = [
        text.format(ours=getattr(ours, name), theirs=getattr(theirs, name))
        for name, text in DIFFERING.items()
        if getattr(ours, name) != getattr(theirs, name)
    ]
    seeds = results["seed"].nunique(), len({p.cell.seed for p in one.runs})
    if seeds[0] != seeds[1]:
        words.append(f"{seeds[0]} seed{'s' * (seeds[0] > 1)} of {seeds[1]}")
    values = results[CHOICES[one.key[-1]]].nunique()
    if values < len(one.values):
        words.append(f"{values} values of {len(one.values)}")
    return ", ".join(words)


def outliers(lines: pd.DataFrame, parameter: str) -> Iterator[str]:
    """Each line outside: the value, ours and the published one; and runs that ended with NaN on either side."""
    name = CHOICES[parameter]
    for row in lines[lines["inside"] == "no"].to_dict("records"):
        theirs, ours = (f"{100 * row[key]:.2f}" for key in ("published_mean", "mean"))
        nan = [f"{row[key]:.0f} of {row[n]:.0f} NaN" if row[key] else "" for key, n in (
            ("nan", "n"), ("published_nan", "published_n"),
        )]  # fmt: skip
        ours, theirs = (
            f"{number} ({note})" if note else number for number, note in zip((ours, theirs), nan, strict=True)
        )
        yield f"{row['rule']}, {parameter} {row[name]:g}: {ours} against {theirs}"


def line(one: Setting) -> list[str]:
    """A row of the table."""
    paper, data, network, norm, optimizer, bits, parameter = one.key
    values = f"{len(one.values)}" + (f" of {one.published}" if one.published > len(one.values) else "")
    head = [
        paper, data, NETWORKS[network], "yes" if norm else "no", optimizer, str(bits),
        f"{PARAMETERS[parameter]} ({values})", f"`{one.grid.name}`",
    ]  # fmt: skip
    known = list(ran(one))
    if not known:
        first = one.runs[0].cell
        assert isinstance(first, TrainCell)
        runs = len({p.id for p in one.runs})
        return [*head, "no", "", f"{runs} run{'s' * (runs > 1)} of {first.epochs} epochs"]
    why = ["; ".join(filter(None, [scale_differs(grid, one, results), *outliers(lines, parameter)]))
           for grid, results, lines in known]  # fmt: skip
    scales = [grid.scale for grid, _, _ in known]
    return [*head, *("<br>".join(parts) for parts in (scales, [counted(lines) for _, _, lines in known], why))]


def page() -> str:
    """The page."""
    rows = [f"| {' | '.join(line(one))} |" for one in settings()]
    return HEAD + "\n".join(rows) + "\n" + IMAGENET


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
