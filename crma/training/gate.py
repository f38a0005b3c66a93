"""The gate: a new backbone serves only if no task suffers from it (docs/method.md, section 5).

The gate scores every task that would serve under the candidate, on the task's own validation set.
The loss may exceed neither that under the serving backbone nor that at the task's publication by
more than a margin. Without the second, the margin would creep with every promotion. All losses that
are compared come from one class of machine and one dtype: a loss recorded elsewhere is measured
again. If a task suffers, the gate searches the backbones between the serving one and the candidate
for the nearest to the candidate that harms no task. If there is none, the serving backbone stays.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from crma.core.errors import ConfigError
from crma.evaluation.offline import Note, Served
from crma.method.backbone import Backbone, FoldedPair
from crma.method.injection import Plan
from crma.training.gated_task import GatedTask

GRID = (1.0, 0.75, 0.5, 0.25, 0.1)
REFINEMENTS = 3  # halvings between the best of the grid and the next above it
SLACK = 0.002  # nats: near a loss of 0, a margin in percent is smaller than the rounding error


def blend(old: Backbone, new: Backbone, weight: float) -> Backbone:
    """The backbone with raw parameters (1 - weight) * old + weight * new.

    Folded or normalised factors are never blended. M is doubly stochastic for every S, so the norm
    bound of the result follows from its own gate.

    Args:
        old: the end at weight 0.
        new: the end at weight 1, of the same shape.
        weight: 0 and 1 return the ends themselves, bit for bit.

    Raises:
        ConfigError: the backbones differ in shape.
    """
    if old.config != new.config:
        message = "two backbones of different shapes cannot be blended"
        raise ConfigError(
            message, field="candidate", value=new.config.to_dict(), allowed=old.config.to_dict()
        )
    if weight == 0:
        return old
    if weight == 1:
        return new
    ends = new.tensors()
    tensors = {name: torch.lerp(start, ends[name], weight) for name, start in old.tensors().items()}
    return Backbone.from_tensors(old.config, tensors)


class Limit(NamedTuple):
    """The largest loss that a task may have, and the losses, in nats, that it follows from.

    Attributes:
        recorded: in the task's manifest, from the machine and in the dtype of its publication.
        recorded_here: the same loss measured again in this run, where it was recorded elsewhere;
            None if it was recorded on such a machine and in this dtype, or if the backbone of that
            time is not in the store.
        serving: under the serving backbone, in this run; None for a newcomer, which cannot serve
            there, or if no backbone serves.
        margin: the share by which the loss may get worse.
    """

    recorded: float
    recorded_here: float | None
    serving: float | None
    margin: float

    @property
    def at_publication(self) -> float:
        """The loss at publication that can be compared with those of this run."""
        return self.recorded if self.recorded_here is None else self.recorded_here

    @property
    def limit(self) -> float:
        """(1 + margin) times the smaller of the loss at publication and that under the serving
        backbone, plus SLACK.
        """
        losses = [self.at_publication]
        if self.serving is not None:
            losses.append(self.serving)
        return min(losses) * (1 + self.margin) + SLACK

    def record(self) -> dict[str, float | None]:
        """The fields and the limit, by name, for the evidence of a promotion."""
        return self._asdict() | {"limit": self.limit}


@dataclass
class Gate:
    """A candidate and the tasks that would serve under it.

    Attributes:
        served: the base model, and the adapters of the store.
        old: the serving backbone; None if none serves.
        new: the candidate.
        tasks: the tasks to score.
        margins: task -> the share of its loss by which it may get worse. SLACK is added.
        newcomers: the tasks that cannot serve under `old`.
        of_record: task -> the backbone that its recorded loss was measured under, where that was
            on another machine or in another dtype.
        note: called with one line about every trial, and about every task in it.
    """

    served: Served
    old: Backbone | None
    new: Backbone
    tasks: list[GatedTask]
    margins: Mapping[str, float]
    newcomers: Collection[str]
    of_record: Mapping[str, Backbone]
    note: Note

    @cached_property
    def limits(self) -> dict[str, Limit]:
        """The limit of every task, by name."""
        limits = {}
        for task in self.tasks:
            name = task.entry.name
            backbone = self.of_record.get(name)
            here = None if backbone is None else self._loss(task, self._folded(backbone))
            serving = None
            if self.old is not None and name not in self.newcomers:
                is_of_record = backbone is self.old
                serving = here if is_of_record else self._loss(task, self._folded(self.old))
            limits[name] = Limit(task.recorded, here, serving, self.margins[name])
        return limits

    def score(self, backbone: Backbone) -> dict[str, float]:
        """The validation loss of every task under a backbone, in nats, by name."""
        pairs = self._folded(backbone)
        return {task.entry.name: self._loss(task, pairs) for task in self.tasks}

    def try_weight(self, weight: float) -> dict[str, Any]:
        """Score the blend at one weight.

        Returns:
            {"lambda": the weight, "harmed": the tasks over their limit, "tasks": task -> {"loss",
            "drift": the change since publication in percent, "change": the change from the serving
            backbone in percent, or None}}.
        """
        scores = {}
        harmed = []
        for name, loss in self.score(blend(self.old or self.new, self.new, weight)).items():
            limit = self.limits[name]
            drift = _percent(loss, limit.at_publication)
            change = None if limit.serving is None else _percent(loss, limit.serving)
            scores[name] = {"loss": loss, "drift": drift, "change": change}
            if loss > limit.limit:
                harmed.append(name)
        self._report(weight, scores, harmed)
        return {"lambda": weight, "harmed": harmed, "tasks": scores}

    def search(self) -> tuple[float, list[dict[str, Any]]]:
        """Search for the largest weight of the candidate that harms no task.

        Drift need not grow with the weight, so bisection alone could miss the answer: a grid is
        tried from above, and then the interval below the next larger weight is halved.

        Returns:
            The weight (0 if every weight harms a task), and every trial as `try_weight` returns it.
        """
        tried: list[dict[str, Any]] = []

        def harms_nobody(weight: float) -> bool:
            trial = self.try_weight(weight)
            tried.append(trial)
            return not trial["harmed"]

        grid = GRID if self.old else GRID[:1]
        best = next((weight for weight in grid if harms_nobody(weight)), 0.0)
        if best == 1 or not self.old:
            return best, tried
        above = GRID[GRID.index(best) - 1] if best else GRID[-1]
        for _ in range(REFINEMENTS):
            middle = (best + above) / 2
            if harms_nobody(middle):
                best = middle
            else:
                above = middle
        return best, tried

    def _folded(self, backbone: Backbone) -> list[FoldedPair]:
        return backbone.folded(self.served.device, self.served.dtype)

    def _loss(self, task: GatedTask, pairs: list[FoldedPair]) -> float:
        served = self.served
        plan = Plan([(None, served.lora(task.entry))], [(None, pairs)])
        return served.evaluator(task.entry).measure(plan, task.rows).loss

    def _report(
        self, weight: float, scores: Mapping[str, Mapping[str, Any]], harmed: Collection[str]
    ) -> None:
        """Note a trial: every task with its losses, their change, and the limit applied."""
        self.note(f"lambda {weight:.4g}: harmed: {', '.join(harmed) or 'none'}")
        for name, score in scores.items():
            limit = self.limits[name]
            serving = "cannot serve yet"
            if limit.serving is not None:
                serving = f"serving {limit.serving:.4f} {score['change']:+.2f} %"
            published = f"at publication {limit.at_publication:.4f} {score['drift']:+.2f} %"
            if limit.recorded_here is not None:
                published += f" (recorded elsewhere as {limit.recorded:.4f})"
            mark = ">" if name in harmed else "<="
            self.note(
                f"  {name}: {score['loss']:.4f} {mark} limit {limit.limit:.4f}; "
                f"{published}; {serving}"
            )


def _percent(loss: float, reference: float) -> float:
    return 100 * (loss / reference - 1)
