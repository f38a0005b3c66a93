"""crma.store.opening: which folders may become a store."""

from pathlib import Path

import pytest

from crma.core.errors import StoreError
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
