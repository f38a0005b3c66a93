"""crma.core.files: writes are complete or absent, bytes stable. Hostile files: tests/crma/store."""

import os
from pathlib import Path

import pytest

from crma.core import files
from crma.core.errors import InvalidAdapter, NotFound
from crma.core.files import (
    TEMPORARY_PREFIX,
    about,
    invalid,
    locked,
    names_in,
    publish_folder,
    read_plain,
    read_regular,
    replace_file,
    to_json,
)

CONTENT = {"first": b"1", "last": b"2"}


class PowerFailure(Exception):
    """Stands for the death of the process."""


def test_a_published_folder_has_all_its_files_and_leaves_no_temporary_ones(tmp_path: Path) -> None:
    target = tmp_path / "tasks" / "medical" / "v1"
    publish_folder(tmp_path, target, CONTENT)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == CONTENT
    assert target.stat().st_mode & 0o777 == 0o755
    assert os.listdir(tmp_path) == ["tasks"]


def test_a_folder_whose_publication_fails_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_the_last(path: Path, data: bytes) -> None:
        if path.name == "last":
            raise PowerFailure
        path.write_bytes(data)

    monkeypatch.setattr(files, "_write_synced", fail_at_the_last)
    with pytest.raises(PowerFailure):
        publish_folder(tmp_path, tmp_path / "v1", CONTENT)
    assert os.listdir(tmp_path) == []


def test_a_failed_replacement_leaves_the_old_bytes_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "channels.json"
    path.write_bytes(b"old")

    def fail(source: Path, target: Path) -> None:
        raise PowerFailure

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(PowerFailure):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["channels.json"]
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["channels.json"]


def test_the_next_writer_deletes_what_a_dead_one_left(tmp_path: Path) -> None:
    leftover = tmp_path / f"{TEMPORARY_PREFIX}x"
    leftover.mkdir()
    (leftover / "half").write_bytes(b"1")
    file = tmp_path / f"{TEMPORARY_PREFIX}channels.json"  # it stayed for ever
    file.write_bytes(b"half")
    with locked(tmp_path):
        assert not leftover.exists()
        assert not file.exists()


def test_a_writer_that_does_not_wait_leaves_the_other_one_alone(tmp_path: Path) -> None:
    with locked(tmp_path):
        leftover = tmp_path / f"{TEMPORARY_PREFIX}x"
        leftover.mkdir()
        with pytest.raises(BlockingIOError), locked(tmp_path, wait=False):
            raise AssertionError("both hold the lock")
        assert leftover.exists()


def test_the_names_in_a_folder_that_is_missing_or_a_link(tmp_path: Path) -> None:
    assert names_in(tmp_path, "tasks/medical") == []
    (tmp_path / "tasks").symlink_to(tmp_path)
    with pytest.raises(InvalidAdapter, match="Not a folder of the store"):
        names_in(tmp_path, "tasks")


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_is_no_plain_file_is_refused_at_once_and_left_closed(tmp_path: Path) -> None:
    """The descriptor of a folder stayed open: a server that looks every two seconds ran out."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    before = num_descriptors()
    for name in ("pipe", "folder"):
        with pytest.raises(InvalidAdapter, match="Not a plain file"):
            read_regular(tmp_path / name, 9)
        with pytest.raises(OSError, match="not a plain file"):
            read_plain(tmp_path / name)
    assert num_descriptors() == before


def test_a_link_is_a_plain_file_to_whoever_named_it_and_not_to_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_plain(tmp_path / "link") == b"abc"
    assert read_plain(tmp_path / "link", 2) == b"ab"
    with pytest.raises(InvalidAdapter, match="Cannot be opened"):
        read_regular(tmp_path / "link", 9)


def test_equal_content_gives_equal_bytes() -> None:
    expected = '{\n  "a": [\n    1.5\n  ],\n  "b": "é"\n}\n'.encode()
    assert to_json({"b": "é", "a": [1.5]}) == to_json({"a": (1.5,), "b": "é"}) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_content_that_json_cannot_represent_is_refused(value: object) -> None:
    with pytest.raises(InvalidAdapter, check=lambda error: error.field == "JSON"):
        to_json({"a": value})


def test_a_store_error_says_where_it_happened() -> None:
    with pytest.raises(NotFound) as caught, about("tasks/medical/v1"):
        raise NotFound("Missing.")
    assert caught.value.message == str(caught.value) == "tasks/medical/v1: Missing."


def test_a_long_value_is_cut_in_an_error() -> None:
    error = invalid("Not a name.", "name", "x" * 10_000, "a name")
    assert error.message == "name: Not a name."
    assert len(str(error.value)) == 200
