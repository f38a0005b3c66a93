"""crma.training.plots: the committed records as SVG, with the same bytes every time."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from paths import RESULTS

from crma.core.errors import ConfigError
from crma.training.plots import draw


def test_plots_are_small_reproducible_and_show_every_arm(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(RESULTS, tmp_path / "one")
    draw(RESULTS, tmp_path / "two")
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    assert {"drift.svg", "tradeoff.svg", "public-ablation.svg"} <= set(files)
    assert max(map(len, files.values())) < 60_000
    drawn = {name: _text(data) for name, data in files.items()}
    for record in (RESULTS / "quick").glob("*-seed0.json"):
        if "JOINT" not in record.stem:  # no task of joint training is prior
            assert record.stem.replace("-seed", "  seed ") in drawn["drift.svg"]
    assert "80 of 100" in drawn["public-ablation.svg"]


def _text(svg: bytes) -> str:
    return " ".join(ElementTree.fromstring(svg).itertext())


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="no records"):
        draw(tmp_path, tmp_path / "none")


def test_without_matplotlib_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'crma-server\[train\]'"):
        draw(RESULTS, tmp_path)
