"""`crma keys add`, `crma keys ls`, `crma keys revoke`: who may call the server."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crma.access.scope import Scope
from crma.cli.answer import Answer, answers
from crma.cli.output import note

if TYPE_CHECKING:
    from crma.access.key import Key

SUMMARY = "The keys of a server, in a file: who may call it."

group = typer.Typer(
    no_args_is_help=True, help=f"Next: `crma keys add NAME` makes a key.\n\n{SUMMARY}"
)

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
@answers
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
) -> Answer:
    """Make a key, and print it.

    It cannot be shown again, because the file has its hash only.
    """
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
    note(f"key {name} is for {', '.join(record.scopes)}; {file} has its hash only")
    return Answer({"key": key, **_shown(record)}, key)


@group.command()
@answers
def ls(file: KeyFileOption) -> Answer:
    """List the keys: names, what they may do, and when they were made."""
    from crma.access.key_file import KeyFile

    keys = [_shown(key) for key in KeyFile(file).read()]
    return Answer({"keys": keys}, "\n".join(map(_line, keys)))


def _shown(key: "Key") -> dict[str, Any]:
    """What may be shown of a key: not its hash."""
    return key.model_dump(mode="json", exclude={"sha256"})


def _line(key: Mapping[str, Any]) -> str:
    """A key as `ls` lists it."""
    limits = [f" {name}={limit}" for name, limit in key["limits"].items() if limit is not None]
    tasks = "all tasks" if key["tasks"] is None else ", ".join(key["tasks"])
    tenant = f" tenant {key['tenant']}" if key["tenant"] else ""
    scopes = ", ".join(key["scopes"])
    return f"{key['name']} [{scopes}] {tasks}{tenant}{''.join(limits)} since {key['created']}"


@group.command()
@answers
def revoke(name: Name, file: KeyFileOption) -> Answer:
    """Remove a key.

    A running server refuses it within seconds; what it runs for it goes on.
    """
    from crma.access.key_file import KeyFile

    KeyFile(file).revoke(name)
    return Answer({"revoked": name}, f"key {name} is revoked")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
