"""Builds the Dockerfile's image without a Docker engine: each stage is a folder, each RUN a chroot.

The steps are read from the Dockerfile. Only the base image is another: Debian's Python of the same
version, because no image can be fetched without a registry. Needs root, debootstrap and unshare.
"""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dockerfile import Dockerfile, Stage
from paths import ROOT

DEBIAN = ("bookworm", "http://deb.debian.org/debian")
# What python:3.11-slim has, as far as Debian has it.
PACKAGES = "ca-certificates,netbase,tzdata,python3.11,python3.11-venv,python3-distutils"
PATH = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
USER_ID = "10001"
IGNORED = shutil.ignore_patterns("__pycache__", ".lock")
# A build sees the machine's network, as with Docker.
SHARED = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs")


def make_base(folder: Path) -> Path:
    """Install Debian and its Python into a folder that does not exist."""
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", DEBIAN[0], str(folder)]
    subprocess.run([*command, DEBIAN[1]], check=True, stdout=subprocess.DEVNULL)
    (folder / "usr/local/bin/python").symlink_to("/usr/bin/python3.11")
    return folder


def enter(
    root: Path,
    command: Sequence[str],
    variables: dict[str, str],
    *,
    folder: str = "/",
    volume: Path | None = None,
) -> list[str]:
    """The command that runs `command` in a root folder, with mounts that end with it.

    Args:
        variables: its whole environment.
        folder: its working folder.
        volume: None: as root, on a root file system that can be written. Else as the image's user,
            on one that cannot, with this folder at /var/lib/crma.
    """
    shared = [path for path in (*SHARED, *_pip_folders()) if Path(path).exists()]
    mounts = [["mount", "--bind", root, root]]
    mounts += [["mount", "--rbind", "/dev", f"{root}/dev"]]
    mounts += [["mount", "-t", "proc", "proc", f"{root}/proc"]]
    mounts += [["mount", "--bind", path, _place(root, path)] for path in shared]
    chroot = ["exec", "chroot"]
    if volume is not None:
        mounts += [["mount", "--bind", volume, f"{root}/var/lib/crma"]]
        mounts += [["mount", "-o", "remount,bind,ro", root]]
        chroot += [f"--userspec={USER_ID}:{USER_ID}"]
    pairs = [f"{name}={value}" for name, value in variables.items()]
    chroot += [str(root), "env", "-i", "-C", folder, *pairs, *command]
    script = "\n".join(shlex.join(map(str, each)) for each in [*mounts, chroot])
    return ["unshare", "--mount", "sh", "-ec", script]


def _place(root: Path, path: str) -> Path:
    """Where a file or folder of the machine is mounted; made if it is missing."""
    place = root / path.lstrip("/")
    if Path(path).is_dir():
        place.mkdir(parents=True, exist_ok=True)
    elif not place.exists():
        place.touch()
    return place


def _pip_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def _pip_folders() -> list[str]:
    """The folders that the machine's configuration of pip names, such as one of wheels."""
    return [value for value in _pip_variables().values() if value.startswith("/")]


@dataclass
class Image:
    """The image as a folder, once `build` has run.

    base: made by `make_base`. work: an empty folder. report: a line for each step, with its time.
    """

    base: Path
    work: Path
    roots: dict[str, Path] = field(default_factory=dict)
    report: list[str] = field(default_factory=list)

    def build(self) -> Path:
        """Run every step of every stage. Returns the folder of the last stage."""
        for stage in Dockerfile.read().stages:
            root = self.work / (stage.name or "image")
            origin = self.roots[stage.base] if stage.is_local else self.base
            subprocess.run(["cp", "-a", "--reflink=auto", origin, root], check=True)
            self.roots[stage.name] = root
            self._run_steps(stage, root)
            self.report.append(f"{_mebibytes(root):6d} MiB  {root.name}")
        return root

    def _run_steps(self, stage: Stage, root: Path) -> None:
        folder = "/app" if stage.is_local else "/"  # the working folder of a local base goes on
        variables = {"PATH": PATH, "HOME": "/root", **stage.arguments, **_pip_variables()}
        for instruction, text in stage.steps:
            start = time.monotonic()
            if instruction == "RUN":
                command = enter(root, ["sh", "-c", text], variables, folder=folder)
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            elif instruction == "WORKDIR":
                folder = text
                (root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif instruction == "COPY":
                self._copy(root, folder, text.split())
            self.report.append(f"{time.monotonic() - start:6.1f} s    {instruction} {text[:80]}")

    def _copy(self, root: Path, folder: str, words: list[str]) -> None:
        """COPY: from the repository, or with --from out of an earlier stage."""
        origin = ROOT
        if words[0].startswith("--from="):
            origin = self.roots[words.pop(0).removeprefix("--from=")]
        *sources, target = words
        place = root / (PurePosixPath(folder) / target).relative_to("/")
        for source in sources:
            found = origin / source.lstrip("/")
            if found.is_dir():
                shutil.copytree(found, place, symlinks=True, dirs_exist_ok=True, ignore=IGNORED)
                continue
            into = place / found.name if target.endswith("/") else place
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(found, into)


def environment() -> dict[str, str]:
    """The variables of a container."""
    found = Dockerfile.read().stages[-1].environment()
    return {**found, "PATH": found["PATH"].replace("$PATH", PATH)}


def _mebibytes(root: Path) -> int:
    command = ["du", "--summarize", "--one-file-system", "--block-size=1M", root]
    return int(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    )
