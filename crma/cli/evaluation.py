"""`crma ablate`: the same questions with and without CRMA."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crma.cli.options import Json, Model, StoreFolder
from crma.cli.output import interval, note, show_json
from crma.core.errors import ConfigError, CrmaError
from crma.evaluation.scorers import SCORERS
from crma.models.base_model import DEFAULT_MODEL, find_base

if TYPE_CHECKING:
    from crma.evaluation.question_set import QuestionSet
    from crma.store.adapter_store import AdapterStore

group = typer.Typer()

_Questions = Annotated[
    Path | None, typer.Option(help="JSON Lines. Default: the store's public question set.")
]
_Split = Annotated[
    str | None,
    typer.Option(help="Ask this split of every task trained here: validation or holdout."),
]
_Variants = Annotated[str, typer.Option(help="Comma-separated variants.")]
_Control = Annotated[Path | None, typer.Option(help="A store of LoRAs trained without CRMA.")]
_Strengths = Annotated[str, typer.Option(help="Injection strengths, such as 0,.25,.5,.75,1.")]
_Scorer = Annotated[str, typer.Option(help=f"One of {', '.join(SCORERS)}.")]
_Tolerance = Annotated[float, typer.Option(help="Absolute tolerance of the numeric scorer.")]
_Relative = Annotated[float, typer.Option(help="Relative tolerance of the numeric scorer.")]
_MaxTokens = Annotated[int, typer.Option(help="Length limit of an answer.")]
_Margin = Annotated[float, typer.Option(help="Variants this close are equivalent; in (0, 1).")]
_Raw = Annotated[bool, typer.Option("--raw", help="Ask raw questions, without the prompt format.")]
_Seed = Annotated[int, typer.Option(help="Seed of the bootstrap.")]


@group.command()
def ablate(
    store: StoreFolder,
    model: Model = DEFAULT_MODEL,
    questions: _Questions = None,
    split: _Split = None,
    variants: _Variants = "task+crma,task,crma,base",
    control: _Control = None,
    strengths: _Strengths = "",
    scorer: _Scorer = "exact",
    tolerance: _Tolerance = 0.0,
    relative_tolerance: _Relative = 0.0,
    max_tokens: _MaxTokens = 16,
    margin: _Margin = 0.02,
    seed: _Seed = 0,
    raw: _Raw = False,
    as_json: Json = False,
) -> None:
    """Ask the same questions with and without CRMA: accuracies, intervals and flips.

    A split is also answered by a naive Bayes classifier.
    """
    # Imported here, so that `crma --help` does not wait for torch.
    from crma.evaluation import offline
    from crma.evaluation.ablation import AblationSettings
    from crma.store.opening import open_store

    factors = _read_strengths(strengths)
    if max_tokens < 1:
        message = "not the length of an answer."
        raise ConfigError(message, field="--max-tokens", value=max_tokens, allowed="1 or more")
    settings = AblationSettings(
        variants=tuple(name.strip() for name in variants.split(",")),
        scorer=scorer,
        tolerance=tolerance,
        relative_tolerance=relative_tolerance,
        margin=margin,
        seed=seed,
        max_tokens=max_tokens,
        raw=raw,
    )
    adapters = open_store(store)
    control_store = open_store(control) if control else None
    file = questions or _public_set(store, split)
    sources = _sources(adapters) if split else None
    question_set = _question_set(sources, split, file)
    result = offline.ablate(
        offline.Served(find_base(model), adapters),
        question_set,
        settings,
        control=control_store,
        strengths=factors,
        naive_bayes_of=None if scorer == "perplexity" else sources,
        note=note,
    )
    if as_json:
        show_json(result)
    else:
        typer.echo(_table(split or str(file), result))


def _read_strengths(text: str) -> list[float]:
    """The comma-separated strengths. Raises ConfigError for one that is no finite number."""
    strengths = []
    for part in filter(None, text.split(",")):
        try:
            strength = float(part)
        except ValueError:
            strength = math.nan
        if not math.isfinite(strength):
            message = f"{part!r} is not a strength."
            allowed = "finite numbers, such as 0,.25,.5,.75,1"
            raise ConfigError(message, field="--strengths", value=part, allowed=allowed)
        strengths.append(strength)
    return strengths


def _public_set(store: Path, split: str | None) -> Path:
    """The store's public question set. Raises ConfigError if there is none and no split."""
    file = store / "question_sets" / "public.jsonl"
    if split is None and not file.exists():
        message = f"{store} has no public question set: ask a split (--split) or a file."
        allowed = "a file of questions"
        raise ConfigError(message, field="--questions", value=None, allowed=allowed)
    return file


def _sources(store: "AdapterStore") -> dict[str, str]:
    """The built-in domain or the folder of every serving task, by name, where it is known.

    A task that does not record its source has that of the built-in domain of its name, if any.
    """
    from crma.data.sources import DOMAINS
    from crma.training.gated_task import task_source

    sources = {}
    for name in store.task_names():
        try:
            sources[name] = task_source(store.task(name))
        except CrmaError as error:
            if name in DOMAINS:
                sources[name] = name
            else:
                note(f"{name} is left out: {error.message}")
    return sources


def _question_set(
    sources: Mapping[str, str] | None, split: str | None, file: Path
) -> "QuestionSet":
    """Return a split of the tasks, or the question set in a file."""
    from crma.evaluation.offline import split_questions
    from crma.evaluation.question_set import read_question_set

    if sources is None or split is None:
        return read_question_set(file)
    return split_questions(sources, split)


def _table(title: str, result: Mapping[str, Any]) -> str:
    """Lay out an ablation's answer: a line per variant, then a line per comparison."""
    lines = [f"{title}: accuracy [95 %, Wilson]"]
    for variant, row in result["variants"].items():
        if "perplexity" in row:
            perplexity = _number(row["perplexity"], ".4g")
            measured = f"perplexity {perplexity}, averaged over {row['scored']} answers"
        else:
            accuracy = _number(row["accuracy"], ".2f")
            counts = f"{row['correct']} of {row['scored']}"
            measured = f"{accuracy} {interval(row['wilson'])} {counts}"
        lines.append(f"{variant:<15} {measured}")
    for pair in result["comparisons"]:
        difference = _number(pair["difference"], "+.2f")
        line = f"{pair['a']} - {pair['b']}: {difference} {interval(pair['bootstrap'])}"
        flips = pair.get("mcnemar")
        if flips is not None:
            p = _number(flips["p"], ".2g")
            line += f", gained {flips['gained']}, lost {flips['lost']}, p = {p}"
        lines.append(line)
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    """Format a number, or a dash for one that too few items leave undefined."""
    return "–" if value is None else format(value, form)
