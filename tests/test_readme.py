"""The README's code runs as written, and what it names exists."""

import re

import pytest
import torch

from nslightning import configs


def blocks(repo_root, language):
    return re.findall(rf"```{language}\n(.*?)```", (repo_root / "README.md").read_text(), re.DOTALL)


def test_python_blocks_run(repo_root, capsys):
    names = {"images": torch.randn(2, 3, 64, 64)}
    for code in blocks(repo_root, "python"):
        exec(code.replace("8, 3, 224, 224", "2, 3, 64, 64"), names)  # smaller images, the same code
    printed = capsys.readouterr().out
    assert "Patched ResNet: 9 relu, 1 max_pool with Jacobians(max_pool='minimal')" in printed
    assert all(p.grad is not None for p in names["model"].parameters())


def test_every_config_of_the_table_exists(repo_root):
    table = re.findall(r"^\| `(\w+)` \|.*\|.*\|.*\|$", (repo_root / "README.md").read_text(), re.MULTILINE)
    named = [name for name in table if name not in ("relu", "relu6", "threshold", "max_pool", "rule")]
    assert len(named) == 8
    for name in named:
        assert configs.path(name).is_file()


def test_links_into_the_repository_exist(repo_root):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (repo_root / "README.md").read_text())
    assert len(links) > 4
    for link in links:
        assert (repo_root / link).exists(), link


@pytest.mark.parametrize("word", ["make demo", "make test"])
def test_the_two_commands_are_make_targets(repo_root, word):
    assert any(word in code for code in blocks(repo_root, "bash"))
    assert re.search(rf"^{word.split()[1]}:", (repo_root / "Makefile").read_text(), re.MULTILINE)
