"""Runs a study: phase after phase, each set by the decisions before it, until one cannot go on.

A record that exists is not made again, so a killed study resumes where it stopped, on the same
machine or another one. Only the runs of one seed of a phase must be of one class of machine: they
are compared.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NamedTuple

from crma.core.errors import TrainingError
from crma.core.files import locked
from crma.data.splits import load_split
from crma.models.base_model import find_base
from crma.training.config import TrainConfig
from crma.training.decision import Decision, decide, keep
from crma.training.experiment import Experiment, Plan, make, one_by_one, plan
from crma.training.joint_runs import all_at_once, groups
from crma.training.partners import refuse, strangers
from crma.training.record import Progress, silent
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


def next_run(study: Study, results: Path) -> TrainConfig:
    """The first run without a record, or, if all have one, the first of the study."""
    steps = list(walk(study, results, regardless=False))
    for step in steps:
        if step.runs.missing and not step.why_not:
            return step.runs.configs[step.runs.missing[0]]
    return next(iter(steps[0].runs.configs.values()))


@dataclass(frozen=True)
class Conduct:
    """How a study is run.

    Attributes:
        study: the study.
        results: records are written to `<results>/<phase>/<run>.json`.
        work: of the run folders.
        workers: so many processes; 1: this one.
        together: so many runs of a kind train at once in a process (`joint_runs`).
        only: a pattern of run names, where several machines divide the runs of a phase.
        until: the last phase to run; empty: all.
        regardless: run what a ceiling makes pointless, too.
        graphs: on a GPU, runs that train together record their passes as CUDA graphs.
        report: called with (description, done, total).
    """

    study: Study
    results: Path
    work: Path
    workers: int
    together: int
    only: str
    until: str
    regardless: bool
    graphs: bool
    report: Progress

    def run(self) -> Iterator[str]:
        """Make the missing records of every phase, and write what each decides.

        Yields:
            The name of each phase, when all of its records are there.

        Where several processes run it, all is made that does not need a run that failed, before
        its error is raised; Ctrl-C ends them at once.

        Raises:
            ConfigError: there is no phase `until`, or the records of a phase allow no decision.
            DataError: the data of a phase that will run is not there.
            TrainingError: runs to make here have partners of another class of machine; records of a
                phase are of other settings, or gave another decision before; a run failed; or
                another process runs the study.
        """
        self.check()
        try:
            with locked(self.work, wait=False):
                yield from self._run()
        except BlockingIOError:
            message = "another process runs a study in this folder"
            value, allowed = str(self.work), "a folder of its own"
            raise TrainingError(message, field="work", value=value, allowed=allowed) from None

    def check(self) -> None:
        """Check before any work what would end it later. Raises as `run`."""
        self._check_supplies()
        refuse(self._strangers())

    def drop_strangers(self) -> list[Path]:
        """Delete the records that `run` would refuse to go on with. Returns them.

        Raises:
            DataError: the data of a phase that will run is not there; then nothing is deleted.
        """
        self._check_supplies()
        dropped = list(self._strangers())
        for path in dropped:
            path.unlink()
        return dropped

    def _strangers(self) -> dict[Path, dict[str, Any]]:
        found: dict[Path, dict[str, Any]] = {}
        for step in self._steps():
            found |= strangers(step.runs, self._missing(step))
        return found

    def _run(self) -> Iterator[str]:
        with self._pool() as pool:
            try:
                yield from self._phases(pool)
            except BaseException as error:
                a_run_failed = isinstance(error, Exception)  # otherwise, the time is up
                try:
                    # What other processes have begun may be hours of work.
                    pool.shutdown(wait=a_run_failed, cancel_futures=True)
                finally:
                    for worker in active_children():  # they would make what they were given before
                        worker.terminate()
                raise

    def _phases(self, pool: Executor) -> Iterator[str]:
        """Begin every phase as soon as it waits for none, and tell of each that is done."""
        told: set[str] = set()
        begun: dict[str, int] = {}  # phase -> its groups of runs
        waiting: dict[Future[None], str] = {}
        failed: list[BaseException] = []
        while True:
            for step in self._ready():
                name = step.phase.name
                if all(path.exists() for path in step.runs.paths.values()):
                    if name not in told:
                        self._decide(step.phase)
                        told.add(name)
                        yield name
                elif name not in begun:
                    futures = self._begin(pool, step)
                    begun[name] = len(futures)
                    waiting |= dict.fromkeys(futures, name)
                    if futures and self.workers == 1:
                        break  # one phase after the other
            if failed and not waiting:
                raise failed[0]
            if not waiting:
                return  # done, or other machines make the rest
            failed += self._wait_for_a_phase(waiting, begun)

    def _ready(self) -> Iterator[Step]:
        """The phases that run and wait for no other, to the last that is to run."""
        return (step for step in self._steps() if not step.waits_for)

    def _steps(self) -> Iterator[Step]:
        """The phases that run, as far as is known, to the last that is to run."""
        for step in walk(self.study, self.results, regardless=self.regardless):
            if not step.why_not:
                yield step
            if step.phase.name == self.until:
                return

    def _missing(self, step: Step) -> list[str]:
        """The runs of a phase to make here."""
        return plan(step.experiment, self.results, only=self.only).missing

    def _decide(self, phase: Phase) -> None:
        if phase.decides:
            keep(decide(self.study, phase, self.results), self.results)

    def _begin(self, pool: Executor, step: Step) -> list[Future[None]]:
        """Begin the missing runs of a phase, so many at once. Raises as `run`."""
        missing = self._missing(step)
        if not missing:
            return []
        refuse(strangers(step.runs, missing))
        configs = {name: step.runs.configs[name] for name in missing}
        at_once = partial(all_at_once, graphs=self.graphs)
        runner = at_once if self.together > 1 else one_by_one
        report = self.report if self.workers == 1 else silent
        arguments = (step.experiment, self.results, self.work)
        return [
            pool.submit(make, *arguments, group, report=report, runner=runner)
            for group in groups(configs, self.together)
        ]

    def _wait_for_a_phase(
        self, waiting: dict[Future[None], str], begun: dict[str, int]
    ) -> list[BaseException]:
        """Wait until all that was begun of some phase has ended. Returns what failed."""
        failed: list[BaseException] = []
        while True:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            ended = {waiting.pop(future) for future in done}
            failed += filter(None, (future.exception() for future in done))
            for name in ended:
                left = sum(name == each for each in waiting.values())
                self.report(name, begun[name] - left, begun[name])
            if ended - set(waiting.values()):
                return failed

    def _pool(self) -> Executor:
        """What makes runs: several processes, or this one."""
        if self.workers == 1:
            return Here()
        context = get_context("spawn")  # CUDA cannot be used in a forked process
        return ProcessPoolExecutor(self.workers, context, _share_cores, (self.workers,))

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


class Here(Executor):
    """Does what it is given in this process, at once."""

    def submit(  # type: ignore[override]
        self, task: Callable[..., None], /, *arguments: Any, **named: Any
    ) -> Future[None]:
        """Do it. Raises as the task does."""
        future: Future[None] = Future()
        task(*arguments, **named)
        future.set_result(None)
        return future


def _share_cores(workers: int) -> None:
    """Give a process its share of the cores."""
    import torch  # here, in the new process

    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
