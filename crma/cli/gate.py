"""`crma promote`: decides whether a new backbone may serve."""

from typing import Annotated

import typer

from crma.cli.options import DEFAULT_STORE, Model, StoreOption
from crma.cli.output import note, show_json
from crma.models.base_model import DEFAULT_MODEL, find_base

group = typer.Typer()


@group.command()
def promote(
    candidate: Annotated[
        str, typer.Argument(help="A published version of the backbone that does not serve yet.")
    ],
    store: StoreOption = DEFAULT_STORE,
    model: Model = DEFAULT_MODEL,
    margin: Annotated[
        float,
        typer.Option(help="Share of its loss by which a task may get worse; .002 nats are added."),
    ] = 0.01,
    newcomer_margin: Annotated[
        float, typer.Option(help="The same for a task that nobody uses yet.")
    ] = 0.1,
    allow_ungated: Annotated[
        list[str] | None,
        typer.Option(help="Promote although this task has no validation data; may be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide, and change nothing.")] = False,
) -> None:
    """Let a backbone serve, whole or as a blend, if no task suffers.

    Prints the evidence as JSON. The exit code is 1 if the serving backbone stays.
    """
    from crma.evaluation.offline import Served
    from crma.store.opening import open_store
    from crma.training.promotion import promote as decide

    adapters = open_store(store)
    served = Served(find_base(model), adapters)
    evidence = decide(
        served,
        candidate,
        margin=margin,
        newcomer_margin=newcomer_margin,
        allow_ungated=allow_ungated or (),
        dry_run=dry_run,
        note=note,
    )
    show_json(evidence)
    raise typer.Exit(0 if evidence["lambda"] else 1)
