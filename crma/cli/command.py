"""The `crma` command: pull a base model, build data, train, evaluate, manage adapters and keys.

It never speaks HTTP. Results go to stdout, everything else to stderr.
The exit code is 0; 1 if a check failed; 2 if the command could not run.
"""

# No module of this package imports torch, transformers or numpy at its top, because `crma --help`
# would then take seconds. A command imports what it needs when it runs.

import sys

import typer
from rich.markup import escape

from crma.cli import data, evaluation, gate, keys, models, store, training
from crma.cli.output import note
from crma.core.errors import CrmaError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
for module in (models, data, training, store, evaluation, gate):
    app.registered_commands += module.group.registered_commands
app.add_typer(keys.group, name="keys")


def main() -> None:
    """Run the command. A CrmaError is printed as one line and gives exit code 2."""
    try:
        app()
    except CrmaError as error:
        allowed = f" (allowed: {error.allowed})" if error.allowed else ""
        text = f"{error.field or 'crma'}: {error.message}{allowed}"
        note(f"[red]error:[/red] {escape(text)}")
        sys.exit(2)
