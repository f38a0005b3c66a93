"""`crma serve`: becomes `python -m server`."""

from typing import Annotated, Literal

import typer

from crma.cli.answer import Json, Quiet
from crma.cli.options import DEFAULT_STORE, Model, Store
from crma.cli.program import become, options
from crma.models.base_model import DEFAULT_MODEL

group = typer.Typer()

_Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Where the model runs.")
]


@group.command(epilog='Next: crma generate "Your question" --task medical')
def serve(
    store: Store = DEFAULT_STORE,
    model: Model = DEFAULT_MODEL,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    device: _Device = None,
    allow_open: Annotated[
        bool, typer.Option("--allow-open", help="Serve without keys to other machines too.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve the tasks of a store, until SIGTERM or Ctrl-C.

    Every other setting is an environment variable CRMA_…: docs/settings.md lists them. With --json
    the log on stderr is JSON lines; with --quiet it has warnings only. Nothing goes to stdout.
    """
    settings = {"store": store, "model": model, "host": host, "port": port, "device": device}
    flags = {"allow_open": allow_open, "json": as_json, "quiet": quiet}
    become("server", options({**settings, **flags}))
