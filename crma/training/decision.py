"""What the phases of a study decide, each by its rule and from records, and the file that says so.

`<results>/<phase>/decision.json` holds the decision in words and in numbers, and the digests of the
records that it was made from. A decision that comes out otherwise later is an error: later phases
rest on it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crma.core.digests import file_digest
from crma.core.errors import ConfigError, TrainingError
from crma.core.files import replace_file, to_json
from crma.training import ceiling, regime, screening
from crma.training.pairing import Record
from crma.training.study import Phase, Study

FILE = "decision.json"

Rule = regime.Taken | ceiling.Reach | screening.Screening


@dataclass(frozen=True)
class Decision:
    """What a phase decided.

    Attributes:
        phase: that decided.
        taken: what its rule takes.
        endpoint: the digest of the endpoint that was there before.
        records: name -> digest, of the records that it was made from.
    """

    phase: Phase
    taken: Rule
    endpoint: str
    records: Mapping[str, str]

    def content(self) -> dict[str, Any]:
        """What its file holds."""
        return {
            "phase": self.phase.name,
            "decides": self.phase.decides,
            "in_words": str(self.taken),
            "taken": _plain(self.taken),
            "endpoint": self.endpoint,
            "records": dict(self.records),
        }


Decisions = Mapping[str, Decision | None]  # phase -> its decision; None: not yet


def decide(study: Study, phase: Phase, results: Path) -> Decision:
    """Apply the rule of a phase to its records, all of which are there.

    Raises:
        ConfigError: the records do not allow a decision, or two of them are no pair.
    """
    paths = record_paths(study, phase.name, results)
    if phase.extends:
        paths = record_paths(study, phase.extends, results) | paths
    records = {name: json.loads(path.read_text("utf-8")) for name, path in paths.items()}
    taken = _rule(study, phase, records)
    digests = {name: file_digest(path) for name, path in paths.items()}
    return Decision(phase, taken, study.endpoint, digests)


def keep(decision: Decision, results: Path) -> None:
    """Write the file of a decision, or compare it with the one that is there.

    Raises TrainingError if the rule took something else, or from other records, before.
    """
    path = results / decision.phase.name / FILE
    content = decision.content()
    if not path.exists():
        replace_file(path, to_json(content))
        return
    before = json.loads(path.read_text("utf-8"))
    for field in ("in_words", "records"):
        if before.get(field) != content[field]:
            message = (
                f"{path}: decided otherwise, or from other records, before; later phases rest on "
                "that. Put the records back, or begin the study in another folder"
            )
            value = content[field] if field == "in_words" else "other records"
            raise TrainingError(message, field=field, value=value, allowed=before.get("in_words"))


def record_paths(study: Study, phase: str, results: Path) -> dict[str, Path]:
    """Where the records of a phase that decides are, by name."""
    experiment = study.experiments[phase]
    return {name: results / phase / f"{name}.json" for name in experiment.planned()}


def _rule(study: Study, phase: Phase, records: Mapping[str, Record]) -> Rule:
    made = list(records.values())
    if phase.decides == "regime":
        return regime.take(regime.grid(made))
    if phase.decides == "screening":
        experiment = study.experiments[phase.name]
        return screening.choose(screening.screened(experiment, records))
    reach = ceiling.reach(made)
    if reach is None:
        message = f"{phase.name}: the ceiling needs two seeds"
        raise ConfigError(message, field="seeds", value=len(made), allowed="at least 2")
    return reach


def _plain(taken: Rule) -> dict[str, Any]:
    """The fields of a rule's outcome, as JSON has them."""
    fields = taken._asdict()
    if isinstance(taken, regime.Taken):
        fields["setting"] = taken.setting._asdict()
    if isinstance(taken, ceiling.Reach):
        fields["is_open"] = taken.is_open
    return fields
