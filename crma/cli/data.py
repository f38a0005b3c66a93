"""`crma data`: the built-in domains."""

from pathlib import Path
from typing import Annotated

import typer

from crma.cli.answer import Answer, answers
from crma.cli.output import columns, note

group = typer.Typer()


@group.command(epilog="Next: crma train CONFIG")
@answers
def data(
    domains: Annotated[
        list[str] | None,
        typer.Argument(help="Domains to build; by default, all that this machine can build."),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="DOMAIN=FILE: use a source file that you already have."),
    ] = None,
) -> Answer:
    """Build the six domains into the cache and check their digests."""
    from crma.data.splits import build

    sources = {}
    for text in source or ():
        domain, _, path = text.partition("=")
        sources[domain] = Path(path)
    built = build(domains or None, sources=sources, note=note)
    return Answer(built, columns(list(built.items())) if built else "")
