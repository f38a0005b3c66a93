"""An ablation as it is asked for, and the same as JSON, from which any server can run it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from crma.core.errors import ConfigError
from crma.evaluation.ablation import AblationSettings
from crma.evaluation.question_set import Question


@dataclass(frozen=True)
class AblationSpec:
    """An ablation as a client asks for it; `Ablations.prepare` checks it.

    Args:
        settings: the variants and how they are judged.
        question_set: name of a question set; or None, and `questions` is given.
        questions: inline questions; or None, and `question_set` is given.
        tasks: ask only the questions of these tasks; None: all.
        temperature: of sampling; 0 is greedy.
        timeout_s: deadline of each item in seconds; None: the server's.
        background: whether it runs as a job, with no limit on the number of items.
        provenance: that of an earlier run, which must be this run's as well; None: any.
        versions: channel -> version, of adapters that were chosen before by the same names; others
            are the ones that serve.
        as_sent: the request as JSON, with the fields that were sent only.
        owner: whose ablation it is: they see its job, and their question sets can be asked.
    """

    settings: AblationSettings
    question_set: str | None = None
    questions: Sequence[Question] | None = None
    tasks: Sequence[str] | None = None
    temperature: float = 0.0
    timeout_s: float | None = None
    background: bool = False
    provenance: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    as_sent: Mapping[str, Any] = field(default_factory=dict)
    owner: str = ""


_JSON = TypeAdapter(AblationSpec)


def write_spec(spec: AblationSpec) -> dict[str, Any]:
    """An ablation as JSON."""
    return _JSON.dump_python(spec, mode="json")


def read_spec(content: Mapping[str, Any]) -> AblationSpec:
    """Read what `write_spec` wrote. Raises ConfigError for what another release wrote."""
    try:
        return _JSON.validate_python(content)
    except ValidationError as error:
        message = "another release of the server began this ablation: send its request again"
        raise ConfigError(message, field="spec") from error
