"""The adapter store: versions that never change once published, and channels that choose one each.

Layout, schema and rules: `adapters_store/README.md`. Every writer holds one lock. Readers need
none: a version appears whole (`files.publish_folder`), and `channels.json` is replaced whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from crma.core.errors import NotFound, NotSigned, StoreError
from crma.core.files import about, locked, names_in
from crma.models.base_model import BaseModel
from crma.models.model_shape import ModelShape
from crma.models.prompts import Format
from crma.store import publication
from crma.store.channels import (
    BACKBONE,
    Channels,
    nothing_before,
    read_channels,
    task_channel,
    write_channels,
)
from crma.store.entry import (
    BackboneEntry,
    TaskEntry,
    read_backbone,
    read_entry,
    read_task,
    versions_in,
)
from crma.store.import_format import check_vocabulary, import_format
from crma.store.manifest import Blend
from crma.store.peft_folder import read_folder
from crma.store.peft_format import StoredLora, check_fits, lora_from_peft
from crma.store.publication import Origin
from crma.store.removal import remove_task
from crma.store.serving import check_change
from crma.store.signature import check_signature, sign
from crma.store.source import read_only
from crma.store.verification import Examination, examine
from crma.store.version_stamp import Stamp, version_stamp

if TYPE_CHECKING:
    from crma.method.backbone import Backbone
    from crma.method.lora import Lora
    from crma.store.mirror import Mirror


class AdapterStore:
    """A folder of task adapters and backbones.

    It is cheap to make and caches nothing, so changes by another process show at once.

    Args:
        root: the folder; the first publish creates it if it is missing.
        public_key: if given, only versions with a signature of this key may begin to serve.
        mirror: if given, it keeps `root` as a copy of another store, which nobody else may change.
    """

    def __init__(
        self, root: Path, public_key: Path | None = None, mirror: Mirror | None = None
    ) -> None:
        self.root = root
        self.public_key = public_key
        self.mirror = mirror

    # Reading ------------------------------------------------------------------------------------

    def channels(self) -> Channels:
        """The serving versions and their history.

        Raises InvalidAdapter if `channels.json` is damaged.
        """
        return read_channels(self.root)

    def task_names(self) -> tuple[str, ...]:
        """The names of the tasks that serve, sorted."""
        return tuple(sorted(self.channels().tasks))

    def task_versions(self, name: str) -> tuple[str, ...]:
        """Every published version of a task, oldest first, serving or not.

        Raises InvalidAdapter if the name is not valid.
        """
        return versions_in(self.root, task_channel(name))

    def find_backbone(self, digest: str) -> BackboneEntry | None:
        """The published backbone that has a digest; None if there is none."""
        return publication.backbones(self.root).get(digest)

    def backbone_versions(self) -> tuple[str, ...]:
        """Every published version of the backbone, oldest first, serving or not."""
        return versions_in(self.root, BACKBONE)

    def task(self, name: str, version: str | None = None) -> TaskEntry:
        """One version of a task; without `version`, the serving one.

        Raises:
            NotFound: no such task or version, or no version of the task serves.
            InvalidAdapter, DigestMismatch: the manifest is damaged, or the name is not valid.
        """
        channel = task_channel(name)
        if version is None:
            version = self.channels().version(channel)
        if version is None:
            message = f"No version of task {name!r} serves."
            allowed = list(self.task_names())
            raise NotFound(message, field="task", value=name, allowed=allowed)
        return read_task(self.root, name, version)

    def backbone(self, version: str | None = None) -> BackboneEntry | None:
        """One version of the backbone; without `version`, the serving one, or None if none serves.

        Raises as `task`.
        """
        if version is None:
            version = self.channels().backbone
        return None if version is None else read_backbone(self.root, version)

    def newcomers(self, candidate: BackboneEntry) -> list[TaskEntry]:
        """The tasks that can serve under `candidate` but not under the serving backbone.

        Of each task, only the newest such version.
        """
        backbone = self.backbone()
        serving = [] if backbone is None else [backbone]
        found = []
        for name in sorted(names_in(self.root, "tasks")):
            for version in reversed(self.task_versions(name)):
                entry = self.task(name, version)
                if entry.fits_lineage([candidate]) and not entry.fits_lineage(serving):
                    found.append(entry)
                    break
        return found

    # Publishing ---------------------------------------------------------------------------------

    def publish_task(
        self,
        name: str,
        lora: Lora,
        *,
        backbone: str | None,
        prompt_format: Format | None,
        serve: bool = True,
        **origin: Unpack[Origin],
    ) -> TaskEntry:
        """Publishes a LoRA as the next version of a task, its tensors in bfloat16.

        Args:
            name: the task's.
            lora: the weights.
            backbone: digest of the CRMA backbone it was trained on; None if it never saw one.
            prompt_format: the format it was trained with; None if unknown.
            serve: whether the version serves from now on.
            origin: the other fields of the manifest.

        Raises:
            LineageMismatch: `backbone` is of another base model, or neither it nor a descendant is
                in the store, or, with `serve`, serves.
            InvalidAdapter: the name, the weights or a field of the manifest. Nothing is published.
        """
        import torch

        stored = StoredLora.of(lora, torch.bfloat16)
        fields = {"backbone": backbone, "prompt_format": prompt_format}
        return publication.publish_lora(self.writable_root(), name, stored, fields, origin, serve)

    def import_peft(
        self,
        path: Path,
        name: str,
        base: BaseModel,
        *,
        licence: str = "unknown",
        shape: ModelShape | None = None,
        trust_base: bool = False,
        prompt_format: str | None = None,
        repeat: bool = True,
        private_key: Path | None = None,
    ) -> TaskEntry:
        """Publishes a PEFT LoRA from a local folder, its tensors in their own dtype.

        It has no CRMA lineage. Only `adapter_config.json`, `adapter_model.safetensors` and the
        tokenizer's files are opened. Links are followed, because the Hub's cache is made of them:
        `path` must come from the operator, never from a request.

        Args:
            path: the folder.
            name: of the task.
            base: the base model that it was made for.
            licence: SPDX identifier where there is one.
            shape: of the base model; if given, the adapter must fit it.
            trust_base: import it even if its config names another base model.
            prompt_format: as the name in `import_format.import_format`.
            repeat: False: if the same adapter serves already, that version is returned and nothing
                is published.
            private_key: signs the version before it serves; needed if the store has a public key.

        Raises:
            NotSigned: the store has a public key, and no private one is given.
            NotFound, BaseMismatch: as `peft_folder.read_folder`.
            ConfigError: as `import_format.import_format`.
            InvalidAdapter: as all of these, `import_format.check_vocabulary`,
                `peft_format.lora_from_peft` and `peft_format.check_fits`.
        """
        root = self.writable_root()
        if self.public_key is not None and private_key is None:
            message = f"{name}: what is published here must be signed, and this process has no key."
            allowed = "crma store import --sign-key, where the private key is"
            raise NotSigned(message, field="signature", value=name, allowed=allowed)
        with about(str(path)):
            config, tensors = read_folder(path, base, shape=shape, trust_base=trust_base)
            lora = lora_from_peft(config, tensors)
            if shape is not None:
                check_fits(config, lora, shape)
            check_vocabulary(path, base)
            chosen = import_format(path, base, prompt_format)
        fields = {"backbone": None, "prompt_format": chosen}
        origin: Origin = {"base": base, "trained_on": None, "measured": {}, "licence": licence}
        if not repeat:
            serving = publication.serving_alike(root, name, lora, fields, origin)
            if serving is not None:
                if private_key is not None:
                    sign(root, serving, private_key)
                return serving
        serve = private_key is None
        entry = publication.publish_lora(root, name, lora, fields, origin, serve)
        if private_key is not None:
            sign(root, entry, private_key)
            self.set_serving({task_channel(name): entry.version})
        return entry

    def publish_backbone(
        self,
        backbone: Backbone,
        *,
        lineage: Sequence[str],
        blend: Blend | None = None,
        serve: bool = True,
        **origin: Unpack[Origin],
    ) -> BackboneEntry:
        """Publishes the raw fp32 parameters of a backbone, with its certificate.

        Args:
            backbone: the weights.
            lineage: digests of all its ancestors, nearest first. If the store holds the nearest,
                the certificate bounds the movement from it.
            blend: the two backbones it lies between; None if it was trained.
            serve: whether the version serves from now on.
            origin: the other fields of the manifest.

        Raises:
            BaseMismatch: an ancestor was made for another base model.
            LineageMismatch: `lineage` lacks an ancestor's ancestor, whose LoRAs would stop serving;
                or, with `serve`, a task that serves could serve no more.
            InvalidAdapter: the weights or a field of the manifest. Nothing is published.
        """
        root = self.writable_root()
        return publication.publish_backbone(root, backbone, lineage, blend, origin, serve)

    # Serving ------------------------------------------------------------------------------------

    def set_serving(
        self,
        moves: Mapping[str, str | None],
        *,
        evidence: Mapping[str, Any] | None = None,
        since: Channels | None = None,
    ) -> Channels:
        """Moves channels to published versions: all of them, or none.

        Args:
            moves: `backbone` or `tasks/<name>` -> the version to serve; None means nothing serves.
            evidence: recorded with the first change. If `moves` is empty, it is recorded as the
                reason why the backbone was kept.
            since: the channels on which the decision was based; if something else serves by now,
                nothing moves.

        Raises:
            NotFound: no such version.
            InvalidAdapter: no such channel, a damaged manifest, or evidence that is not finite
                JSON.
            LineageMismatch: a task that serves could serve no more.
            StoreError: something else serves than `since`.
        """
        with locked(self.writable_root()):
            before = channels = read_channels(self.root)
            if since is not None and channels.serving() != since.serving():
                message = "Something else serves by now than when this was decided: decide again."
                value, allowed = channels.serving(), since.serving()
                raise StoreError(message, field="channels", value=value, allowed=allowed)
            if not moves and evidence is not None:
                channels = channels.keep(BACKBONE, evidence)
            for channel, version in moves.items():
                channels = channels.serve(channel, version, evidence)
                evidence = None
            return self._write(moves, before, channels)

    def roll_back(self, channel: str, *, evidence: Mapping[str, Any] | None = None) -> Channels:
        """Moves a channel back to the version that it served before.

        If that is the backbone's, each task that does not fit the earlier backbone goes back until
        it does, or until it served nothing: then it stops.

        Raises:
            NotFound: no such channel, or it served nothing before.
            InvalidAdapter: a damaged manifest.
            LineageMismatch: a task does not fit the serving backbone in its earlier version.
        """
        with locked(self.writable_root()):
            before = read_channels(self.root)
            channels = before.roll_back(channel, evidence)
            version = channels.version(channel)
            if version is None:
                raise nothing_before(channel, before)
            if channel != BACKBONE:
                return self._write([channel], before, channels)
            backbone = read_backbone(self.root, version)
            moved = [channel]
            for name in channels.tasks:
                served = channels.tasks.get(name)
                while served and not self.task(name, served).fits_lineage([backbone]):
                    channels = channels.roll_back(task_channel(name), evidence)
                    moved.append(task_channel(name))
                    served = channels.tasks.get(name)
            return self._write(moved, before, channels)

    def remove_task(self, name: str, version: str | None = None) -> tuple[str, ...]:
        """Removes one version of a task, or all of them, from the disk. Requests that run with one
        are not concerned.

        Returns:
            The versions that were removed.

        Raises:
            NotFound: there is no such task or version.
            VersionServes: a version to remove serves; nothing is removed.
            InvalidAdapter: the name is not valid.
        """
        return remove_task(self.writable_root(), name, version)

    def writable_root(self) -> Path:
        """The folder, for whoever changes it. Raises ReadOnlyStore if it is a copy."""
        if self.mirror is not None:
            raise read_only(self.mirror.source.address)
        return self.root

    # Checking -----------------------------------------------------------------------------------

    def verify(
        self, *, base: BaseModel | None = None, shape: ModelShape | None = None
    ) -> list[StoreError]:
        """Every problem of the store; empty if it is sound. Damage is reported, not raised.

        Args:
            base: if given, every entry must be made for this base model.
            shape: of that model; if given, every entry must fit it.
        """
        return self.examine(base=base, shape=shape).problems

    def examine(
        self, *, base: BaseModel | None = None, shape: ModelShape | None = None
    ) -> Examination:
        """Every problem, and every version that has none. Args are those of `verify`."""
        return examine(self.root, base, shape, self.public_key)

    def stamp(self, place: str) -> Stamp:
        """What the version at a place looks like, and what signs it; another once it changes."""
        return version_stamp(self.root, place, self.public_key)

    def check_signature(self, entry: TaskEntry | BackboneEntry) -> None:
        """Raises NotSigned if the store has a public key and the entry no signature of it."""
        if self.public_key is not None:
            check_signature(self.root, entry, self.public_key)

    # --------------------------------------------------------------------------------------------

    def _write(self, moved: Iterable[str], before: Channels, channels: Channels) -> Channels:
        """Writes changed channels once their new versions are known to be sound and to fit.

        Call it with the lock held.
        """
        for channel in moved:
            version = channels.version(channel)
            if version is not None:
                self.check_signature(read_entry(self.root, channel, version))
        check_change(self.root, before, channels)
        write_channels(self.root, channels)
        return channels
