"""The gate: a new backbone serves once it is shown that no task suffers from it (METHOD, section 5).

A candidate is a published backbone that does not serve and descends from the one that does. Every task that would serve
under it is scored on its own validation set against the loss recorded when it was published, never against the loss
under the serving backbone: or the margin would creep with every promotion. If a task suffers, the candidate is cut
back: of the backbones between the two, the nearest to it that harms nobody serves; or the old one stays.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
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
from crma.store.channels import BACKBONE, task_channel
from crma.store.entry import BackboneEntry, TaskEntry, read_backbone
from crma.store.manifest import Blend
from crma.store.publication import Origin, backbone_digest
from crma.training.config import TrainConfig

GRID = (1.0, 0.75, 0.5, 0.25, 0.1)
REFINEMENTS = 3  # halvings between the best of the grid and the next above it
SLACK = 0.002  # nats: a percentage of a loss near 0 is less than rounding makes


def blend(old: Backbone, new: Backbone, weight: float) -> Backbone:
    """Raw parameters (1 - weight) * old + weight * new; at 0 and 1 those of the ends, bit for bit.

    Never of folded or normalised factors: M is doubly stochastic for every S, so the bound of the result is that of its
    own gate. Raises ConfigError for backbones of two shapes.
    """
    if old.config != new.config:
        message = "backbones of two shapes have nothing between them"
        raise ConfigError(
            message, field="candidate", value=new.config.to_dict(), allowed=old.config.to_dict()
        )
    if weight in (0, 1):
        return new if weight else old
    ends = zip(old.tensors().items(), new.tensors().values(), strict=True)
    return Backbone.from_tensors(
        old.config, {name: torch.lerp(a, b, weight) for (name, a), b in ends}
    )


class Gated(NamedTuple):
    """A task before the gate: its validation set, and the loss in nats that it had there when it was published."""

    entry: TaskEntry
    rows: list[Encoded]
    recorded: float

    @classmethod
    def of(cls, served: Served, entry: TaskEntry) -> "Gated":
        """Raises CrmaError, with the reason, where the set that it was published with cannot be had."""
        trained_on, measured = entry.manifest.trained_on, entry.manifest.measured.get("validation")
        recorded = measured.get("loss") if isinstance(measured, dict) else None
        if trained_on is None or not isinstance(recorded, float):
            raise DataError("it recorded no validation loss", field="task", value=entry.name)
        sources = {Path(task).name: task for task in TrainConfig.from_dict(trained_on.config).tasks}
        if (source := sources.get(entry.name)) is None:
            raise DataError(
                "it does not say where its validation data is", field="task", value=entry.name
            )
        examples, path = load_split(source, "validation"), split_path(source, "validation")
        if (found := file_digest(path)) != (
            published := trained_on.data.get(f"{entry.name}/validation")
        ):
            raise DataError(
                f"{path} is not what it was published with", value=found, allowed=published
            )
        return cls(entry, served.evaluator(entry).encode(examples), recorded)


@dataclass
class Gate:
    """A candidate before the tasks that would serve under it; `old` is what serves, None if nothing does.

    margins: by task, the share of its recorded loss by which it may get worse (SLACK comes on top).
    """

    served: Served
    old: Backbone | None
    new: Backbone
    tasks: list[Gated]
    margins: Mapping[str, float]
    note: Note

    def score(self, backbone: Backbone) -> dict[str, dict[str, float]]:
        """Task -> its validation loss in nats under `backbone`, that recorded, and its drift from that in percent."""
        served, scores = self.served, {}
        pairs = backbone.folded(served.device, served.dtype)
        for entry, rows, recorded in self.tasks:
            plan = Plan([(None, served.lora(entry))], [(None, pairs)])
            loss = served.evaluator(entry).measure(plan, rows).loss
            scores[entry.name] = {
                "loss": loss,
                "recorded": recorded,
                "drift": 100 * (loss / recorded - 1),
            }
        return scores

    def search(self) -> tuple[float, list[dict[str, Any]]]:
        """The largest share of the candidate that harms nobody (0: none does), and all that was tried.

        Drift need not grow with the share: so a grid from above, then halvings below the next failure.
        """
        tried: list[dict[str, Any]] = []
        old = self.old or self.new

        def passes(weight: float) -> bool:
            tasks = self.score(blend(old, self.new, weight))
            harmed = [
                n
                for n, t in tasks.items()
                if t["loss"] > t["recorded"] * (1 + self.margins[n]) + SLACK
            ]
            tried.append({"lambda": weight, "harmed": harmed, "tasks": tasks})
            worst = max((task["drift"] for task in tasks.values()), default=0.0)
            self.note(
                f"lambda {weight:.4g}: worst drift {worst:+.2f} %; harmed: {', '.join(harmed) or 'none'}"
            )
            return not harmed

        grid = GRID if self.old else GRID[:1]
        best = next((weight for weight in grid if passes(weight)), 0.0)
        if best == 1 or not self.old:
            return best, tried
        above = GRID[GRID.index(best) - 1] if best else GRID[-1]
        for _ in range(REFINEMENTS):
            middle = (best + above) / 2
            best, above = (middle, above) if passes(middle) else (best, middle)
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
    """Let a candidate serve, whole or cut back, with the tasks that were trained on the way to it; or keep what serves.

    Either way `channels.json` records the evidence, unless it is a dry run. A newcomer, a task that nobody uses yet,
    has a margin of its own: what suits the others rarely leaves it all that it had under the whole candidate.

    Returns:
        {"candidate", "serving", "margins", "slack", "lambda" (0: kept), "tried", "ungated": {task: reason}, "dtype",
        "hardware", "commit"}

    Raises:
        ConfigError: it serves already, or a task that is not in `allow_ungated` has no validation data.
        LineageMismatch: it was not trained on top of what serves, whose tasks would stop.
        StoreError: something else began to serve meanwhile. Nothing changed, whatever was raised.
    """
    store = served.store
    channels, serving, candidate = (
        store.channels(),
        store.backbone(),
        read_backbone(store.root, version),
    )
    candidate.check_base(served.base.digest)
    if serving is not None and serving.digest == candidate.digest:
        raise ConfigError(
            "this backbone serves", field="candidate", value=version, allowed="another version"
        )
    if serving is not None and not candidate.descends_from(serving.digest):
        message = "it was not trained on top of what serves, whose tasks would stop; train it with `start`"
        raise LineageMismatch(
            message, field="candidate", value=candidate.digest, allowed=serving.digest
        )
    newcomers = store.newcomers(candidate)
    after = {name: store.task(name) for name in channels.tasks} | {
        entry.name: entry for entry in newcomers
    }
    tasks, ungated = _gated(served, after, allow_ungated)
    margins = {name: margin if name in channels.tasks else newcomer_margin for name in after}
    gate = Gate(served, serving.load() if serving else None, candidate.load(), tasks, margins, note)
    weight, tried = gate.search()
    evidence: dict[str, Any] = {
        "candidate": candidate.digest,
        "serving": serving.digest if serving else None,
    }
    evidence |= {
        "margins": margins,
        "slack": SLACK,
        "lambda": weight,
        "tried": tried,
        "ungated": ungated,
    }
    evidence |= {
        "dtype": str(served.dtype).removeprefix("torch."),
        "hardware": hardware(),
        "commit": commit(),
    }
    if dry_run:
        return evidence
    moves: dict[str, str | None] = {}
    if weight:
        moves[BACKBONE] = (
            _publish_blend(gate, serving, candidate, weight) if serving and weight < 1 else version
        )
        moves |= {task_channel(entry.name): entry.version for entry in newcomers}
    store.set_serving(moves, evidence=evidence, since=channels)
    return evidence


def _gated(
    served: Served, entries: Mapping[str, TaskEntry], allow_ungated: Collection[str]
) -> tuple[list[Gated], dict[str, str]]:
    """The tasks that can be scored, and why others cannot. Raises ConfigError for one not in `allow_ungated`."""
    tasks, ungated = [], {}
    for name, entry in sorted(entries.items()):
        if entry.manifest.backbone is None:
            continue  # it never serves with CRMA on: no backbone can harm it
        try:
            tasks.append(Gated.of(served, entry))
        except CrmaError as error:
            ungated[name] = str(error)
    if refused := sorted(set(ungated) - set(allow_ungated)):
        message = f"{refused[0]} cannot be scored: {ungated[refused[0]]}; promote all the same: --allow-ungated NAME"
        raise ConfigError(
            message, field="task", value=refused, allowed=[task.entry.name for task in tasks]
        )
    return tasks, ungated


def _publish_blend(gate: Gate, old: BackboneEntry, new: BackboneEntry, weight: float) -> str:
    """The version of the backbone between the two; what a promotion that was killed has published is used again."""
    store, made = gate.served.store, blend(old.load(), new.load(), weight)
    for version in store.backbone_versions():
        if read_backbone(store.root, version).digest == backbone_digest(made):
            return version
    ancestors = dict.fromkeys((old.digest, new.digest, *new.manifest.lineage))
    origin: Origin = {
        "base": gate.served.base,
        "trained_on": None,
        "measured": {},
        "licence": new.manifest.licence,
    }
    record = Blend.model_validate({"parents": (old.digest, new.digest), "lambda": weight})
    return store.publish_backbone(
        made, lineage=list(ancestors), blend=record, serve=False, **origin
    ).version
