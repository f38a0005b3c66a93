"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

StoreFolder = Annotated[Path, typer.Argument(help="The adapter store.")]
StoreOption = Annotated[Path, typer.Option(help="The adapter store.")]
DEFAULT_STORE = Path("adapters_store")
Model = Annotated[str, typer.Option(help="A pulled model's name, or its folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")]
