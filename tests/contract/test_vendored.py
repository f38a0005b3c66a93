"""What is other people's is as they published it, with its licence."""

from pathlib import Path

import pytest
import vendored
from paths import ROOT

FOLDERS = (ROOT / "server/http/page/vendor", ROOT / "tests/e2e/page/vendor")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_every_vendored_file_is_listed_and_has_the_digest_of_the_list(folder: Path) -> None:
    assert vendored.found(folder) == vendored.listed(folder)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_every_vendored_package_has_version_licence_and_the_text_of_its_licence(
    folder: Path,
) -> None:
    for name, package in vendored.packages(folder).items():
        assert package["version"], name
        assert package["licence"], name
        assert package["tarball"].startswith("sha256:"), name
        assert "LICENSE" in {file["from"] for file in package["files"].values()}, name
