"""`crma train`, `crma experiment` and `crma plots`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crma.cli.answer import Answer, answers
from crma.cli.output import columns, note
from crma.cli.progress import progress
from crma.core.errors import ConfigError
from crma.models.base_model import find_base

if TYPE_CHECKING:
    from crma.training.experiment import Plan
    from crma.training.shipping import Shipment

group = typer.Typer()

_SUMMARY = ("arm", "seed", "loss", "accuracy", "drift", "norm_log", "training")


@group.command(epilog="Next: crma ablate --store STORE --split holdout")
@answers
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
) -> Answer:
    """Train task after task, measure, and write the run's record."""
    from crma.store.opening import writable_store
    from crma.training.arms import ARMS
    from crma.training.config import TrainConfig
    from crma.training.protocol import Run
    from crma.training.shipping import check_shippable
    from crma.training.shipping import ship as publish

    settings = TrainConfig.read(config, arm=arm, seed=seed)
    target = None
    if ship is not None:
        check_shippable(ARMS[settings.arm])
        target = writable_store(ship)  # before the run, not after it
    folder = out or Path("runs") / f"{config.stem}-{settings.arm}-{settings.seed}"
    with progress() as report:
        run = Run(settings, find_base(settings.model), folder, report)
        if target is not None and run.ranks.sharded:
            raise _not_from_shards()
        record = run.execute()
        if not record:
            return Answer({})  # another process writes it
        shipment = None if target is None else publish(run, target)
    if shipment is not None:
        _note_shipment(shipment, ship)
    note(f"record: {folder / 'record.json'}")
    summary = {key: record[key] for key in _SUMMARY}
    return Answer(summary, columns([(key, str(value)) for key, value in summary.items()]))


def _not_from_shards() -> ConfigError:
    """The refusal to ship from processes that have a part of the base model each."""
    message = (
        "no process has the whole base model to measure what ships: train without --ship; then "
        "the same command in one process, on a CPU too, ships what is in the run folder"
    )
    return ConfigError(message, field="ship", value="with FSDP", allowed="one process")


def _note_shipment(shipment: "Shipment", store: Path | None) -> None:
    """Say what is in the store now, and what comes next."""
    for channel, version in shipment.existing.items():
        note(f"{channel}: already published as {version}")
    if shipment.candidate is None:
        note(f"{store} serves it")
    else:
        note(f"next: crma store promote {shipment.candidate.version} --store {store}")


@group.command(epilog="Next: crma plots")
@answers
def experiment(
    config: Annotated[Path, typer.Argument(help="A TOML file; see crma/experiments.")],
    results: Annotated[Path, typer.Option(help="The folder of the records.")] = Path(
        "crma/results"
    ),
    work: Annotated[Path, typer.Option(help="The folder of the run folders.")] = Path("runs"),
    only: Annotated[
        str, typer.Option(help="Only runs whose name matches a pattern, such as '*-seed0'.")
    ] = "*",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many runs there are and what they cost.")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Spread the runs over a Ray cluster, or this machine.")
    ] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="The cluster of --ray; by default RAY_ADDRESS.")
    ] = None,
    run_cpus: Annotated[float, typer.Option(help="CPUs of a run of --ray.", min=0.1)] = 1.0,
    run_gpus: Annotated[float, typer.Option(help="GPUs of a run of --ray.", min=0.0)] = 0.0,
) -> Answer:
    """Make the missing records of an experiment.

    Prints the table of all its records, those that were there included.
    """
    from crma.training.experiment import execute, one_by_one, plan, read_experiment
    from crma.training.experiment_report import experiment_report
    from crma.training.ray_runs import RayRuns

    planned = read_experiment(config)
    if dry_run:
        return _costs(plan(planned, results, only=only), results)
    runner = RayRuns(ray_address, run_cpus, run_gpus) if ray else one_by_one
    with progress(planned.name) as report:
        paths = execute(planned, results, work, only=only, report=report, runner=runner)
    note(f"{len(paths)} records in {results / planned.name}")
    records = {path.stem: json.loads(path.read_text()) for path in paths}
    return Answer(records, experiment_report(planned, records))


def _costs(runs: "Plan", results: Path) -> Answer:
    """How many runs an experiment has, and what the missing ones cost."""
    from crma.training.cost import estimate

    cost = estimate([runs.configs[name] for name in runs.missing], results)
    value = {"runs": len(runs.configs), "missing": runs.missing, **cost._asdict()}
    time = "unknown: there is no record of any machine"
    if cost.seconds is not None:
        time = f"{cost.seconds / 3600:.1f} h, one after the other, on {cost.machine}"
    rows = [
        ("runs", str(len(runs.configs))),
        ("missing", str(len(runs.missing))),
        ("training examples", str(cost.examples)),
        ("time", time),
    ]
    return Answer(value, columns(rows))


@group.command()
@answers
def plots(
    results: Annotated[
        Path, typer.Argument(help="The folder of the records that the other commands wrote.")
    ] = Path("crma/results"),
) -> Answer:
    """Draw the records as SVG files in RESULTS/plots."""
    from crma.training.plots import draw

    folder = results / "plots"
    draw(results, folder)
    drawn = sorted(str(path) for path in folder.glob("*.svg"))
    return Answer({"plots": drawn}, "\n".join(drawn))
