"""Write docs/gallery.md and its figures from the results in the repository.

    python docs/make_gallery.py [--text]

Every figure for which results/ has an experiment is drawn; the others are listed with the commands that make them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from nslightning.experiments import figures
from nslightning.experiments.grid import SCALES

HERE = Path(__file__).parent
ROOT = HERE.parent
PLOTS = HERE / "figures" / "gallery"
LARGEST = 150_000  # bytes of a picture


class Entry(NamedTuple):
    """A figure, what it is drawn from, and why it is not (where it is not)."""

    name: str
    sources: list[Path]
    missing: str


def sources(name: str, results: Path) -> list[Path]:
    """Of every experiment that feeds a figure, the results at the scale of which most cells ran; smoke is no result."""
    folders = []
    for experiment in figures.feeding(name):
        scales = [results / experiment / scale for scale in SCALES[1:]]
        ran = [folder for folder in scales if (folder / "results.csv").is_file()]
        folders += [max(ran, key=lambda folder: len(cells(folder)))] if ran else []
    return folders


def cells(folder: Path) -> dict[str, Any]:
    """The cells of some results, by name: their settings and provenance."""
    content: dict[str, dict[str, Any]] = json.loads((folder / "provenance.json").read_text())
    return content["cells"]


def entries(results: Path) -> list[Entry]:
    """The figures that can be drawn, and those that cannot."""
    made = []
    for name, drawing in figures.FIGURES.items():
        folders = sources(name, results) if drawing.needs_results else []
        missing = "" if folders or not drawing.needs_results else "no results yet"
        if not missing:
            try:
                figures.make(name, figures.read(folders))
            except ValueError as error:  # results that do not suffice, such as those of one rule alone
                missing = str(error)
        made.append(Entry(name, folders, missing))
    return made


def command(entry: Entry) -> str:
    """The commands that draw a figure, from the repository's root."""
    folders = " ".join(s.relative_to(ROOT).as_posix() for s in entry.sources)
    return f"nslightning figure {entry.name}" + (f" --from {folders}" if folders else "")


def section(entry: Entry) -> str:
    """A figure with what made it."""
    drawing = figures.FIGURES[entry.name]
    lines = [f"## {entry.name}", "", f"{drawing.title}. Published counterpart: {drawing.paper}.", ""]
    lines += [f"![{entry.name}](figures/gallery/{entry.name}.png)", "", "```", command(entry), "```", ""]
    for source in entry.sources:
        ran = cells(source)
        images = "; ".join(dict.fromkeys(cell["provenance"]["data"] for cell in ran.values()))
        run = f"nslightning experiment {source.parent.name} --scale {source.name}"
        lines.append(f"- `{run}`: {len(ran)} cells, {images}")
    return "\n".join([*lines, ""] if entry.sources else lines)


def page(made: list[Entry]) -> str:
    """The whole page."""
    head = """# Gallery

Written by `python docs/make_gallery.py` from the results in `results/`; do not edit. Under each picture stand the
command that draws it, and of each experiment the command, the scale and the copy of the data that made its numbers. At
the scale `small` the settings are not the published ones: hollow grey diamonds, which are published numbers, show then
what a paper found under its own settings. The numbering of fig3 is inferred.
"""
    drawn = [section(e) for e in made if not e.missing]
    lines = [
        "## Not drawn yet",
        "",
        "| figure | shows | why not | commands |",
        "|---|---|---|---|",
    ]
    for entry in made:
        if entry.missing:
            runs = [f"`nslightning experiment {e} --scale small`" for e in figures.feeding(entry.name)]
            shows = figures.FIGURES[entry.name].title
            lines.append(f"| {entry.name} | {shows} | {entry.missing} | {'<br>'.join(runs)} |")
    return "\n".join([head, *drawn, *(lines if len(lines) > 4 else []), ""])


def picture(entry: Entry) -> bytes:
    """A figure as PNG, as sharp as fits."""
    from matplotlib import rc_context
    from PIL import Image

    figure = figures.make(entry.name, figures.read(entry.sources))
    for dpi in (140, 120, 100, 80, 60):
        raw, small = io.BytesIO(), io.BytesIO()
        with rc_context({"savefig.bbox": "tight"}):
            figure.savefig(raw, format="png", dpi=dpi)
        # The palette with the widest span: rare colours, such as those of crosses, stay what they are.
        flat = Image.open(raw).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        flat.save(small, "PNG", optimize=True)
        if small.tell() <= LARGEST:
            break
    return small.getvalue()


def main() -> None:
    """Write the page and the pictures; a picture whose figure is no longer drawn goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="store_true", help="write the page alone")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where results are")
    options = parser.parse_args()
    made = entries(options.results.resolve())
    (HERE / "gallery.md").write_text(page(made), encoding="utf-8")
    if options.text:
        return
    PLOTS.mkdir(parents=True, exist_ok=True)
    drawn = {e.name: e for e in made if not e.missing}
    for file in PLOTS.glob("*.png"):
        if file.stem not in drawn:
            file.unlink()
    for name, entry in drawn.items():
        (PLOTS / f"{name}.png").write_bytes(picture(entry))
        print(f"{name}: {(PLOTS / f'{name}.png').stat().st_size // 1000} kB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty:
        os.environ["NSLIGHTNING_DATA_DIR"] = empty  # so that no image is drawn but the embedded sample's
        main()
