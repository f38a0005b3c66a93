"""A store on another machine: in a bucket of S3 or of Google, or in a repository of the Hub.

fsspec reads it, through the package for its kind. Keys, regions and endpoints come from where that
package looks for them, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL, and never from the address.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from crma.core.errors import ConfigError, ReadOnlyStore, SourceUnavailable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
"""The package that each kind of address needs."""

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:/", re.IGNORECASE)  # a Path keeps one slash of two
_REQUEST_ID = re.compile(r" *\(Request ID: [^)]*\)")  # another in each error of the Hub
_MAX_REASON = 200  # characters


def is_address(place: Path | str) -> bool:
    """Whether a store is named by an address, and not by its folder."""
    return _ADDRESS.match(str(place)) is not None


def check_address(address: str) -> str:
    """Returns an address unchanged. Raises ConfigError for one that no store can have."""
    kind, _, path = address.partition("://")
    if kind not in PACKAGES or not path.strip("/") or "::" in address:
        allowed = ", ".join(f"{each}://…" for each in PACKAGES)
        message = f"{address} is not the address of a store (allowed: a folder, {allowed})"
        raise ConfigError(message, field="store", value=address, allowed=f"a folder, {allowed}")
    return address


def read_only(address: str) -> ReadOnlyStore:
    """The error for a change of a store that is here as a copy."""
    message = f"{address} is read from here and never changed: publish where it is written"
    allowed = "a store in a folder of this machine"
    return ReadOnlyStore(message, field="store", value=address, allowed=allowed)


@dataclass(frozen=True)
class SourceFile:
    """What is known of a file without reading it.

    size: in bytes. mark: another once the file is.
    """

    size: int
    mark: str

    @classmethod
    def of(cls, info: dict[str, Any]) -> Self:
        """From fsspec's description of a file."""
        return cls(info.get("size") or 0, repr(info))


class Source:
    """The store at an address. Every error names the object that it is about.

    Args:
        address: of the store.
        files: the file system that holds it.
        folder: of the store, in that file system.
    """

    def __init__(self, address: str, files: AbstractFileSystem, folder: str) -> None:
        self.address = address.rstrip("/")
        self._files = files
        self._folder = folder.rstrip("/")

    @classmethod
    def at(cls, address: str) -> Self:
        """The source at an address.

        Raises:
            ConfigError: no store can have this address, or its package is not installed.
            SourceUnavailable: the package finds no way there.
        """
        kind = check_address(address).partition("://")[0]
        from fsspec.core import url_to_fs

        try:
            # An instance of its own: fsspec would give out one with the keys of an earlier time.
            files, folder = url_to_fs(address, skip_instance_cache=True)
        except ImportError as error:
            package = PACKAGES[kind]
            message = f"{kind}:// needs the package {package}: pip install {package}"
            raise ConfigError(message, field="store", value=address, allowed=package) from error
        except Exception as error:  # each package has errors of its own
            raise _unavailable(address, error) from error
        return cls(address, files, folder)

    def place(self, name: str) -> str:
        """The address of a file or folder of the store."""
        return f"{self.address}/{name}"

    def file(self, name: str) -> SourceFile:
        """What is known of a file now. Raises SourceUnavailable, also if it is not there."""
        with self._asking(name):
            self._files.invalidate_cache()
            return SourceFile.of(self._files.info(f"{self._folder}/{name}"))

    def files(self) -> dict[str, SourceFile]:
        """Every file of the store by its name, relative to the store. Raises SourceUnavailable."""
        with self._asking(""):
            self._files.invalidate_cache()
            found = self._files.find(self._folder, detail=True)
        start = f"{self._folder}/"
        return {
            path.removeprefix(start): SourceFile.of(info)
            for path, info in sorted(found.items())
            if path.startswith(start)
        }

    def read(self, name: str) -> bytes:
        """The content of a file. Raises SourceUnavailable."""
        with self._asking(name):
            content: bytes = self._files.cat_file(f"{self._folder}/{name}")
            return content

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """Whatever the file system's package raises becomes a SourceUnavailable."""
        try:
            yield
        except Exception as error:  # each package has errors of its own
            raise _unavailable(self.place(name).rstrip("/"), error) from error


def _unavailable(place: str, error: Exception) -> SourceUnavailable:
    if isinstance(error, FileNotFoundError):
        reason = "there is no such object"
    else:
        lines = _REQUEST_ID.sub("", str(error)).strip().splitlines()
        reason = lines[0][:_MAX_REASON] if lines else type(error).__name__
    message = f"{place} cannot be read: {reason}"
    return SourceUnavailable(message, field="store", value=place, allowed="a store that answers")
