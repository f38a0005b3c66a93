"""How one stage of a run trains: where its adapters start, what trains, and what is published.

The work folder of a stage holds its step logs, and `stats.json` once its snapshot is published. A
stage that was interrupted trains again from its start, with the same result.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crma.core.files import replace_file, to_json
from crma.evaluation.evaluator import Encoded, Evaluator
from crma.method.backbone import Backbone
from crma.method.injection import Injection, Plan
from crma.method.lora import Lora
from crma.models.model_shape import ModelShape
from crma.training.adapted_model import AdaptedModel
from crma.training.arms import ARMS, Arm
from crma.training.config import TrainConfig
from crma.training.gate import blend
from crma.training.growing_lora import grown_lora
from crma.training.initial_adapters import first_lora, lora_config, mean_lora, new_backbone
from crma.training.loop import LOG_FILE, TaskTrainer
from crma.training.protected_span import (
    free_directions,
    save_moments,
    second_moments,
    sum_of_moments,
)
from crma.training.ranks import ALONE, Ranks
from crma.training.record import Progress
from crma.training.snapshots import Snapshots, Stage
from crma.training.training import Training
from crma.training.weight_average import WeightAverage

STORED_DTYPE = torch.bfloat16  # of published LoRAs
STATS_FILE = "stats.json"  # exists once a stage is trained and its snapshot published
MOMENTS_FILE = "moments.safetensors"  # of the block outputs, in arms that protect them
PRETRAINING = "pretraining"  # the folder of the backbone that trains alone, before the stage
SETTLED = "settled"  # the folder of the LoRA that trains alone, after its backbone went back


class Fit(NamedTuple):
    """How long adapters trained, and the average of their weights, if there is to be one."""

    wall_s: float
    average: WeightAverage | None

    def apply(self) -> None:
        """Set the weights to their average, if there is one."""
        if self.average is not None:
            self.average.apply()


@dataclass(frozen=True)
class StageTrainer:
    """Trains the stages of one run.

    Attributes:
        config: the run's.
        injection: the hooks on the base model.
        evaluator: asks that model.
        snapshots: of the run; stages are published there.
        train_rows, measure_rows: task -> its examples.
        folder: of the stages' work folders.
        progress: called with (description, done, total).
        ranks: the processes that train the run together; one of them writes.
    """

    config: TrainConfig
    injection: Injection
    evaluator: Evaluator
    snapshots: Snapshots
    train_rows: Mapping[str, list[Encoded]]
    measure_rows: Mapping[str, list[Encoded]]
    folder: Path
    progress: Progress
    ranks: Ranks = ALONE

    @property
    def arm(self) -> Arm:
        """The arm of the run."""
        return ARMS[self.config.arm]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.injection.model.device

    # The stage ---------------------------------------------------------------------------------

    def train(self, index: int) -> Training[float]:
        """Train a stage and publish its snapshot, unless that is done.

        Returns:
            The seconds that training took.

        Raises:
            TrainingError: a loss or gradient is not finite, M has no gradient, or a stage that was
                trained again differs from its published snapshot.
        """
        stage = self.snapshots.stages[index]
        stats = self.folder / stage.name / STATS_FILE
        self.ranks.wait()  # until what was trained before is written
        if stats.exists():
            return json.loads(stats.read_text())["wall_s"]
        lora = self.start_lora(index)
        backbone = self._start_backbone(index)
        wall_s = yield from self._pretrain(index, backbone)
        fit = yield from self._fit_stage(index, lora, backbone)
        wall_s += fit.wall_s
        if self.arm.slow and backbone is not None:
            fit.apply()
            backbone = self._gone_back(index, backbone)
            fit = yield from self._settle(stage, lora, backbone)
            wall_s += fit.wall_s
        self.ranks.check_same([*lora.parameters(), *(backbone.parameters() if backbone else ())])
        if self.ranks.measures:
            self._keep(index, lora, backbone, fit, wall_s)
        return wall_s

    def logs(self) -> Iterator[Path]:
        """The step logs of all stages, in the order of training."""
        for stage in self.snapshots.stages:
            folder = self.folder / stage.name
            for place in (folder / PRETRAINING, folder, folder / SETTLED):
                if (place / LOG_FILE).exists():
                    yield place / LOG_FILE

    def losses_unaveraged(self) -> list[float]:
        """The loss of each task when it was learned, under the weights after the last step.

        Call it after the last stage, in a run that averages its weights.
        """
        by_task: dict[str, float] = {}
        for stage in self.snapshots.stages:
            stats = json.loads((self.folder / stage.name / STATS_FILE).read_text())
            by_task |= stats["loss_unaveraged"]
        return [by_task[task] for task in self.config.tasks]

    # Where adapters start ----------------------------------------------------------------------

    def start_lora(self, index: int) -> Lora:
        """The LoRA before a stage: new, or made from those of earlier stages."""
        uses_earlier = self.arm.warm is not None or not self.arm.fresh_lora
        if index == 0 or not uses_earlier:
            return first_lora(self.config, self.injection, self.snapshots.stages[index].name)
        if self.arm.grows:
            new = first_lora(self.config, self.injection, self.snapshots.stages[index].name)
            return grown_lora(self.snapshots.task(index - 1).load(), new)
        if self.arm.warm == "mean":
            return mean_lora([self.snapshots.task(i).load() for i in range(index)])
        return self.snapshots.task(index - 1).load().trainable()

    def _start_backbone(self, index: int) -> Backbone | None:
        """The backbone before a stage: the snapshot of the stage before, or the run's first."""
        if not self.arm.crma:
            return None
        if index > 0 and not self.arm.private:
            return self.snapshots.backbone_after(index).load()
        return self._first_backbone()

    def _first_backbone(self) -> Backbone:
        """The backbone before the first stage: new, or the one that the run continues."""
        start = self.snapshots.start
        if start is not None:
            return start.load(ModelShape.of(self.injection.model))
        return new_backbone(self.config, self.injection)

    # What trains -------------------------------------------------------------------------------

    def _pretrain(self, index: int, backbone: Backbone | None) -> Training[float]:
        """Train the backbone alone, in arms that do so before this stage. Returns the seconds."""
        tasks = self.snapshots.pretraining_tasks(index)
        if backbone is None or not tasks:
            return 0.0
        name = self.snapshots.stages[index].name
        no_lora = Lora(lora_config(self.config, self.injection), {})
        adapted = AdaptedModel(self.injection, no_lora, backbone, backbone_moves=True)
        stage = Stage(f"{name}, backbone", tasks)
        folder = self.folder / name / PRETRAINING
        fit = yield from self._fit(stage, adapted, folder, self.config, first_task=True)
        fit.apply()
        return fit.wall_s

    def _fit_stage(self, index: int, lora: Lora, backbone: Backbone | None) -> Training[Fit]:
        """Train the LoRA of a stage, and the backbone if it moves in this stage."""
        stage = self.snapshots.stages[index]
        arm, config = self.arm, self.config
        at_full_rates = arm.private or arm.slow or (index == 0 and self.snapshots.start is None)
        later_moves = arm.backbone_learns and config.crma.later_scale > 0
        moves = arm.crma and arm.pretrained_on is None and (at_full_rates or later_moves)
        if arm.slow:
            config = config.model_copy(update={"epochs": (config.epochs + 1) // 2})
        free = None
        if arm.protects:
            earlier = [self.folder / each.name for each in self.snapshots.stages[:index]]
            moments = sum_of_moments(folder / MOMENTS_FILE for folder in earlier)
            free = None if moments is None else free_directions(moments).to(self.device)
        adapted = AdaptedModel(self.injection, lora, backbone, backbone_moves=moves)
        folder = self.folder / stage.name
        return (
            yield from self._fit(
                stage, adapted, folder, config, first_task=at_full_rates, free=free
            )
        )

    def _gone_back(self, index: int, fast: Backbone) -> Backbone:
        """The backbone that goes 1 / t of the way from the last one to the fast one of task t."""
        last = self._start_backbone(index)
        if index == 0 or last is None:
            return fast
        return blend(last, fast.to("cpu"), 1 / (index + 1))

    def _settle(self, stage: Stage, lora: Lora, backbone: Backbone) -> Training[Fit]:
        """Train a LoRA alone for the epochs that are left, under a backbone that stands still."""
        config = self.config.model_copy(update={"epochs": self.config.epochs // 2})
        adapted = AdaptedModel(self.injection, lora, backbone, backbone_moves=False)
        settled = Stage(f"{stage.name}, settled", stage.tasks)
        folder = self.folder / stage.name / SETTLED
        return (yield from self._fit(settled, adapted, folder, config, first_task=False))

    def _fit(
        self,
        stage: Stage,
        adapted: AdaptedModel,
        folder: Path,
        config: TrainConfig,
        *,
        first_task: bool,
        free: torch.Tensor | None = None,
    ) -> Training[Fit]:
        """Train adapters on the tasks of a stage; they end at the weights after the last step."""
        adapted.to(self.device)
        M_0 = None
        if adapted.backbone_moves:
            M_0 = self._first_backbone().to(self.device).mixing().detach()
        average = WeightAverage(adapted.parameters(), config.ema) if config.ema else None
        description = f"{self.arm.name} seed {config.seed}: {stage.name}"
        trainer = TaskTrainer(
            config=config,
            device=self.device,
            adapted=adapted,
            rows=[row for task in stage.tasks for row in self.train_rows[task]],
            task=stage.name,
            first_task=first_task,
            pad_id=self.evaluator.stop_id,
            folder=folder,
            progress=partial(self.progress, description),
            M_0=M_0,
            average=average,
            free=free,
            ranks=self.ranks,
        )
        (seconds,) = yield [trainer]
        return Fit(seconds, average)

    # What is measured and kept -----------------------------------------------------------------

    def _keep(
        self, index: int, lora: Lora, backbone: Backbone | None, fit: Fit, wall_s: float
    ) -> None:
        """Publish the snapshot of a stage, and write what its training measured.

        Processes that do not write take part in the measuring.
        """
        stage = self.snapshots.stages[index]
        measured: dict[str, Any] = {"wall_s": wall_s}
        if fit.average is not None:
            measured["loss_unaveraged"] = self._losses(stage, lora, backbone)
            fit.apply()
        if self.arm.protects and backbone is not None:
            self._protect(stage, lora, backbone)
        if not self.ranks.writes:
            return
        self.snapshots.publish(index, lora, backbone)
        replace_file(self.folder / stage.name / STATS_FILE, to_json(measured))

    def _losses(self, stage: Stage, lora: Lora, backbone: Backbone | None) -> dict[str, float]:
        """The loss of each task of a stage under adapters that are not published, as they serve."""
        dtype = self.injection.model.dtype
        stored = lora.to(self.device, STORED_DTYPE).to(self.device, dtype)
        pairs = [] if backbone is None else [(None, backbone.folded(self.device, dtype))]
        plan = Plan([(None, stored)], pairs)
        return {
            task: self.evaluator.measure(plan, self.measure_rows[task]).loss for task in stage.tasks
        }

    def _protect(self, stage: Stage, lora: Lora, backbone: Backbone) -> None:
        """Keep the moments of a stage's block outputs for the stages to come."""
        rows = [row for task in stage.tasks for row in self.train_rows[task]]
        moments = second_moments(self.injection, lora, backbone, rows, self.evaluator.stop_id)
        if self.ranks.writes:
            save_moments(self.folder / stage.name / MOMENTS_FILE, moments)
