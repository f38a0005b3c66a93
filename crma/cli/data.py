"""`crma data`: the built-in domains."""

from pathlib import Path
from typing import Annotated

import typer

from crma.cli.output import note, show_json

group = typer.Typer()


@group.command()
def data(
    domains: Annotated[
        list[str] | None, typer.Argument(help="Domains to build; all that can be if none.")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="DOMAIN=FILE: a source that you already have.")
    ] = None,
) -> None:
    """Build the six domains into the cache, and check their digests."""
    from crma.data.splits import build

    pairs = [text.partition("=") for text in source or ()]
    show_json(
        build(domains or None, sources={domain: Path(path) for domain, _, path in pairs}, note=note)
    )
