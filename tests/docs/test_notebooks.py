"""The notebooks run from their sources, and the committed ones are those, with outputs."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))


def code_of(notebook):
    return ["".join(cell["source"]).strip() for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_committed_notebook_is_its_source_with_outputs(source):
    jupytext = pytest.importorskip("jupytext", reason="needs the dependency group docs: jupytext")
    committed = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert code_of(committed) == code_of(json.loads(jupytext.writes(jupytext.read(source), "ipynb"))), "make notebooks"
    outputs = [output for cell in committed["cells"] for output in cell.get("outputs", [])]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert source.with_suffix(".ipynb").stat().st_size < 300_000


def test_there_are_four():
    assert len(SOURCES) == 4


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebooks_run(source, tmp_path):
    jupytext = pytest.importorskip("jupytext", reason="needs the dependency group docs: jupytext")
    nbclient = pytest.importorskip("nbclient", reason="needs the dependency group docs: nbclient")
    notebook = jupytext.read(source)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert any(cell.get("outputs") for cell in notebook.cells)
