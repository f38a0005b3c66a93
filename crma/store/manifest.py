"""The schema of `manifest.json`, which describes one published version.

A manifest is written last and trusted last: its digests are compared with the bytes that are used,
and its numbers with the weights (`crma/store/entry.py`).
"""

import os
import re
from abc import ABC, abstractmethod
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
from crma.models.prompts import PromptFormat, RawFormat, TemplateFormat

MANIFEST = "manifest.json"
TASK_FILES = ("adapter_config.json", "adapter_model.safetensors")
BACKBONE_FILES = ("config.json", "crma.safetensors")

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
VERSION_PATTERN = r"v[1-9][0-9]{0,8}"


def check_name(name: str) -> str:
    """Returns a task name unchanged; call it before a path is made of the name.

    Raises InvalidAdapter if it is not a valid name.
    """
    if not re.fullmatch(NAME_PATTERN, name) or name == "base":
        allowed = f"{NAME_PATTERN}, and not base"
        raise invalid("Not a valid task name.", "name", name, allowed)
    return name


def check_version(version: str) -> str:
    """Returns a version unchanged; call it before a path is made of the version.

    Raises InvalidAdapter if it is not a valid version.
    """
    if not re.fullmatch(VERSION_PATTERN, version):
        raise invalid("Not a valid version.", "version", version, VERSION_PATTERN)
    return version


Name = Annotated[str, AfterValidator(check_name)]
Version = Annotated[str, AfterValidator(check_version)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}\Z")]
Timestamp = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")]
Json = dict[str, JsonValue]


class Record(BaseModel):
    """Base of everything the store writes as JSON. Unknown fields and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, regex_engine="python-re")


class BaseReference(Record):
    """The base model an adapter was made for. The digest decides; the name is for people."""

    name: str
    digest: Digest


class TrainedOn(Record):
    """How an adapter was trained: enough to train it again.

    `data` maps each split or file to its digest.
    """

    data: dict[str, Digest]
    seed: int
    commit: str
    arm: str
    config: Json = Field(default_factory=dict)


class Blend(Record):
    """A backbone between two others: raw parameters (1 - λ) · parents[0] + λ · parents[1].

    `weight` is λ, and "lambda" in JSON.
    """

    parents: tuple[Digest, Digest]
    weight: float = Field(alias="lambda", ge=0, le=1)


class _Manifest(Record, ABC):
    """The fields that both kinds share. Raises DigestMismatch if `digest` is not that of `files`.

    Each kind names its `FILES`: the config, then the weights.
    """

    FILES: ClassVar[tuple[str, str]]

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
        expected = content_digest(self.files)
        if self.digest != expected:
            message = "The manifest's digest is not that of its files."
            raise DigestMismatch(message, field="digest", value=self.digest, allowed=expected)
        return self

    @property
    @abstractmethod
    def place(self) -> str:
        """Its folder, relative to the store's root."""

    def check_place(self, place: str) -> None:
        """Raises InvalidAdapter if it describes another folder than the one that it is in."""
        if self.place != place:
            raise invalid("Describes another folder.", MANIFEST, self.place, place)


class TaskManifest(_Manifest):
    """`manifest.json` of a task adapter.

    `rank`, `alpha` and `scaling` hold for every pair that the PEFT config has no pattern for.
    `backbone` is the digest of the backbone it was trained on, or null for a LoRA that never saw
    one. `prompt_format` is null if unknown.
    """

    FILES = TASK_FILES

    kind: Literal["task"] = "task"
    name: Name
    prompt_format: PromptFormat | RawFormat | TemplateFormat | None
    rank: int = Field(ge=1)
    alpha: float
    scaling: float
    target_modules: tuple[str, ...] = Field(min_length=1)
    backbone: Digest | None

    @property
    def place(self) -> str:
        """Its folder, relative to the store's root."""
        return f"tasks/{self.name}/{self.version}"


class BackboneManifest(_Manifest):
    """`manifest.json` of a CRMA backbone.

    `lineage` is the digests of its ancestors, nearest first, without its own.
    """

    FILES = BACKBONE_FILES

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

    @property
    def place(self) -> str:
        """Its folder, relative to the store's root."""
        return f"backbones/{self.version}"


M = TypeVar("M", bound=_Manifest)
R = TypeVar("R", bound=BaseModel)


def add_manifest(kind: type[M], files: Mapping[str, bytes], **fields: Any) -> dict[str, bytes]:
    """The files of a version with their manifest added last.

    Args:
        kind: which manifest.
        files: the config and the weights, by file name; their digests are computed here.
        fields: all other fields of the manifest.

    Raises:
        InvalidAdapter: a field is unknown, missing or wrong.
    """
    digests = {name: bytes_digest(data) for name, data in files.items()}
    values = to_json({**fields, "files": digests, "digest": content_digest(digests)})
    return {**files, MANIFEST: to_json(parse_record(kind, values, MANIFEST))}


def read_manifest(root: Path, kind: type[M], place: str) -> tuple[Path, M]:
    """The folder of a version and the manifest in it.

    Args:
        root: of the store.
        kind: which manifest; the folder must hold it, the files of its kind, and nothing else.
        place: the folder, relative to `root`.

    Raises:
        NotFound: there is no such folder.
        DigestMismatch: the manifest's digest is not that of its own list of files.
        InvalidAdapter: anything else is wrong with the folder or the manifest.
    """
    with about(place):
        path = plain_folder(root, place)
        found = set(os.listdir(path))
        expected = {MANIFEST, *kind.FILES}
        odd = sorted(found ^ expected)
        if odd:
            message = "Missing." if odd[0] in expected else "Does not belong in this folder."
            raise invalid(message, odd[0], sorted(found), sorted(expected))
        manifest = parse_record(kind, read_regular(path / MANIFEST, MAX_JSON_BYTES), MANIFEST)
        manifest.check_place(place)
        return path, manifest


def parse_record(kind: type[R], data: bytes, where: str) -> R:
    """A pydantic model from JSON bytes.

    Raises:
        InvalidAdapter: not JSON, or a field is unknown, missing or wrong; the error names the
            first.
        DigestMismatch: a manifest's digest is not that of its own list of files.
    """
    parse_json(data, where)  # pydantic would accept duplicate keys and numbers that overflow
    with about(where):
        return checked("", data, kind.model_validate_json, InvalidAdapter)
