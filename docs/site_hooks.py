"""Additions to MkDocs: formulas as MathML, and the commands' own help texts."""

import contextlib
import inspect
import io
import os
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

from nslightning import callbacks, configs, models

sys.path.insert(0, str(Path(__file__).parent))
from docstring_markup import markdown as markup  # beside this file

_OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+((?:results|benchmarks|examples)/[^)]*)\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_HELP = re.compile(r"<!-- help: ([\w-]*) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what the code says of itself where a page asks for it."""
    if "<!-- logged keys -->" in markdown:
        markdown = markdown.replace("<!-- logged keys -->", _logged())
    if "<!-- configs -->" in markdown:
        markdown = markdown.replace("<!-- configs -->", _configs())
    # Files of the repository that are no part of the site.
    markdown = _OUTSIDE.sub(r"\1 (`\2`)", markdown)
    return _HELP.sub(lambda mark: f"```text\n{_help(mark[1])}\n```", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers draw without a script."""
    return _FORMULA.sub(_mathml, html)


def _logged() -> str:
    """The tables of logged names in the docstrings of callbacks and models."""
    parts = []
    for home in (callbacks, models):
        for name in home.__all__:
            text = inspect.getdoc(getattr(home, name)) or ""
            tables = re.findall(r"(^=+ +=+$.*?^=+ +=+$)", text, re.DOTALL | re.MULTILINE)
            sentence = re.findall(r"^(Logged: .*?)\n\n", f"{text}\n\n", re.DOTALL | re.MULTILINE)
            if tables or sentence:
                parts.append(f"## {name}\n\n{markup(chr(10).join([*tables, *sentence]))}")
    return "\n\n".join(parts)


def _configs() -> str:
    """Each packaged config with the first sentence of its own comment."""
    folder = Path(configs.__file__).parent
    rows = ["| config | |", "|---|---|"]
    for file in sorted(folder.rglob("*.yaml")):
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        said = first.lstrip("# ") if first.startswith("#") else ""
        rows.append(f"| `configs/{file.relative_to(folder).as_posix()}` | {said} |")
    return "\n".join(rows)


def _mathml(formula: re.Match[str]) -> str:
    return str(convert(unescape(formula[3]).strip(), display="inline" if formula[2] == "(" else "block"))


def _help(command: str) -> str:
    from nslightning.cli import main

    os.environ["COLUMNS"] = "110"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([command, "--help"] if command else ["--help"])
    if not out.getvalue().strip():
        raise RuntimeError(f"nslightning {command} --help printed nothing")
    return out.getvalue().rstrip()
