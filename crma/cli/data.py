"""`crma data`: the built-in domains, and CLINC150."""

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
        typer.Argument(
            help="Domains, or clinc; by default, all domains that this machine can build."
        ),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="DOMAIN=FILE: use a source that you already have."),
    ] = None,
) -> Answer:
    """Build the six domains into the cache and check their digests."""
    from crma.data.clinc import CLINC
    from crma.data.splits import build, build_clinc

    sources = {}
    for text in source or ():
        domain, _, path = text.partition("=")
        sources[domain] = Path(path)
    wanted = [domain for domain in domains or () if domain != CLINC]
    built = {}
    if CLINC in (*(domains or ()), *sources):
        built = build_clinc(sources.pop(CLINC, None), note=note)
    if wanted or not domains:
        built |= build(wanted or None, sources=sources, note=note)
    return Answer(built, columns(list(built.items())) if built else "")
