"""The one place that makes HTML: what a page holds, as plain data, and the template that turns it into one file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, TypeAlias

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

__all__ = [
    "MISSING", "Cards", "Cell", "Figure", "Fold", "Page", "Section", "Table", "Text", "chart", "render", "scripts",
    "table",
]  # fmt: skip

MISSING = "-"
_SCRIPTS = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js")  # each needs those before it
_LONG = 32  # characters, from which on a cell breaks into lines


# ------------------------------------------------------------------------------------------- what a page holds
@dataclass(frozen=True)
class Text:
    """A paragraph. Words between backticks become code.

    Args:
        text: The words.
        kind: ``""``, ``"quiet"`` for an explanation, ``"missing"`` for what was not recorded, ``"advice"``, or
            ``"heading"``.
    """

    template: ClassVar[str] = "text"
    text: str
    kind: str = ""


@dataclass(frozen=True)
class Cards:
    """Verdicts beside each other.

    Args:
        cards: For each card its label, its word, a note, and its kind: ``"good"``, ``"slight"``, ``"strong"``,
            ``"bad"`` or ``"none"``.
    """

    template: ClassVar[str] = "cards"
    cards: Sequence[tuple[str, str, str, str]]


@dataclass(frozen=True)
class Cell:
    """A cell whose look says something.

    Args:
        text: Its content.
        kind: ``"number"``, ``"zero"`` or ``"hot"`` for a number; ``""`` for a text.
        title: A note that appears under a resting pointer.
    """

    text: str
    kind: str = ""
    title: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Args:
        label: Name of the table for a screen reader.
        head: The columns' names.
        numeric: For each column, whether it holds numbers.
        rows: The cells of each row.
        marks: For each row ``""``, ``"differs"`` for one that stands out, or ``"aside"`` for one that stands back.
    """

    template: ClassVar[str] = "table"
    label: str
    head: Sequence[str]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[Cell]]
    marks: Sequence[str]


@dataclass(frozen=True)
class Figure:
    """A figure that the page's script draws with Vega.

    Args:
        spec: Name of the Vega-Lite spec in ``charts/``.
        data: One row per mark.
        alt: Description for readers who do not see it, in a sentence.
        title: Its heading.
        note: Explanation beside the figure.
        choose: Columns of which the reader picks one value.
        focus: Column of which the reader may pick one value to see alone.
        first: A column, and how many of its values are drawn before the reader asks for all.
        axis: Title of the axis whose title the spec leaves to the page.
        extent: Pixels for the labels of the vertical axis, where the page is wide enough.
    """

    template: ClassVar[str] = "figure"
    spec: str
    data: pd.DataFrame
    alt: str
    title: str = ""
    note: str = ""
    choose: Sequence[str] = ()
    focus: str = ""
    first: tuple[str, int] | None = None
    axis: str = ""
    extent: int = 56


@dataclass(frozen=True)
class Fold:
    """Parts that a reader opens.

    Args:
        summary: Title of the closed fold.
        parts: The parts.
    """

    template: ClassVar[str] = "fold"
    summary: str
    parts: Sequence[Part]


Part: TypeAlias = Text | Cards | Table | Figure | Fold


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading, to which the contents lead.

    Args:
        title: The heading.
        parts: Its content.
    """

    title: str
    parts: Sequence[Part] = field(default_factory=tuple)

    @property
    def anchor(self) -> str:
        """The heading's name in an address."""
        return re.sub(r"\W+", "-", self.title.lower())


@dataclass(frozen=True)
class Page:
    """A page.

    Args:
        title: Its title.
        lead: Introduction to the subject, below the title.
        sections: Its sections.
        subtitle: The measurement: model, data, device, versions.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    subtitle: str = ""


# ----------------------------------------------------------------------------------------------- what parts are
def number(value: float | None) -> str:
    """A number for a table.

    Args:
        value: The number; None where there is none.

    Returns:
        Four digits, ``"-"`` for None, ``"not finite"`` for what is not finite.

    Example:
        >>> number(0.25), number(1e-9), number(None), number(float("nan"))
        ('0.25', '1.00e-09', '-', 'not finite')
    """
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"


def table(label: str, head: Sequence[str], rows: Iterable[Sequence[Any]], marks: Iterable[str] = ()) -> Table:
    """A table of texts and numbers.

    Args:
        label: Name of the table for a screen reader.
        head: The columns' names.
        rows: Texts, numbers, None for a number that is missing, and :class:`Cell` for cells with a look.
        marks: For each row its mark, as :class:`Table` takes them; none by default.

    Returns:
        The table; a column of numbers is set to the right.
    """
    rows, marks = [list(row) for row in rows], list(marks)
    numeric = [bool(rows) and all(map(_is_number, column)) for column in zip(*rows, strict=True)] or [False] * len(head)
    cells = [[_cell(value) for value in row] for row in rows]
    return Table(label, head, numeric, cells, marks or [""] * len(rows))


def _is_number(value: Any) -> bool:
    return bool(value.kind) if isinstance(value, Cell) else isinstance(value, (int, float, type(None)))


def _cell(value: Any) -> Cell:
    if isinstance(value, Cell):
        return value
    return Cell(number(value) if value is None or isinstance(value, float) else str(value))


def chart(name: str) -> dict[str, Any]:
    """A Vega-Lite spec of this package. Its data set is called ``wandb``, as in W&B's custom charts.

    Args:
        name: ``"curves"``, ``"dots"``, ``"log_series"``, ``"layers"``, ``"ties"`` or ``"zones"``.

    Returns:
        The spec.

    Example:
        >>> chart("layers")["data"]
        {'name': 'wandb'}
    """
    spec: dict[str, Any] = json.loads(_source(f"charts/{name}.json"))
    return spec


@cache
def scripts() -> tuple[str, ...]:
    """Vega, Vega-Lite and Vega-Embed, in the order in which a page needs them.

    Returns:
        The scripts, 0.8 MB together; the last one sets ``vegaEmbed``.
    """
    # Without the address of their source maps, which a page that loads nothing cannot have.
    return tuple(re.sub(r"\n//# sourceMappingURL=.*", "", _source(f"vega/{name}")) for name in _SCRIPTS)


def _source(name: str) -> str:
    return files("nslightning.report").joinpath(name).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- rendering
def render(page: Page) -> str:
    """A page as one HTML file.

    Args:
        page: The page.

    Returns:
        The source; it makes no request to any server, and a policy makes the browser refuse one.
    """
    figures = {f"figure-{i}": figure for i, figure in enumerate(_figures(page), start=1)}
    drawn = {
        "specs": {name: chart(name) for name in sorted({figure.spec for figure in figures.values()})},
        "figures": [
            {
                "id": name, "spec": figure.spec, "alt": figure.alt, "choose": figure.choose, "focus": figure.focus,
                "first": figure.first, "axis": figure.axis, "extent": figure.extent,
                "columns": _columns(figure.data),
            }
            for name, figure in figures.items()
        ],
    }  # fmt: skip
    return _environment().get_template("page.html").render(
        page=page,
        style=Markup(_source("templates/page.css")),
        scripts=[_inline(script) for script in (*scripts(), _source("templates/page.js"))] if figures else [],
        drawn=Markup(json.dumps(drawn, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")),
        names={id(figure): name for name, figure in figures.items()},
    )  # fmt: skip


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nslightning.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"code": _code, "breakable": _breakable}
    environment.globals |= {"identity": id}
    environment.tests |= {"long": lambda text: len(text) > _LONG}
    return environment


def _figures(page: Page) -> Iterator[Figure]:
    def inside(parts: Sequence[Part]) -> Iterator[Figure]:
        for part in parts:
            if isinstance(part, Figure):
                yield part
            elif isinstance(part, Fold):
                yield from inside(part.parts)

    for section in page.sections:
        yield from inside(section.parts)


def _code(text: str) -> Markup:
    """Text whose words between backticks are code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _breakable(text: str) -> Markup:
    """A name that may break into lines after a slash and a dot."""
    return Markup(re.sub(r"(?<=[./])", "<wbr>", str(escape(text))))


def _inline(script: str) -> Markup:
    return Markup(script.replace("</script", "<\\/script"))


def _columns(data: pd.DataFrame) -> Mapping[str, Any]:
    """A table as lists: texts as distinct values and codes, numbers to five digits, what is not finite as null."""
    columns: dict[str, Any] = {}
    for name, column in data.items():
        if pd.api.types.is_numeric_dtype(column):
            columns[str(name)] = [_digits(v) for v in column.astype(float)]
        else:
            codes, values = pd.factorize(column)
            columns[str(name)] = {"values": list(values), "codes": codes.tolist()}
    return columns


def _digits(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 2**53 else float(f"{value:.5g}")
