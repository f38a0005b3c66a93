"""`crma ablate`: the same questions with and without CRMA, here or on a server."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from crma.cli.ablation_table import table
from crma.cli.answer import Answer, answers
from crma.cli.options import DEFAULT_STORE, KeyFile, Model, Store
from crma.cli.output import note
from crma.cli.remote_ablation import ablate_on
from crma.core.errors import ConfigError, CrmaError
from crma.models.base_model import DEFAULT_MODEL, find_base

if TYPE_CHECKING:
    from crma.evaluation.question_set import QuestionSet
    from crma.store.adapter_store import AdapterStore

group = typer.Typer()

SCORERS = "exact, contains, numeric, regex, choice, choice_normalised, perplexity"

_Server = Annotated[
    str | None,
    typer.Option("--server", metavar="URL", help="Ask this running server instead of --store."),
]
_Questions = Annotated[
    str | None,
    typer.Option(
        help="A file of JSON Lines; with --server also the name of a set there. Default: public."
    ),
]
_Split = Annotated[
    Literal["train", "validation", "holdout"] | None,
    typer.Option(help="Ask this split of every task trained here."),
]
_Variants = Annotated[str, typer.Option(help="Comma-separated variants.")]
_Control = Annotated[Path | None, typer.Option(help="A store of LoRAs trained without CRMA.")]
_Strengths = Annotated[str, typer.Option(help="Injection strengths, such as 0,.25,.5,.75,1.")]
_Scorer = Annotated[str, typer.Option(help=f"One of {SCORERS}.")]
_Tolerance = Annotated[float, typer.Option(help="Absolute tolerance of the numeric scorer.")]
_Relative = Annotated[float, typer.Option(help="Relative tolerance of the numeric scorer.")]
_MaxTokens = Annotated[int, typer.Option(help="Length limit of an answer.")]
_Margin = Annotated[float, typer.Option(help="Variants this close are equivalent; in (0, 1).")]
_Raw = Annotated[bool, typer.Option("--raw", help="Ask raw questions, without the prompt format.")]
_Seed = Annotated[int, typer.Option(help="Seed of the bootstrap.")]


@group.command(epilog="What the columns mean: docs/evaluation.md")
@answers
def ablate(
    store: Store = DEFAULT_STORE,
    model: Model = DEFAULT_MODEL,
    server: _Server = None,
    key_file: KeyFile = None,
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
) -> Answer:
    """Ask the same questions with and without CRMA, and compare.

    Prints accuracies, intervals, flips, and what so many questions can show. A split is also
    answered by a naive Bayes classifier. --split, --control and --strengths need the store, and
    cannot be had with --server.
    """
    if max_tokens < 1:
        message = "not the length of an answer."
        raise ConfigError(message, field="--max-tokens", value=max_tokens, allowed="1 or more")
    settings = {
        "variants": tuple(name.strip() for name in variants.split(",")),
        "scorer": scorer,
        "tolerance": tolerance,
        "relative_tolerance": relative_tolerance,
        "margin": margin,
        "seed": seed,
        "max_tokens": max_tokens,
        "raw": raw,
    }
    if server is not None:
        _refuse_local({"--split": split, "--control": control, "--strengths": strengths})
        report = ablate_on(server, key_file, settings, questions)
    else:
        factors = _read_strengths(strengths)
        report = _ablate_here(store, model, settings, questions, split, control, factors)
    return Answer(report, table(split or questions or "public", report))


def _refuse_local(given: Mapping[str, object]) -> None:
    """Raises ConfigError for an option that only an ablation without a server honours."""
    for option, value in given.items():
        if value:
            message = "needs the store on this machine."
            raise ConfigError(message, field=option, value=str(value), allowed="without --server")


def _ablate_here(
    store: str,
    model: str,
    settings: Mapping[str, Any],
    questions: str | None,
    split: str | None,
    control: Path | None,
    strengths: list[float],
) -> dict[str, Any]:
    """The report of an ablation in this process."""
    # Imported here, so that `crma --help` does not wait for torch.
    from crma.evaluation import offline
    from crma.evaluation.ablation import AblationSettings
    from crma.store.opening import open_store

    adapters = open_store(store)
    control_store = open_store(control) if control else None
    file = Path(questions) if questions else _public_set(adapters, split)
    sources = _sources(adapters) if split else None
    question_set = _question_set(sources, split, file)
    return offline.ablate(
        offline.Served(find_base(model), adapters),
        question_set,
        AblationSettings(**settings),
        control=control_store,
        strengths=strengths,
        naive_bayes_of=None if settings["scorer"] == "perplexity" else sources,
        note=note,
    )


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


def _public_set(store: "AdapterStore", split: str | None) -> Path:
    """The store's public question set. Raises ConfigError if there is none and no split."""
    file = store.root / "question_sets" / "public.jsonl"
    if split is None and not file.exists():
        message = f"{store.root} has no public question set: ask a split (--split) or a file."
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
