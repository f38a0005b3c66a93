"""crma.store.incoming: the folder goes when its block ends, or after its process has died."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from crma.core.files import locked
from crma.store.adapter_store import AdapterStore
from crma.store.incoming import INCOMING_PREFIX, incoming_folder


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
