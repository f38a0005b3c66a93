"""What is other people's is as they published it, with its licence."""

import json
import subprocess
import sys
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


def test_the_bill_of_materials_has_the_packages_of_the_page(tmp_path: Path) -> None:
    """It had those of Python only."""
    file = tmp_path / "sbom.json"
    file.write_text(json.dumps({"bomFormat": "CycloneDX", "components": [{"name": "httpx"}]}))
    script = ROOT / "docker" / "vendored_sbom.py"
    subprocess.run([sys.executable, str(script), str(file)], check=True)
    first, *added = json.loads(file.read_text())["components"]
    assert first == {"name": "httpx"}
    expected = vendored.packages(FOLDERS[0])
    assert {each["name"]: each["version"] for each in added} == {
        name: package["version"] for name, package in expected.items()
    }
    for each in added:
        package = expected[each["name"]]
        assert each["licenses"] == [{"license": {"id": package["licence"]}}]
        assert f"sha256:{each['hashes'][0]['content']}" == package["tarball"]
