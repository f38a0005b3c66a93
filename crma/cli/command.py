"""The `crma` command: models, data, training, the adapter store, ablations, and a server's client.

Results go to stdout, everything else to stderr.
"""

# No module of this package imports torch, rich, httpx or another package that takes long at its
# top, because `crma --help` would then take long. A command imports what it needs when it runs.

import sys
from collections.abc import Iterable
from difflib import get_close_matches

import typer

from crma.cli import (
    bench,
    data,
    environment,
    evaluation,
    generation,
    keys,
    pull,
    serve,
    store,
    study,
    training,
)
from crma.cli.options import HELP_NAMES
from crma.core.errors import ConfigError, CrmaError, NotFound

HELP = """Start here: `crma pull`, then `crma serve`, then `crma generate "Your question"`.

Serve many fine-tuned tasks from one base model, and find out whether CRMA helps them.

Every command has --json and --quiet. Results go to stdout, everything else to stderr. The exit code
is 0: done; 1: it failed, or found a problem; 2: wrong use, and nothing was done.
"""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=HELP,
    context_settings=HELP_NAMES,
    rich_markup_mode=None,  # typer's boxes take twice as long as all the rest of `--help`
)
for module in (pull, serve, generation, evaluation, data, training, study, environment, bench):
    app.registered_commands += module.group.registered_commands
app.add_typer(store.group, name="store", short_help=store.SUMMARY)
app.add_typer(keys.group, name="keys", short_help=keys.SUMMARY)


def main() -> None:
    """Run the command. An expected error is one line on stderr, and exit code 1 or 2."""
    try:
        app()
    except CrmaError as error:
        _complain(explain(error))
        sys.exit(2 if isinstance(error, ConfigError | NotFound) else 1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _complain(f"{place}{error.strerror or error}")
        sys.exit(1)


def explain(error: CrmaError) -> str:
    """An error in a line: what is wrong, what is allowed, and what may have been meant."""
    place = f"{error.field or 'crma'}: "
    text = error.message if error.message.startswith(place) else place + error.message
    names = _listed(error.allowed)
    allowed = ", ".join(names) or str(error.allowed or "")
    if names or allowed not in text:
        text += f" (allowed: {allowed})"
    if isinstance(error.value, str):
        likely = get_close_matches(error.value, names, n=1)
        text += "".join(f" Did you mean {name!r}?" for name in likely)
    return text


def _listed(allowed: object) -> list[str]:
    """The names that are allowed; none if a sentence says what is."""
    if isinstance(allowed, str) or not isinstance(allowed, Iterable):
        return []
    return [str(name) for name in allowed]


def _complain(text: str) -> None:
    """Print an error, also if the command is to be quiet."""
    label = typer.style("error:", fg="red") if sys.stderr.isatty() else "error:"
    typer.echo(f"{label} {text}", err=True)
