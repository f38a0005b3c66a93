"""`crma train`, `crma experiment` and `crma plots`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from crma.cli.output import note, progress_bars, show_json
from crma.models.base_model import find_base

group = typer.Typer()

_SUMMARY = ("arm", "seed", "loss", "accuracy", "drift", "norm_log", "training")


@group.command()
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; see crma/experiments.")],
    out: Annotated[
        Path | None, typer.Option(help="The run folder; a killed run resumes there.")
    ] = None,
    arm: Annotated[str | None, typer.Option(help="Replaces the file's arm.")] = None,
    seed: Annotated[int | None, typer.Option(help="Replaces the file's seed.")] = None,
    ship: Annotated[
        Path | None,
        typer.Option(
            help="Publish into this store; if a backbone serves there, the new one is a candidate."
        ),
    ] = None,
) -> None:
    """Train task after task, measure, and write the run's record."""
    from crma.store.adapter_store import AdapterStore
    from crma.training.config import TrainConfig
    from crma.training.protocol import Run
    from crma.training.shipping import ship as publish

    settings = TrainConfig.read(config, arm=arm, seed=seed)
    folder = out or Path("runs") / f"{config.stem}-{settings.arm}-{settings.seed}"
    with progress_bars() as bars:
        bar = bars.add_task("loading the model", total=None)

        def progress(description: str, done: int, total: int) -> None:
            bars.update(bar, description=description, completed=done, total=total)

        run = Run(settings, find_base(settings.model), folder, progress)
        record = run.execute()
        if ship is not None:
            candidate = publish(run, AdapterStore(ship))
            if candidate is None:
                note(f"{ship} serves it")
            else:
                note(f"next: crma promote {candidate.version} --store {ship}")
    note(f"record: {folder / 'record.json'}")
    show_json({key: record[key] for key in _SUMMARY})


@group.command()
def experiment(
    config: Annotated[Path, typer.Argument(help="A TOML file; see crma/experiments.")],
    results: Annotated[Path, typer.Option(help="The folder of the records.")] = Path(
        "crma/results"
    ),
    work: Annotated[Path, typer.Option(help="The folder of the run folders.")] = Path("runs"),
    only: Annotated[
        str, typer.Option(help="Only runs whose name matches a pattern, such as '*-seed0'.")
    ] = "*",
) -> None:
    """Make the missing records of an experiment, and print the table of all its records."""
    from crma.training.experiment import execute, read_experiment
    from crma.training.tables import arms_table

    planned = read_experiment(config)
    with progress_bars() as bars:
        whole_bar = bars.add_task(planned.name)
        run_bar = bars.add_task("")

        def report(description: str, done: int, total: int) -> None:
            bar = whole_bar if description == planned.name else run_bar
            bars.update(bar, description=description, completed=done, total=total)

        paths = execute(planned, results, work, only=only, report=report)
    note(f"{len(paths)} records in {results / planned.name}")
    typer.echo(arms_table({path.stem: json.loads(path.read_text()) for path in paths}))


@group.command()
def plots(
    results: Annotated[
        Path, typer.Argument(help="The folder of the records that the other commands wrote.")
    ] = Path("crma/results"),
) -> None:
    """Draw the records as SVG files in RESULTS/plots."""
    from crma.training.plots import draw

    draw(results, results / "plots")
