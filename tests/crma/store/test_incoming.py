"""crma.store.incoming: the folder goes when its block ends, or after its process has died."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from crma.core.files import TEMPORARY_PREFIX, locked
from crma.store.adapter_store import AdapterStore
from crma.store.incoming import INCOMING_PREFIX, incoming_folder, remove_leftovers


def folders(root: Path) -> list[Path]:
    return sorted(root.glob(f"{INCOMING_PREFIX}*"))


def test_the_folder_is_inside_the_store_and_gone_afterwards(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with incoming_folder(root) as folder:
        (folder / "file").write_bytes(b"x")
        assert folders(root) == [folder]
        assert AdapterStore(root).verify() == []
    assert folders(root) == []
    with pytest.raises(RuntimeError), incoming_folder(root):
        raise RuntimeError
    assert folders(root) == []


def test_a_folder_that_is_being_filled_stays_whatever_others_do(tmp_path: Path) -> None:
    with incoming_folder(tmp_path) as mine:
        (mine / "file").write_bytes(b"x")

        def work() -> None:
            with incoming_folder(tmp_path) as other:
                assert other != mine
            with locked(tmp_path):
                pass

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert (mine / "file").read_bytes() == b"x"


def test_the_folder_of_a_process_that_died_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from crma.store.incoming import incoming_folder\n"
        "with incoming_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'file').write_bytes(b'x'); os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert len(folders(tmp_path)) == 1
    with incoming_folder(tmp_path) as folder:
        assert folders(tmp_path) == [folder]


def test_leftovers_are_removed_and_what_is_in_use_stays(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    for name in (f"{INCOMING_PREFIX}dead", f"{TEMPORARY_PREFIX}dead"):
        (tmp_path / name).mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}channels.json").write_bytes(b"half")
    with incoming_folder(tmp_path) as mine:
        publishing = tmp_path / f"{TEMPORARY_PREFIX}alive"
        with locked(tmp_path):
            publishing.mkdir()
            remove_leftovers(tmp_path)
            assert publishing.exists()
        remove_leftovers(tmp_path)
        assert folders(tmp_path) == [mine]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]
