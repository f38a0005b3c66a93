"""The `crma` command: from pulling a base model to the plots. It never speaks HTTP.

Data goes to stdout, everything else to stderr. The exit code is 0, 1 where something that was checked is wrong, 2
where the command could not be carried out.
"""

import sys

import typer
from rich.markup import escape

from crma.cli import data, evaluation, gate, models, store, training
from crma.cli.output import note
from crma.core.errors import CrmaError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
for each in (models, data, training, store, evaluation, gate):
    app.add_typer(each.group)


def main() -> None:
    """Run the command; an error of the tree is one line and exit code 2."""
    try:
        app()
    except CrmaError as error:
        allowed = f" (allowed: {error.allowed})" if error.allowed else ""
        text = f"{error.field or 'crma'}: {error.message}{allowed}"
        note(f"[red]error:[/red] {escape(text)}")
        sys.exit(2)
