"""The adapters of an ablation: what its variants mean for each task, and the provenance of that."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from crma.core.errors import DigestMismatch, StoreError
from crma.core.selection import AdapterSelection, read_cell
from crma.store.channels import BACKBONE
from crma.store.entry import TaskEntry
from server.engine.request import SamplingParams
from server.service.ablation_spec import AblationSpec
from server.service.caller import Caller
from server.service.frontend import Frontend
from server.service.registry import Resolved


class AblationAdapters:
    """Resolves the adapters of variants, and records which were used.

    Attributes:
        resolved: (task, selection) -> the adapters, in the task's prompt format.
        versions: channel -> version, of adapters whose names leave the version open; given again in
            `AblationSpec.versions`, the same adapters are found whatever serves by then.
    """

    def __init__(self, frontend: Frontend, spec: AblationSpec, caller: Caller) -> None:
        self.resolved: dict[tuple[str, AdapterSelection], Resolved] = {}
        self.versions: dict[str, str] = dict(spec.versions)
        self._frontend = frontend
        self._spec = spec
        self._caller = caller
        self._tasks: dict[str, str | None] = {}  # name, or name@version -> digest
        self._backbones: dict[str, str | None] = {}  # "crma", or "crma@version" -> digest

    def select(self, variant: str, task: str) -> AdapterSelection:
        """Resolve a variant for a task. Raises as `Frontend.resolve` and `Frontend.check`."""
        cell = read_cell(variant)
        name = f"{task}@{cell.task_version}" if cell.task_version else task
        asked = name if cell.task_version else self._chosen(task)
        crma_version = cell.crma_version or self._spec.versions.get(BACKBONE)
        found = self._frontend.resolve(
            asked if cell.task else None, cell.crma, crma_version, caller=self._caller
        )
        if not cell.task:
            entry = self._entry_of(task)
            trained_with = entry.prompt_format if entry else None
            found = replace(found, prompt_format=trained_with or found.prompt_format)
        needs_format = not self._spec.settings.raw
        timeout_s = self._spec.timeout_s
        self._frontend.check(found, SamplingParams(), timeout_s, needs_format=needs_format)
        self.resolved[task, found.selection] = found
        if cell.task:
            self._tasks[name] = found.selection.task_digest
        if cell.crma:
            backbone = f"crma@{cell.crma_version}" if cell.crma_version else "crma"
            self._backbones[backbone] = found.selection.crma_digest
        self._choose(task, found, crma_version)
        return found.selection

    def _chosen(self, task: str) -> str:
        """The name of a task, with the version that was chosen before."""
        version = self._spec.versions.get(f"tasks/{task}")
        return f"{task}@{version}" if version else task

    def _choose(self, task: str, found: Resolved, crma_version: str | None) -> None:
        """Note the versions that serve by now, so that a later run finds the same."""
        serving = self._frontend.registry.backbone
        if found.selection.crma_digest is not None and crma_version is None and serving is not None:
            self.versions[BACKBONE] = serving.version
        entry = self._entry_of(task)
        if entry is not None:
            self.versions.setdefault(f"tasks/{task}", entry.version)

    def _entry_of(self, task: str) -> TaskEntry | None:
        """The version of a task whose format every variant is asked in; None if there is none.

        Otherwise variants without the task's adapter would differ from it by the prompt too.
        """
        try:
            return self._frontend.registry.task(self._chosen(task), self._caller)
        except StoreError:  # no such task, or a damaged one: variants without it can still answer
            return None

    def provenance(self, question_set: str) -> dict[str, Any]:
        """Return the digests of everything that was selected and of the question set; and choices.

        What the choices are decides the answers as much as an adapter does.
        """
        settings = self._spec.settings
        serving = self._backbones.get("crma")
        versions: dict[str, Any] = {}
        versions.update((name, each) for name, each in self._backbones.items() if name != "crma")
        if settings.choices:
            choices = settings.choices
            versions["choices"] = choices if choices == "own" else list(choices)
        return self._frontend.provenance(
            settings.seed, serving, question_set=question_set, tasks=self._tasks, **versions
        )


def check_provenance(provenance: Mapping[str, Any], earlier: Mapping[str, Any]) -> None:
    """Raise DigestMismatch if something else would answer than in an earlier run."""
    names = {**provenance, **earlier}
    differ = [name for name in names if provenance.get(name) != earlier.get(name)]
    if differ:
        advice = "name the versions in variants, or leave provenance out"
        message = f"{', '.join(differ)}: not the same as in the earlier run; {advice}"
        allowed = [provenance.get(name) for name in differ]
        raise DigestMismatch(message, field="provenance", value=differ, allowed=allowed)
