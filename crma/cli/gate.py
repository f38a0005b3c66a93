"""`crma promote`: whether a new backbone may serve."""

from typing import Annotated, Any

import typer

from crma.cli.options import DEFAULT_STORE, Model, StoreOption
from crma.cli.output import note, show_json
from crma.models.base_model import DEFAULT_MODEL, find_base

group = typer.Typer()


@group.command()
def promote(
    candidate: Annotated[
        str, typer.Argument(help="A published version of the backbone that does not serve.")
    ],
    store: StoreOption = DEFAULT_STORE,
    model: Model = DEFAULT_MODEL,
    margin: Annotated[
        float, typer.Option(help="By how much of its recorded loss a task may get worse.")
    ] = 0.01,
    newcomer_margin: Annotated[
        float, typer.Option(help="The same of a task that nobody uses yet.")
    ] = 0.1,
    allow_ungated: Annotated[
        list[str] | None, typer.Option(help="A task without validation data.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide and change nothing.")] = False,
) -> None:
    """Let a backbone serve, whole or cut back, if no task suffers; exit code 1 where the old one stays. JSON."""
    from crma.evaluation.offline import Served
    from crma.store.adapter_store import AdapterStore
    from crma.training.gate import promote as decide

    served = Served(find_base(model), AdapterStore(store))
    options: Any = {"margin": margin, "newcomer_margin": newcomer_margin, "dry_run": dry_run}
    options["allow_ungated"] = allow_ungated or ()
    evidence = decide(served, candidate, **options, note=note)
    show_json(evidence)
    raise typer.Exit(0 if evidence["lambda"] else 1)
