"""`crma env`: what this machine is, for a bug report."""

import typer

from crma.cli.answer import Answer, answers
from crma.cli.output import columns

group = typer.Typer()


@group.command()
@answers
def env() -> Answer:
    """Say what this machine is: versions, CPU and its instructions, devices, models, settings.

    A bug report needs it. Settings are named without their values, because keys are among them.
    """
    from crma.core.machine import describe

    found = describe()
    rows = []
    for name, value in found.items():
        if isinstance(value, dict):
            rows += [(f"{name} {key}", str(inner)) for key, inner in value.items()]
        else:
            shown = ", ".join(value) if isinstance(value, list) else str(value)
            rows.append((name, shown or "–"))
    return Answer(found, columns(rows))
