"""One published version of a task adapter or a backbone: its manifest, and its checked weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from crma.core.digests import bytes_digest
from crma.core.errors import BaseMismatch, ConfigError, DigestMismatch
from crma.core.files import MAX_JSON_BYTES, about, invalid, names_in, parse_json, read_regular
from crma.models.model_shape import ModelShape
from crma.models.prompts import Format
from crma.store.channels import BACKBONE, channel_folder, channel_task, task_channel
from crma.store.manifest import (
    VERSION_PATTERN,
    BackboneManifest,
    M,
    TaskManifest,
    check_version,
    read_manifest,
)
from crma.store.peft_format import StoredLora, check_fits, lora_from_peft
from crma.store.stored_tensor import StoredTensor, read_tensors

if TYPE_CHECKING:
    from crma.method.backbone import Backbone, CrmaConfig
    from crma.method.lora import Lora

Contents = tuple[dict[str, Any], dict[str, StoredTensor]]
"""The parsed config and the tensors of an adapter."""

MAX_WEIGHTS_BYTES = 4 * 2**30


@dataclass(frozen=True)
class _Entry(Generic[M]):
    """A published version: its folder and its manifest, whose claims only `load` checks."""

    path: Path
    manifest: M

    @property
    def version(self) -> str:
        """`v1`, `v2`, …"""
        return self.manifest.version

    @property
    def digest(self) -> str:
        """The identity of the adapter, whatever its name."""
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
        """The name of the task."""
        return self.manifest.name

    @property
    def prompt_format(self) -> Format | None:
        """The format it is asked in; None if the manifest records none (imports of version 0.1)."""
        return self.manifest.prompt_format

    def fits_lineage(self, backbones: Sequence[BackboneEntry]) -> bool:
        """Whether it may serve under one of these backbones, or needs none.

        A LoRA that never saw a backbone serves without CRMA, whichever backbone serves.
        """
        trained_on = self.manifest.backbone
        return trained_on is None or any(each.descends_from(trained_on) for each in backbones)

    def load(self, shape: ModelShape | None = None) -> Lora:
        """The weights in their stored dtype. Arguments and errors are those of `read`."""
        return self.read(shape).to_lora()

    def num_parameters(self, shape: ModelShape | None = None) -> int:
        """Numbers in its tensors. Arguments and errors are those of `read`."""
        return self.read(shape).num_parameters

    def read(self, shape: ModelShape | None = None) -> StoredLora:
        """The weights as they are stored, made from the bytes whose digests were checked.

        Args:
            shape: of the base model; if given, every pair must fit it and every targeted module
                must have a pair.

        Raises:
            DigestMismatch: a file is not the one that the manifest names.
            InvalidAdapter: anything else is wrong with a file; the error names it.
        """
        with about(self.manifest.place):
            config, tensors = self._read()
            lora = lora_from_peft(config, tensors)
            for field in ("rank", "alpha", "scaling", "target_modules"):
                claimed = getattr(self.manifest, field)
                found = getattr(lora, field)
                if claimed != found:
                    raise invalid("The manifest contradicts the adapter.", field, claimed, found)
            if shape is not None:
                check_fits(config, lora, shape)
            return lora


class BackboneEntry(_Entry[BackboneManifest]):
    """A version of the CRMA backbone."""

    def check_certificate(self, found: Mapping[str, Any]) -> None:
        """Compares the certificate's bounds with those just computed from the weights.

        The digest does not cover the manifest, so its bounds cannot be trusted. Raises
        InvalidAdapter if they differ.
        """
        for name in ("max_bound", "max_norm"):
            claimed = self.manifest.certificate.get(name)
            if not isinstance(claimed, float) or abs(claimed - found[name]) > 1e-5:
                message = f"backbones/{self.version}: the certificate is not that of the weights."
                raise invalid(message, name, claimed, found[name])

    def descends_from(self, digest: str) -> bool:
        """Whether `digest` is this backbone or an ancestor: a LoRA trained on it may serve here."""
        return digest == self.digest or digest in self.manifest.lineage

    def load(self, shape: ModelShape | None = None) -> Backbone:
        """The raw fp32 parameters, made from the bytes whose digests were checked.

        Args:
            shape: of the base model; if given, depth and hidden size must be those of it.

        Raises:
            DigestMismatch, InvalidAdapter: as `TaskEntry.read`.
        """
        with about(self.manifest.place):
            values, tensors = self._read()
            if values != self.manifest.config:
                message = "The manifest contradicts config.json."
                raise invalid(message, "config", self.manifest.config, values)
            backbone = _make_backbone(values, tensors)
            if shape is not None:
                _check_backbone_fits(backbone.config, shape)
            return backbone

    def num_parameters(self, shape: ModelShape | None = None) -> int:
        """Numbers in its tensors. Arguments and errors are those of `load`."""
        return sum(tensor.numel() for tensor in self.load(shape).parameters())


def read_task(root: Path, name: str, version: str) -> TaskEntry:
    """The entry at `tasks/<name>/<version>`.

    Raises:
        NotFound: there is none.
        StoreError: its folder or manifest is damaged.
    """
    place = f"{task_channel(name)}/{check_version(version)}"
    return TaskEntry(*read_manifest(root, TaskManifest, place))


def read_backbone(root: Path, version: str) -> BackboneEntry:
    """The entry at `backbones/<version>`. Raises as `read_task`."""
    place = f"backbones/{check_version(version)}"
    return BackboneEntry(*read_manifest(root, BackboneManifest, place))


def read_entry(root: Path, channel: str, version: str) -> TaskEntry | BackboneEntry:
    """The entry of a version of a channel. Raises as `read_task`."""
    if channel == BACKBONE:
        return read_backbone(root, version)
    return read_task(root, channel_task(channel), version)


def read_weights(files: Sequence[Path], digests: Mapping[str, str] | None = None) -> Contents:
    """A JSON config and safetensors weights.

    Each file is read once: the bytes that are checked are the bytes that are used.

    Args:
        files: the config and the weights.
        digests: file name -> the digest that its bytes must have, if known.

    Raises:
        DigestMismatch: a file has another digest.
        InvalidAdapter: a file is missing, too large or malformed; the error names it.
    """
    config_file, weights_file = files
    config = _read_checked(config_file, MAX_JSON_BYTES, digests)
    weights = _read_checked(weights_file, MAX_WEIGHTS_BYTES, digests)
    return parse_json(config, config_file.name), read_tensors(weights, weights_file.name)


def versions_in(root: Path, channel: str) -> tuple[str, ...]:
    """Every published version of a channel, oldest first.

    Raises InvalidAdapter if there can be no such channel, or its folder is a link.
    """
    names = names_in(root, channel_folder(channel))
    versions = (name for name in names if re.fullmatch(VERSION_PATTERN, name))
    return tuple(sorted(versions, key=lambda version: int(version[1:])))


def check_file(name: str, data: bytes, digest: str) -> None:
    """Raises DigestMismatch if the content of a file does not have the digest of its manifest."""
    found = bytes_digest(data)
    if found != digest:
        message = f"{name}: not the file that was published."
        raise DigestMismatch(message, field=name, value=found, allowed=digest)


def _read_checked(path: Path, limit: int, digests: Mapping[str, str] | None) -> bytes:
    data = read_regular(path, limit)
    if digests is not None:
        check_file(path.name, data, digests[path.name])
    return data


def _make_backbone(values: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Backbone:
    from crma.method.backbone import Backbone, CrmaConfig

    try:
        config = CrmaConfig.from_dict(values)
        # A config may claim any size, so compare it with the file before allocating anything.
        _check_size(config, values, tensors)
        weights = {name: tensor.to_torch() for name, tensor in tensors.items()}
        return Backbone.from_tensors(config, weights)
    except (ConfigError, TypeError, RuntimeError) as error:
        allowed = "the fields of crma.method.backbone.CrmaConfig"
        raise invalid(f"{error}.", "config.json", values, allowed) from error


def _check_size(
    config: CrmaConfig, values: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> None:
    """The tensors hold as many numbers as a backbone of this config."""
    numbers_a_layer = config.num_streams**2 + 2 * config.rank * config.hidden_size + 1
    if sum(tensor.numel for tensor in tensors.values()) != config.num_layers * numbers_a_layer:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise invalid("Not the shape of the weights.", "config.json", values, shapes)


def _check_backbone_fits(config: CrmaConfig, shape: ModelShape) -> None:
    if config.num_layers != shape.num_layers:
        message = "Not the number of layers of the base model."
        raise invalid(message, "num_layers", config.num_layers, shape.num_layers)
    if config.hidden_size != shape.hidden_size:
        message = "Not the hidden size of the base model."
        raise invalid(message, "hidden_size", config.hidden_size, shape.hidden_size)
