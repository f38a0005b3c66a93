"""What a store entry says of itself: digests, and the schema of `manifest.json`.

A manifest is written last and believed last: its digests are checked against the bytes that are used, its numbers
against the weights (`crma/entry.py`).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from crma.core.digests import bytes_digest, content_digest
from crma.core.errors import DigestMismatch, InvalidAdapter
from crma.core.files import (
    MAX_JSON_BYTES,
    about,
    invalid,
    parse_json,
    plain_folder,
    read_regular,
    to_json,
)
from crma.core.json_lines import checked
from crma.models.prompts import PromptFormat

MANIFEST = "manifest.json"
TASK_FILES = ("adapter_config.json", "adapter_model.safetensors")

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
VERSION_PATTERN = r"v[1-9][0-9]{0,8}"


def check_name(name: str) -> str:
    """Returns a task name unchanged, before it touches a file system. Raises InvalidAdapter."""
    if not re.fullmatch(NAME_PATTERN, name) or name == "base":
        raise invalid("Not a task name.", "name", name, f"{NAME_PATTERN}, and not base")
    return name


def check_version(version: str) -> str:
    """Returns a version unchanged, before it touches a file system. Raises InvalidAdapter."""
    if not re.fullmatch(VERSION_PATTERN, version):
        raise invalid("Not a version.", "version", version, VERSION_PATTERN)
    return version


Name = Annotated[str, AfterValidator(check_name)]
Version = Annotated[str, AfterValidator(check_version)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}\Z")]
Timestamp = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")]
Json = dict[str, JsonValue]


class Record(BaseModel):
    """What the store writes as JSON: every field known and of its type (`parse_record`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, regex_engine="python-re")


class BaseReference(Record):
    """The base model an adapter was made for. The digest decides; the name is for people."""

    name: str
    digest: Digest


class TrainedOn(Record):
    """What made an adapter: enough to train it again. `data` maps each split or file to its digest."""

    data: dict[str, Digest]
    seed: int
    commit: str
    arm: str
    config: Json = Field(default_factory=dict)


class Blend(Record):
    """A backbone between two others: raw parameters (1 - lambda) * parents[0] + lambda * parents[1]."""

    parents: tuple[Digest, Digest]
    weight: float = Field(alias="lambda", ge=0, le=1)


class _Manifest(Record):
    """Fields of both kinds. DigestMismatch if `digest` is not that of `files`."""

    FILES: ClassVar[tuple[str, str]]
    PLACE: ClassVar[str]

    format: Literal[1] = 1
    version: Version
    digest: Digest
    files: dict[str, Digest]
    base: BaseReference
    trained_on: TrainedOn | None
    measured: Json
    licence: str
    created: Timestamp

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if set(self.files) != set(self.FILES):
            raise ValueError(f"files must be exactly {', '.join(self.FILES)}")
        if self.digest != (expected := content_digest(self.files)):
            message = "The manifest's digest is not that of its files."
            raise DigestMismatch(message, field="digest", value=self.digest, allowed=expected)
        return self

    @property
    def place(self) -> str:
        """Its folder in the store."""
        return self.PLACE.format(self)


class TaskManifest(_Manifest):
    """`manifest.json` of a task adapter.

    `rank`, `alpha` and `scaling` are those of every pair unless the PEFT config says otherwise for a module.
    `backbone` is the digest of the backbone it was trained on; null for a LoRA that never saw one.
    """

    FILES = TASK_FILES
    PLACE = "tasks/{0.name}/{0.version}"

    kind: Literal["task"] = "task"
    name: Name
    prompt_format: PromptFormat | None
    rank: int = Field(ge=1)
    alpha: float
    scaling: float
    target_modules: tuple[str, ...] = Field(min_length=1)
    backbone: Digest | None


class BackboneManifest(_Manifest):
    """`manifest.json` of a CRMA backbone. `lineage`: digests of its ancestors, nearest first, itself not among them."""

    FILES = ("config.json", "crma.safetensors")
    PLACE = "backbones/{0.version}"

    kind: Literal["backbone"] = "backbone"
    config: Json
    lineage: tuple[Digest, ...]
    blend: Blend | None
    certificate: Json

    @model_validator(mode="after")
    def _check_lineage(self) -> Self:
        if len({self.digest, *self.lineage}) != len(self.lineage) + 1:
            raise ValueError("lineage names a digest twice, or the backbone itself")
        return self


M = TypeVar("M", bound=_Manifest)
R = TypeVar("R", bound=BaseModel)


def add_manifest(kind: type[M], files: Mapping[str, bytes], **fields: Any) -> dict[str, bytes]:
    """The files and, last, their manifest: their digests and the other fields, checked. Raises InvalidAdapter."""
    digests = {name: bytes_digest(data) for name, data in files.items()}
    values = to_json({**fields, "files": digests, "digest": content_digest(digests)})
    return {**files, MANIFEST: to_json(parse_record(kind, values, MANIFEST))}


def read_manifest(root: Path, kind: type[M], place: str) -> tuple[Path, M]:
    """The folder at `place` and the manifest in it; it holds that, the files of its kind, and nothing else."""
    with about(place):
        path = plain_folder(root, place)
        found, expected = set(os.listdir(path)), {MANIFEST, *kind.FILES}
        if odd := sorted(found ^ expected):
            message = (
                "Missing." if odd[0] in expected else "Only the files of its kind belong here."
            )
            raise invalid(message, odd[0], sorted(found), sorted(expected))
        manifest = parse_record(kind, read_regular(path / MANIFEST, MAX_JSON_BYTES), MANIFEST)
        if manifest.place != place:
            raise invalid("Made for another place.", MANIFEST, manifest.place, place)
        return path, manifest


def parse_record(kind: type[R], data: bytes, where: str) -> R:
    """A pydantic model from JSON bytes.

    Raises:
        InvalidAdapter: not JSON, or a field that is unknown, missing or wrong; the error names the first.
        DigestMismatch: a manifest's digest is not that of its own list of files.
    """
    parse_json(data, where)  # a key twice, or a number that is not finite, would pass below
    with about(where):
        return checked("", data, kind.model_validate_json, InvalidAdapter)
