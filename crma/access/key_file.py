"""The file of keys: read whole, and replaced whole by `crma keys`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from crma.access.key import Key
from crma.core.errors import ConfigError
from crma.core.files import PRIVATE, locked, read_plain, replace_file, to_json

MAX_BYTES = 4 * 2**20


class KeyList(BaseModel):
    """What a file of keys holds, as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in self.keys]
            if len(set(values)) != len(values):
                raise ValueError(f"two keys have the same {field}")
        return self


@dataclass(frozen=True)
class KeyFile:
    """A file of keys. Only its owner may read or write it.

    Readers need no lock: they see the keys before a change or after it.
    """

    path: Path

    def read(self) -> tuple[Key, ...]:
        """The keys.

        Raises:
            ConfigError: the file is missing, no plain file or cannot be read, or is no list of
                keys; the message never shows what it holds.
        """
        try:
            data = read_plain(self.path, MAX_BYTES + 1)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            message = f"{self.path} cannot be read: {reason}; crma keys add makes it"
            raise self._error(message) from error
        if len(data) > MAX_BYTES:
            raise self._error(f"{self.path} is larger than {MAX_BYTES} bytes")
        try:
            return KeyList.model_validate_json(data).keys
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise self._error(f"{self.path}: {place}: {first['msg']}") from None

    def add(self, key: Key) -> None:
        """Add a key; the file is made if it is missing.

        Raises:
            ConfigError: its name or its digest is there already, or the file is none of keys.
        """
        with self._changing() as keys:
            if key.name in {each.name for each in keys}:
                message = f"{self.path} has a key {key.name!r} already; revoke it first"
                raise ConfigError(message, field="name", value=key.name, allowed="a new name")
            self._write([*keys, key])

    def revoke(self, name: str) -> None:
        """Remove a key. Raises ConfigError if it is not there, or the file is none of keys."""
        with self._changing() as keys:
            names = [each.name for each in keys]
            if name not in names:
                message = f"{self.path} has no key {name!r}"
                raise ConfigError(message, field="name", value=name, allowed=names)
            self._write([each for each in keys if each.name != name])

    @contextmanager
    def _changing(self) -> Iterator[tuple[Key, ...]]:
        """The keys, while no other process changes them."""
        with locked(self.path.parent):
            yield self.read() if os.path.lexists(self.path) else ()

    def _write(self, keys: list[Key]) -> None:
        replace_file(self.path, to_json(KeyList(keys=tuple(keys))), mode=PRIVATE)

    def _error(self, message: str) -> ConfigError:
        return ConfigError(message, field="keys_file", allowed="a file that crma keys wrote")
