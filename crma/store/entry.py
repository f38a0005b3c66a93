"""One version of a task adapter or backbone in a store: what it says of itself, and its weights, checked before use."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import safetensors
import safetensors.torch
from torch import Tensor

from crma.core.digests import bytes_digest
from crma.core.errors import BaseMismatch, ConfigError, DigestMismatch
from crma.core.files import MAX_JSON_BYTES, about, invalid, names_in, parse_json, read_regular
from crma.method.backbone import Backbone, CrmaConfig
from crma.method.lora import Lora
from crma.models.prompts import PromptFormat
from crma.store.channels import BACKBONE, channel_folder, channel_task, task_channel
from crma.store.manifest import (
    VERSION_PATTERN,
    BackboneManifest,
    M,
    TaskManifest,
    check_version,
    read_manifest,
)
from crma.store.peft_format import check_fits, lora_from_peft

Shapes = Mapping[str, tuple[int, int]]
"""Module path -> (out, in) of every linear in the decoder blocks, from `injection.linear_shapes`."""

Contents = tuple[dict[str, Any], dict[str, Tensor]]
"""Of the config and of the weights."""

MAX_WEIGHTS_BYTES = 4 * 2**30


@dataclass(frozen=True)
class _Entry(Generic[M]):
    """A published version: its folder and its manifest, which says what it likes until `load` has checked it."""

    path: Path
    manifest: M

    @property
    def version(self) -> str:
        """`v1`, `v2`, …"""
        return self.manifest.version

    @property
    def digest(self) -> str:
        """What it is, whatever it is called."""
        return self.manifest.digest

    def check_base(self, base_digest: str) -> None:
        """Raises BaseMismatch if it was made for another base model."""
        base = self.manifest.base
        if base.digest != base_digest:
            message = f"{self.manifest.place}: made for another base model, {base.name}."
            raise BaseMismatch(message, field="base", value=base.digest, allowed=base_digest)

    def _read(self) -> Contents:
        return read_weights([self.path / name for name in self.manifest.FILES], self.manifest.files)


class TaskEntry(_Entry[TaskManifest]):
    """A version of a task adapter."""

    @property
    def name(self) -> str:
        """The task's."""
        return self.manifest.name

    @property
    def prompt_format(self) -> PromptFormat | None:
        """The format of training; None for an import that recorded none."""
        return self.manifest.prompt_format

    def load(self, shapes: Shapes | None = None) -> Lora:
        """The weights, in their stored dtype, from bytes whose digests were checked.

        Args:
            shapes: of the base model; with them, every pair must fit and every targeted module must have one.

        Raises:
            DigestMismatch: a file is not what the manifest says.
            InvalidAdapter: anything else that is wrong with a file; the error names it.
        """
        with about(self.manifest.place):
            config, tensors = self._read()
            lora = lora_from_peft(config, tensors)
            for field in ("rank", "alpha", "scaling", "target_modules"):
                said, found = getattr(self.manifest, field), getattr(lora.config, field)
                if said != found:
                    raise invalid(
                        "The manifest says otherwise than the adapter.", field, said, found
                    )
            if shapes is not None:
                check_fits(config, lora, shapes)
            return lora


class BackboneEntry(_Entry[BackboneManifest]):
    """A version of the CRMA backbone."""

    def check_certificate(self, found: dict[str, Any]) -> None:
        """The manifest is outside the digest, so its bounds are computed anew. Raises InvalidAdapter if they differ."""
        for name in ("max_bound", "max_norm"):
            said = self.manifest.certificate.get(name)
            if not isinstance(said, float) or abs(said - found[name]) > 1e-5:
                raise invalid(
                    f"backbones/{self.version}: not its certificate.", name, said, found[name]
                )

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
        with about(self.manifest.place):
            values, tensors = self._read()
            if values != self.manifest.config:
                raise invalid(
                    "The manifest says otherwise than config.json.",
                    "config",
                    self.manifest.config,
                    values,
                )
            backbone = _backbone(values, tensors)
            if shapes is not None:
                _check_backbone_fits(backbone.config, shapes)
            return backbone


def read_task(root: Path, name: str, version: str) -> TaskEntry:
    """The entry at `tasks/<name>/<version>`. NotFound, or another StoreError if its folder or manifest is damaged."""
    return TaskEntry(
        *read_manifest(root, TaskManifest, f"{task_channel(name)}/{check_version(version)}")
    )


def read_backbone(root: Path, version: str) -> BackboneEntry:
    """The entry at `backbones/<version>`. Raises as `read_task`."""
    return BackboneEntry(
        *read_manifest(root, BackboneManifest, f"backbones/{check_version(version)}")
    )


def read_entry(root: Path, channel: str, version: str) -> TaskEntry | BackboneEntry:
    """What a channel would serve. Raises as `read_task`."""
    return (
        read_backbone(root, version)
        if channel == BACKBONE
        else read_task(root, channel_task(channel), version)
    )


def read_weights(files: Sequence[Path], digests: Mapping[str, str] | None = None) -> Contents:
    """A JSON config and safetensors weights, read once: the bytes that were checked are the bytes that are used.

    Args:
        files: the config and the weights.
        digests: file name -> digest of its bytes, if they are known.

    Raises:
        DigestMismatch, InvalidAdapter
    """
    contents = []
    for path, limit in zip(files, (MAX_JSON_BYTES, MAX_WEIGHTS_BYTES), strict=True):
        contents.append(read_regular(path, limit))
        if digests is not None and (found := bytes_digest(contents[-1])) != digests[path.name]:
            message = f"{path.name}: not the file that was published."
            raise DigestMismatch(message, field=path.name, value=found, allowed=digests[path.name])
    config = parse_json(contents[0], files[0].name)
    try:
        return config, safetensors.torch.load(contents[1])
    except (
        safetensors.SafetensorError,
        KeyError,
        ValueError,
        RuntimeError,
        AssertionError,
    ) as error:
        size = f"{len(contents[1])} bytes"
        raise invalid(
            f"Not a safetensors file: {error}.", files[1].name, size, "safetensors"
        ) from error


def versions_in(root: Path, channel: str) -> tuple[str, ...]:
    """Every published version of a channel, oldest first. InvalidAdapter for no channel, or a folder that is a link."""
    names = names_in(root, channel_folder(channel))
    versions = (name for name in names if re.fullmatch(VERSION_PATTERN, name))
    return tuple(sorted(versions, key=lambda version: int(version[1:])))


def _backbone(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Backbone:
    try:
        config = CrmaConfig.from_dict(values)
        size = config.num_layers * (
            config.num_streams**2 + 2 * config.rank * config.hidden_size + 1
        )
        if (
            sum(t.numel() for t in tensors.values()) != size
        ):  # before it is allocated: a config may claim any size
            shapes = {name: list(t.shape) for name, t in tensors.items()}
            raise invalid("Not the shape of the weights.", "config.json", values, shapes)
        return Backbone.from_tensors(config, tensors)
    except (ConfigError, TypeError, RuntimeError) as error:
        raise invalid(
            f"{error}.", "config.json", values, "what crma.method.backbone.CrmaConfig takes"
        ) from error


def _check_backbone_fits(config: CrmaConfig, shapes: Shapes) -> None:
    layers = {part for path in shapes for part in path.split(".") if part.isdecimal()}
    if len(layers) != config.num_layers:
        raise invalid(
            "Not as deep as the base model.", "num_layers", config.num_layers, len(layers)
        )
    widths = {in_features for _, in_features in shapes.values()}
    if config.hidden_size not in widths:
        raise invalid(
            "Not the base model's hidden size.", "hidden_size", config.hidden_size, sorted(widths)
        )
