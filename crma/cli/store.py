"""`crma store`: what is in an adapter store, whether it is sound, and which versions serve."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crma.cli import publishing
from crma.cli.answer import Answer, answers
from crma.cli.options import DEFAULT_STORE, Model, Store
from crma.cli.output import cell, columns, note
from crma.models.base_model import DEFAULT_MODEL, find_base

if TYPE_CHECKING:
    from crma.store.adapter_store import AdapterStore
    from crma.store.entry import BackboneEntry, TaskEntry

SUMMARY = "The adapter store: what is in it, and which versions serve."

group = typer.Typer(
    no_args_is_help=True, help=f"Next: `crma store ls` lists what a store holds.\n\n{SUMMARY}"
)

_COLUMNS = ("channel", "serves", "versions", "digest")
_PublicKey = Annotated[
    Path | None, typer.Option(help="PEM of the key whose signature is required.")
]


@group.command(epilog="Next: crma store import FOLDER NAME --store STORE")
@answers
def init(store: Store = DEFAULT_STORE) -> Answer:
    """Start an empty store in a folder that is missing or empty.

    A store that is there already stays as it is.
    """
    from crma.store.opening import start_store

    names = start_store(store).task_names()
    text = f"{store} is an adapter store: {', '.join(names) or 'no tasks'}"
    return Answer({"store": store, "tasks": names}, text)


@group.command(epilog="Next: crma store show NAME")
@answers
def ls(store: Store = DEFAULT_STORE) -> Answer:
    """List the backbone and the tasks, and which versions serve."""
    from crma.store.opening import open_store

    adapters = open_store(store)
    serving = adapters.channels().serving()
    versions = {"backbone": adapters.backbone_versions()}
    for name in _published(adapters):
        versions[f"tasks/{name}"] = adapters.task_versions(name)
    listed = []
    for channel, published in versions.items():
        entry = _serving_entry(adapters, channel) if channel in serving else None
        listed.append(
            {
                "channel": channel,
                "serves": serving.get(channel),
                "versions": list(published),
                "digest": entry.digest if entry else None,
            }
        )
    for problem in _not_copied(adapters):
        note(problem)
    table = [tuple(name.upper() for name in _COLUMNS), *map(_row, listed)]
    return Answer({"store": store, "channels": listed}, columns(table))


def _not_copied(store: "AdapterStore") -> list[str]:
    """Why a copy of a store on another machine is not all that is there."""
    return [] if store.mirror is None else [each.message for each in store.mirror.problems]


def _published(store: "AdapterStore") -> list[str]:
    """The tasks that have a version, whether one serves or not."""
    from crma.core.files import names_in

    return sorted(names_in(store.root, "tasks"))


def _serving_entry(store: "AdapterStore", channel: str) -> "TaskEntry | BackboneEntry | None":
    if channel == "backbone":
        return store.backbone()
    return store.task(channel.removeprefix("tasks/"))


def _row(channel: dict[str, Any]) -> tuple[str, ...]:
    return tuple(cell(channel[name]) for name in _COLUMNS)


@group.command()
@answers
def show(
    name: Annotated[
        str, typer.Argument(help="A task, or backbone; @VERSION may follow: medical@v1.")
    ],
    store: Store = DEFAULT_STORE,
) -> Answer:
    """Show the manifest of a version.

    Without @VERSION, of the one that serves.
    """
    from crma.store.opening import open_store

    adapters = open_store(store)
    task, _, version = name.partition("@")
    if task == "backbone":
        entry = _backbone(adapters, version or None)
        manifest = entry.manifest.model_dump(mode="json", by_alias=True)
    else:
        manifest = adapters.task(task, version or None).manifest.model_dump(mode="json")
    rows = [(key, _short(value)) for key, value in manifest.items()]
    return Answer(manifest, columns(rows))


def _backbone(store: "AdapterStore", version: str | None) -> "BackboneEntry":
    """A version of the backbone. Raises NotFound if it is not there, or none serves."""
    from crma.core.errors import NotFound

    entry = store.backbone(version)
    if entry is None:
        allowed = [f"backbone@{each}" for each in store.backbone_versions()]
        message = "No backbone serves: name a version."
        raise NotFound(message, field="name", value="backbone", allowed=allowed)
    return entry


def _short(value: Any) -> str:
    """A field of a manifest in a line: nested values as keys only, if they are long."""
    if isinstance(value, dict):
        inner = [
            f"{key}={each}" for key, each in value.items() if not isinstance(each, list | dict)
        ]
        hidden = [f"{key}=…" for key, each in value.items() if isinstance(each, list | dict)]
        return repr(" ".join(inner + hidden)).strip("'") or "–"
    return cell(value)


@group.command()
@answers
def verify(
    store: Store = DEFAULT_STORE, model: Model = DEFAULT_MODEL, public_key: _PublicKey = None
) -> Answer:
    """Check files, digests, shapes, lineage and certificate.

    With --public-key also every version's signature. The exit code is 1 if anything is wrong. Every
    problem is listed. Of a store on another machine, what is new is fetched first; versions that
    are here already are not fetched again.
    """
    from crma.models.model_shape import read_shape
    from crma.store.opening import open_store

    adapters = open_store(store, public_key)
    base = find_base(model)
    problems = _not_copied(adapters)
    problems += [each.message for each in adapters.verify(base=base, shape=read_shape(base))]
    serving = adapters.backbone() if not problems else None
    certificate = {} if serving is None else serving.manifest.certificate
    value = {"problems": problems, "certificate": certificate}
    if problems:
        return Answer(value, "\n".join(f"✗ {problem}" for problem in problems), code=1)
    tasks = ", ".join(adapters.task_names()) or "no tasks"
    bounds = {key: bound for key, bound in certificate.items() if key != "layers"}
    return Answer(value, f"✓ {store}: {tasks}; certificate {bounds}")


group.registered_commands += publishing.group.registered_commands  # in this order


@group.command()
@answers
def rollback(
    store: Store = DEFAULT_STORE,
    channel: Annotated[
        str,
        typer.Option(
            help="tasks/NAME, or backbone; tasks that do not fit the earlier backbone go back too, "
            "or stop if they served nothing that fits."
        ),
    ] = "backbone",
) -> Answer:
    """Serve the version that served before the current one.

    A running server notices at once.
    """
    from crma.store.opening import open_store

    adapters = open_store(store)
    before = adapters.channels().serving()
    after = adapters.roll_back(channel).serving()
    stopped = sorted(before.keys() - after.keys())
    if stopped:
        note(f"no longer served: {', '.join(stopped)}")
    text = columns([("CHANNEL", "SERVES"), *after.items()])
    return Answer({"serving": after, "stopped": stopped}, text)


@group.command()
@answers
def gc(
    store: Store = DEFAULT_STORE,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete them. Nobody can bring them back.")
    ] = False,
) -> Answer:
    """List the old versions of tasks, or delete them.

    Old are those before the one that a roll back would serve. With --delete they are deleted. A
    server that still has one in memory goes on with it.
    """
    from crma.store.garbage import outdated
    from crma.store.opening import open_store

    adapters = open_store(store)
    found = outdated(adapters.root)
    lines = [f"{name}@{version}" for name, versions in found.items() for version in versions]
    if delete:
        for name, versions in found.items():
            for version in versions:
                adapters.remove_task(name, version)
        note(f"{len(lines)} versions deleted")
    else:
        note(f"{len(lines)} versions can be deleted" + (", with --delete" if lines else ""))
    return Answer({"outdated": lines, "deleted": delete}, "\n".join(lines))
