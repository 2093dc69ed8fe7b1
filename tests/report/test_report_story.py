"""The notebook that tells the story runs from top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: pip install nbclient ipykernel")
pytest.importorskip("ipykernel", reason="needs ipykernel: pip install ipykernel")
pytest.importorskip("anywidget", reason="needs anywidget: pip install anywidget")

STORY = Path(__file__).parents[2] / "benchmarks" / "notebooks" / "story.ipynb"


# The warnings of Jupyter's own event loops and message formats are not ours to mend.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning", "ignore::PendingDeprecationWarning"
)
def test_the_story_ends_well(tmp_path: Path) -> None:
    import nbformat

    notebook = nbformat.read(STORY, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "Renamed" in html_of(notebook, "mapping = automatch.propose_mapping(")
    assert text_of(notebook, "assert torch.equal").startswith("Dice before")
    assert "nothing was loaded" in text_of(notebook, "PatchTransformer()")


def outputs(notebook: Any, start: str) -> list[Any]:
    return next(cell.outputs for cell in notebook.cells if cell.cell_type == "code" and start in cell.source)


def html_of(notebook: Any, start: str) -> str:
    return "".join(output.data.get("text/html", "") for output in outputs(notebook, start) if "data" in output)


def text_of(notebook: Any, start: str) -> str:
    return "".join(output.get("text", "") for output in outputs(notebook, start))
