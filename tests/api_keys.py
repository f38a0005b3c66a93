"""A file of keys for a test, and the headers with which each key is sent."""

from pathlib import Path
from typing import Any

from crma.access.key import digest_of, read_key
from crma.access.key_file import KeyFile

Headers = dict[str, str]


def bearer(key: str) -> Headers:
    return {"Authorization": f"Bearer {key}"}


def add(file: Path, name: str, *scopes: str, **fields: Any) -> Headers:
    """Add a key to a file. Returns the headers of a request with it.

    Args:
        scopes: generate, if none are given.
        fields: of `Key`, but for what it needs; limits at their own names.
    """
    limits = {
        each: fields.pop(each)
        for each in ("requests_per_minute", "tokens_per_minute", "max_concurrent")
        if each in fields
    }
    secret = f"the key of {name}"
    key = read_key(
        name=name,
        sha256=digest_of(secret),
        scopes=list(scopes or ("generate",)),
        limits=limits,
        **fields,
    )
    KeyFile(file).add(key)
    return bearer(secret)
