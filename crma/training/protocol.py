"""The sequential protocol: train task after task, publish a snapshot after each, then measure.

A run folder holds `store/` (every snapshot, in the format of an adapter store), `work/` (the step
logs) and `record.json` (see `record.make_record`). A killed run resumes after the last task that it
finished, and ends with the same result.
"""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from crma.core.errors import ConfigError, TrainingError
from crma.core.files import replace_file, to_json
from crma.data.splits import load_split
from crma.evaluation.evaluator import Encoded, Evaluator
from crma.method.backbone import Backbone
from crma.method.injection import Injection
from crma.method.lora import Lora, new_lora
from crma.models.base_model import BaseModel
from crma.models.loading import load_model, load_tokenizer, resolve_device, training_dtype
from crma.models.model_shape import ModelShape
from crma.store.entry import BackboneEntry
from crma.store.manifest import check_name
from crma.store.opening import open_store
from crma.training.adapted_model import AdaptedModel
from crma.training.arms import ARMS
from crma.training.config import TrainConfig, task_name
from crma.training.initial_adapters import backbone_shape, generator, lora_config, new_backbone
from crma.training.loop import LOG_FILE, TaskTrainer
from crma.training.prompt_format import format_of
from crma.training.record import Progress, make_record, measure_stages, read_logs
from crma.training.snapshots import Snapshots

STATS_FILE = "stats.json"  # exists once a stage is trained and its snapshot published


class Run:
    """One run: an arm, a seed and an order of tasks, on one base model.

    Args:
        config: the arm, the seed, the tasks and all settings.
        base: a pulled base model.
        folder: the run folder; if it holds a run of the same configuration, that run resumes.
        progress: called with (description, done, total).

    Attributes:
        start: the backbone of another store that the run continues, if the configuration names one.
        serving_attention: the attention implementation that serves the model; training may use
            another one.
        train_rows, measure_rows: task -> its examples.
        snapshots: the adapters after every stage.

    Raises:
        InvalidAdapter: a task's folder does not have the name of a task.
        BaseMismatch, ConfigError: the backbone in `config.start` cannot continue in this run.
        ConfigError: as `prompt_format.format_of`.
        DataError: a split is missing.
    """

    def __init__(
        self, config: TrainConfig, base: BaseModel, folder: Path, progress: Progress
    ) -> None:
        self.config = config
        self.base = base
        self.folder = folder
        self.progress = progress
        self.arm = ARMS[config.arm]
        for task in config.tasks:
            check_name(task_name(task))  # before any training: its snapshot could not be published
        self.start = _start_of(config, base)
        self.device = resolve_device("auto")
        self.model = load_model(base, self.device, training_dtype(config.dtype, self.device))
        self.serving_attention = self.model.config._attn_implementation
        if self.device.type == "cpu":
            # The backward pass of torch's fused attention takes a third of a step there.
            self.model.set_attn_implementation("eager")
        self.injection = Injection(self.model)
        tokenizer = load_tokenizer(base)
        prompt_format = format_of(config, tokenizer)
        self.evaluator = Evaluator(self.injection, tokenizer, prompt_format)
        self.train_rows = self._rows("train", config.train_items or None)
        self.measure_rows = self._rows(config.measure)
        self.snapshots = Snapshots(folder / "store", config, base, self.evaluator.fmt, self.start)

    def execute(self) -> dict[str, Any]:
        """Train every stage, measure, and write the record.

        Returns:
            The record.

        Raises:
            TrainingError: the folder holds a run of another configuration, a loss or gradient is
                not finite, M has no gradient, or a resumed run does not reproduce its snapshots.
        """
        self._pin_config()
        started = time.perf_counter()
        stages = self.snapshots.stages
        train_s = sum(self._train(index) for index in range(len(stages)))
        measured = measure_stages(self.snapshots, self.evaluator, self.measure_rows, self.progress)
        log = read_logs(self._work(stage.name) / LOG_FILE for stage in stages)
        record = make_record(self.snapshots, measured, log, train_s, self.model.dtype)
        record["wall_s"] = time.perf_counter() - started
        replace_file(self.folder / "record.json", to_json(record))
        return record

    def _rows(self, split: str, limit: int | None = None) -> dict[str, list[Encoded]]:
        """The examples of a split, by task."""
        return {
            task: self.evaluator.encode(load_split(task, split)[:limit])
            for task in self.config.tasks
        }

    def _work(self, stage: str) -> Path:
        return self.folder / "work" / stage

    def _pin_config(self) -> None:
        """Write the configuration into the run folder, which then belongs to it.

        Raises TrainingError if the folder holds a run of another configuration.
        """
        path = self.folder / "config.json"
        if path.exists():
            pinned = TrainConfig.from_dict(json.loads(path.read_text()))
            if pinned != self.config:
                message = "the run folder holds a run with another config; name a new one"
                raise TrainingError(
                    message, field="out", value=str(self.folder), allowed="the same config"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, to_json(self.config))

    def _train(self, index: int) -> float:
        """Train a stage and publish its snapshot, unless that is done.

        Returns:
            The seconds that training took.
        """
        stage = self.snapshots.stages[index]
        folder = self._work(stage.name)
        stats = folder / STATS_FILE
        if stats.exists():
            return json.loads(stats.read_text())["wall_s"]
        first_task = index == 0 and self.start is None
        later_moves = self.arm.backbone_learns and self.config.crma.later_scale > 0
        backbone_moves = self.arm.crma and (first_task or later_moves)
        lora = self._start_lora(index)
        backbone = self._start_backbone(index)
        adapted = AdaptedModel(self.injection, lora, backbone, backbone_moves=backbone_moves)
        M_0 = None
        if backbone_moves:
            M_0 = self._first_backbone().to(self.device).mixing().detach()
        trainer = TaskTrainer(
            config=self.config,
            device=self.device,
            adapted=adapted.to(self.device),
            rows=[row for task in stage.tasks for row in self.train_rows[task]],
            task=stage.name,
            first_task=first_task,
            pad_id=self.evaluator.stop_id,
            folder=folder,
            M_0=M_0,
        )
        description = f"{self.arm.name} seed {self.config.seed}: {stage.name}"
        wall_s = trainer.run(partial(self.progress, description))
        self.snapshots.publish(index, lora, backbone)
        replace_file(stats, to_json({"wall_s": wall_s}))
        return wall_s

    def _start_lora(self, index: int) -> Lora:
        """The LoRA before a stage: new, or the one from the stage before (NAIVE)."""
        if index > 0 and not self.arm.fresh_lora:
            return self.snapshots.task(index - 1).load().trainable()
        config = lora_config(self.config, self.injection)
        seeded = generator(self.config.seed, self.snapshots.stages[index].name)
        return new_lora(config, self.injection.shapes, seeded)

    def _start_backbone(self, index: int) -> Backbone | None:
        """The backbone before a stage: the snapshot of the stage before, or the run's first."""
        if not self.arm.crma:
            return None
        if index > 0:
            return self.snapshots.backbone_after(index).load()
        return self._first_backbone()

    def _first_backbone(self) -> Backbone:
        """The backbone before the first stage: new, or the one that the run continues."""
        if self.start is not None:
            return self.start.load(ModelShape.of(self.model))
        return new_backbone(self.config, self.injection)


def _start_of(config: TrainConfig, base: BaseModel) -> BackboneEntry | None:
    """The backbone that a run continues; None if it starts with a new one.

    Raises:
        NotFound: `config.start` is no store.
        ConfigError: the store in `config.start` serves no backbone, the backbone's shape is not the
            configured one, or the arm trains no backbone.
        BaseMismatch: the backbone was made for another base model.
    """
    if not config.start:
        return None
    start = open_store(Path(config.start).expanduser()).backbone()
    if start is None or not ARMS[config.arm].crma:
        message = "no backbone serves in that store, or the arm trains none"
        raise ConfigError(
            message, field="start", value=config.start, allowed="a store with a backbone"
        )
    start.check_base(base.digest)
    shape = backbone_shape(config)
    found = start.manifest.config
    if any(found[key] != value for key, value in shape.items()):
        message = "the backbone of that store has another shape"
        raise ConfigError(message, field="crma", value=shape, allowed=found)
    return start
