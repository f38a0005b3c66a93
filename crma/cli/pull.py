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
    from crma.models.serving_record import read_served

    base = fetch(source)
    # Recorded now, because to compute them takes seconds. A model that transformers does not know
    # can be pulled; and one that it does may take no adapters.
    with suppress(UnsupportedModel, OSError, ValueError):
        read_shape(base)
        read_served(base)
    value = {"name": base.name, "digest": base.digest, "path": str(base.path)}
    return Answer(value, f"{base.name} {base.digest} in {base.path}")
