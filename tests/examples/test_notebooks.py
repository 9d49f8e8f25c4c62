"""examples/notebooks: they run from the first cell to the last, and show what they promise."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat", reason="needs the extra: test")
nbclient = pytest.importorskip("nbclient", reason="needs the extra: test")
pytest.importorskip("ipykernel", reason="needs the extra: test")
pytest.importorskip("sklearn", reason="needs the extra: examples")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "examples" / "notebooks"


def test_first_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # for hf-swd
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOKS / "first_steps.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    def outputs_of(source):
        (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and source in cell.source)
        return cell.outputs

    accuracies, decays = outputs_of("scores.loc"), outputs_of("adams.state.log_history")
    advice, picture = outputs_of("!hf-swd advise"), outputs_of("plot_runs(folders")
    table = accuracies[-1]["data"]["text/plain"]
    assert all(float(value) > 0.8 for value in table.splitlines()[1].split()[1:])
    rows = [line.split() for line in decays[-1]["data"]["text/plain"].splitlines()[2:]]
    assert float(rows[0][-1]) == 1.0 != float(rows[-1][-1])  # AdamW's up to reference_steps, another one later
    text = "".join(output["text"] for output in advice)
    assert "outputs/first_steps/adamw" in text and "weight_decay" in text and "Traceback" not in text
    assert base64.b64decode(picture[-1]["data"]["image/png"]).startswith(b"\x89PNG")
