"""The lock files of the image pin what pyproject.toml asks for and what the tests ran with."""

import re
import tomllib
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from paths import ROOT

REQUIREMENTS = ROOT / "docker/requirements.lock"
TORCH = (ROOT / "docker/torch-cpu.lock", ROOT / "docker/torch-cuda.lock")
LOCKS = (REQUIREMENTS, *TORCH)
EXTRAS = ("otel", "postgres", "remote", "signing")  # the extras that the image has
ENTRY = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)([^\n]*\\\n(?:    --hash=.*\n)+)", re.MULTILINE)


@dataclass(frozen=True)
class Pin:
    """A line of a lock file."""

    version: str
    hashes: tuple[str, ...]


def pins(path: Path) -> dict[str, Pin]:
    """Name -> pin, of one lock file."""
    found = {}
    for name, version, rest in ENTRY.findall(path.read_text("utf-8")):
        hashes = tuple(re.findall(r"--hash=sha256:([0-9a-f]{64})\b", rest))
        found[canonicalize_name(name)] = Pin(version, hashes)
    return found


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def needed() -> dict[str, list[Requirement]]:
    """Name -> requirements on it, of all that the image needs on this machine's platform.

    Read from the packages that are installed here, which are those of constraints.txt.
    """
    table = project()["project"]
    waiting = list(table["dependencies"])
    for extra in EXTRAS:
        waiting += table["optional-dependencies"][extra]
    found: dict[str, list[Requirement]] = {}
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        is_new = name not in found
        found.setdefault(name, []).append(requirement)
        if not is_new and not requirement.extras:
            continue
        for text in distribution(name).requires or []:
            marker = Requirement(text).marker
            extras = requirement.extras or {""}
            environments = [{**default_environment(), "extra": extra} for extra in extras]
            if marker is None or any(map(marker.evaluate, environments)):
                waiting.append(text)
    return found


def test_the_lock_files_hold_all_that_the_image_needs() -> None:
    """A dependency added to pyproject.toml alone would be missing from the image."""
    locked = pins(REQUIREMENTS) | pins(TORCH[0])
    for name, requirements in needed().items():
        assert name in locked, f"{name} is in no lock file of the image: make lock"
        for requirement in requirements:
            version = Version(locked[name].version)
            assert requirement.specifier.contains(version, prereleases=True), requirement


def test_the_lock_files_pin_what_the_tests_ran_with() -> None:
    text = (ROOT / "constraints.txt").read_text("utf-8")
    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))
    tested = {canonicalize_name(name): version for name, version in constraints.items()}
    for path in LOCKS:
        for name, pin in pins(path).items():
            release = pin.version.partition("+")[0]
            assert tested.get(name, release) == release, f"{path.name}: {name}: make lock"


def test_what_setuptools_needs_to_build_is_locked_too() -> None:
    """The image is built without isolation, so that nothing comes without a hash."""
    locked = pins(REQUIREMENTS)
    for text in project()["build-system"]["requires"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[requirement.name].version), requirement


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_line_has_hashes_and_comes_from_a_public_index(path: Path) -> None:
    found = pins(path)
    text = path.read_text("utf-8")
    lines = [line for line in text.splitlines() if re.match(r"[A-Za-z0-9]", line)]
    assert len(found) == len(lines), "a line without a hash"
    assert all(pin.hashes for pin in found.values())
    links = set(re.findall(r"https?://[^\s/]+", text))
    assert links <= {"https://download.pytorch.org"}


def test_torchs_cpu_build_needs_what_the_resolver_was_told() -> None:
    """docker/uv.toml states it, because PyPI's torch would bring the packages of CUDA."""
    (told,) = tomllib.loads((ROOT / "docker/uv.toml").read_text("utf-8"))["dependency-metadata"]
    assert pins(TORCH[0])["torch"].version == f"{told['version']}+cpu"
    if torch.__version__ != pins(TORCH[0])["torch"].version:
        pytest.skip(f"torch {torch.__version__} is installed here")
    requires = [Requirement(text) for text in distribution("torch").requires or []]
    plain = {str(each) for each in requires if "extra" not in str(each.marker)}
    assert plain == {str(Requirement(text)) for text in told["requires-dist"]}
