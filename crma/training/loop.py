"""The training loop: the LoRA and the backbone of one task, with a log line for every step."""

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crma.core.errors import TrainingError
from crma.evaluation.evaluator import Encoded, collate
from crma.method.backbone import Backbone
from crma.training.adapted_model import AdaptedModel
from crma.training.arms import ARMS
from crma.training.backbone_log import measure_backbone
from crma.training.batches import epoch_batches
from crma.training.config import TrainConfig
from crma.training.growing_lora import overlap
from crma.training.optimizer import learning_rate_factor, parameter_groups
from crma.training.ranks import ALONE, Ranks
from crma.training.weight_average import WeightAverage

ALIVE_FROM_STEP = 10  # after the backbone's first step, every layer's M must have a gradient
LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class TaskTrainer:
    """Trains one task.

    Attributes:
        config: the run's configuration.
        device: where the model is.
        adapted: the model with the adapters to train; they are changed in place.
        rows: the training examples.
        task: the task's name, for seeds, the log and messages.
        first_task: whether the backbone trains for the first time.
        pad_id: the padding token.
        folder: the step log is written to `<folder>/log.jsonl`.
        progress: called with (steps done, total steps) after every step.
        M_0: the mixing matrices at the start of the run; None if the backbone does not train.
        average: follows the weights step by step, if they are to be averaged.
        free: [L, d, d] the projection on the directions in which R may move; None: in all.
        ranks: the processes that train it together; one of them writes the log.
    """

    config: TrainConfig
    device: torch.device
    adapted: AdaptedModel
    rows: Sequence[Encoded]
    task: str
    first_task: bool
    pad_id: int
    folder: Path
    progress: Callable[[int, int], None]
    M_0: Tensor | None = None
    average: WeightAverage | None = None
    free: Tensor | None = None
    ranks: Ranks = ALONE

    def run(self) -> float:
        """Train to the end of the last epoch.

        Returns:
            The seconds it took.

        Raises:
            TrainingError: a loss or gradient is not finite, or M has no gradient.
        """
        groups = parameter_groups(self.config, self.adapted, first_task=self.first_task)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
        rates = self.rates(optimizer)
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        dropout = random.Random(f"{self.config.seed}/{self.task}/drop")
        file = self.folder / LOG_FILE
        with file.open("wb", buffering=0) if self.ranks.writes else nullcontext() as log:
            for epoch in range(self.config.epochs):
                for step, indices in self.batches(epoch):
                    crma = self.has_no_lora or dropout.random() >= self.config.crma.drop
                    measured = self._step(optimizer, [self.rows[i] for i in indices], crma=crma)
                    rates.step()
                    if log is not None:
                        log.write(self.log_line(epoch, step, measured))
                    self.check_mixing_gradient(step, measured)
                    self.progress(step + 1, self.num_steps)
        return time.perf_counter() - started

    @property
    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self.rows) / self.config.batch_size)

    @property
    def num_steps(self) -> int:
        """The steps to the end of the last epoch."""
        return self._steps_per_epoch * self.config.epochs

    @property
    def has_no_lora(self) -> bool:
        """Whether the backbone trains alone."""
        return not self.adapted.lora.pairs

    @property
    def _backbone_starts(self) -> int:
        """The step at which the backbone starts to train."""
        if not self.first_task or self.has_no_lora:
            return 0
        return round(self.config.crma.starts_at * self.num_steps)

    def rates(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """The learning rates of all groups, step by step."""
        factors: list[Callable[[int], float]] = [
            partial(self._rate_factor, group["name"]) for group in optimizer.param_groups
        ]
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)

    def _rate_factor(self, group: str, step: int) -> float:
        """The factor on a parameter group's peak learning rate."""
        if group != "lora" and step < self._backbone_starts:
            return 0.0
        return learning_rate_factor(step, self.num_steps, self.config.warmup)

    def batches(self, epoch: int) -> enumerate[list[int]]:
        """The batches of an epoch with their step numbers, which count on from epoch to epoch."""
        key = f"{self.config.seed}/{self.task}/{epoch}"
        batches = epoch_batches(self.rows, self.config.batch_size, key)
        return enumerate(batches, start=epoch * self._steps_per_epoch)

    def _step(
        self, optimizer: torch.optim.Optimizer, rows: Sequence[Encoded], *, crma: bool
    ) -> dict[str, Any]:
        """Take one optimizer step on a batch. Returns its measures for the log.

        Those of the residual stream (`dh`) are of the rows of this process.
        """
        optimizer.zero_grad(set_to_none=True)
        loss, num_tokens = self._backward(optimizer, rows, crma=crma)
        norms = {}
        for group in optimizer.param_groups:
            norm = nn.utils.clip_grad_norm_(group["params"], self.config.clip)
            norms[group["name"]] = float(norm)
        measured: dict[str, Any] = {
            "loss": loss,
            "tokens": num_tokens,
            "grad_norm": norms,
            "recorded": False,
        }
        backbone = self.adapted.backbone
        if backbone is not None and self.M_0 is not None and crma:
            measured["crma"] = measure_backbone(backbone, self.M_0, self.adapted.ratios)
        self.check_finite(measured)
        move(optimizer, self.adapted.backbone, self.free)
        if self.average is not None:
            self.average.update()
        return measured

    def _penalty(self) -> Tensor | float:
        """What is added to the loss of a batch, beside what the model answers."""
        settings = self.config.lora
        if not ARMS[self.config.arm].grows:
            return 0.0
        return settings.orthogonality * overlap(self.adapted.lora, settings.rank)

    def _backward(
        self, optimizer: torch.optim.Optimizer, rows: Sequence[Encoded], *, crma: bool
    ) -> tuple[float, int]:
        """Gradients of the mean loss of a batch, of which each process computes its share.

        Returns:
            The loss, and how many tokens the batch has.
        """
        num_answer_tokens = torch.tensor(sum(len(row.answer) for row in rows))
        own = self.ranks.share(rows)
        sums = torch.zeros(2, dtype=torch.float64)
        objective = self._penalty() / self.ranks.size
        if own:
            batch = collate(own, self.pad_id, self.device)
            loss = self.adapted(batch, crma=crma) / num_answer_tokens.to(self.device)
            objective = loss + objective
            sums = torch.tensor([loss.item(), batch.num_tokens], dtype=torch.float64)
        elif self.ranks.sharded:  # the others need this process's part of the base model
            idle = collate(rows[:1], self.pad_id, self.device)
            objective = 0.0 * self.adapted(idle, crma=crma) + objective
        if isinstance(objective, Tensor):
            torch.autograd.backward(objective)
        if self.ranks.size > 1:
            self.ranks.add_up(_gradients(optimizer, crma=crma))
            self.ranks.add_up([sums])
        return float(sums[0]), int(sums[1])

    def log_line(self, epoch: int, step: int, measured: dict[str, Any]) -> bytes:
        """A line of the log."""
        factor = learning_rate_factor(step, self.num_steps, self.config.warmup)
        line = {"task": self.task, "step": step, "epoch": epoch, "lr": factor, **measured}
        text = json.dumps(line, allow_nan=False, separators=(",", ":"))
        return text.encode() + b"\n"

    def check_finite(self, measured: dict[str, Any]) -> None:
        """Raise TrainingError if the loss or a gradient of a step is not finite."""
        if not all(
            math.isfinite(each) for each in (measured["loss"], *measured["grad_norm"].values())
        ):
            message = f"{self.task}: loss or gradient is not finite; lower lr ({self.folder})"
            raise TrainingError(message, field="loss", value=measured, allowed="finite")

    def check_mixing_gradient(self, step: int, measured: dict[str, Any]) -> None:
        """Raise TrainingError if a layer's M has no gradient where it must have one.

        The gradient is 0 until W moves. In task 1 it must be non-zero in every layer from ten steps
        after the backbone started.
        """
        learns_M = "S" in ARMS[self.config.arm].groups and "crma" in measured
        must_be_alive = step >= self._backbone_starts + ALIVE_FROM_STEP
        if not (self.first_task and learns_M and must_be_alive):
            return
        dead = [layer for layer, norm in enumerate(measured["crma"]["grad_S"]) if norm == 0.0]
        if dead:
            message = f"{self.task}: the gradient of M is 0 at step {step} ({self.folder})"
            raise TrainingError(
                message, field="layers", value=dead, allowed="a gradient in every layer"
            )


def move(optimizer: torch.optim.Optimizer, backbone: Backbone | None, free: Tensor | None) -> None:
    """Take a step of the optimizer, in which R moves only in its free directions.

    Args:
        optimizer: of all parameters.
        backbone: the one that trains, if any.
        free: [L, d, d] the projection on those directions; None: R may move in all.
    """
    if free is None or backbone is None:
        optimizer.step()
        return
    before = backbone.R.detach().clone()
    optimizer.step()
    with torch.no_grad():
        backbone.R.copy_(before + (backbone.R - before) @ free)


def _gradients(optimizer: torch.optim.Optimizer, *, crma: bool) -> list[Tensor]:
    """The gradients of all parameters that a step moves; zero in a process without rows."""
    found = []
    for group in optimizer.param_groups:
        if group["name"] != "lora" and not crma:
            continue
        for parameter in group["params"]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
    return found
