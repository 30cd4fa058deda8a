"""The README's code runs as written, its numbers are those that were measured, and what it names exists."""

import json
import re

import pytest
import torch

from nslightning import configs
from nslightning.probes.audit import Audit


def readme(repo_root):
    return (repo_root / "README.md").read_text(encoding="utf-8")


def blocks(repo_root, language):
    return re.findall(rf"```{language}\n(.*?)```", readme(repo_root), re.DOTALL)


def test_python_blocks_run_in_order_and_print_what_is_not_zero(repo_root, capsys):
    torch.manual_seed(0)
    names, printed = {}, []
    for code in blocks(repo_root, "python"):
        # Smaller images, the same code.
        exec(code.replace("8, 3, 224, 224", "4, 3, 112, 112"), names)
        printed.append(capsys.readouterr().out)
    assert "Patched ResNet: 9 relu, 1 max_pool with Jacobians(max_pool='minimal')" in printed[0]
    norm = float(re.search(r"tensor\(([\d.e+-]+)", printed[0])[1])
    relative, share, kind = printed[1].split()
    assert min(norm, float(relative), float(share)) > 0
    assert kind == "bifurcation"


def test_the_table_is_what_was_measured(repo_root):
    rows = re.findall(r"^\|(.*)\| (bfloat16|float32|float64) \| (.*) \| (.*) \|$", readme(repo_root), re.MULTILINE)
    assert len(rows) == 6
    dtypes = {"bfloat16": "bf16", "float32": "32", "float64": "64"}
    audits = [
        Audit.from_dict(json.loads((repo_root / f"benchmarks/results/concern_resnet{depth}.json").read_text()))
        for depth in (18, 18, 18, 50, 50, 50)
    ]
    for (_, dtype, *shown), audit in zip(rows, audits, strict=True):
        measured = {s.choice: s.relative for s in audit.spreads if s.dtype == dtypes[dtype]}
        values = [measured["relu1"], measured["beta10"]]
        assert shown == ["0" if value == 0 else f"{100 * value:.2g} %" for value in values]


def test_what_the_libraries_pick_is_what_conventions_say(repo_root):
    page = (repo_root / "docs/conventions.md").read_text(encoding="utf-8")
    rows = {r[0]: r for r in (re.split(r" *\| *", line.strip("| ")) for line in page.splitlines()) if len(r) == 8}
    shown = re.findall(r"^\| (`[^`]*`), .*? \| (.*?) \| (.*?) \| (.*?) \|$", readme(repo_root), re.MULTILINE)
    table = {name: picks for name, *picks in shown}
    half = {"1/2": "0.5", "slope": "0.1"}
    for mine, theirs in {"`relu`": "relu", "`abs`": "abs", "`maximum(x, 0)`": "maximum(x,0)", "`selu`": "selu",
                         "`clip(x, -1, 1)`": "clip(-1,1)", "`leaky_relu`": "leaky_relu(0.1)"}.items():  # fmt: skip
        _, _, _, jax, tensorflow, _, _, torch_ = rows[theirs]
        measured = [re.match(r"[\d.]+", cell)[0] for cell in (torch_, jax, tensorflow)]
        assert [half.get(cell, cell) for cell in table[mine]] == measured, mine


def test_every_config_that_is_named_exists(repo_root):
    named = re.findall(r"configs/([\w/]+\.yaml)", readme(repo_root))
    assert named
    for name in named:
        assert configs.path(name).is_file()


def test_links_into_the_repository_exist(repo_root):
    links = re.findall(r"\]\((?!http)([^)#]+)(?:#([\w-]+))?\)", readme(repo_root))
    assert len(links) > 10
    for link, anchor in links:
        assert (repo_root / link).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (repo_root / link).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"\W+", "-", heading.lower()).strip("-") for heading in headings], (link, anchor)


def test_no_paragraph_has_more_than_three_numbers(repo_root):
    text = re.sub(r"```.*?```", "", readme(repo_root), flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.lstrip().startswith(("|", "The papers")):
            continue
        words = re.sub(r"`[^`]*`|\]\([^)]*\)|[A-Za-z]\S*\d\S*", "", paragraph)
        assert len(re.findall(r"\d+", words)) <= 3, paragraph


@pytest.mark.parametrize("word", ["make demo", "make test", "make docs"])
def test_the_commands_are_make_targets(repo_root, word):
    assert word in readme(repo_root)
    assert re.search(rf"^{word.split()[1]}:", (repo_root / "Makefile").read_text(), re.MULTILINE)
