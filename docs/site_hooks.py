"""What MkDocs does not do by itself: formulas as MathML, and the commands' own help texts."""

import contextlib
from html import unescape
import io
import os
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_HELP = re.compile(r"<!-- help: ([\w-]*) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the output of ``nslightning COMMAND --help`` where a page asks for it."""
    return _HELP.sub(lambda found: f"```text\n{_help(found[1])}\n```", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers draw without a script."""
    return _FORMULA.sub(_mathml, html)


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
