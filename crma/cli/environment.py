"""`crma env`: what this machine is, for a bug report."""

import typer

from crma.cli.answer import Answer, answers
from crma.cli.output import cell, columns

group = typer.Typer()


@group.command()
@answers
def env() -> Answer:
    """Say what this machine is, for a bug report.

    Versions, the CPU and its instructions, devices, models, settings. Settings are named without
    their values, because keys are among them.
    """
    from crma.core.machine import describe

    found = describe()
    rows = []
    for name, value in found.items():
        if isinstance(value, dict):
            rows += [(f"{name} {key}", cell(inner)) for key, inner in value.items()]
        else:
            rows.append((name, cell(value)))
    return Answer(found, columns(rows))
