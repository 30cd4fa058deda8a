"""Each mistake of the table gets an answer in a few lines, with the right status; the page of messages has it."""

from pathlib import Path

import lightning.pytorch  # noqa: F401 # its messages go to the standard error of its import: not to a test's
import pytest
from mistakes import MISTAKES, Mistake, answer, prepare, row

ROWS = [(section, mistake) for section, rows in MISTAKES.items() for mistake in rows]


@pytest.fixture(scope="module")
def page(repo_root) -> str:
    return (repo_root / "docs/reference/messages.md").read_text(encoding="utf-8")


@pytest.fixture
def prepared(monkeypatch) -> set[Path]:
    """A folder as the page has it; its files."""
    prepare()
    monkeypatch.setenv("NSLIGHTNING_DATA_DIR", "data")
    for name in ("COLUMNS", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    return set(Path().rglob("*"))


@pytest.mark.parametrize("mistake", [m for _, m in ROWS], ids=[m.typed for _, m in ROWS])
def test_mistake(mistake: Mistake, prepared, page):
    status, error = answer(mistake.typed)
    assert status == mistake.status, error
    for part in mistake.says:
        assert part in error
    assert "Traceback" not in error
    assert "Errno" not in error
    assert "Union subtypes" not in error
    assert len(error.splitlines()) <= 4
    assert error.startswith("nslightning")
    left = {path for path in Path().rglob("*") if "__pycache__" not in path.parts}
    assert left == prepared
    assert row(mistake, status, error) in page, "run: python docs/make_messages.py"


def test_the_page_has_the_table_s_rows_and_no_others(page):
    lines = [line for line in page.splitlines() if line.startswith("| `nslightning ")]
    assert len(lines) == len(ROWS)
    assert len({mistake.typed for _, mistake in ROWS}) == len(ROWS)
    headings = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert headings == list(MISTAKES)
