"""Options that several commands share. `crma serve` and `python -m server` know them as well."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_STORE = "adapters_store"
DEFAULT_SERVER = "http://127.0.0.1:8000"

Store = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="CRMA_STORE",
        metavar="STORE",
        help="The folder of the adapter store; to read one elsewhere: s3://…, gs://… or hf://….",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model", envvar="CRMA_MODEL", help="The name or the folder of a pulled base model."
    ),
]
Server = Annotated[str, typer.Option("--server", metavar="URL", help="The address of a server.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        exists=True,
        dir_okay=False,
        help="A file with the key that the server asks for, and no more.",
    ),
]
Task = Annotated[
    str | None,
    typer.Option(help="A task adapter: NAME or NAME@VERSION. Default: the base model alone."),
]
Crma = Annotated[
    bool | None,
    typer.Option(
        "--crma/--no-crma",
        help="The CRMA backbone on or off. Default: as the task adapter was trained.",
    ),
]

HELP_NAMES = {"help_option_names": ["-h", "--help"]}
