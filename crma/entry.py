"""One version of a task adapter or backbone in a store: what it says of itself, and its weights, checked before use."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from crma.adapter import Backbone, CrmaConfig
from crma.errors import ConfigError, DigestMismatch, InvalidAdapter, NotFound, StoreError
from crma.files import parse_json, read_regular
from crma.lora import Lora
from crma.manifest import (
    BACKBONE_FILES,
    MANIFEST,
    TASK_FILES,
    VERSION_PATTERN,
    BackboneManifest,
    TaskManifest,
    bytes_digest,
    parse_manifest,
)
from crma.peft_format import check_fits, lora_from_peft
from crma.prompts import PromptFormat

Shapes = Mapping[str, tuple[int, int]]
"""Module path -> (out, in) of every linear in the decoder blocks, from `injection.linear_shapes`."""

MAX_JSON_BYTES = 4 * 2**20
MAX_WEIGHTS_BYTES = 4 * 2**30
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class TaskEntry:
    """A version of a task adapter. `digest` is what its manifest claims until `load` has checked it."""

    name: str
    version: str
    digest: str
    path: Path
    manifest: TaskManifest

    @property
    def prompt_format(self) -> PromptFormat | None:
        """The format of training; None for an import that recorded none."""
        record = self.manifest.prompt_format
        return None if record is None else PromptFormat.from_dict(record.model_dump())

    def load(self, shapes: Shapes | None = None) -> Lora:
        """The weights, in their stored dtype, from bytes whose digests were checked.

        Args:
            shapes: of the base model; with them, every pair must fit and every targeted module must have one.

        Raises:
            DigestMismatch: a file is not what the manifest says.
            InvalidAdapter: anything else that is wrong with a file; the error names it.
        """
        with about(f"tasks/{self.name}/{self.version}"):
            config_file, weights_file = TASK_FILES
            files = _read_checked(self.path, self.manifest.files)
            config = parse_json(files[config_file], config_file)
            lora = lora_from_peft(config, _tensors(files[weights_file], weights_file))
            for field in ("rank", "alpha", "scaling", "target_modules"):
                said, found = getattr(self.manifest, field), getattr(lora.config, field)
                if said != found:
                    raise InvalidAdapter(
                        f"{MANIFEST}: {field} is not the adapter's.", field=field, value=said, allowed=found
                    )
            if shapes is not None:
                check_fits(config, lora, shapes)
            return lora


@dataclass(frozen=True)
class BackboneEntry:
    """A version of the CRMA backbone. `digest` is what its manifest claims until `load` has checked it."""

    version: str
    digest: str
    path: Path
    manifest: BackboneManifest

    def descends_from(self, digest: str) -> bool:
        """Whether `digest` is this backbone or one of its ancestors: then a LoRA trained under it may serve here."""
        return digest == self.digest or digest in self.manifest.lineage

    def load(self, shapes: Shapes | None = None) -> Backbone:
        """The raw fp32 parameters, from bytes whose digests were checked.

        Args:
            shapes: of the base model; with them, depth and hidden size must fit it.

        Raises:
            DigestMismatch, InvalidAdapter: as `TaskEntry.load`.
        """
        with about(f"backbones/{self.version}"):
            config_file, weights_file = BACKBONE_FILES
            files = _read_checked(self.path, self.manifest.files)
            values = parse_json(files[config_file], config_file)
            if values != self.manifest.config:
                raise InvalidAdapter(
                    f"{MANIFEST}: config is not {config_file}.",
                    field="config",
                    value=self.manifest.config,
                    allowed=values,
                )
            backbone = backbone_from_files(values, _tensors(files[weights_file], weights_file))
            if shapes is not None:
                _check_backbone_fits(backbone.config, shapes)
            return backbone


def backbone_from_files(values: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Backbone:
    """A backbone from the contents of `config.json` and `crma.safetensors`. Raises InvalidAdapter."""
    try:
        config = CrmaConfig.from_dict(values)
        layers, streams, rank, hidden = config.num_layers, config.num_streams, config.rank, config.hidden_size
        # Before anything is allocated: a config may claim any size.
        if sum(t.numel() for t in tensors.values()) != layers * (streams**2 + 2 * rank * hidden + 1):
            raise InvalidAdapter(
                "config.json is not the shape of the weights.",
                field="config",
                value=dict(values),
                allowed={name: list(t.shape) for name, t in tensors.items()},
            )
        return Backbone.from_tensors(config, tensors)
    except (ConfigError, TypeError, RuntimeError) as error:
        raise InvalidAdapter(f"config.json: {error}.", field="config", value=dict(values)) from error


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file of an adapter. Raises InvalidAdapter."""
    return parse_json(read_regular(path, MAX_JSON_BYTES), path.name)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Raises InvalidAdapter."""
    return _tensors(read_regular(path, MAX_WEIGHTS_BYTES), path.name)


def versions_in(root: Path, *parts: str) -> tuple[str, ...]:
    """The versions in a folder of the store, oldest first; none if there is no such folder. Raises InvalidAdapter."""
    try:
        names = os.listdir(plain_folder(root, *parts))
    except NotFound:
        return ()
    return tuple(
        sorted((name for name in names if re.fullmatch(VERSION_PATTERN, name)), key=lambda name: int(name[1:]))
    )


def read_task(root: Path, name: str, version: str) -> TaskEntry:
    """The entry at `tasks/<name>/<version>`; name and version must have been checked. Raises StoreError."""
    with about(f"tasks/{name}/{version}"):
        path = plain_folder(root, "tasks", name, version)
        manifest = parse_manifest(TaskManifest, read_regular(path / MANIFEST, MAX_JSON_BYTES))
        if (manifest.name, manifest.version) != (name, version):
            found = f"{manifest.name}/{manifest.version}"
            raise InvalidAdapter(
                f"{MANIFEST}: made for another place.", field="name", value=found, allowed=f"{name}/{version}"
            )
        return TaskEntry(name, version, manifest.digest, path, manifest)


def read_backbone(root: Path, version: str) -> BackboneEntry:
    """The entry at `backbones/<version>`; the version must have been checked. Raises StoreError."""
    with about(f"backbones/{version}"):
        path = plain_folder(root, "backbones", version)
        manifest = parse_manifest(BackboneManifest, read_regular(path / MANIFEST, MAX_JSON_BYTES))
        if manifest.version != version:
            raise InvalidAdapter(
                f"{MANIFEST}: made for another place.", field="version", value=manifest.version, allowed=version
            )
        return BackboneEntry(version, manifest.digest, path, manifest)


def plain_folder(root: Path, *parts: str) -> Path:
    """`root/parts…`, of which every part is a folder and none is a link (`root` itself may be one).

    Raises:
        NotFound: there is no such folder.
        InvalidAdapter: a link, or not a folder.
    """
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise InvalidAdapter(
                "Not a folder of the store.", field="path", value=str(path), allowed="a folder, not a link"
            )
        if not path.exists():
            raise NotFound("Not in the store.", field="path", value="/".join(parts), allowed="a published version")
    return path


@contextmanager
def about(where: str) -> Iterator[None]:
    """Store errors raised inside say which entry they are about."""
    try:
        yield
    except StoreError as error:
        if error.message.startswith(where):
            raise
        message = f"{where}: {error.message}"
        raise type(error)(message, field=error.field, value=error.value, allowed=error.allowed) from error


def check_listing(path: Path, files: Mapping[str, str]) -> None:
    """The folder holds the manifest, its files, and nothing else. Raises InvalidAdapter."""
    found, expected = set(os.listdir(path)), {MANIFEST, *files}
    for name in sorted(found - expected):
        pickled = name.lower().endswith(_PICKLES)
        message = "Pickle is never read." if pickled else "Not a file of this adapter."
        raise InvalidAdapter(f"{name}: {message}", field=name, value=name, allowed=sorted(expected))
    if missing := sorted(expected - found):
        raise InvalidAdapter(f"{missing[0]}: Missing.", field=missing[0], value=None, allowed=sorted(expected))


def _read_checked(path: Path, files: Mapping[str, str]) -> dict[str, bytes]:
    """Each file's bytes, read once and hashed, so that the bytes that were checked are the bytes that are used."""
    check_listing(path, files)
    contents = {}
    for name, digest in files.items():
        limit = MAX_WEIGHTS_BYTES if name.endswith(".safetensors") else MAX_JSON_BYTES
        contents[name] = read_regular(path / name, limit)
        if (found := bytes_digest(contents[name])) != digest:
            raise DigestMismatch(f"{name}: not the file that was published.", field=name, value=found, allowed=digest)
    return contents


def _tensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise InvalidAdapter(
            f"{where}: not a safetensors file: {error}.", field=where, value=f"{len(data)} bytes", allowed="safetensors"
        ) from error


def _check_backbone_fits(config: CrmaConfig, shapes: Shapes) -> None:
    layers = {part for path in shapes for part in path.split(".") if part.isdecimal()}
    if len(layers) != config.num_layers:
        raise InvalidAdapter(
            "Not as deep as the base model.", field="num_layers", value=config.num_layers, allowed=len(layers)
        )
    widths = {in_features for _, in_features in shapes.values()}
    if config.hidden_size not in widths:
        raise InvalidAdapter(
            "Not the base model's hidden size.", field="hidden_size", value=config.hidden_size, allowed=sorted(widths)
        )
