"""Add the vendored packages of the page to a list of Python packages in CycloneDX's format.

python docker/vendored_sbom.py build/sbom.json
"""

import json
import sys
from pathlib import Path
from typing import Any

PACKAGES = Path(__file__).parents[1] / "server/http/page/vendor/packages.json"


def component(name: str, package: dict[str, Any]) -> dict[str, Any]:
    """An npm package as CycloneDX describes it, with the digest of the tarball on the registry."""
    address = f"pkg:npm/{name}@{package['version']}"
    algorithm, _, digest = package["tarball"].partition(":")
    assert algorithm == "sha256"
    return {
        "bom-ref": address,
        "hashes": [{"alg": "SHA-256", "content": digest}],
        "licenses": [{"license": {"id": package["licence"]}}],
        "name": name,
        "purl": address,
        "type": "library",
        "version": package["version"],
    }


def main(path: str) -> None:
    """Rewrite the file with the packages added."""
    file = Path(path)
    bom = json.loads(file.read_text())
    packages = json.loads(PACKAGES.read_text())
    added = [component(name, package) for name, package in packages.items()]
    bom.setdefault("components", []).extend(added)
    bom.setdefault("dependencies", []).extend({"ref": each["bom-ref"]} for each in added)
    file.write_text(json.dumps(bom, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
