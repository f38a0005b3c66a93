"""What a store entry says of itself: digests, and the schema of `manifest.json`.

A manifest is written last and believed last: its digests are checked against the bytes that are used
(`crma/store.py`), its numbers against the weights (`crma/peft_format.py`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from crma.errors import DigestMismatch, InvalidAdapter
from crma.files import parse_json, to_json

MANIFEST = "manifest.json"
TASK_FILES = ("adapter_config.json", "adapter_model.safetensors")
BACKBONE_FILES = ("config.json", "crma.safetensors")

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
VERSION_PATTERN = r"v[1-9][0-9]{0,8}"
DIGEST_PATTERN = r"sha256:[0-9a-f]{64}"
RESERVED_NAMES = ("base",)


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


def check_name(name: str) -> str:
    """Returns a task name unchanged, before it touches a file system. Raises InvalidAdapter."""
    if not re.fullmatch(NAME_PATTERN, name) or name in RESERVED_NAMES:
        raise InvalidAdapter(
            "Not a task name.", field="name", value=name, allowed=f"{NAME_PATTERN}, and not {', '.join(RESERVED_NAMES)}"
        )
    return name


def check_version(version: str) -> str:
    """Returns a version unchanged, before it touches a file system. Raises InvalidAdapter."""
    if not re.fullmatch(VERSION_PATTERN, version):
        raise InvalidAdapter("Not a version.", field="version", value=version, allowed=VERSION_PATTERN)
    return version


def _finite_json(value: JsonValue) -> JsonValue:
    """Refuses NaN and infinity anywhere inside."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is not finite")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite_json(item)
    return value


Digest = Annotated[str, Field(pattern=rf"^{DIGEST_PATTERN}\Z")]
Json = Annotated[dict[str, JsonValue], AfterValidator(_finite_json)]
Timestamp = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, regex_engine="python-re")


class BaseReference(_Record):
    """The base model an adapter was made for. The digest decides; the name is for people."""

    name: str
    digest: Digest


class PromptRecord(_Record):
    """The prompt format of training, as `crma.prompts.PromptFormat.to_dict` gives it."""

    head: str
    tail: str
    stop: str


class TrainedOn(_Record):
    """What made an adapter: enough to train it again. `data` maps each split or file to its digest."""

    data: dict[str, Digest]
    seed: int
    commit: str
    arm: str
    config: Json = Field(default_factory=dict)


class Blend(_Record):
    """A backbone between two others: raw parameters (1 - lambda) * parents[0] + lambda * parents[1]."""

    parents: tuple[Digest, Digest]
    weight: float = Field(alias="lambda", ge=0, le=1)


class _Manifest(_Record):
    format: Literal[1]
    version: Annotated[str, Field(pattern=rf"^{VERSION_PATTERN}\Z")]
    digest: Digest
    files: dict[str, Digest]
    base: BaseReference
    trained_on: TrainedOn | None
    measured: Json
    licence: str
    created: Timestamp

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the names of the file format."""
        return self.model_dump(mode="json", by_alias=True)


class TaskManifest(_Manifest):
    """`manifest.json` of a task adapter.

    `rank`, `alpha` and `scaling` are those of every pair unless the PEFT config says otherwise for a module.
    `backbone` is the digest of the backbone it was trained on; null for a LoRA that never saw one.
    """

    kind: Literal["task"]
    name: Annotated[str, Field(pattern=rf"^{NAME_PATTERN}\Z")]
    prompt_format: PromptRecord | None
    rank: int = Field(ge=1)
    alpha: float
    scaling: float
    target_modules: tuple[str, ...] = Field(min_length=1)
    backbone: Digest | None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _exactly(self.files, TASK_FILES)
        if self.name in RESERVED_NAMES:
            raise ValueError(f"the name {self.name} is reserved")
        if self.scaling != self.alpha / self.rank:
            raise ValueError("scaling is not alpha / rank")
        return self


class BackboneManifest(_Manifest):
    """`manifest.json` of a CRMA backbone. `lineage`: digests of its ancestors, nearest first, itself not among them."""

    kind: Literal["backbone"]
    config: Json
    lineage: tuple[Digest, ...]
    blend: Blend | None
    certificate: Json

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _exactly(self.files, BACKBONE_FILES)
        if self.digest in self.lineage or len(set(self.lineage)) != len(self.lineage):
            raise ValueError("lineage names a digest twice, or the backbone itself")
        return self


def _exactly(files: Mapping[str, str], expected: tuple[str, ...]) -> None:
    if set(files) != set(expected):
        raise ValueError(f"files must be exactly {', '.join(expected)}")


M = TypeVar("M", bound=_Manifest)
R = TypeVar("R", bound=BaseModel)


def make_manifest(kind: type[M], values: Mapping[str, Any]) -> M:
    """A manifest from its fields; `digest` is worked out from `files`. Raises InvalidAdapter."""
    return parse_record(kind, to_json({"format": 1, "digest": content_digest(values["files"]), **values}), MANIFEST)


def parse_manifest(kind: type[M], data: bytes) -> M:
    """A manifest from the bytes of a `manifest.json`.

    Raises:
        InvalidAdapter: not JSON, or a field that is unknown, missing or out of range; the error names it.
        DigestMismatch: its digest is not that of its own list of files.
    """
    manifest = parse_record(kind, data, MANIFEST)
    if manifest.digest != (expected := content_digest(manifest.files)):
        raise DigestMismatch(
            "The manifest's digest is not that of its files.", field="digest", value=manifest.digest, allowed=expected
        )
    return manifest


def parse_record(kind: type[R], data: bytes, where: str) -> R:
    """A pydantic model from JSON bytes. Raises InvalidAdapter that names the first field that is wrong."""
    parse_json(data, where)  # a key twice would pass below
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or where
        raise InvalidAdapter(
            f"{where}: {field}: {first['msg']}.", field=field, value=repr(first["input"])[:200], allowed=first["msg"]
        ) from error
