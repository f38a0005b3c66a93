"""The sequential protocol: train task after task, publish a snapshot after each, then measure.

A run folder holds `store/` (every snapshot, in the format of an adapter store), `work/` (the step
logs) and `record.json` (see `record.make_record`). A killed run resumes after the last task that it
finished, and ends with the same result.
"""

import json
import time
from pathlib import Path
from typing import Any

from crma.core.errors import ConfigError, TrainingError
from crma.core.files import replace_file, to_json
from crma.data.examples import Example
from crma.data.splits import load_split
from crma.evaluation.evaluator import Encoded, Evaluator
from crma.models.base_model import BaseModel
from crma.store.entry import BackboneEntry
from crma.store.manifest import check_name
from crma.store.opening import open_store
from crma.training.arms import ARMS
from crma.training.config import TrainConfig, task_name
from crma.training.initial_adapters import backbone_shape
from crma.training.prompt_format import format_of
from crma.training.ranks import Ranks
from crma.training.record import Progress, make_record, measure_stages, read_logs, silent
from crma.training.snapshots import Snapshots
from crma.training.stage_trainer import StageTrainer
from crma.training.training import Training, side_by_side, train_alone
from crma.training.training_model import TrainingModel, load_training_model

ROWS_ON_GPU = 200  # measured at once there, where a pass of 50 short rows is launching kernels


class Run:
    """One run: an arm, a seed and an order of tasks, on one base model.

    Args:
        config: the arm, the seed, the tasks and all settings.
        base: a pulled base model.
        folder: the run folder; if it holds a run of the same configuration, that run resumes.
        progress: called with (description, done, total).
        loaded: the base model in the dtype of the configuration, if other runs train on it too.

    Attributes:
        ranks: the processes that train it together; alone by default.
        start: the backbone of another store that the run continues, if the configuration names one.
        serving_attention: the attention implementation that serves the model; training may use
            another one.
        train_rows, measure_rows: task -> its examples.
        snapshots: the adapters after every stage.
        stage_trainer: trains the stages.

    Raises:
        InvalidAdapter: a task's folder does not have the name of a task.
        BaseMismatch, ConfigError: the backbone in `config.start` cannot continue in this run.
        ConfigError: as `prompt_format.format_of`.
        DataError: a split is missing.
    """

    def __init__(
        self,
        config: TrainConfig,
        base: BaseModel,
        folder: Path,
        progress: Progress,
        loaded: TrainingModel | None = None,
    ) -> None:
        self.config = config
        self.base = base
        self.folder = folder
        self.ranks = Ranks.join()
        self.progress = progress if self.ranks.writes else silent
        self.arm = ARMS[config.arm]
        for task in config.tasks:
            check_name(task_name(task))  # before any training: its snapshot could not be published
        self.start = _start_of(config, base)
        loaded = loaded or load_training_model(base, config.dtype, self.ranks)
        self.injection = loaded.injection
        self.model = loaded.injection.model
        self.device = self.model.device
        self.serving_attention = loaded.serving_attention
        prompt_format = format_of(config, loaded.tokenizer)
        at_once = ROWS_ON_GPU if self.device.type == "cuda" else Evaluator.batch_size
        self.evaluator = Evaluator(self.injection, loaded.tokenizer, prompt_format, at_once)
        self.train_rows = self._rows("train", config.train_items or None)
        self.measure_rows = self._rows(config.measure)
        self.snapshots = Snapshots(folder / "store", config, base, self.evaluator.fmt, self.start)
        self.stage_trainer = StageTrainer(
            config,
            self.injection,
            self.evaluator,
            self.snapshots,
            self.train_rows,
            self.measure_rows,
            folder / "work",
            self.progress,
            self.ranks,
        )

    def execute(self) -> dict[str, Any]:
        """Train every stage, measure, and write the record. Returns and raises as `training`."""
        return train_alone(self.training())

    def training(self, *, at_once: bool = False) -> Training[dict[str, Any]]:
        """Train every stage, measure, and write the record, part by part.

        Args:
            at_once: offer stages that do not need each other side by side. A run that is killed
                then loses all of them.

        Returns:
            The record; empty in a process that only trains with others.

        Raises:
            TrainingError: the folder holds a run of another configuration, a loss or gradient is
                not finite, M has no gradient, or a resumed run does not reproduce its snapshots.
        """
        if self.ranks.writes:
            self._pin_config()
        stages = [self.stage_trainer.train(i) for i in range(len(self.snapshots.stages))]
        train_s = 0.0
        if at_once and self.arm.stages_are_apart:
            train_s = sum((yield from side_by_side(stages)))
        else:
            for stage in stages:
                train_s += yield from stage
        self.ranks.wait()
        if not self.ranks.sharded:
            self.ranks.leave()
        if not self.ranks.measures:
            return {}
        measuring = time.perf_counter()
        measured = measure_stages(self.snapshots, self.evaluator, self.measure_rows, self.progress)
        if self.ranks.sharded:
            self.ranks.leave()
        if not self.ranks.writes:
            return {}
        log = read_logs(self.stage_trainer.logs())
        record = make_record(self.snapshots, measured, log, train_s, self.model.dtype)
        if self.config.ema:
            record["loss_unaveraged"] = self.stage_trainer.losses_unaveraged()
        record["wall_s"] = train_s + time.perf_counter() - measuring  # its own share, if at once
        replace_file(self.folder / "record.json", to_json(record))
        return record

    def _rows(self, splits: str, limit: int | None = None) -> dict[str, list[Encoded]]:
        """The examples of a split, or of several joined by "+", by task."""
        rows = {}
        for task in self.config.tasks:
            examples: list[Example] = []
            for split in splits.split("+"):
                examples += load_split(task, split)
            rows[task] = self.evaluator.encode(examples[:limit])
        return rows

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
