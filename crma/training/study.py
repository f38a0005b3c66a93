"""A study: experiments one after the other, each set by what those before it found.

    name = "sharing"
    endpoint = "endpoint.toml"

    [[phases]]
    name = "regime"
    experiment = "regime.toml"
    decides = "regime"

    [[phases]]
    name = "ceiling"
    experiment = "ceiling.toml"
    decides = "ceiling"

The files stand beside that of the study. What a phase decides, it decides by a rule in code
(`decision`), from records; `settings` says what later phases take from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from crma.core.errors import ConfigError
from crma.core.json_lines import checked
from crma.training.config import Settings, read_toml
from crma.training.endpoint import read_endpoint
from crma.training.experiment import Experiment, merged, read_experiment

Decides = Literal["regime", "ceiling", "screening"]


class Phase(Settings):
    """One experiment of a study.

    Attributes:
        name: of the phase, and of the folder of its records.
        experiment: its file, beside that of the study.
        config: changes to the configuration that its runs share.
        decides: the rule that is applied to its records; None: they are only reported.
        extends: an earlier phase. This one runs only if the rule there took nothing, and decides
            from the records of both.
        within_reach_of: an earlier phase that decides on a ceiling. This one runs only if that
            ceiling leaves something to be found.
    """

    name: str = Field(pattern=r"^[\w-]+$")
    experiment: str
    config: dict[str, Any] = Field({})
    decides: Decides | None = None
    extends: str = ""
    within_reach_of: str = ""


class StudyFile(Settings):
    """The content of a study's file.

    Attributes:
        name: of the study.
        endpoint: the file that was written down before; its digest is in every record.
        phases: in order.
    """

    name: str = Field(pattern=r"^[\w-]+$")
    endpoint: str
    phases: tuple[Phase, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Study:
    """A study with its experiments.

    Attributes:
        name: of the study.
        endpoint: the digest of the endpoint's file.
        phases: in order.
        experiments: phase -> its experiment, with the name and the configuration of the phase, and
            nothing yet of what other phases decide.
    """

    name: str
    endpoint: str
    phases: tuple[Phase, ...]
    experiments: dict[str, Experiment]

    def phase(self, name: str) -> Phase:
        """The phase of a name. Raises ConfigError if there is none."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        allowed = [phase.name for phase in self.phases]
        message = f"the study {self.name} has no such phase"
        raise ConfigError(message, field="phase", value=name, allowed=allowed)


def read_study(path: Path) -> Study:
    """Read a TOML file and those that it names.

    Raises:
        ConfigError: a file cannot be read, names an invalid key, or does not fit the study: two
            phases of one name, a phase that names one that is not before it, an experiment without
            the study's endpoint, runs whose dtype follows the machine, or a candidate that changes
            more than its backbone.
    """
    file = checked("", read_toml(path), StudyFile.model_validate, ConfigError)
    endpoint = read_endpoint(path.parent / file.endpoint)
    experiments: dict[str, Experiment] = {}
    for place, phase in enumerate(file.phases):
        _check_order(phase, file.phases[:place])
        experiment = read_experiment(path.parent / phase.experiment)
        config = merged(experiment.config, phase.config)
        experiment = experiment.model_copy(update={"name": phase.name, "config": config})
        _check_endpoint(experiment, endpoint.digest)
        _check_dtypes(experiment)
        _check_candidates(experiment)
        experiments[phase.name] = experiment
    return Study(file.name, endpoint.digest, file.phases, experiments)


def _check_order(phase: Phase, before: Sequence[Phase]) -> None:
    decides = {each.name: each.decides for each in before}
    if phase.name in decides:
        message = "two phases have the same name"
        raise ConfigError(message, field="name", value=phase.name, allowed="one name a phase")
    wanted = {
        "extends": (phase.extends, "regime"),
        "within_reach_of": (phase.within_reach_of, "ceiling"),
    }
    for field, (name, kind) in wanted.items():
        if name and decides.get(name) != kind:
            message = f"{phase.name}: {name} is no phase before it that decides on a {kind}"
            allowed = [each for each, decided in decides.items() if decided == kind]
            raise ConfigError(message, field=field, value=name, allowed=allowed)


def _check_endpoint(experiment: Experiment, digest: str) -> None:
    endpoint = experiment.judged_by()
    found = None if endpoint is None else endpoint.digest
    if found != digest:
        message = f"{experiment.name}: its records would not say the study's endpoint"
        raise ConfigError(message, field="endpoint", value=found, allowed=digest)


def _check_dtypes(experiment: Experiment) -> None:
    dtypes = {config.dtype for config in experiment.planned().values()}
    if "auto" in dtypes or len(dtypes) > 1:
        message = f"{experiment.name}: runs of several dtypes are no pairs"
        allowed = "one dtype, and not auto, which follows the machine"
        raise ConfigError(message, field="dtype", value=sorted(dtypes), allowed=allowed)


def _check_candidates(experiment: Experiment) -> None:
    for runs in experiment.runs:
        if runs.role == "candidate" and set(runs.changes) - {"crma"}:
            message = f"{runs.name}: a candidate changes nothing but its backbone"
            raise ConfigError(message, field="changes", value=list(runs.changes), allowed="crma")
