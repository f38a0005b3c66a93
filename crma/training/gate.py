"""The gate: a new backbone serves only if no task suffers from it (docs/method.md, section 5).

A candidate is a published backbone that descends from the serving one and does not serve yet. The
gate scores every task that would serve under it, on the task's own validation set, against the loss
recorded when the task was published. The serving backbone's loss is not the reference, because the
margin would then creep with every promotion. If a task suffers, the gate searches the backbones
between the serving one and the candidate for the nearest to the candidate that harms no task. If
there is none, the serving backbone stays.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from crma.core.digests import file_digest
from crma.core.errors import ConfigError, CrmaError, DataError, LineageMismatch
from crma.core.provenance import commit, hardware
from crma.data.splits import load_split, split_path
from crma.evaluation.evaluator import Encoded
from crma.evaluation.offline import Note, Served
from crma.method.backbone import Backbone
from crma.method.injection import Plan
from crma.store.adapter_store import AdapterStore
from crma.store.channels import BACKBONE, Channels, task_channel
from crma.store.entry import BackboneEntry, TaskEntry, read_backbone
from crma.store.manifest import Blend, TrainedOn
from crma.store.publication import backbone_digest
from crma.training.config import TrainConfig, task_name

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


class GatedTask(NamedTuple):
    """A task that the gate can score.

    Attributes:
        entry: the task in the store.
        rows: its validation set.
        recorded: its loss there, in nats, when it was published.
    """

    entry: TaskEntry
    rows: list[Encoded]
    recorded: float

    @classmethod
    def of(cls, served: Served, entry: TaskEntry) -> "GatedTask":
        """Load the validation set and the recorded loss of a task.

        Raises:
            CrmaError: with the reason, if the validation set that the task was published with
                cannot be loaded.
        """
        name, manifest = entry.name, entry.manifest
        trained_on = manifest.trained_on
        measured = manifest.measured.get("validation")
        recorded = measured.get("loss") if isinstance(measured, dict) else None
        if trained_on is None or not isinstance(recorded, float):
            raise DataError("it recorded no validation loss", field="task", value=name)
        source = _source(trained_on, name)
        examples = load_split(source, "validation")
        path = split_path(source, "validation")
        found = file_digest(path)
        published = trained_on.data.get(f"{name}/validation")
        if found != published:
            message = f"{path} is not the file that the task was published with"
            raise DataError(message, value=found, allowed=published)
        return cls(entry, served.evaluator(entry).encode(examples), recorded)


def _source(trained_on: TrainedOn, name: str) -> str:
    """The domain or folder that a task was trained on. Raises DataError if it is not recorded."""
    for task in TrainConfig.from_dict(trained_on.config).tasks:
        if task_name(task) == name:
            return task
    message = "it does not say where its validation data is"
    raise DataError(message, field="task", value=name)


@dataclass
class Gate:
    """A candidate and the tasks that would serve under it.

    Attributes:
        served: the base model, and the adapters of the store.
        old: the serving backbone; None if none serves.
        new: the candidate.
        tasks: the tasks to score.
        margins: task -> the share of its recorded loss by which it may get worse. SLACK is added.
        note: called with one line about every trial.
    """

    served: Served
    old: Backbone | None
    new: Backbone
    tasks: list[GatedTask]
    margins: Mapping[str, float]
    note: Note

    def score(self, backbone: Backbone) -> dict[str, dict[str, float]]:
        """Score every task under a backbone.

        Returns:
            Task -> {"loss": its validation loss in nats, "recorded": its recorded loss, "drift":
            the change in percent}.
        """
        served = self.served
        pairs = backbone.folded(served.device, served.dtype)
        scores = {}
        for entry, rows, recorded in self.tasks:
            plan = Plan([(None, served.lora(entry))], [(None, pairs)])
            loss = served.evaluator(entry).measure(plan, rows).loss
            drift = 100 * (loss / recorded - 1)
            scores[entry.name] = {"loss": loss, "recorded": recorded, "drift": drift}
        return scores

    def try_weight(self, weight: float) -> dict[str, Any]:
        """Score the blend at one weight.

        Returns:
            {"lambda": the weight, "harmed": the tasks beyond their margin, "tasks": as `score`}.
        """
        scores = self.score(blend(self.old or self.new, self.new, weight))
        harmed = [name for name, score in scores.items() if self._is_harmed(name, score)]
        worst = max((score["drift"] for score in scores.values()), default=0.0)
        names = ", ".join(harmed) or "none"
        self.note(f"lambda {weight:.4g}: worst drift {worst:+.2f} %; harmed: {names}")
        return {"lambda": weight, "harmed": harmed, "tasks": scores}

    def _is_harmed(self, name: str, score: Mapping[str, float]) -> bool:
        return score["loss"] > score["recorded"] * (1 + self.margins[name]) + SLACK

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


def promote(
    served: Served,
    version: str,
    *,
    margin: float = 0.01,
    newcomer_margin: float = 0.1,
    allow_ungated: Collection[str] = (),
    dry_run: bool = False,
    note: Note,
) -> dict[str, Any]:
    """Let a candidate serve, whole or as a blend, with the tasks trained on the way to it.

    If no blend passes, the serving backbone stays. Either way `channels.json` records the evidence,
    unless this is a dry run. If an error is raised, nothing has changed.

    Args:
        served: the base model, and the store that holds the candidate.
        version: the candidate's version.
        margin: the share of its recorded loss by which a serving task may get worse.
        newcomer_margin: the same for a newcomer, a task that nobody uses yet. A newcomer
            was trained under the whole candidate, so almost every blend costs it something.
        allow_ungated: names of tasks that need not be scored.
        dry_run: decide, and change nothing.
        note: called with one line about every trial.

    Returns:
        The evidence: {"candidate", "serving", "margins", "slack", "lambda" (0: the serving backbone
        stays), "tried", "ungated": {task: reason}, "dtype", "hardware", "commit"}.

    Raises:
        ConfigError: the candidate already serves, or a task outside `allow_ungated` has no
            validation data.
        LineageMismatch: the candidate does not descend from the serving backbone, so the serving
            tasks could no longer serve.
        StoreError: something else began to serve meanwhile.
    """
    store = served.store
    channels = store.channels()
    serving = store.backbone()
    candidate = read_backbone(store.root, version)
    _check_candidate(candidate, serving, served.base.digest)
    newcomers = store.newcomers(candidate)
    entries = {name: store.task(name) for name in channels.tasks}
    entries |= {entry.name: entry for entry in newcomers}
    margins = {name: margin if name in channels.tasks else newcomer_margin for name in entries}
    tasks, ungated = _gated_tasks(served, entries, allow_ungated)
    old = serving.load() if serving else None
    gate = Gate(served, old, candidate.load(), tasks, margins, note)
    weight, tried = gate.search()
    evidence = {
        "candidate": candidate.digest,
        "serving": serving.digest if serving else None,
        "margins": margins,
        "slack": SLACK,
        "lambda": weight,
        "tried": tried,
        "ungated": ungated,
        "dtype": str(served.dtype).removeprefix("torch."),
        "hardware": hardware(),
        "commit": commit(),
    }
    if not dry_run:
        _serve(served, weight, serving, candidate, newcomers, evidence, since=channels)
    return evidence


def _check_candidate(
    candidate: BackboneEntry, serving: BackboneEntry | None, base_digest: str
) -> None:
    """Raise BaseMismatch, ConfigError or LineageMismatch if the candidate must not serve."""
    candidate.check_base(base_digest)
    if serving is None:
        return
    if serving.digest == candidate.digest:
        message = "this backbone serves already"
        raise ConfigError(
            message, field="candidate", value=candidate.version, allowed="another version"
        )
    if not candidate.descends_from(serving.digest):
        message = (
            "it does not descend from the serving backbone, so the serving tasks could not use it; "
            "train it with `start`"
        )
        raise LineageMismatch(
            message, field="candidate", value=candidate.digest, allowed=serving.digest
        )


def _gated_tasks(
    served: Served, entries: Mapping[str, TaskEntry], allow_ungated: Collection[str]
) -> tuple[list[GatedTask], dict[str, str]]:
    """Divide the tasks into those that can be scored and those that cannot.

    A task that was trained without a backbone is in neither group: it never serves with CRMA on, so
    no backbone can harm it.

    Returns:
        The tasks to score, and for each of the others the reason why it cannot be scored.

    Raises:
        ConfigError: a task that cannot be scored is not in `allow_ungated`.
    """
    tasks: list[GatedTask] = []
    ungated: dict[str, str] = {}
    for name, entry in sorted(entries.items()):
        if entry.manifest.backbone is None:
            continue
        try:
            tasks.append(GatedTask.of(served, entry))
        except CrmaError as error:
            ungated[name] = str(error)
    refused = sorted(set(ungated) - set(allow_ungated))
    if refused:
        name = refused[0]
        message = (
            f"{name} cannot be scored: {ungated[name]}; to promote without it: --allow-ungated NAME"
        )
        scored = [task.entry.name for task in tasks]
        raise ConfigError(message, field="task", value=refused, allowed=scored)
    return tasks, ungated


def _serve(
    served: Served,
    weight: float,
    serving: BackboneEntry | None,
    candidate: BackboneEntry,
    newcomers: Collection[TaskEntry],
    evidence: Mapping[str, Any],
    *,
    since: Channels,
) -> None:
    """Move the channels as decided, in one write that also records the evidence."""
    moves: dict[str, str | None] = {}
    if weight:
        moves[BACKBONE] = candidate.version
        if serving is not None and weight < 1:
            moves[BACKBONE] = _publish_blend(served, serving, candidate, weight)
        for entry in newcomers:
            moves[task_channel(entry.name)] = entry.version
    served.store.set_serving(moves, evidence=evidence, since=since)


def _publish_blend(served: Served, old: BackboneEntry, new: BackboneEntry, weight: float) -> str:
    """Publish the backbone between two others. Returns its version.

    A promotion that was killed may have published it already; that version is then used again.
    """
    made = blend(old.load(), new.load(), weight)
    published = _version_of(served.store, backbone_digest(made))
    if published is not None:
        return published
    ancestors = dict.fromkeys((old.digest, new.digest, *new.manifest.lineage))
    record = Blend.model_validate({"parents": (old.digest, new.digest), "lambda": weight})
    entry = served.store.publish_backbone(
        made,
        lineage=list(ancestors),
        blend=record,
        serve=False,
        base=served.base,
        trained_on=None,
        measured={},
        licence=new.manifest.licence,
    )
    return entry.version


def _version_of(store: AdapterStore, digest: str) -> str | None:
    for version in store.backbone_versions():
        if read_backbone(store.root, version).digest == digest:
            return version
    return None
