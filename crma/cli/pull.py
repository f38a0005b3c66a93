"""`crma pull`: base models."""

from contextlib import suppress
from typing import Annotated

import typer

from crma.cli.answer import Answer, answers
from crma.core.errors import UnsupportedModel
from crma.models.base_model import DEFAULT_MODEL

group = typer.Typer()


@group.command(epilog="Next: crma serve")
@answers
def pull(
    source: Annotated[
        str, typer.Argument(help="The default model's name, a hub id, or a folder.")
    ] = DEFAULT_MODEL,
) -> Answer:
    """Fetch a base model into the cache, unless it is there.

    The default model is converted into the Hugging Face layout, which takes 20 seconds.
    """
    from crma.models.model_shape import read_shape
    from crma.models.pull import pull as fetch

    base = fetch(source)
    with suppress(UnsupportedModel):  # such a model can be pulled, but takes no adapters
        read_shape(base)  # recorded now, because computing it takes seconds
    value = {"name": base.name, "digest": base.digest, "path": str(base.path)}
    return Answer(value, f"{base.name} {base.digest} in {base.path}")
