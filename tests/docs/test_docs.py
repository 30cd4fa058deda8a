"""The documentation: its examples run, its words are defined, and the site builds without a warning."""

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
EXAMPLES = [page for page in PAGES if ">>>" in page.read_text(encoding="utf-8")]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_examples_run(page):
    failed, tried = doctest.testfile(str(page), module_relative=False, optionflags=FLAGS, encoding="utf-8")
    assert tried > 0
    assert failed == 0


def test_pages_with_examples_are_found():
    names = {page.stem for page in EXAMPLES}
    assert {"why", "quickstart", "surgery", "audit", "lightning-project", "other-loops", "port"} <= names


#: Run elsewhere: lines of whole scripts that tests/integrations runs, and a registration that would last: tests/ops
#: runs it in a separate process.
COMPILED_ALONE = {"other-loops", "how-to-add-an-operation"}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text(encoding="utf-8")], ids=lambda p: p.stem
)
def test_other_code_runs(page, tmp_path, monkeypatch):
    """The blocks of a page without prompts, in their order."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        if ">>>" in code:
            continue
        program = compile(code.replace("...)", ")"), str(page), "exec")
        if page.stem not in COMPILED_ALONE:
            exec(program, names)


def test_configs_in_pages_are_yaml():
    for page in PAGES:
        for text in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            comment = all(line.startswith("#") for line in text.splitlines())  # an editor's line
            assert comment or isinstance(yaml.safe_load(text), dict), page


def test_commands_of_pages_are_commands():
    from nslightning.cli import COMMANDS

    for page in PAGES:
        for code in re.findall(r"```(?:console|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for command in re.findall(r"(?:^|\s)nslightning ([a-z-]+)", code):
                assert command in COMMANDS, (page, command)


def calls(page):
    """The command lines of nslightning in a page's console blocks, continued lines joined, comments left out."""
    for code in re.findall(r"```(?:console|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in code.replace("\\\n", " ").splitlines():
            if "nslightning " in line and "$(" not in line:
                yield shlex.split(line.partition("nslightning ")[2], comments=True)


def test_the_audit_page_has_the_ranges_that_were_measured():
    measured = pd.read_csv(ROOT / "benchmarks/results/concern_seeds.csv")
    page = (ROOT / "docs/how-to/audit.md").read_text(encoding="utf-8")
    name, shown = "", re.findall(r"^\| ?([\w ()-]*) ?\| (\d+) \| (bfloat16|float64) \| (.*) \| (.*) \|$", page, re.M)
    assert len(shown) == 6
    for network, pixels, dtype, *ranges in shown:
        name = re.sub(r"ResNet-(\d+) \((\w+)\)", r"\2/resnet\1", network.strip()) or name
        bits = {"bfloat16": "bf16", "float64": "64"}[dtype]
        settings = (measured["pixels"] == int(pixels)) & (measured["precision"] == bits) & (measured["images"] == 4)
        rows = measured[(measured["network"] == name) & settings]
        assert len(rows) == 3
        for text, values in zip(ranges, (100 * rows["relu1"], 100 * rows["beta10"]), strict=True):
            low, *high = re.findall(r"[\d.]+", text)
            decimals = len(low.partition(".")[2])
            assert (round(values.min(), decimals), round(values.max(), decimals)) == (
                float(low),
                float([low, *high][-1]),
            )


PARSED = ("audit", "cost", "dashboard", "experiment", "figure", "lr-search", "report", "tokens", "zones")


def test_the_options_of_pages_are_options(monkeypatch):
    """Each command takes the words that README and pages write, and needs no others. `fit` is test_configs' subject."""
    from nslightning.cli import COMMANDS

    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    tried = set()
    for page in (*PAGES, ROOT / "README.md"):
        for command, *words in calls(page):
            if command in PARSED:
                parser = import_module(COMMANDS[command][0]).make_parser(f"nslightning {command}")
                try:
                    parser.parse_args(words)
                except SystemExit as end:
                    pytest.fail(f"{page.name}: nslightning {command} {shlex.join(words)} ends with status {end.code}")
                tried.add(command)
    assert {"audit", "dashboard", "experiment", "report", "zones"} <= tried


def test_the_glossary_defines_each_word():
    words = "tie choice clarke-jacobian native minimal alpha beta reference zone bifurcation compensation frontier"
    headings = re.findall(r"^## (.*)$", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [h.lower().replace(" ", "-") for h in headings] == [*words.split(), "exact-and-published"]


def test_the_docstrings_markup_becomes_markdown():
    pytest.importorskip("griffe", reason="griffe comes with the dependency group docs")
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
    if CHROMIUM is not None:  # the search of a page that is opened as a file
        address = f"{(tmp_path / 'site' / 'glossary.html').as_uri()}?q=compensation"
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=10000", "--dump-dom", address,
        ]  # fmt: skip
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        assert re.search(r'<a href="[^"]*glossary\.html[^"]*#compensation" class="md-search-result__link"', shown)
