"""The adapters after every stage of a run, published in the run's own adapter store.

Shapes: stages are counted from 1 in "after i stages" (0: the base model) and from 0 as an `index`;
tasks are counted from 0.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from crma.core.digests import file_digest
from crma.core.errors import TrainingError
from crma.core.provenance import commit
from crma.data.splits import SPLITS, split_path
from crma.method.backbone import Backbone
from crma.method.injection import Plan
from crma.method.lora import Lora
from crma.models.base_model import BaseModel
from crma.models.prompts import Format
from crma.store.adapter_store import AdapterStore
from crma.store.entry import BackboneEntry, TaskEntry, read_backbone
from crma.store.manifest import TrainedOn
from crma.store.publication import Origin, backbone_digest
from crma.training.arms import ARMS
from crma.training.config import TrainConfig, task_name

LICENCE = "Apache-2.0"


class Stage(NamedTuple):
    """The training of one LoRA: its name, and the configured tasks that it learns."""

    name: str
    tasks: tuple[str, ...]


class Adapters(NamedTuple):
    """What serves a task: a LoRA and a backbone, or only one of them, or neither."""

    task: TaskEntry | None
    backbone: BackboneEntry | None

    @property
    def digests(self) -> tuple[str | None, str | None]:
        """Their identities: the same adapters give the same answers."""
        task = None if self.task is None else self.task.digest
        return task, None if self.backbone is None else self.backbone.digest

    def plan(self, device: torch.device, dtype: torch.dtype) -> Plan:
        """The plan that serves with them, on `device` in `dtype`."""
        loras, backbones = [], []
        if self.task is not None:
            loras = [(None, self.task.load().to(device, dtype))]
        if self.backbone is not None:
            backbones = [(None, self.backbone.load().folded(device, dtype))]
        return Plan(loras, backbones)


def stages_of(config: TrainConfig) -> list[Stage]:
    """One stage for each task; in a joint arm, one stage for all."""
    if ARMS[config.arm].joint:
        return [Stage("joint", config.tasks)]
    return [Stage(task_name(task), (task,)) for task in config.tasks]


def split_digests(task: str, splits: Iterable[str] = SPLITS) -> dict[str, str]:
    """The digests of the files that a task was trained and measured on."""
    return {split: file_digest(split_path(task, split)) for split in splits}


class Snapshots:
    """The LoRA and the backbone after every stage.

    Version `v<i>` of the backbone is the one after i stages.

    Args:
        root: the folder of the store.
        config: the run's configuration.
        base: the base model that the adapters are made for.
        prompt_format: the format that they are trained with.
        start: the backbone of another store that the run continues, if any.
    """

    def __init__(
        self,
        root: Path,
        config: TrainConfig,
        base: BaseModel,
        prompt_format: Format,
        start: BackboneEntry | None,
    ) -> None:
        self.store = AdapterStore(root)
        self.config = config
        self.arm = ARMS[config.arm]
        self.stages = stages_of(config)
        self.base = base
        self.prompt_format = prompt_format
        self.start = start

    # Reading -----------------------------------------------------------------------------------

    def task(self, index: int) -> TaskEntry:
        """The LoRA that the stage `index` trained."""
        # No store can serve LoRAs that were trained on unrelated backbones.
        version = "v1" if self.arm.private else None
        return self.store.task(self.stages[index].name, version)

    def backbone_after(self, i: int) -> BackboneEntry:
        """The backbone after i >= 1 stages."""
        return read_backbone(self.store.root, f"v{i}")

    def learned_after(self, t: int) -> int:
        """The number of stages after which task t is learned."""
        return 1 if self.arm.joint else t + 1

    def adapters_after(self, i: int, t: int) -> Adapters:
        """The adapters that serve task t after i stages (docs/method.md, section 4).

        Before task t is learned it has no LoRA of its own: it runs under the shared backbone alone,
        or on the base model in arms without one.
        """
        index = self._lora_index(i, t)
        task = None if index is None else self.task(index)
        if not self.arm.crma or i == 0:
            return Adapters(task, None)
        if not self.arm.private:
            return Adapters(task, self.backbone_after(i))
        return Adapters(task, None if index is None else self.backbone_after(index + 1))

    def _lora_index(self, i: int, t: int) -> int | None:
        """The stage whose LoRA serves task t after i stages; None while there is none."""
        if i == 0:
            return None
        if self.arm.joint:
            return 0
        if not self.arm.fresh_lora:
            return i - 1
        return t if i > t else None

    def pretraining_tasks(self, index: int) -> tuple[str, ...]:
        """The tasks that the backbone learns alone before the stage `index`; none in most arms."""
        if self.arm.pretrained_on == "union" and index == 0:
            return self.config.tasks
        if self.arm.pretrained_on == "others":
            return tuple(task for task in self.config.tasks if task not in self.stages[index].tasks)
        return ()

    def _taught_to_backbone(self, index: int) -> tuple[str, ...]:
        """The tasks that the backbone after the stage `index` has learned."""
        if self.arm.pretrained_on == "union":
            return self.config.tasks
        if self.arm.private:
            return self.pretraining_tasks(index) or self.stages[index].tasks
        return self.config.tasks[: index + 1]

    # Publishing --------------------------------------------------------------------------------

    def publish(self, index: int, lora: Lora, backbone: Backbone | None) -> None:
        """Publish the adapters of the stage `index`, unless a killed run already has.

        Raises:
            TrainingError: the published backbone is another one. The stage was trained again, and
                training did not reproduce it.
        """
        stage = self.stages[index]
        digest = None if backbone is None else self._publish_backbone(index, backbone)
        if not self._is_published(stage.name):
            self.store.publish_task(
                stage.name,
                lora,
                backbone=digest,
                prompt_format=self.prompt_format,
                serve=not self.arm.private,
                **self._origin(stage.tasks),
            )

    def _is_published(self, name: str) -> bool:
        if self.arm.private:
            return bool(self.store.task_versions(name))
        return name in self.store.task_names()

    def _publish_backbone(self, index: int, backbone: Backbone) -> str:
        """Publish the backbone after the stage `index`. Returns its digest."""
        trained = backbone_digest(backbone)
        if f"v{index + 1}" not in self.store.backbone_versions():
            tasks = self._taught_to_backbone(index)
            lineage = self._ancestors(index, trained)
            self.store.publish_backbone(
                backbone, lineage=lineage, serve=not self.arm.private, **self._origin(tasks)
            )
        published = self.backbone_after(index + 1).digest
        if published != trained:
            message = (
                f"{self.stages[index].name}: trained again after the run was killed, and the "
                "backbone differs from the published one; start a new run"
            )
            raise TrainingError(message, field="out", value=trained, allowed=published)
        return published

    def _ancestors(self, index: int, digest: str) -> list[str]:
        """The digests that a backbone trained by the stage `index` descends from, nearest first."""
        ancestors = []
        if not self.arm.private:
            ancestors = [self.backbone_after(i).digest for i in range(index, 0, -1)]
        if self.start is not None:
            ancestors += [self.start.digest, *self.start.manifest.lineage]
        # A backbone that did not move has its ancestor's digest, and must not be its own ancestor.
        return [ancestor for ancestor in dict.fromkeys(ancestors) if ancestor != digest]

    def _origin(self, tasks: Sequence[str]) -> Origin:
        """Where a snapshot that was trained on `tasks` comes from."""
        data = {}
        for task in tasks:
            for split, digest in split_digests(task).items():
                data[f"{task_name(task)}/{split}"] = digest
        trained_on = TrainedOn(
            data=data,
            seed=self.config.seed,
            commit=commit(),
            arm=self.arm.name,
            config=self.config.model_dump(mode="json"),
        )
        return {"base": self.base, "trained_on": trained_on, "measured": {}, "licence": LICENCE}
