"""`crma ablate`: the same questions with and without CRMA."""

from pathlib import Path
from typing import Annotated, Any

import typer

from crma.cli.options import Json, Model, StoreFolder
from crma.cli.output import interval, note, show_json
from crma.evaluation.scorers import SCORERS
from crma.models.base_model import DEFAULT_MODEL, find_base

group = typer.Typer()


@group.command()
def ablate(
    store: StoreFolder,
    model: Model = DEFAULT_MODEL,
    questions: Annotated[
        Path | None, typer.Option(help="JSON Lines; the store's public set if not given.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Instead: validation or holdout, of every built-in task.")
    ] = None,
    variants: Annotated[str, typer.Option(help="Comma-separated.")] = "task+crma,task,crma,base",
    control: Annotated[
        Path | None, typer.Option(help="A store of LoRAs trained without CRMA.")
    ] = None,
    strengths: Annotated[str, typer.Option(help="Of the injection, such as 0,.25,.5,.75,1.")] = "",
    scorer: Annotated[str, typer.Option(help=f"One of {', '.join(SCORERS)}.")] = "exact",
    tolerance: Annotated[float, typer.Option(help="Of numeric.")] = 0.0,
    relative_tolerance: float = 0.0,
    max_tokens: int = 16,
    margin: float = 0.02,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """The same questions with and without CRMA: accuracies, intervals, flips; of a split, also naive Bayes."""
    from crma.data.sources import DOMAINS
    from crma.evaluation.offline import Served, split_questions
    from crma.evaluation.offline import ablate as run
    from crma.evaluation.question_set import read_question_set
    from crma.store.adapter_store import AdapterStore

    served = Served(find_base(model), AdapterStore(store))
    built_in = [task for task in served.store.task_names() if task in DOMAINS]
    file = questions or store / "question_sets" / "public.jsonl"
    asked = split_questions(built_in, split) if split else read_question_set(file)
    names: Any = [name.strip() for name in variants.split(",")]
    options: Any = {"scorer": scorer, "max_tokens": max_tokens, "margin": margin, "seed": seed}
    options |= {"tolerance": tolerance, "relative_tolerance": relative_tolerance}
    options |= {
        "strengths": [float(share) for share in strengths.split(",") if share],
        "with_naive_bayes": bool(split) and scorer != "perplexity",
    }
    result = run(
        served,
        asked,
        names,
        control=AdapterStore(control) if control else None,
        **options,
        note=note,
    )
    if as_json:
        show_json(result)
        return
    typer.echo(f"{split or file}: accuracy [95 %, Wilson]")
    for variant, row in result["variants"].items():
        if scorer == "perplexity":
            typer.echo(
                f"{variant:<15} perplexity {row['perplexity']:.4g} of {row['scored']} answers"
            )
        else:
            counts = f"{row['correct']} of {row['scored']}"
            typer.echo(f"{variant:<15} {row['accuracy']:.2f} {interval(row['wilson'])} {counts}")
    for pair in result["comparisons"]:
        text = f"{pair['a']} - {pair['b']}: {pair['difference']:+.2f} {interval(pair['bootstrap'])}"
        if flips := pair.get("mcnemar"):
            text += f", gained {flips['gained']}, lost {flips['lost']}, p = {flips['p']:.2g}"
        typer.echo(text)
