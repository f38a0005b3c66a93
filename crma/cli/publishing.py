"""`crma store import`, `sign` and `promote`: what is published, signed, and let serve."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from crma.cli.answer import Answer, answers
from crma.cli.options import DEFAULT_STORE, Model, Store
from crma.cli.output import columns, note
from crma.models.base_model import DEFAULT_MODEL, find_base

group = typer.Typer()

_AuthorKey = Annotated[
    Path | None,
    typer.Option(help="PEM of the key that signed the folder: its model.sig must count."),
]
_SignKey = Annotated[
    Path | None, typer.Option(help="PEM of the private key that signs the new version.")
]
_PromptFormat = Annotated[
    Literal["raw", "chat", "template"] | None,
    typer.Option(
        help="raw, chat (the base model's chat template) or template (the adapter's own). "
        "Default: the adapter's own if it has one, else chat if the base model has one, else raw."
    ),
]
_Licence = Annotated[str, typer.Option(help="Licence of the adapter, such as Apache-2.0.")]
_TrustBase = Annotated[
    bool, typer.Option("--trust-base", help="Import it even if it names another base model.")
]


@group.command("import", epilog="Next: crma generate PROMPT --task NAME")
@answers
def import_adapter(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A PEFT LoRA: a folder with adapter_config.json and adapter_model.safetensors."
        ),
    ],
    name: Annotated[str, typer.Argument(help="The task name to publish it under.")],
    store: Store = DEFAULT_STORE,
    model: Model = DEFAULT_MODEL,
    licence: _Licence = "unknown",
    prompt_format: _PromptFormat = None,
    trust_base: _TrustBase = False,
    public_key: _AuthorKey = None,
    sign_key: _SignKey = None,
) -> Answer:
    """Publish a PEFT LoRA from a local folder as a task, and serve it.

    It was not trained with CRMA, so it serves with CRMA off only. An adapter that serves already,
    in the same prompt format and under the same licence, is not published again.
    """
    from crma.models.model_shape import read_shape
    from crma.store.import_format import describe
    from crma.store.opening import is_store, writable_store
    from crma.store.signature import signed_copy

    checked = nullcontext(folder) if public_key is None else signed_copy(folder, public_key)
    with checked as source:
        adapters = writable_store(store)
        if not is_store(adapters.root):
            note(f"starts a new store: {store}")
        served = adapters.channels().tasks.get(name)
        base = find_base(model)
        entry = adapters.import_peft(
            source,
            name,
            base,
            licence=licence,
            shape=read_shape(base),
            trust_base=trust_base,
            prompt_format=prompt_format,
            repeat=False,
            private_key=sign_key,
        )
    _note_replaced(name, served, entry.version, store)
    described = describe(entry.prompt_format)
    value = {
        "name": entry.name,
        "version": entry.version,
        "digest": entry.digest,
        "prompt_format": described,
        "served_before": served,
    }
    text = f"{entry.name}@{entry.version} {entry.digest}\nprompt format {described}"
    return Answer(value, text)


def _note_replaced(name: str, before: str | None, now: str, store: str) -> None:
    """Say what served before, and how to have it back."""
    if now == before:
        note(f"tasks/{name}: already published as {before}")
    elif before is not None:
        undo = f"crma store rollback --channel tasks/{name} --store {store}"
        note(f"replaces {before}; undo: {undo}")


@group.command()
@answers
def sign(
    key: Annotated[
        Path, typer.Argument(help="PEM of an elliptic private key: P-256, P-384 or P-521.")
    ],
    store: Store = DEFAULT_STORE,
    version: Annotated[
        list[str] | None,
        typer.Option(help="tasks/NAME/vN or backbones/vN, signed again if it is signed already."),
    ] = None,
) -> Answer:
    """Sign the versions that are named, or all without a signature.

    A version whose files are not those of its manifest is refused.
    """
    from crma.store.opening import open_store
    from crma.store.signing import sign_versions

    signed = list(sign_versions(open_store(store), key, version))
    if not signed:
        note("every version has a signature")
    return Answer({"signed": signed}, "\n".join(f"signed {place}" for place in signed))


@group.command()
@answers
def promote(
    candidate: Annotated[
        str, typer.Argument(help="A published version of the backbone that does not serve yet.")
    ],
    store: Store = DEFAULT_STORE,
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
) -> Answer:
    """Let a backbone serve, whole or as a blend, if no task suffers.

    Prints what was tried; with --json all the evidence. The exit code is 1 if the serving backbone
    stays.
    """
    from crma.evaluation.offline import Served
    from crma.store.opening import open_store
    from crma.training.promotion import promote as decide

    adapters = open_store(store)
    if not dry_run:
        adapters.writable_root()  # before the measurements, not after them
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
    if dry_run:
        note("a dry run: nothing has changed")
    return Answer(evidence, _decision(candidate, evidence), code=0 if evidence["lambda"] else 1)


def _decision(candidate: str, evidence: dict[str, Any]) -> str:
    """The decision in a sentence, under a line for each weight and task that was tried."""
    rows = [("WEIGHT", "TASK", "LOSS", "VERDICT")]
    for trial in evidence["tried"]:
        for task, score in trial["tasks"].items():
            verdict = "worse than allowed" if task in trial["harmed"] else "ok"
            rows.append((f"{trial['lambda']:g}", task, f"{score['loss']:.4f}", verdict))
    weight = evidence["lambda"]
    sentence = f"{candidate} may serve, at weight {weight:g}"
    if not weight:
        sentence = "the serving backbone stays"
    return f"{columns(rows)}\n{sentence}"
