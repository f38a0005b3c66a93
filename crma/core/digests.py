"""Content digests: the identity of files, and of sets of files."""

import hashlib
from collections.abc import Mapping
from pathlib import Path


def file_digest(path: Path) -> str:
    """`sha256:<hex>` of a file's bytes, read as a stream. Raises OSError if it cannot be read."""
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def bytes_digest(data: bytes) -> str:
    """`sha256:<hex>` of bytes in memory."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def content_digest(files: Mapping[str, str]) -> str:
    """The digest of a set of files; task adapters, backbones and base models all use it.

    Args:
        files: file name -> `sha256:<hex>` of its bytes, in any order.

    Returns:
        `sha256:<hex>` of the lines `<name> <hex>`, sorted by name and joined by newlines, with no
        newline at the end.
    """
    lines = (f"{name} {digest.removeprefix('sha256:')}" for name, digest in sorted(files.items()))
    return bytes_digest("\n".join(lines).encode())


def files_digest(files: Mapping[str, bytes]) -> str:
    """`content_digest` of files in memory: file name -> bytes."""
    return content_digest({name: bytes_digest(data) for name, data in files.items()})
