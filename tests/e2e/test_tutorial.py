"""docs/tutorial.ipynb runs from its first cell to its last, and ends in a plot of what it found."""

import pytest
from paths import ROOT

pytestmark = pytest.mark.e2e


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tutorial_runs_and_draws_its_ablation() -> None:
    nbclient = pytest.importorskip("nbclient")  # of the group `e2e`: not of `make setup`
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    runner = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
    )
    runner.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert "CRMA True: 'injuries and poisoning'" in text
    assert "60 of 60" in text
    assert "task+crma - task: " in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
