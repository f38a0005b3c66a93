"""A key as it is kept: its name, its digest, and what it may do. The key itself is never kept."""

import hashlib
import json
import secrets
from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crma.access.scope import Scope
from crma.core.errors import ConfigError

NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
RESERVED = ("admin", "env-")
"""Names, and beginnings of names, of keys that come from settings."""

_PREFIX = "crma_"  # by which scanners for leaked secrets find a key
_RANDOM_BYTES = 32

Name = Annotated[str, Field(pattern=f"^{NAME}$")]
Limit = Annotated[int, Field(ge=1)]


class Limits(BaseModel):
    """How much a key may use. None: no limit.

    Attributes:
        requests_per_minute: requests that generate, encode or ablate.
        tokens_per_minute: tokens of prompts and answers.
        max_concurrent: requests that generate, encode or ablate at once; streams until they end.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    max_concurrent: Limit | None = None


class Key(BaseModel):
    """One key of a file.

    Attributes:
        name: what belongs to the key is kept under its name.
        sha256: of the key, in hexadecimal.
        scopes: what it is for.
        tasks: the only tasks that exist for it; None: all. Not for admins, who change the store.
        tenant: keys of one tenant share cached prefixes; None: the key shares them with no other.
        limits: how much it may use.
        created: UTC, ISO 8601.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Name
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    tasks: tuple[Name, ...] | None = None
    tenant: Name | None = None
    limits: Limits = Limits()
    created: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name.startswith(RESERVED):
            raise ValueError(f"names that begin with {' or '.join(RESERVED)} are taken")
        if Scope.ADMIN in self.scopes and self.tasks is not None:
            raise ValueError("a key for admin works on the whole store: leave tasks out")
        return self


def digest_of(key: str) -> str:
    """The SHA-256 of a key, in hexadecimal.

    A plain hash is enough for a key that `new_key` made: its 256 random bits cannot be guessed,
    however fast the hash is. A slow hash is for passwords, and would be paid by every request.
    """
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """A key that has never been given out."""
    return _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def read_key(**fields: Any) -> Key:
    """The key with these fields, made now. Raises ConfigError that names the field at fault."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        return Key.model_validate_json(json.dumps({**fields, "created": created}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "key"
        message = first["msg"].removeprefix("Value error, ")
        value = None if field == "key" else first["input"]
        raise ConfigError(message, field=field, value=value) from None
