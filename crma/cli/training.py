"""`crma train`, `crma experiment`, `crma plots`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from crma.cli.output import note, progress_bars, show_json
from crma.models.base_model import find_base

group = typer.Typer()


@group.command()
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; see crma/experiments.")],
    out: Annotated[
        Path | None, typer.Option(help="Run folder; a killed run goes on there.")
    ] = None,
    arm: Annotated[str | None, typer.Option(help="Instead of the file's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the file's.")] = None,
    ship: Annotated[
        Path | None, typer.Option(help="Store to publish into; a candidate if a backbone serves.")
    ] = None,
) -> None:
    """Train task after task, measure, and write the run's record."""
    from crma.store.adapter_store import AdapterStore
    from crma.training import protocol
    from crma.training.config import TrainConfig

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
            note(
                f"next: crma promote {candidate.version} --store {ship}"
                if candidate
                else f"{ship} serves it"
            )
    note(f"record: {folder / 'record.json'}")
    show_json(
        {
            key: record[key]
            for key in ("arm", "seed", "loss", "accuracy", "drift", "norm_log", "training")
        }
    )


@group.command()
def experiment(
    config: Annotated[Path, typer.Argument(help="A TOML file; see crma/experiments.")],
    results: Annotated[Path, typer.Option(help="Where the records go.")] = Path("crma/results"),
    work: Annotated[Path, typer.Option(help="Run folders.")] = Path("runs"),
    only: Annotated[
        str, typer.Option(help="Runs whose name is like this, such as '*-seed0'.")
    ] = "*",
) -> None:
    """Run every arm and seed of an experiment whose record is not there yet, and print the table of all."""
    from crma.training.experiment import execute, read_experiment
    from crma.training.tables import arms_table

    planned = read_experiment(config)
    with progress_bars() as bars:
        whole, row = bars.add_task(planned.name), bars.add_task("")

        def report(what: str, done: int, total: int) -> None:
            bars.update(
                whole if what == planned.name else row,
                description=what,
                completed=done,
                total=total,
            )

        paths = execute(planned, results, work, only=only, report=report)
    note(f"{len(paths)} records in {results / planned.name}")
    typer.echo(arms_table({path.stem: json.loads(path.read_text()) for path in paths}))


@group.command()
def plots(
    results: Annotated[
        Path, typer.Argument(help="Records, as the other commands write them.")
    ] = Path("crma/results"),
) -> None:
    """Draw the records as SVG into RESULTS/plots."""
    from crma.training.plots import draw

    draw(results, results / "plots")
