"""What model signing signs, made from digests that are known instead of files on the disk.

The library would read the files of a version by itself. Somebody who can write to the store could
then show it other files than those that are loaded.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from model_signing import hashing
from model_signing._hashing.hashing import Digest
from model_signing.manifest import FileManifestItem, Manifest, SerializationType

ALGORITHM = "sha256"
_BY_FILE = {"method": "files", "hash_type": ALGORITHM, "allow_symlinks": False}


class SignedFiles(hashing.Config):
    """The library's own form of a folder's files and their digests.

    Args:
        digests: file name -> `sha256:<hex>`.
    """

    def __init__(self, digests: Mapping[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._digests = digests

    def hash(
        self,
        model_path: hashing.PathLike,
        *,
        files_to_hash: Iterable[hashing.PathLike] | None = None,  # noqa: ARG002
    ) -> Manifest:
        """All files and their digests, whatever a signature says is to be left out."""
        items = [_item(name, digest) for name, digest in self._digests.items()]
        return Manifest(
            Path(os.fsdecode(model_path)).name, items, SerializationType.from_args(_BY_FILE)
        )


def _item(name: str, digest: str) -> FileManifestItem:
    value = bytes.fromhex(digest.removeprefix(f"{ALGORITHM}:"))
    return FileManifestItem(path=PurePosixPath(name), digest=Digest(ALGORITHM, value))
