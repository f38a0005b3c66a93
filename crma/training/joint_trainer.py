"""Trains the tasks of several runs at once, in one forward pass of the base model that they share.

A step of one run of a small model is thousands of small operations that leave a GPU idle. Here the
batches of all runs are rows of one batch, and their adapters are stacked. What a run gets is what
it gets alone, up to rounding: it keeps its own rows, their order, gradient norms and log.

Shapes: n runs; L layers; p parameters of a group in one run.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crma.evaluation.evaluator import IGNORED, Batch, Encoded, collate
from crma.method.lora import Lora
from crma.training.arms import ARMS
from crma.training.backbone_log import StepLog, measure_backbone
from crma.training.config import LoraSettings
from crma.training.growing_lora import newest, overlap
from crma.training.joint_model import JointModel, joined, parted
from crma.training.joint_pass import Inputs, Passed
from crma.training.loop import LOG_FILE, TaskTrainer, move
from crma.training.optimizer import parameter_groups
from crma.training.recorded_pass import Recorder
from crma.training.training import Result, Training, go_through, side_by_side
from crma.training.weight_average import WeightAverage

OWN = {"seed", "tasks"}  # keys of a configuration in which runs that train together may differ


def can_be_joint(trainer: TaskTrainer) -> bool:
    """Whether a trainer's steps are the same in kind for every run, and take one process."""
    return trainer.config.crma.drop == 0 and trainer.ranks.size == 1


def kind(trainer: TaskTrainer) -> tuple[Any, ...]:
    """Trainers of one kind can train together."""
    adapted = trainer.adapted
    shapes = [(tuple(each.shape), each.requires_grad) for each in adapted.parameters()]
    return (
        trainer.config.model_dump_json(exclude=OWN),
        len(trainer.rows),
        shapes,
        adapted.backbone_moves,
        trainer.first_task,
        trainer.M_0 is None,
        trainer.average is None,
        trainer.free is None,
        id(adapted.injection),
    )


def train_together(
    trainings: Sequence[Training[Result]], recorder: Recorder | None = None
) -> list[Result]:
    """Go through trainings side by side; what is of one kind trains at once.

    Each is sent its share of the seconds.

    Args:
        trainings: those of several runs.
        recorder: of this process; None: passes are done as they come.

    Returns:
        The results, in the order of the trainings.

    Raises:
        TrainingError: as `TaskTrainer.run`; all end with the first that fails.
    """
    train = partial(_train, recorder or Recorder())
    return go_through(side_by_side(trainings), train)


def _train(recorder: Recorder, trainers: Sequence[TaskTrainer]) -> list[float]:
    """Train everything, one kind after the other. Returns each one's share of the seconds."""
    taken = [0.0] * len(trainers)
    left = list(range(len(trainers)))
    while left:
        wanted = kind(trainers[left[0]])
        chosen = [index for index in left if kind(trainers[index]) == wanted]
        left = [index for index in left if index not in chosen]
        if len(chosen) > 1 and can_be_joint(trainers[chosen[0]]):
            seconds = JointTrainer([trainers[index] for index in chosen], recorder).run()
            for index in chosen:
                taken[index] = seconds / len(chosen)
        else:
            for index in chosen:
                taken[index] = trainers[index].run()
    return taken


class Block(NamedTuple):
    """What every run trains at one rate, so that one operation clips, moves or averages it.

    Attributes:
        values: [n, p].
        parameters: each [n, ..]: views of the values.
    """

    values: nn.Parameter
    parameters: Sequence[nn.Parameter]

    def gradient(self) -> Tensor:
        """The gradients of the parameters, side by side: [n, p]."""
        return joined([_gradient(each) for each in self.parameters], len(self.values))

    def take(self, gradient: Tensor, largest: float) -> Tensor:
        """Take a gradient [n, p]; cut that of each run as `clip_grad_norm_` does.

        Args:
            gradient: side by side.
            largest: the norm that the gradient of one run may have.

        Returns:
            The norms before that, [n].
        """
        norms = gradient.norm(dim=1)
        gradient = gradient * (largest / (norms + 1e-6)).clamp(max=1.0)[:, None]
        self.values.grad = gradient
        parts = parted(gradient, self.parameters)
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part
        return norms


class JointTrainer:
    """Trains what several trainers of one kind would train, each alone.

    Args:
        trainers: one of each run, for which `can_be_joint`.
        recorder: of this process.
    """

    def __init__(self, trainers: Sequence[TaskTrainer], recorder: Recorder) -> None:
        self.trainers = trainers
        first = trainers[0]
        self.config = first.config
        grows = ARMS[self.config.arm].grows
        penalty = partial(_penalty, self.config.lora) if grows else None
        self.model = JointModel([trainer.adapted for trainer in trainers], penalty)
        self.groups = parameter_groups(self.config, self.model, first_task=first.first_task)
        self.device = first.device
        self.do_pass = recorder.pass_of(self.model)
        self.still = None if self.model.backbone_moves else self.model.joint_fold()
        self.blocks = [self._block(group["params"]) for group in self.groups]
        # It is the first group; a backbone that trains alone has none.
        self.lora = self.blocks[0] if self.model.trained_lora else None
        self.learns: Tensor | None = None  # [n, p], 1 where a LoRA that grows does
        if grows:
            learning = newest(self.model.lora, self.config.lora.rank)
            self.learns = joined(learning, len(trainers))
        self.average: WeightAverage | None = None
        if first.average is not None:
            values = [block.values for block in self.blocks]
            self.average = WeightAverage(values, first.average.decay)
        self.M_0 = _all([trainer.M_0 for trainer in trainers])
        self.free = _all([trainer.free for trainer in trainers])

    def run(self) -> float:
        """Train to the end of the last epoch; the adapters of every trainer end there.

        Returns:
            The seconds it took.

        Raises:
            TrainingError: as `TaskTrainer.run`, for any of the runs.
        """
        started = time.perf_counter()
        for _ in self.steps():
            pass
        self._hand_back()
        return time.perf_counter() - started

    def steps(self) -> Iterator[None]:
        """Train step by step to the end of the last epoch. Raises as `run`."""
        first = self.trainers[0]
        groups = [
            group | {"params": [block.values]}
            for group, block in zip(self.groups, self.blocks, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
        rates = first.rates(optimizer)
        with ExitStack() as files:
            logs = []
            for trainer in self.trainers:
                trainer.folder.mkdir(parents=True, exist_ok=True)
                logs.append(files.enter_context((trainer.folder / LOG_FILE).open("wb")))
            for epoch, step, rows in self._batches():
                measured = self._step(optimizer, rows)
                rates.step()
                for log, trainer, own in zip(logs, self.trainers, measured, strict=True):
                    log.write(trainer.log_line(epoch, step, own))
                    trainer.check_mixing_gradient(step, own)
                first.progress(step + 1, first.num_steps)
                yield

    def _batches(self) -> Iterator[tuple[int, int, list[list[Encoded]]]]:
        """(epoch, step, the rows of each run) of every step."""
        for epoch in range(self.config.epochs):
            of_runs = [each.batches(epoch) for each in self.trainers]
            for batches in zip(*of_runs, strict=True):
                rows = []
                for trainer, (_, indices) in zip(self.trainers, batches, strict=True):
                    rows.append([trainer.rows[i] for i in indices])
                step, _ = batches[0]
                yield epoch, step, rows

    def _step(
        self, optimizer: torch.optim.Optimizer, rows: Sequence[Sequence[Encoded]]
    ) -> list[dict[str, Any]]:
        """Take a step on the batch of every run. Returns the measures of each, for its log."""
        self.model.zero_grad(set_to_none=True)
        passed = self._backward(rows)
        norms = torch.stack(self._take_gradients(passed))
        by_run = torch.cat([passed.losses[None], norms]).mT.tolist()  # one copy from the device
        names = [group["name"] for group in optimizer.param_groups]
        measured = []
        for trainer, own_rows, (loss, *own_norms) in zip(self.trainers, rows, by_run, strict=True):
            own = {
                "loss": loss,
                "tokens": _read_tokens(own_rows),
                "grad_norm": dict(zip(names, own_norms, strict=True)),
                "recorded": passed.recorded,
            }
            trainer.check_finite(own)
            measured.append(own)
        self._measure_backbones(measured, passed.ratios)
        move(optimizer, self.model.backbone, self.free)
        if self.average is not None:
            self.average.update()
        return measured

    def _backward(self, rows: Sequence[Sequence[Encoded]]) -> Passed:
        """The pass of the batch of every run; its gradients arrive at the backbones."""
        batch = collate_runs(rows, self.trainers[0].pad_id)
        batch = Batch(*(each.to(self.device) for each in batch))
        answer_tokens = torch.tensor([_answer_tokens(own) for own in rows], device=self.device)
        fold = self.still or self.model.joint_fold()
        no_lora = answer_tokens.new_zeros(len(rows), 0)
        lora = no_lora if self.lora is None else self.lora.values
        passed = self.do_pass(Inputs(batch, answer_tokens, lora, fold))
        if passed.fold:
            trained = [part for part in fold or () if part.requires_grad]
            torch.autograd.backward(trained, passed.fold)
        return passed

    def _take_gradients(self, passed: Passed) -> list[Tensor]:
        """Cut the gradients of every block. Returns their norms before that, each [n]."""
        norms = []
        for block in self.blocks:
            gradient = passed.lora if block is self.lora else block.gradient()
            if block is self.lora and self.learns is not None:
                gradient = gradient * self.learns
            norms.append(block.take(gradient, self.config.clip))
        return norms

    def _measure_backbones(self, measured: Sequence[dict[str, Any]], ratios: Tensor) -> None:
        """Add to the measures of each run those of its backbone, if that trains.

        Args:
            measured: of each run.
            ratios: as `JointModel.ratios`.
        """
        if self.model.backbone is None or self.M_0 is None:
            return
        found = measure_backbone(self.model.backbone, self.M_0, ratios)
        L = len(self.M_0) // len(self.trainers)
        for run, own in enumerate(measured):
            of_run: StepLog = {key: each[run * L : (run + 1) * L] for key, each in found.items()}
            own["crma"] = of_run

    def _block(self, parameters: Sequence[nn.Parameter]) -> Block:
        """Move parameters into one block, of which they become views."""
        values = joined(parameters, len(self.trainers))
        parts = parted(values, parameters)
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part
        return Block(nn.Parameter(values), parameters)

    @torch.no_grad()
    def _hand_back(self) -> None:
        """Give every trainer its adapters, and their averages."""
        owns = [list(trainer.adapted.parameters()) for trainer in self.trainers]
        for run, own in enumerate(owns):
            for parameter, trained in zip(own, self.model.of_run(run, own), strict=True):
                parameter.copy_(trained)
        if self.average is None:
            return
        self.average.apply()
        for run, trainer in enumerate(self.trainers):
            if trainer.average is not None:
                averages = self.model.of_run(run, owns[run])
                trainer.average.adopt(averages, self.average.num_steps)


def _all(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Those of all runs, one after the other; None if they have none."""
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(found) if found else None


def collate_runs(rows: Sequence[Sequence[Encoded]], pad_id: int) -> Batch:
    """One batch with as many rows of each run, as `JointModel` takes it.

    Where a run has fewer, its first is repeated, without an answer.
    """
    most = max(len(own) for own in rows)
    filled: list[Encoded] = []
    repeated: list[int] = []
    for own in rows:
        missing = most - len(own)
        filled += [*own, *[own[0]] * missing]
        repeated += range(len(filled) - missing, len(filled))
    batch = collate(filled, pad_id)
    batch.targets[repeated] = IGNORED
    return batch


def _penalty(settings: LoraSettings, lora: Lora) -> Tensor:
    """What LoRAs that grow add to the objective of each run, as `TaskTrainer` adds it: [n]."""
    return settings.orthogonality * overlap(lora, settings.rank)


def _answer_tokens(rows: Sequence[Encoded]) -> float:
    return float(sum(len(row.answer) for row in rows))


def _read_tokens(rows: Sequence[Encoded]) -> int:
    return sum(len(row.prompt) + len(row.answer) - 1 for row in rows)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
