"""What a command answers, and the two options that every command has: `--json` and `--quiet`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from crma.cli.output import be_quiet, print_json

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but the result and errors.")
]
_ADDED = {"as_json": Json, "quiet": Quiet}


@dataclass(frozen=True)
class Answer:
    """The result of a command.

    Args:
        value: all of it, as `--json` prints it.
        text: what a person reads instead; empty: nothing.
        code: the exit code: 0, or 1 if the command found a problem.
    """

    value: Any
    text: str = ""
    code: int = 0


def answers(function: Callable[..., Answer]) -> Callable[..., None]:
    """Make a command of a function: it has `--json` and `--quiet` too, and prints the answer.

    A function that prints while it works has a parameter `as_json` of its own, without annotation
    for typer, and is told.
    """
    signature = inspect.signature(function)
    is_told = "as_json" in signature.parameters
    own = [each for each in signature.parameters.values() if each.name not in _ADDED]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in _ADDED.items()
    ]

    @wraps(function)
    def command(*, as_json: bool, quiet: bool, **arguments: Any) -> None:
        be_quiet(quiet)
        if is_told:
            arguments["as_json"] = as_json
        answer = function(**arguments)
        if as_json:
            print_json(answer.value)
        elif answer.text:
            typer.echo(answer.text)
        if answer.code:
            raise typer.Exit(answer.code)

    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own] + added
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command
