"""`crma bench`: becomes `python -m bench` of a checkout."""

from pathlib import Path
from typing import Annotated

import typer

from crma.cli.answer import Json, Quiet
from crma.cli.program import become

group = typer.Typer()

CLIENTS = Path(__file__).parents[2] / "clients"


@group.command(epilog="What is measured: clients/bench/README.md")
def bench(
    server: Annotated[
        list[str] | None,
        typer.Option(
            "--server", metavar="NAME=URL", help="Measure this running server too; may be repeated."
        ),
    ] = None,
    rows: Annotated[
        str | None, typer.Option("--rows", metavar="ROW,…", help="Only these rows.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few requests, to see that it works.")
    ] = False,
    as_json: Json = False,  # noqa: ARG001 (its rows are JSON in any case)
    quiet: Quiet = False,
) -> None:
    """Measure the server beside PEFT and transformers.

    On this machine's CPU, in half an hour. Its rows are JSON, with or without --json; the table for
    people comes last, on stderr.
    """
    urls = [part for each in server or () for part in ("--url", each)]
    flags = [name for name, is_on in (("--quick", quick), ("--quiet", quiet)) if is_on]
    chosen = [] if rows is None else ["--rows", rows]
    become("bench", [*flags, *chosen, *urls], folder=CLIENTS)
