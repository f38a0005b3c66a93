"""`crma keys add`, `crma keys ls`, `crma keys revoke`: who may call the server."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from crma.access.scope import Scope
from crma.cli.options import Json
from crma.cli.output import note, show_json

group = typer.Typer(no_args_is_help=True, help="The keys of the server, in a file.")

KeyFileOption = Annotated[
    Path,
    typer.Option(
        "--file",
        envvar="CRMA_KEYS_FILE",
        help="The file of keys. The server reads it again when it changes.",
    ),
]
Name = Annotated[str, typer.Argument(help="The name of the key.")]


@group.command()
def add(
    name: Name,
    file: KeyFileOption,
    scopes: Annotated[
        str, typer.Option(help=f"What it is for: {', '.join(Scope)}, separated by commas.")
    ] = "generate",
    tasks: Annotated[
        str | None,
        typer.Option(help="The only tasks that exist for it, separated by commas. Default: all."),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(help="Keys of one tenant share cached prefixes. Default: its own."),
    ] = None,
    rate: Annotated[int | None, typer.Option(help="Requests a minute. Default: no limit.")] = None,
    tokens_per_min: Annotated[
        int | None,
        typer.Option(help="Tokens of prompts and answers a minute. Default: no limit."),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests at once. Default: no limit.")
    ] = None,
) -> None:
    """Make a key, and print it: it cannot be shown again, because the file has its hash only."""
    from crma.access.key import digest_of, new_key, read_key
    from crma.access.key_file import KeyFile

    key = new_key()
    limits = {
        "requests_per_minute": rate,
        "tokens_per_minute": tokens_per_min,
        "max_concurrent": concurrency,
    }
    record = read_key(
        name=name,
        sha256=digest_of(key),
        scopes=_listed(scopes),
        tasks=None if tasks is None else _listed(tasks),
        tenant=tenant,
        limits=limits,
    )
    KeyFile(file).add(record)
    typer.echo(key)
    note(f"key {escape(name)} is for {', '.join(record.scopes)}; {file} has its hash only")


@group.command()
def ls(file: KeyFileOption, as_json: Json = False) -> None:
    """List the keys: names, what they may do, and when they were made."""
    from crma.access.key_file import KeyFile

    shown = [key.model_dump(mode="json", exclude={"sha256"}) for key in KeyFile(file).read()]
    if as_json:
        show_json({"keys": shown})
        return
    for key in shown:
        limits = {name: limit for name, limit in key.pop("limits").items() if limit is not None}
        tasks = "all tasks" if key["tasks"] is None else ", ".join(key["tasks"])
        tenant = f" tenant {key['tenant']}" if key["tenant"] else ""
        scopes = ", ".join(key["scopes"])
        bounds = "".join(f" {name}={limit}" for name, limit in limits.items())
        typer.echo(f"{key['name']} [{scopes}] {tasks}{tenant}{bounds} since {key['created']}")


@group.command()
def revoke(name: Name, file: KeyFileOption) -> None:
    """Remove a key. A running server refuses it within seconds; what it runs for it goes on."""
    from crma.access.key_file import KeyFile

    KeyFile(file).revoke(name)
    note(f"key {escape(name)} is revoked")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
