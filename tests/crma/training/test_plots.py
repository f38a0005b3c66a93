"""crma.training.plots: the committed records as SVG, the same bytes every time."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from paths import RESULTS

from crma.core.errors import ConfigError


def test_plots_are_small_reproducible_and_show_every_arm(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from crma.training.plots import draw

    for out in ("one", "two"):
        draw(RESULTS, tmp_path / out)
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    assert {"drift.svg", "tradeoff.svg", "public-ablation.svg"} <= set(files)
    assert max(map(len, files.values())) < 60_000
    drawn = {
        name: " ".join(ElementTree.fromstring(data).itertext()) for name, data in files.items()
    }
    for record in (RESULTS / "quick").glob("*-seed0.json"):
        if "JOINT" not in record.stem:  # nothing in it is prior
            assert record.stem.replace("-seed", "  seed ") in drawn["drift.svg"]
    assert "80 of 100" in drawn["public-ablation.svg"]
    with pytest.raises(ConfigError, match="no records"):
        draw(tmp_path, tmp_path / "none")
