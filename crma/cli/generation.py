"""`crma generate` and `crma chat`: ask a running server."""

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crma.cli.answer import Answer, answers
from crma.cli.options import DEFAULT_SERVER, Crma, KeyFile, Server, Task
from crma.cli.output import note
from crma.cli.server_link import connected
from crma.core.errors import ConfigError

if TYPE_CHECKING:
    from crma_client import Client, Generation

group = typer.Typer()

_MaxTokens = Annotated[int | None, typer.Option(help="Length limit of an answer.")]
_Temperature = Annotated[
    float | None, typer.Option(help="0 takes the most probable token each time.")
]
_Seed = Annotated[int | None, typer.Option(help="Seed of the sampling.")]
_Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=JSON",
        help="Any other field of the request, such as top_p=0.9; may be repeated.",
    ),
]


@group.command(epilog="Next: the same with --no-crma, or crma ablate")
@answers
def generate(
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from stdin.")],
    server: Server = DEFAULT_SERVER,
    key_file: KeyFile = None,
    task: Task = None,
    crma: Crma = None,
    max_tokens: _MaxTokens = None,
    temperature: _Temperature = None,
    seed: _Seed = None,
    n: Annotated[int | None, typer.Option("-n", help="Answers to draw.")] = None,
    fields: _Fields = None,
    as_json: bool = False,
) -> Answer:
    """Ask a running server one question. The answer appears while it is generated.

    With --json it is the body of POST /generate: text, usage, timings, provenance.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    options: dict[str, Any] = {**_read_fields(fields), "task": task, "crma": crma, "seed": seed}
    options |= {"max_tokens": max_tokens, "temperature": temperature, "n": n}
    with connected(server, key_file) as client:
        if as_json or (n or 1) > 1:
            answer = client.generate(text, **options)
            return Answer(answer.raw, "\n".join(choice.text for choice in answer.choices))
        with client.stream(text, **options) as stream:
            _print_pieces(token.text for token in stream)
    note(_about(stream.result), style="dim")
    return Answer(stream.result.raw)


@group.command(epilog="An empty line, or Ctrl-D, ends the conversation.")
@answers
def chat(
    server: Server = DEFAULT_SERVER,
    key_file: KeyFile = None,
    task: Task = None,
    crma: Crma = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the first turn.")
    ] = None,
    max_tokens: _MaxTokens = None,
    temperature: _Temperature = None,
    seed: _Seed = None,
    fields: _Fields = None,
    as_json: bool = False,
) -> Answer:
    """Talk with a running server: a line of stdin is a turn.

    stdout has the answers. With --json the whole conversation is printed at its end.
    """
    options: dict[str, Any] = {**_read_fields(fields), "task": task, "crma": crma, "seed": seed}
    options |= {"max_tokens": max_tokens, "temperature": temperature}
    messages = [] if system is None else [{"role": "system", "content": system}]
    with connected(server, key_file) as client:
        for line in _turns():
            messages.append({"role": "user", "content": line})
            text = _answered(client, messages, options, as_json)
            messages.append({"role": "assistant", "content": text})
    return Answer({"messages": messages})


def _answered(
    client: "Client", messages: list[dict[str, str]], options: dict[str, Any], is_silent: bool
) -> str:
    """The answer to a conversation, printed piece by piece unless `is_silent`."""
    with client.stream_chat(messages, **options) as stream:
        pieces = (token.text for token in stream)
        if not is_silent:
            _print_pieces(pieces)
        for _ in pieces:
            pass
    return stream.result.text


def _turns() -> Iterator[str]:
    """Lines of stdin until one is empty; a terminal is shown where to write."""
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _print_pieces(pieces: Iterator[str]) -> None:
    """Print texts side by side as they come, and end the line."""
    for piece in pieces:
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


def _about(answer: "Generation") -> str:
    """Which adapters answered, and how fast, in a line."""
    crma = "on" if answer.crma else "off"
    tokens = answer.usage["completion_tokens"]
    seconds = answer.timings["e2e_s"]
    return f"{answer.task or 'base'}, CRMA {crma}: {tokens} tokens in {seconds:.2f} s"


def _read_fields(fields: list[str] | None) -> dict[str, Any]:
    """FIELD=JSON as a dictionary; what is no JSON is a text. Raises ConfigError without a "="."""
    found: dict[str, Any] = {}
    for each in fields or ():
        name, equals, value = each.partition("=")
        if not equals:
            message = f"{each!r} sets nothing."
            raise ConfigError(message, field="--set", value=each, allowed="FIELD=JSON")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
