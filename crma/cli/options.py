"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_STORE = Path("adapters_store")
StoreFolder = Annotated[Path, typer.Argument(help="The adapter store.")]
StoreOption = Annotated[Path, typer.Option(help="The adapter store.")]
Model = Annotated[str, typer.Option(help="The name or the folder of a pulled base model.")]
Json = Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")]
