"""`crma verify`, `crma import`, `crma rollback`: the adapter store."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from crma.cli.options import DEFAULT_STORE, Json, Model, StoreFolder, StoreOption
from crma.cli.output import note, show_json
from crma.models.base_model import DEFAULT_MODEL, find_base

group = typer.Typer()


@group.command()
def verify(store: StoreFolder, model: Model = DEFAULT_MODEL, as_json: Json = False) -> None:
    """Check every file, digest, shape and lineage of a store, and print the backbone's certificate."""
    from crma.method.injection import shapes_of_folder
    from crma.store.adapter_store import AdapterStore

    base = find_base(model)
    adapters = AdapterStore(store)
    problems = adapters.verify(base=base, shapes=shapes_of_folder(base.path))
    serving = adapters.backbone() if not problems else None
    certificate = {} if serving is None else serving.manifest.certificate
    if as_json:
        show_json(
            {"problems": [problem.message for problem in problems], "certificate": certificate}
        )
    for problem in problems:
        note(f"[red]✗[/red] {escape(problem.message)}")
    if not problems:
        summary = {key: certificate[key] for key in certificate if key != "layers"}
        note(
            f"[green]✓[/green] {store}: {', '.join(adapters.task_names()) or 'no tasks'}; certificate {summary}"
        )
    raise typer.Exit(1 if problems else 0)


@group.command("import")
def import_adapter(
    folder: Annotated[
        Path, typer.Argument(help="A PEFT LoRA: adapter_config.json and adapter_model.safetensors.")
    ],
    name: Annotated[str, typer.Argument(help="The task's name here.")],
    store: StoreOption = DEFAULT_STORE,
    model: Model = DEFAULT_MODEL,
    licence: str = "unknown",
) -> None:
    """Publish a PEFT LoRA from elsewhere as a task. It has never seen CRMA, so it serves without."""
    from crma.method.injection import shapes_of_folder
    from crma.store.adapter_store import AdapterStore

    base = find_base(model)
    entry = AdapterStore(store).import_peft(
        folder, name, base, licence=licence, shapes=shapes_of_folder(base.path)
    )
    note(f"{entry.name}@{entry.version} {entry.digest}")


@group.command()
def rollback(
    store: StoreOption = DEFAULT_STORE,
    channel: Annotated[
        str, typer.Option(help="backbone, and tasks that need the newer; or tasks/NAME.")
    ] = "backbone",
) -> None:
    """What served before serves again. A running server sees it at once."""
    from crma.store.adapter_store import AdapterStore

    note(f"serving: {AdapterStore(store).roll_back(channel).serving()}")
