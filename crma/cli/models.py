"""`crma pull`: base models."""

from contextlib import suppress
from typing import Annotated

import typer

from crma.cli.output import note
from crma.core.errors import UnsupportedModel
from crma.models.base_model import DEFAULT_MODEL
from crma.models.model_shape import read_shape

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
    with suppress(UnsupportedModel):  # such a model can be pulled, but takes no adapters
        read_shape(base)  # recorded now, because computing it takes seconds
    note(f"{base.name} {base.digest} in {base.path}")
