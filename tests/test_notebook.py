"""The notebook in docs/ runs from top to bottom."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "walkthrough.ipynb"
MOST_BYTES = 200_000


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_notebook_is_sound_and_small():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not re.search(r"/(tmp|root|home)/", str(outputs)), "a path of the machine it ran on"
    assert NOTEBOOK.stat().st_size < MOST_BYTES


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(real_student, tmp_path):
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(
        notebook, timeout=600, startup_timeout=300, kernel_name="python3", resources=place
    )
    client.execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    # Ray and tqdm say what they would show with ipywidgets.
    shown = [o for o in outputs if o.output_type != "stream" or "ipywidgets" not in o.text]
    assert {output.output_type for output in shown} == {"execute_result"}
    assert any("image/svg+xml" in output.data for output in shown)
    tables = [output.data["text/plain"] for output in shown]
    assert "spelled_out" in tables[2]
    assert "minor" in tables[-1]
