"""`crma study`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crma.cli.answer import Answer, answers
from crma.cli.output import columns, note
from crma.cli.progress import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crma.training.study import Study
    from crma.training.study_report import Forecast
    from crma.training.study_run import Conduct

group = typer.Typer()

_SPEED_S = 2.0  # that each measurement of --speed takes

File = Annotated[Path, typer.Argument(help="A TOML file, such as crma/experiments/sharing.toml.")]
Results = Annotated[Path, typer.Option(help="The folder of the records.")]
Work = Annotated[Path, typer.Option(help="The folder of the run folders.")]
Workers = Annotated[int, typer.Option(min=1, help="So many processes make runs at once.")]
Together = Annotated[
    int,
    typer.Option(
        min=1,
        help="So many runs that differ only in seed and order train at once in a process, on one "
        "base model: one run of a small model leaves most of a GPU idle.",
    ),
]
Only = Annotated[
    str, typer.Option(help="Only runs whose name matches a pattern, such as '*-seed0'.")
]
Until = Annotated[str, typer.Option(help="The last phase to run.")]
Regardless = Annotated[
    bool, typer.Option("--regardless", help="Run what a ceiling makes pointless, too.")
]
Graphs = Annotated[
    bool,
    typer.Option(help="On a GPU, runs that train together record their passes as CUDA graphs."),
]
FreshClass = Annotated[
    bool,
    typer.Option(
        "--fresh-class",
        help="Delete the records of another class of machine whose seeds have missing runs, and "
        "make them here. Without it, the study refuses to go on with those seeds.",
    ),
]
Speed = Annotated[
    bool,
    typer.Option(
        "--speed", help="Measure joint steps a second here, with 1 to --workers processes."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run, and what it costs.")]


@group.command(epilog="Next: crma plots")
@answers
def study(
    file: File,
    results: Results = Path("crma/results"),
    work: Work = Path("runs"),
    workers: Workers = 1,
    together: Together = 1,
    only: Only = "*",
    until: Until = "",
    regardless: Regardless = False,
    graphs: Graphs = True,
    fresh_class: FreshClass = False,
    speed: Speed = False,
    dry_run: DryRun = False,
) -> Answer:
    """Run experiments in order, each set by those before it.

    Records that exist are not made again. The tables of all phases are printed, and written to
    RESULTS/<study>.md.
    """
    from crma.training.study import read_study
    from crma.training.study_report import forecast
    from crma.training.study_run import Conduct

    planned = read_study(file)
    if dry_run:
        return _to_do(forecast(planned, results, regardless=regardless))
    with progress() as report:
        conduct = Conduct(
            planned, results, work, workers, together, only, until, regardless, graphs, report
        )
        if fresh_class:
            for path in conduct.drop_strangers():
                note(f"dropped: {path}")
        return _speeds(conduct) if speed else _run(conduct, planned, results)


def _run(conduct: "Conduct", planned: "Study", results: Path) -> Answer:
    """Run a study, and write its tables after each phase."""
    from crma.core.files import replace_file
    from crma.training.study_report import study_report

    target = results / f"{planned.name}.md"
    for phase in conduct.run():
        text = study_report(planned, results)
        replace_file(target, f"{text}\n".encode())
        note(f"{phase} is done: {target}")
    text = study_report(planned, results)
    return Answer({"report": text}, text)


def _speeds(conduct: "Conduct") -> Answer:
    """How fast runs train together, with so many processes and with fewer of them."""
    from crma.training.study_run import next_run
    from crma.training.study_speed import fastest, speeds

    conduct.check()
    config = next_run(conduct.study, conduct.results)
    fewer = [number for number in (1, 2, 4, 8, 16) if number < conduct.workers]
    workers = [*fewer, conduct.workers]
    found = speeds(config, together=conduct.together, workers=workers, seconds=_SPEED_S)
    rows = [(str(each.workers), str(each.graphs), f"{each.steps_per_s:.1f}") for each in found]
    value = {
        "speeds": [each._asdict() for each in found],
        "fastest": fastest(found)._asdict(),
    }
    return Answer(value, columns([("workers", "graphs", "joint steps/s"), *rows]))


def _to_do(phases: "Sequence[Forecast]") -> Answer:
    """What a study still has to do, and what that costs."""
    value = []
    for each in phases:
        cost = None if each.cost is None else each.cost._asdict()
        value.append({**each._asdict(), "cost": cost})
    known = [each.cost for each in phases if each.cost is not None]
    hours = sum(cost.seconds or 0 for cost in known) / 3600
    header = ("phase", "runs", "missing", "time", "state")
    total = (
        "all",
        str(sum(each.runs for each in phases)),
        str(sum(each.missing for each in phases)),
        f"{hours:.1f} h",
        f"of what is known, one run after the other, on {known[0].machine}" if known else "",
    )
    return Answer(value, columns([header, *(each.row() for each in phases), total]))
