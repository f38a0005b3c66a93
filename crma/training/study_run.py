"""Runs a study: phase after phase, each set by the decisions before it, until one cannot go on.

A record that exists is not made again, so a killed study resumes where it stopped, on the same
machine or another one. Only the runs of one seed of a phase must be of one class of machine: they
are compared.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from crma.core.errors import TrainingError
from crma.core.files import locked
from crma.core.provenance import hardware, machine_class
from crma.data.splits import load_split
from crma.models.base_model import find_base
from crma.training.decision import Decision, decide, keep
from crma.training.experiment import Experiment, Plan, execute, plan
from crma.training.record import Progress
from crma.training.study import Phase, Study
from crma.training.study_settings import settled, waits_for, why_not


class Step(NamedTuple):
    """A phase on the way through a study.

    Attributes:
        phase: it.
        experiment: its runs, with all that was decided before it.
        runs: those runs, and which have no record.
        why_not: why it does not run, in words; empty: it does.
        waits_for: the phases before it that have not decided yet, and on which it depends; what
            they decide is still as its file says.
    """

    phase: Phase
    experiment: Experiment
    runs: Plan
    why_not: str
    waits_for: tuple[str, ...]


def walk(study: Study, results: Path, *, regardless: bool) -> Iterator[Step]:
    """The phases of a study, in order.

    A phase whose records are all there has decided when the next one is asked for. Whoever makes
    the missing ones of a step before that goes through the whole study.

    Args:
        study: the study.
        results: the folder of all records.
        regardless: run what a ceiling makes pointless, too.

    Raises:
        ConfigError, TrainingError: as `decide`, `settled`, and `experiment.plan`.
    """
    decisions: dict[str, Decision | None] = {}
    for phase in study.phases:
        reason = why_not(study, phase, decisions, regardless=regardless)
        experiment = settled(study, phase, decisions)
        runs = plan(experiment, results, only="*")
        yield Step(phase, experiment, runs, reason, waits_for(study, phase, decisions))
        if phase.decides and not reason:
            is_made = all(path.exists() for path in runs.paths.values())
            decisions[phase.name] = decide(study, phase, results) if is_made else None


@dataclass(frozen=True)
class Conduct:
    """How a study is run.

    Attributes:
        study: the study.
        results: records are written to `<results>/<phase>/<run>.json`.
        work: of the run folders.
        workers: so many runs at once, each in a process of its own; 1: in this process.
        only: a pattern of run names, where several machines divide the runs of a phase.
        until: the last phase to run; empty: all.
        regardless: run what a ceiling makes pointless, too.
        report: called with (description, done, total).
    """

    study: Study
    results: Path
    work: Path
    workers: int
    only: str
    until: str
    regardless: bool
    report: Progress

    def run(self) -> Iterator[str]:
        """Make the missing records of every phase, and write what each decides.

        Yields:
            The name of each phase, when all of its records are there.

        Raises:
            ConfigError: there is no phase `until`, or the records of a phase allow no decision.
            DataError: the data of a phase that will run is not there.
            TrainingError: runs to make here have partners of another class of machine; records of a
                phase are of other settings, or gave another decision before; a run failed; or
                another process runs the study.
        """
        self._check_supplies()
        try:
            with locked(self.work, wait=False):
                yield from self._run()
        except BlockingIOError:
            message = "another process runs a study in this folder"
            value, allowed = str(self.work), "a folder of its own"
            raise TrainingError(message, field="work", value=value, allowed=allowed) from None

    def _run(self) -> Iterator[str]:
        for step in walk(self.study, self.results, regardless=self.regardless):
            if step.why_not:
                continue
            self.make(step)
            if any(not path.exists() for path in step.runs.paths.values()):
                return  # other machines make the rest
            if step.phase.decides:
                keep(decide(self.study, step.phase, self.results), self.results)
            yield step.phase.name
            if step.phase.name == self.until:
                return

    def make(self, step: Step) -> None:
        """Make the missing records of a phase. Raises as `run`."""
        missing = plan(step.experiment, self.results, only=self.only).missing
        if not missing:
            return
        check_machine(step.runs, missing)
        if self.workers == 1:
            execute(step.experiment, self.results, self.work, only=self.only, report=self.report)
            return
        self._make_at_once(step.experiment, missing)

    def _make_at_once(self, experiment: Experiment, missing: list[str]) -> None:
        """Make records in several processes. The first run that fails ends it."""
        context = get_context("spawn")  # CUDA cannot be used in a forked process
        arguments = (self.workers,)
        with ProcessPoolExecutor(self.workers, context, _share_cores, arguments) as pool:
            begun = [
                pool.submit(_make_one, experiment, self.results, self.work, name)
                for name in missing
            ]
            try:
                for done, future in enumerate(as_completed(begun)):
                    self.report(experiment.name, done, len(missing))
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _check_supplies(self) -> None:
        """Raise DataError or ConfigError now for what a later phase would miss hours later."""
        phases = list(self.study.phases)
        if self.until:
            phases = phases[: phases.index(self.study.phase(self.until)) + 1]
        models: set[str] = set()
        splits: set[tuple[str, str]] = set()
        for phase in phases:
            for config in self.study.experiments[phase.name].planned().values():
                models.add(config.model)
                names = ("train", *config.measure.split("+"))
                splits |= set(product(config.tasks, names))
        for model in models:
            find_base(model)
        for task, split in sorted(splits):
            load_split(task, split)


def check_machine(runs: Plan, names: Sequence[str]) -> None:
    """Raise TrainingError if runs have partners that were made on another class of machine.

    Args:
        runs: of a phase.
        names: those that are to be made here. Their partners have the same seed.
    """
    here = machine_class(hardware())
    seeds = {runs.configs[name].seed for name in names}
    for name, path in runs.paths.items():
        if runs.configs[name].seed not in seeds or not path.exists():
            continue
        found = json.loads(path.read_text("utf-8"))["pairing"]["machine"]
        if found != here:
            message = (
                "this machine is of another class than that of the records of this seed; runs of "
                "two classes are no pair: go on there, or begin the study in another folder"
            )
            raise TrainingError(message, field=name, value=here, allowed=found)


def _share_cores(workers: int) -> None:
    """Give a process its share of the cores."""
    import torch  # here, in the new process

    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def _make_one(experiment: Experiment, results: Path, work: Path, name: str) -> None:
    execute(experiment, results, work, only=name, report=lambda *_: None)
