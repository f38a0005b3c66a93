"""On/off ablation: its settings, and the generations to run.

The server and the `crma ablate` command share this module and `report`, which turns the outcomes
into the answer. Neither runs a model:

    settings = AblationSettings(("task+crma", "task"), seed=0)
    settings.check(question_set.questions)
    work = plan(question_set.questions, settings, select)
    outcomes = [run(job) for job in work.jobs]  # one ItemResult per job
    answer = body(question_set, settings, work.by_variant(outcomes), provenance)

A variant named twice is a null run: the second is labelled "task#2", and the flips between the two
show how much of any other comparison is noise. Variants that resolve to the same selection share
each item's outcome, so a null run has no flips by construction; `repeat=True` runs them separately.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from crma.core.errors import ConfigError
from crma.core.selection import AdapterSelection, read_cell
from crma.evaluation import scorers, statistics
from crma.evaluation.question_set import Question
from crma.evaluation.scorers import Likelihood, Scorer

Status = Literal["scored", "failed", "timed_out"]
MAX_COMPARISONS = 2_000_000
"""Pairs of a choice and an answer that one ablation may look through: a few seconds."""


@dataclass(frozen=True)
class AblationSettings:
    """The variants of an ablation and how their answers are judged and compared.

    Args:
        variants: variant names (`read_cell`), in the order of the report. A variant given twice
            makes a null run.
        scorer: a name in `scorers.SCORERS`.
        tolerance: absolute tolerance of the numeric scorer.
        relative_tolerance: relative tolerance of the numeric scorer.
        margin: variants that differ by less than this are equivalent; a share of items, or nats
            per token for perplexity, in (0, 1).
        seed: seed of the bootstrap, and of sampled answers.
        max_tokens: length limit of an answer.
        repeat: run variants of the same selection separately, to see nondeterminism.
        raw: ask the questions as raw prompts, without the prompt format.
        choices: every answer is one of these texts, or one of its question's own choices; () is
            any text. A scorer that compares choices generates nothing to constrain.
    """

    variants: tuple[str, ...] = ("task+crma", "task")
    scorer: str = "exact"
    tolerance: float = 0.0
    relative_tolerance: float = 0.0
    margin: float = 0.02
    seed: int = 0
    max_tokens: int = 16
    repeat: bool = False
    raw: bool = False
    choices: tuple[str, ...] | Literal["own"] = ()

    def choices_of(self, question: Question) -> tuple[str, ...]:
        """Return the texts one of which the answer to a question has to be; none: any text."""
        return question.choices if self.choices == "own" else self.choices

    def judge(self) -> Scorer:
        """Return the scorer with its tolerances. Raises ConfigError for an unknown scorer."""
        return scorers.scorer(self.scorer, self.tolerance, self.relative_tolerance)

    def check(self, questions: Sequence[Question]) -> None:
        """Check that these settings can judge the questions. Call it before anything runs.

        Raises:
            ConfigError: the scorer or margin is not allowed, the scorer cannot judge a question,
                or no choice is right.
        """
        self.judge()
        statistics.check_share(self.margin)
        self._check_num_comparisons(questions)
        num_steps = 0
        for i, question in enumerate(questions):
            place = f"questions[{i}]"
            scorers.check_answers(self.scorer, place, question.answers, question.choices)
            num_steps += scorers.num_steps(self.scorer, question.answers)
            if num_steps > scorers.MAX_PATTERN_STEPS:
                message = f"{place}: the patterns up to here are too large together."
                allowed = f"<= {scorers.MAX_PATTERN_STEPS} instructions of RE2 over all questions"
                raise ConfigError(message, field=place, value=num_steps, allowed=allowed)
            if self.choices:
                self._check_choices(place, question)

    def _check_num_comparisons(self, questions: Sequence[Question]) -> None:
        """Raises ConfigError for choices that it takes too long to look through for right ones."""
        if not self.choices:
            return
        pairs = (len(self.choices_of(each)) * len(each.answers) for each in questions)
        num_pairs = sum(pairs)
        if num_pairs > MAX_COMPARISONS:
            message = f"choices: {num_pairs} pairs of a choice and an answer are too many."
            allowed = f"<= {MAX_COMPARISONS} pairs over all questions"
            raise ConfigError(message, field="choices", value=num_pairs, allowed=allowed)

    def _check_choices(self, place: str, question: Question) -> None:
        """Raises ConfigError if a question cannot be answered by one of its choices."""
        if scorers.continuations(self.scorer, question.answers, question.choices):
            message = f"choices: the scorer {self.scorer!r} generates no answer."
            allowed = "left out, or a scorer that judges a generated text"
            raise ConfigError(message, field="choices", value=self.choices, allowed=allowed)
        choices = self.choices_of(question)
        is_right = self.judge()
        # Answer by answer, so that each is read (a pattern: compiled) once for all choices.
        pairs = product(question.answers, choices)
        if not any(is_right(choice, (answer,)) for answer, choice in pairs):
            message = f"{place}: none of its choices is a right answer."
            allowed = "choices, one of which is right"
            raise ConfigError(message, field="choices", value=list(choices), allowed=allowed)


@dataclass(frozen=True)
class ItemResult:
    """Outcome of one job.

    Args:
        status: "scored" items have a text, which may be empty; others are neither right nor wrong.
        text: the answer.
        error: why the item was not scored.
        likelihoods: those of the texts that the scorer compares, if any (`of_likelihoods`).
    """

    status: Status
    text: str | None = None
    error: str | None = None
    likelihoods: tuple[Likelihood, ...] = ()


@dataclass(frozen=True)
class Job:
    """One generation.

    Args:
        question: index of the question.
        selection: the adapters that answer it.
        nth: counts the runs of the same question and selection, from 0.
    """

    question: int
    selection: AdapterSelection
    nth: int = 0


@dataclass(frozen=True)
class AblationPlan:
    """The jobs to run, and which of them answers each question of a variant.

    Args:
        jobs: question by question.
        job_of: variant label -> [questions] index into `jobs`.
    """

    jobs: tuple[Job, ...]
    job_of: Mapping[str, tuple[int, ...]]

    def by_variant(self, outcomes: Sequence[ItemResult]) -> dict[str, tuple[ItemResult, ...]]:
        """Return label -> [questions] outcomes, from the outcomes of `jobs` in their order."""
        rows = {}
        for label, indices in self.job_of.items():
            rows[label] = tuple(outcomes[index] for index in indices)
        return rows


def plan(
    questions: Sequence[Question],
    settings: AblationSettings,
    select: Callable[[str, str], AdapterSelection],
) -> AblationPlan:
    """List the generations that answer every question under every variant.

    Args:
        questions: in the order of the report.
        settings: names the variants, and whether equal selections run separately.
        select: (variant, task name) -> selection; called once for each pair. It may raise if an
            adapter is missing.

    Raises:
        ConfigError: a variant's name is not allowed, or there is none.
    """
    variants = settings.variants
    labels = _labels(variants)
    selections: dict[tuple[str, str], AdapterSelection] = {}
    for task in dict.fromkeys(question.task for question in questions):
        for variant in dict.fromkeys(variants):
            selections[variant, task] = select(variant, task)
    jobs: list[Job] = []
    job_of: dict[str, list[int]] = {label: [] for label in labels}
    for index, question in enumerate(questions):
        shared: dict[AdapterSelection, int] = {}
        num_runs: Counter[AdapterSelection] = Counter()
        for label, variant in zip(labels, variants, strict=True):
            selection = selections[variant, question.task]
            if settings.repeat or selection not in shared:
                shared[selection] = len(jobs)
                jobs.append(Job(index, selection, num_runs[selection]))
                num_runs[selection] += 1
            job_of[label].append(shared[selection])
    return AblationPlan(tuple(jobs), {label: tuple(row) for label, row in job_of.items()})


def _labels(variants: Sequence[str]) -> list[str]:
    """Return a distinct label per variant: the second "task" becomes "task#2"."""
    labels = []
    seen: Counter[str] = Counter()
    for variant in variants or [""]:  # an empty list is refused like an empty name
        read_cell(variant)
        seen[variant] += 1
        is_first = seen[variant] == 1
        labels.append(variant if is_first else f"{variant}#{seen[variant]}")
    return labels


def of_likelihoods(
    scorer: str, texts: Sequence[str], likelihoods: Sequence[Likelihood]
) -> ItemResult:
    """Return the outcome of a scorer that compares the likelihoods of given texts.

    Args:
        scorer: its name.
        texts: [n >= 1] the scorer's `continuations`.
        likelihoods: [n] one per text.
    """
    if not all(math.isfinite(each.logprob) for each in likelihoods):
        return ItemResult("failed", error="a log-probability is not finite")
    likeliest = scorers.likeliest(scorer, texts, likelihoods)
    return ItemResult("scored", likeliest, likelihoods=tuple(likelihoods))
