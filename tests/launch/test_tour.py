"""The notebook: every cell of it runs, and it was saved with what its cells put out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jobs import ROOT

TOUR = ROOT / "launch" / "tour.ipynb"
SHORT = {"data.limit": 64, "federation.rounds": 1, "federation.local_epochs": 1, "sample.steps": 2, "model.dim": 8}


def test_it_was_saved_as_it_ran() -> None:
    cells = [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert str(ROOT) not in TOUR.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fields", [SHORT, pytest.param({}, marks=pytest.mark.rare)], ids=["short", "as it is"])
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, float]) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(TOUR, as_version=4)
    [given] = [cell for cell in notebook.cells if cell.source.startswith("fields = {")]
    if fields:
        given.source = re.sub(r"fields = \{.*?\}", f"fields = {fields!r}", given.source, count=1, flags=re.S)
    client = nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    reporters = last.outputs[-1]["data"]["text/plain"]
    assert re.fullmatch(r"\{'encoder': \[[0-3]\], 'decoder': \[0, 1, 2, 3\]\}", reporters)
    assert {path.name for path in (tmp_path / "runs" / "tour").iterdir()} == {"udec", "full", "usplit", "own"}
