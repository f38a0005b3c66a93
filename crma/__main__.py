"""The `crma` command: from pulling a base model to the plots. It never speaks HTTP.

Data goes to stdout, everything else to stderr. The exit code is 0, 1 where something that was checked is wrong, 2
where the command could not be carried out.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crma.errors import CrmaError
from crma.pull import DEFAULT_MODEL, find_base
from crma.scorers import SCORERS

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(stderr=True, highlight=False, soft_wrap=True)
note = console.print  # a line about what is going on

StoreFolder = Annotated[Path, typer.Argument(help="The adapter store.")]
StoreOption = Annotated[Path, typer.Option(help="The adapter store.")]
DEFAULT_STORE = Path("adapters_store")
Model = Annotated[str, typer.Option(help="A pulled model's name, or its folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")]


def show_json(value: Any) -> None:
    """The whole result."""
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def progress_bars() -> Progress:
    """Bars on standard error, with the time they took and will take."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)


@app.command()
def pull(source: Annotated[str, typer.Argument(help="Default model, hub id, or folder.")] = DEFAULT_MODEL) -> None:
    """Fetch and convert a base model into the cache; does nothing if it is there."""
    from crma.pull import pull as fetch

    base = fetch(source)
    note(f"{base.name} {base.digest} in {base.path}")


@app.command()
def data(
    domains: Annotated[list[str] | None, typer.Argument(help="Domains to build; all that can be if none.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="DOMAIN=FILE: a source that you already have.")] = None,
) -> None:
    """Build the six domains into the cache, and check their digests."""
    from crma.data import build

    pairs = [text.partition("=") for text in source or ()]
    show_json(build(domains or None, sources={domain: Path(path) for domain, _, path in pairs}, note=note))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; see crma/experiments.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; a killed run goes on there.")] = None,
    arm: Annotated[str | None, typer.Option(help="Instead of the file's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the file's.")] = None,
    ship: Annotated[Path | None, typer.Option(help="Store to publish into; a candidate if a backbone serves.")] = None,
) -> None:
    """Train task after task, measure, and write the run's record."""
    from crma import protocol
    from crma.config import TrainConfig
    from crma.store import AdapterStore

    settings = TrainConfig.read(config, arm=arm, seed=seed)
    folder = out or Path("runs") / f"{config.stem}-{settings.arm}-{settings.seed}"
    with progress_bars() as bars:
        bar = bars.add_task("loading the model", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bars.update(bar, description=what, completed=done, total=total)

        run = protocol.Run(settings, find_base(settings.model), folder, progress)
        record = run.execute()
        if ship is not None:
            candidate = protocol.ship(run, AdapterStore(ship))
            note(f"next: crma promote {candidate.version} --store {ship}" if candidate else f"{ship} serves it")
    note(f"record: {folder / 'record.json'}")
    show_json({key: record[key] for key in ("arm", "seed", "loss", "accuracy", "drift", "norm_log", "training")})


@app.command()
def experiment(
    config: Annotated[Path, typer.Argument(help="A TOML file; see crma/experiments.")],
    results: Annotated[Path, typer.Option(help="Where the records go.")] = Path("crma/results"),
    work: Annotated[Path, typer.Option(help="Run folders.")] = Path("runs"),
    only: Annotated[str, typer.Option(help="Runs whose name is like this, such as '*-seed0'.")] = "*",
) -> None:
    """Run every arm and seed of an experiment whose record is not there yet, and print the table of all."""
    from crma.experiment import execute, read_experiment
    from crma.tables import arms_table

    planned = read_experiment(config)
    with progress_bars() as bars:
        whole, row = bars.add_task(planned.name), bars.add_task("")

        def report(what: str, done: int, total: int) -> None:
            bars.update(whole if what == planned.name else row, description=what, completed=done, total=total)

        paths = execute(planned, results, work, only=only, report=report)
    note(f"{len(paths)} records in {results / planned.name}")
    typer.echo(arms_table({path.stem: json.loads(path.read_text()) for path in paths}))


@app.command()
def plots(
    results: Annotated[Path, typer.Argument(help="Records, as the other commands write them.")] = Path("crma/results"),
) -> None:
    """Draw the records as SVG into RESULTS/plots."""
    from crma.plots import draw

    draw(results, results / "plots")


@app.command()
def verify(store: StoreFolder, model: Model = DEFAULT_MODEL, as_json: Json = False) -> None:
    """Check every file, digest, shape and lineage of a store, and print the backbone's certificate."""
    from crma.injection import shapes_of_folder
    from crma.store import AdapterStore

    base = find_base(model)
    adapters = AdapterStore(store)
    problems = adapters.verify(base=base, shapes=shapes_of_folder(base.path))
    serving = adapters.backbone() if not problems else None
    certificate = {} if serving is None else serving.manifest.certificate
    if as_json:
        show_json({"problems": [problem.message for problem in problems], "certificate": certificate})
    for problem in problems:
        note(f"[red]✗[/red] {escape(problem.message)}")
    if not problems:
        summary = {key: certificate[key] for key in certificate if key != "layers"}
        note(f"[green]✓[/green] {store}: {', '.join(adapters.task_names()) or 'no tasks'}; certificate {summary}")
    raise typer.Exit(1 if problems else 0)


@app.command()
def ablate(
    store: StoreFolder,
    model: Model = DEFAULT_MODEL,
    questions: Annotated[Path | None, typer.Option(help="JSON Lines; the store's public set if not given.")] = None,
    split: Annotated[str | None, typer.Option(help="Instead: validation or holdout, of every built-in task.")] = None,
    variants: Annotated[str, typer.Option(help="Comma-separated.")] = "task+crma,task,crma,base",
    control: Annotated[Path | None, typer.Option(help="A store of LoRAs trained without CRMA.")] = None,
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
    from crma.question_set import read_question_set
    from crma.served import Served, split_questions
    from crma.served import ablate as run
    from crma.sources import DOMAINS
    from crma.store import AdapterStore

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
    result = run(served, asked, names, control=AdapterStore(control) if control else None, **options, note=note)
    if as_json:
        show_json(result)
        return
    typer.echo(f"{split or file}: accuracy [95 %, Wilson]")
    for variant, row in result["variants"].items():
        if scorer == "perplexity":
            typer.echo(f"{variant:<15} perplexity {row['perplexity']:.4g} of {row['scored']} answers")
        else:
            counts = f"{row['correct']} of {row['scored']}"
            typer.echo(f"{variant:<15} {row['accuracy']:.2f} {interval(row['wilson'])} {counts}")
    for pair in result["comparisons"]:
        text = f"{pair['a']} - {pair['b']}: {pair['difference']:+.2f} {interval(pair['bootstrap'])}"
        if flips := pair.get("mcnemar"):
            text += f", gained {flips['gained']}, lost {flips['lost']}, p = {flips['p']:.2g}"
        typer.echo(text)


@app.command()
def promote(
    candidate: Annotated[str, typer.Argument(help="A published version of the backbone that does not serve.")],
    store: StoreOption = DEFAULT_STORE,
    model: Model = DEFAULT_MODEL,
    margin: Annotated[float, typer.Option(help="By how much of its recorded loss a task may get worse.")] = 0.01,
    newcomer_margin: Annotated[float, typer.Option(help="The same of a task that nobody uses yet.")] = 0.1,
    allow_ungated: Annotated[list[str] | None, typer.Option(help="A task without validation data.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide and change nothing.")] = False,
) -> None:
    """Let a backbone serve, whole or cut back, if no task suffers; exit code 1 where the old one stays. JSON."""
    from crma.gate import promote as decide
    from crma.served import Served
    from crma.store import AdapterStore

    served = Served(find_base(model), AdapterStore(store))
    options: Any = {"margin": margin, "newcomer_margin": newcomer_margin, "dry_run": dry_run}
    options["allow_ungated"] = allow_ungated or ()
    evidence = decide(served, candidate, **options, note=note)
    show_json(evidence)
    raise typer.Exit(0 if evidence["lambda"] else 1)


@app.command()
def rollback(
    store: StoreOption = DEFAULT_STORE,
    channel: Annotated[str, typer.Option(help="backbone, and tasks that need the newer; or tasks/NAME.")] = "backbone",
) -> None:
    """What served before serves again. A running server sees it at once."""
    from crma.store import AdapterStore

    note(f"serving: {AdapterStore(store).roll_back(channel).serving()}")


@app.command("import")
def import_adapter(
    folder: Annotated[Path, typer.Argument(help="A PEFT LoRA: adapter_config.json and adapter_model.safetensors.")],
    name: Annotated[str, typer.Argument(help="The task's name here.")],
    store: StoreOption = DEFAULT_STORE,
    model: Model = DEFAULT_MODEL,
    licence: str = "unknown",
) -> None:
    """Publish a PEFT LoRA from elsewhere as a task. It has never seen CRMA, so it serves without."""
    from crma.injection import shapes_of_folder
    from crma.store import AdapterStore

    base = find_base(model)
    entry = AdapterStore(store).import_peft(folder, name, base, licence=licence, shapes=shapes_of_folder(base.path))
    note(f"{entry.name}@{entry.version} {entry.digest}")


def interval(bounds: list[float] | None) -> str:
    """[low, high], or a dash."""
    return "–" if bounds is None else f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"


def main() -> None:
    """Run the command; an error of the tree is one line and exit code 2."""
    try:
        app()
    except CrmaError as error:
        allowed = f" (allowed: {error.allowed})" if error.allowed else ""
        text = f"{error.field or 'crma'}: {error.message}{allowed}"
        note(f"[red]error:[/red] {escape(text)}")
        sys.exit(2)


if __name__ == "__main__":
    main()
