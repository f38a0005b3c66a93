"""crma.store.source: addresses, and errors that name the object, whatever a package raises."""

import sys
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from crma.core.errors import ConfigError, SourceUnavailable
from crma.store.source import Source, check_address, is_address

ADDRESS = "s3://bucket/store"


@pytest.mark.parametrize("place", [ADDRESS, "hf://owner/name", "ftp://host/x", Path(ADDRESS)])
def test_what_has_a_scheme_is_an_address(place: Path | str) -> None:
    """A Path makes `s3:/` of `s3://`: as a folder, that would be made where nobody looks."""
    assert is_address(place)


@pytest.mark.parametrize("place", ["adapters_store", "/srv/s3", "a:b", Path("~/store")])
def test_a_folder_is_no_address(place: Path | str) -> None:
    assert not is_address(place)


@pytest.mark.parametrize(
    "address", ["ftp://host/store", "s3://", "s3:///", "s3:/bucket", "s3://bucket::file:///etc"]
)
def test_an_address_that_no_store_has_is_refused_with_those_it_may_have(address: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a store") as caught:
        check_address(address)
    assert (caught.value.field, caught.value.value) == ("store", address)
    assert "gs://" in str(caught.value.allowed)


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match="pip install gcsfs"):
        Source.at("gs://bucket/store")


def test_a_store_in_a_repository_of_the_hub_has_a_source() -> None:
    assert Source.at("hf://owner/name/store/").address == "hf://owner/name/store"


def test_files_have_names_within_the_store_and_marks_that_change(tmp_path: Path) -> None:
    (tmp_path / "store" / "tasks").mkdir(parents=True)
    (tmp_path / "beside.txt").write_text("not of the store")
    file = tmp_path / "store" / "tasks" / "x"
    file.write_text("one")
    source = Source(ADDRESS, LocalFileSystem(), str(tmp_path / "store"))
    first = source.files()
    assert list(first) == ["tasks/x"]
    assert first["tasks/x"].size == 3
    assert source.files() == first
    assert source.file("tasks/x") == source.file("tasks/x")
    file.write_text("three")
    assert source.files() != first
    assert source.read("tasks/x") == b"three"


class FailingFiles(LocalFileSystem):
    """A file system whose requests fail as those of a client library do, which names are many."""

    cachable = False

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def cat_file(self, path: str, **options: object) -> bytes:
        raise self.error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError("x"), "there is no such object"),
        (PermissionError("Access Denied"), "Access Denied"),
        (RuntimeError("503 Slow down (Request ID: Root=1-2;3)\nmore"), "503 Slow down"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_an_error_names_the_object_and_is_the_same_each_time(error: Exception, reason: str) -> None:
    """One that differed each time would be a line of the log each time."""
    source = Source(ADDRESS, FailingFiles(error), "/store")
    with pytest.raises(SourceUnavailable) as caught:
        source.read("channels.json")
    assert caught.value.message == f"{ADDRESS}/channels.json cannot be read: {reason}"
