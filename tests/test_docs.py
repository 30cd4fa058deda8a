"""The documentation: its examples run, its words are defined, and the site builds without a warning."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
EXAMPLES = [page for page in PAGES if ">>>" in page.read_text(encoding="utf-8")]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_examples_run(page):
    failed, tried = doctest.testfile(str(page), module_relative=False, optionflags=FLAGS, encoding="utf-8")
    assert tried > 0
    assert failed == 0


def test_pages_with_examples_are_found():
    names = {page.stem for page in EXAMPLES}
    assert {"why", "quickstart", "surgery", "audit", "lightning-project", "other-loops", "port"} <= names


@pytest.mark.parametrize("language", ["python"])
def test_other_code_compiles(language):
    """Fragments of somebody's script name what the page does not define: they have to be Python."""
    for page in PAGES:
        for code in re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            if ">>>" not in code:
                compile(code.replace("...)", ")"), str(page), "exec")


def test_commands_of_pages_are_commands():
    from nslightning.cli import COMMANDS

    for page in PAGES:
        for code in re.findall(r"```(?:console|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for command in re.findall(r"(?:^|\s)nslightning ([a-z-]+)", code):
                assert command in COMMANDS, (page, command)


def test_the_glossary_defines_each_word():
    words = "tie choice clarke-jacobian native minimal alpha beta reference zone bifurcation compensation frontier"
    headings = re.findall(r"^## (.*)$", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [h.lower().replace(" ", "-") for h in headings] == [*words.split(), "exact-and-published"]


def test_the_docstrings_markup_becomes_markdown():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from docstring_markup import markdown
    finally:
        sys.path.remove(str(ROOT / "docs"))
    table = "Logged:\n\n======== =====\n``a/<b>`` first\n         line\n``c``    second\n======== =====\n"
    assert markdown(table).splitlines()[2:] == [
        "| key | meaning |",
        "|---|---|",
        "| ``a/<b>`` | first line |",
        "| ``c`` | second |",
    ]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the dependency group docs: mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert built.returncode == 0, built.stdout + built.stderr
    logged = (tmp_path / "site" / "reference" / "logged.html").read_text(encoding="utf-8")
    assert "divergence/&lt;choice&gt;/relative" in logged
    assert "<math" in (tmp_path / "site" / "concepts.html").read_text(encoding="utf-8")
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text(encoding="utf-8")
        )
        assert not [url for url in fetched if "canonical" not in url], page
