"""`crma pull`: base models."""

from typing import Annotated

import typer

from crma.cli.output import note
from crma.models.base_model import DEFAULT_MODEL

group = typer.Typer()


@group.command()
def pull(
    source: Annotated[
        str, typer.Argument(help="Default model, hub id, or folder.")
    ] = DEFAULT_MODEL,
) -> None:
    """Fetch and convert a base model into the cache; does nothing if it is there."""
    from crma.models.pull import pull as fetch

    base = fetch(source)
    note(f"{base.name} {base.digest} in {base.path}")
