"""`crma init`, `crma verify`, `crma sign`, `crma import`, `crma rollback`: the adapter store."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from crma.cli.options import DEFAULT_STORE, Json, Model, StoreFolder, StoreOption
from crma.cli.output import note, show_json
from crma.models.base_model import DEFAULT_MODEL, find_base

PublicKey = Annotated[Path | None, typer.Option(help="PEM of the key whose signature is required.")]
AuthorKey = Annotated[
    Path | None,
    typer.Option(help="PEM of the key that signed the folder: its model.sig must count."),
]
SignKey = Annotated[
    Path | None, typer.Option(help="PEM of the private key that signs the new version.")
]
PromptFormat = Annotated[
    str | None,
    typer.Option(
        help="raw, chat (the base model's chat template) or template (the adapter's own). "
        "Default: the adapter's own if it has one, else chat if the base model has one, else raw."
    ),
]

group = typer.Typer()


@group.command()
def init(store: StoreFolder) -> None:
    """Start an empty store in a folder that is missing or empty. A store stays as it is."""
    from crma.store.opening import start_store

    tasks = ", ".join(start_store(store).task_names()) or "no tasks"
    note(f"{store} is an adapter store: {escape(tasks)}")


@group.command()
def verify(
    store: StoreFolder,
    model: Model = DEFAULT_MODEL,
    public_key: PublicKey = None,
    as_json: Json = False,
) -> None:
    """Check a store: every file, digest, shape and lineage, the backbone's certificate, and with
    --public-key every version's signature.

    The exit code is 1 if anything is wrong. Every problem is listed.
    """
    from crma.models.model_shape import read_shape
    from crma.store.opening import open_store

    adapters = open_store(store, public_key)
    base = find_base(model)
    problems = adapters.verify(base=base, shape=read_shape(base))
    serving = adapters.backbone() if not problems else None
    certificate = {} if serving is None else serving.manifest.certificate
    if as_json:
        messages = [problem.message for problem in problems]
        show_json({"problems": messages, "certificate": certificate})
    for problem in problems:
        note(f"[red]✗[/red] {escape(problem.message)}")
    if not problems:
        tasks = ", ".join(adapters.task_names()) or "no tasks"
        bounds = {key: value for key, value in certificate.items() if key != "layers"}
        note(f"[green]✓[/green] {store}: {tasks}; certificate {bounds}")
    raise typer.Exit(1 if problems else 0)


@group.command()
def sign(
    store: StoreFolder,
    key: Annotated[
        Path, typer.Argument(help="PEM of an elliptic private key: P-256, P-384 or P-521.")
    ],
    version: Annotated[
        list[str] | None,
        typer.Option(help="tasks/NAME/vN or backbones/vN, signed again if it is signed already."),
    ] = None,
) -> None:
    """Sign versions of a store; without --version, those that have no signature.

    A version whose files are not those of its manifest is refused.
    """
    from crma.store.opening import open_store
    from crma.store.signing import sign_versions

    signed = sign_versions(open_store(store), key, version)
    for place in signed:
        note(f"signed {place}")
    if not signed:
        note("every version has a signature")


@group.command("import")
def import_adapter(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A PEFT LoRA: a folder with adapter_config.json and adapter_model.safetensors."
        ),
    ],
    name: Annotated[str, typer.Argument(help="The task name to publish it under.")],
    store: StoreOption = DEFAULT_STORE,
    model: Model = DEFAULT_MODEL,
    licence: Annotated[
        str, typer.Option(help="Licence of the adapter, such as Apache-2.0.")
    ] = "unknown",
    prompt_format: PromptFormat = None,
    trust_base: Annotated[
        bool,
        typer.Option("--trust-base", help="Import it even if it names another base model."),
    ] = False,
    public_key: AuthorKey = None,
    sign_key: SignKey = None,
) -> None:
    """Publish a PEFT LoRA from a local folder as a task, and serve it.

    It was not trained with CRMA, so it serves with CRMA off only. An adapter that serves already,
    in the same prompt format and under the same licence, is not published again.
    """
    from crma.models.model_shape import read_shape
    from crma.store.import_format import describe
    from crma.store.opening import is_store, writable_store
    from crma.store.signature import check_folder

    if public_key is not None:
        check_folder(folder, public_key)
    adapters = writable_store(store)
    is_new = not is_store(store)
    served = adapters.channels().tasks.get(name)
    base = find_base(model)
    shape = read_shape(base)
    entry = adapters.import_peft(
        folder,
        name,
        base,
        licence=licence,
        shape=shape,
        trust_base=trust_base,
        prompt_format=prompt_format,
        repeat=False,
        private_key=sign_key,
    )
    if is_new:
        note(f"started a new store: {store}")
    note(f"{entry.name}@{entry.version} {entry.digest}")
    note(f"prompt format {describe(entry.prompt_format)}")
    if entry.version == served:
        note(f"tasks/{name}: already published as {served}")
    elif served is not None:
        note(f"replaces {served}; undo: crma rollback --channel tasks/{name} --store {store}")


@group.command()
def rollback(
    store: StoreOption = DEFAULT_STORE,
    channel: Annotated[
        str,
        typer.Option(
            help="tasks/NAME, or backbone; tasks that do not fit the earlier backbone go back too, "
            "or stop if they served nothing that fits."
        ),
    ] = "backbone",
) -> None:
    """Serve the version that served before the current one. A running server notices at once."""
    from crma.store.opening import open_store

    adapters = open_store(store)
    before = adapters.channels().serving()
    after = adapters.roll_back(channel).serving()
    note(f"serving: {after}")
    stopped = sorted(before.keys() - after.keys())
    if stopped:
        note(f"no longer served: {', '.join(stopped)}")
