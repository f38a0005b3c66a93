"""GET /adapters, and what an administrator may do with an adapter: load, unload, pin, unpin."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from crma.core.errors import StoreError
from crma.store.entry import TaskEntry
from crma.store.import_format import describe
from server.engine.errors import AdapterInUse
from server.http.audited import audited
from server.http.auth import TheCaller, require_key
from server.http.dependencies import TheFrontend
from server.http.error_handlers import documented
from server.http.history import shown_history
from server.service.audit import Act
from server.service.caller import ADMIN
from server.service.errors import AdapterBusy
from server.service.frontend import Frontend

router = APIRouter()
admin = APIRouter(
    prefix="/adapters/{task}",
    responses=documented(401, 403, 404, 409, example_of="/adapters/{task}"),
)


class UnloadQuery(BaseModel):
    """What happens to requests that use the adapter."""

    model_config = ConfigDict(extra="forbid")

    when_in_use: Literal["refuse", "wait", "cancel"] = Field(
        "refuse",
        description="refuse: 409; wait: for them as long as a request may take, then 409; "
        "cancel: end them with an error.",
    )


@router.get(
    "/adapters",
    responses=documented(401, 403, example_of="/adapters"),
    dependencies=[require_key],
)
async def adapters(frontend: TheFrontend, caller: TheCaller) -> dict[str, Any]:
    """The base model, the backbone that serves, and each task that the key may use, as it serves.

    `lineage` is the backbone that the task was trained on; null: it was trained without one.
    """
    model = frontend.model
    base = {
        "name": model.name,
        "digest": model.digest,
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
    }
    backbone = frontend.registry.backbone
    shown = None
    if backbone is not None:
        shown = backbone.manifest.model_dump(include={"version", "digest", "certificate"})
    tasks = [task_info(entry, frontend) for entry in frontend.registry.serving_tasks(caller)]
    return {"base": base, "backbone": shown, "tasks": tasks}


@router.get("/adapters/{task}", responses=documented(401, 403, 404), dependencies=[require_key])
async def adapter(task: str, frontend: TheFrontend, caller: TheCaller) -> dict[str, Any]:
    """The versions of a task, the oldest first, and which of them served when.

    `problem` says why a version may not serve; null: it may. `history` has the changes of what
    serves, each with the evidence for it if there is some and the key may use every task.
    """
    record = frontend.registry.task_record(task, caller)
    shown = []
    for version, entry in record.versions.items():
        about = {"version": version, "serves": version == record.serving}
        if isinstance(entry, StoreError):
            shown.append({**about, "problem": entry.message})
            continue
        fields = {"licence", "created", "alpha", "trained_on"}
        manifest = entry.manifest.model_dump(mode="json", include=fields)
        shown.append({**about, "problem": None, **task_info(entry, frontend), **manifest})
    history = shown_history(record.history, caller)
    return {"name": task, "serving": record.serving, "versions": shown, "history": history}


@admin.post("/load")
async def load(
    task: str, frontend: TheFrontend, act: Annotated[Act, audited("load")]
) -> dict[str, Any]:
    """Brings an adapter (`name` or `name@version`) into memory before a request needs it."""
    entry = _entry(task, frontend, act)
    await frontend.engine.load(entry.digest)
    return task_info(entry, frontend)


@admin.post("/unload", responses=documented(422))
async def unload(
    task: str,
    frontend: TheFrontend,
    act: Annotated[Act, audited("unload")],
    query: Annotated[UnloadQuery, Query()],
) -> dict[str, Any]:
    """Unload an adapter; the next request that needs it loads it again.

    409 if requests still use it, or while it is pinned.
    """
    entry = _entry(task, frontend, act)
    wait_s = 0.0 if query.when_in_use == "refuse" else frontend.settings.request_timeout_s
    cancel = query.when_in_use == "cancel"
    try:
        await frontend.engine.unload(entry.digest, wait_s=wait_s, cancel=cancel)
    except AdapterInUse as error:
        raise AdapterBusy(str(error), field="task", value=task, allowed=error.allowed) from error
    return task_info(entry, frontend)


@admin.post("/pin")
async def pin(
    task: str, frontend: TheFrontend, act: Annotated[Act, audited("pin")]
) -> dict[str, Any]:
    """Load an adapter and keep it in memory until it is unpinned. Pinning twice changes nothing.

    A later version is another adapter.
    """
    entry = _entry(task, frontend, act)
    await frontend.engine.pin(entry.digest)
    return task_info(entry, frontend)


@admin.post("/unpin")
async def unpin(
    task: str, frontend: TheFrontend, act: Annotated[Act, audited("unpin")]
) -> dict[str, Any]:
    """Undoes `pin`; requests that use the adapter keep it.

    Name the version, `name@version`, if another one serves by now.
    """
    entry = _entry(task, frontend, act)
    frontend.engine.unpin(entry.digest)
    return task_info(entry, frontend)


def _entry(task: str, frontend: Frontend, act: Act) -> TaskEntry:
    """The entry of `name` or `name@version`, where it may serve; its version and digest are added
    to the act. Raises as `Frontend.resolve`.
    """
    entry = frontend.resolve(task, crma=False, caller=ADMIN).task
    assert entry is not None
    act.about.update(version=entry.version, digest=entry.digest)
    return entry


def task_info(entry: TaskEntry, frontend: Frontend) -> dict[str, Any]:
    """What an administrator sees of a version of a task."""
    manifest = entry.manifest
    used = entry.prompt_format or frontend.registry.base_format
    return {
        "name": manifest.name,
        "version": manifest.version,
        "digest": manifest.digest,
        "rank": manifest.rank,
        "scaling": manifest.scaling,
        "target_modules": manifest.target_modules,
        "prompt_format": None if used is None else describe(used),
        "lineage": manifest.backbone,
        "measured": manifest.measured,
        "resident": entry.digest in frontend.engine.resident(),
    }
