"""crma.store.opening: which folders may become a store."""

from pathlib import Path

import pytest

from crma.core.errors import ReadOnlyStore, StoreError
from crma.store.opening import is_store, start_store


@pytest.mark.parametrize("left", [".lock", ".publishing-x", ".incoming-x"])
def test_what_a_writer_that_died_leaves_does_not_spoil_an_empty_folder(
    left: str, tmp_path: Path
) -> None:
    (tmp_path / left).touch()
    start_store(tmp_path)
    assert is_store(tmp_path)


def test_a_folder_with_other_files_becomes_no_store(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(StoreError, match="something else"):
        start_store(tmp_path)
    assert not is_store(tmp_path)


@pytest.mark.parametrize("place", ["s3://bucket/store", Path("hf://owner/name")])
def test_nothing_is_published_at_an_address(
    place: Path | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`crma train --ship s3://bucket` would have made a folder `s3:`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReadOnlyStore, match="publish where it is written"):
        start_store(place)
    assert list(tmp_path.iterdir()) == []
