"""`crma serve`: becomes `python -m server`."""

from pathlib import Path
from typing import Annotated

import typer

from crma.cli.answer import Json, Quiet
from crma.cli.options import Store
from crma.cli.program import become, options
from crma.models.base_model import DEFAULT_MODEL

group = typer.Typer()

_Model = Annotated[
    str, typer.Option("--model", envvar="CRMA_MODEL", help="A pulled base model, or its folder.")
]


@group.command(epilog='Next: crma generate "Your question" --task medical')
def serve(
    store: Store = Path("adapters_store"),
    model: _Model = DEFAULT_MODEL,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", min=1, max=65535)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    allow_open: Annotated[
        bool, typer.Option("--allow-open", help="Serve without keys to other machines too.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve the tasks of a store until told to stop, by SIGTERM or Ctrl-C.

    Every other setting is an environment variable CRMA_…: docs/settings.md lists them. With --json
    the log on stderr is JSON lines; with --quiet it has warnings only. Nothing goes to stdout.
    """
    settings = {"store": store, "model": model, "host": host, "port": port, "device": device}
    flags = {"allow_open": allow_open, "json": as_json, "quiet": quiet}
    become("server", options({**settings, **flags}))
