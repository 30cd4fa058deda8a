"""Runs the notebooks, and writes them with their outputs beside their sources: notebooks/*.py to notebooks/*.ipynb."""

import os
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"


def erased(output: dict[str, Any]) -> bool:
    """Return whether an output is a progress line whose text is gone."""
    return output.get("data", {}).get("text/plain") == ""


def main() -> None:
    """Run and write them all."""
    os.environ |= {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "2"}
    for source in sorted(FOLDER.glob("*.py")):
        notebook = jupytext.read(source)
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"{source.stem}-{number}"  # and not a random one, which each run would change
        with tempfile.TemporaryDirectory() as folder:
            client = NotebookClient(
                notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
            )
            client.execute()
        for cell in notebook.cells:
            cell["metadata"].pop("execution", None)  # times of day
            # Lightning's remarks on this machine, and a progress line that was erased, are no results.
            cell["outputs"] = [o for o in cell.get("outputs", []) if o.get("name") != "stderr" and not erased(o)]
            if cell["cell_type"] != "code":
                del cell["outputs"]
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
