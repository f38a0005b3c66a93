"""Content digests: how files, and sets of files, are identified."""

import hashlib
from collections.abc import Mapping
from pathlib import Path


def file_digest(path: Path) -> str:
    """`sha256:<hex>` of a file's bytes, streamed. Raises OSError if it cannot be read."""
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def bytes_digest(data: bytes) -> str:
    """`sha256:<hex>` of bytes in memory."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def content_digest(files: Mapping[str, str]) -> str:
    """The one digest of a set of files, for task adapters, backbones and base models alike.

    Args:
        files: file name -> `sha256:<hex>` of its bytes. The order does not matter.

    Returns:
        `sha256:<hex>` over the lines `<name> <hex>`, sorted by name, joined by one newline, without one at the end.
    """
    lines = (f"{name} {digest.removeprefix('sha256:')}" for name, digest in sorted(files.items()))
    return bytes_digest("\n".join(lines).encode())


def files_digest(files: Mapping[str, bytes]) -> str:
    """`content_digest` of files in memory: name -> bytes."""
    return content_digest({name: bytes_digest(data) for name, data in files.items()})
