"""server.service.import_roots: a path from a request leads nowhere but below the roots."""

from pathlib import Path

import pytest

from crma.core.errors import NotFound
from server.service.errors import Forbidden, InvalidField
from server.service.import_roots import find_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root that holds a folder with a file, reached through a link; a secret lies beside it."""
    real = tmp_path / "real"
    (real / "a" / "b").mkdir(parents=True)
    (real / "a" / "file").write_text("x")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("x")
    (tmp_path / "root").symlink_to(real)
    return tmp_path / "root"


def test_a_folder_below_a_root_is_found_absolute_or_relative(root: Path, tmp_path: Path) -> None:
    expected = tmp_path / "real" / "a"
    for path in (str(root / "a"), "a", "a/b/..", "./a", str(expected)):
        assert find_folder(path, [tmp_path / "other", root]) == expected


def test_links_may_lead_to_other_places_below_the_roots(root: Path, tmp_path: Path) -> None:
    (root / "blobs").mkdir()
    (root / "blobs" / "1").write_text("x")
    (root / "a" / "adapter_config.json").symlink_to(root / "blobs" / "1")
    (root / "link").symlink_to(root / "a")
    assert find_folder("link", [root]) == tmp_path / "real" / "a"


@pytest.mark.parametrize("path", ["../secret", "/", "/etc", "..", "a/../..", "a\0", "/a\0"])
def test_a_path_that_leads_out_is_refused_by_name(root: Path, path: str) -> None:
    with pytest.raises(InvalidField, check=lambda error: error.field == "lora_path"):
        find_folder(path, [root])


@pytest.mark.parametrize("target", ["../secret", "../secret/file", "../nothing", "loop"])
def test_a_link_that_leads_out_or_nowhere_is_refused(root: Path, target: str) -> None:
    (root / "loop").symlink_to(target)
    with pytest.raises((InvalidField, NotFound)):
        find_folder("loop", [root])
    (root / "a" / "loop").symlink_to("../" + target if target != "loop" else "loop")
    with pytest.raises(InvalidField, match="loop"):
        find_folder("a", [root])


@pytest.mark.parametrize("path", ["nothing", "a/file"])
def test_what_is_no_folder_is_not_found(root: Path, path: str) -> None:
    with pytest.raises(NotFound, check=lambda error: error.field == "lora_path"):
        find_folder(path, [root])


def test_without_roots_every_path_is_refused(root: Path) -> None:
    with pytest.raises(Forbidden, check=lambda error: error.field == "CRMA_IMPORT_ROOTS"):
        find_folder(str(root / "a"), [])
