"""GET /adapters, and what an administrator may do with one: load, unload, pin, unpin."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field

from crma.store.entry import TaskEntry
from server.engine.errors import AdapterInUse
from server.http.auth import require_admin, require_key
from server.http.dependencies import TheFrontend
from server.http.error_handlers import documented
from server.service.errors import AdapterBusy
from server.service.frontend import Frontend

router = APIRouter()
RESPONSES = documented(401, 403, 404, 409, of="/adapters/{task}")
admin = APIRouter(
    prefix="/adapters/{task}", dependencies=[Depends(require_admin)], responses=RESPONSES
)


class UnloadQuery(BaseModel):
    """What is to become of requests that use the adapter."""

    model_config = ConfigDict(extra="forbid")

    when_in_use: Literal["refuse", "wait", "cancel"] = Field(
        "refuse",
        description="409; wait for them as long as a request may take, then 409; or end them with an error.",
    )


@router.get(
    "/adapters", responses=documented(401, of="/adapters"), dependencies=[Depends(require_key)]
)
async def adapters(frontend: TheFrontend) -> dict[str, Any]:
    """The base model, the backbone that serves, and each task's serving version.

    `lineage`: the backbone that the task was trained on; null: it never saw one.
    """
    serving = frontend.registry.backbone
    backbone = serving and serving.manifest.model_dump(include={"version", "digest", "certificate"})
    tasks = [_task_info(entry, frontend) for entry in frontend.registry.serving_tasks()]
    return {"base": frontend.model.model_dump(), "backbone": backbone, "tasks": tasks}


def _task_info(entry: TaskEntry, frontend: Frontend) -> dict[str, Any]:
    manifest, resident = entry.manifest, entry.digest in frontend.registry.pool.resident()
    names = ("name", "version", "digest", "rank", "scaling", "target_modules")
    fields = {name: getattr(manifest, name) for name in names}
    return {
        **fields,
        "lineage": manifest.backbone,
        "measured": manifest.measured,
        "resident": resident,
    }


@admin.post("/load")
async def load(task: str, frontend: TheFrontend) -> dict[str, Any]:
    """Brings an adapter (`name` or `name@version`) into memory before a request needs it."""
    return await _apply(frontend, task, frontend.registry.pool.load)


@admin.post("/unload", responses=documented(422))
async def unload(
    task: str, frontend: TheFrontend, query: Annotated[UnloadQuery, Query()]
) -> dict[str, Any]:
    """Frees its memory; it loads again when a request needs it. 409 if requests still use it, or while it is pinned."""
    pool, digest = frontend.registry.pool, frontend.resolve(task, crma=False).selection.task_digest
    if query.when_in_use == "cancel" and digest is not None and digest not in pool.pinned:
        frontend.engine.cancel_adapter(digest)
    wait_s = 0.0 if query.when_in_use == "refuse" else frontend.settings.request_timeout_s
    try:
        return await _apply(frontend, task, partial(pool.unload, wait_s=wait_s))
    except AdapterInUse as error:
        raise AdapterBusy(str(error), field="task", value=task, allowed=error.allowed) from error


@admin.post("/pin")
async def pin(task: str, frontend: TheFrontend) -> dict[str, Any]:
    """Loads it, and keeps it in memory until it is unpinned. Once is enough. A later version is another adapter."""
    return await _apply(frontend, task, frontend.registry.pool.pin)


@admin.post("/unpin")
async def unpin(task: str, frontend: TheFrontend) -> dict[str, Any]:
    """Takes back `pin`, of `name@version` if another version serves by now; requests that use the adapter keep it."""
    return await _apply(frontend, task, frontend.registry.pool.unpin)


async def _apply(frontend: Frontend, task: str, action: Callable[[str], None]) -> dict[str, Any]:
    entry = frontend.resolve(task, crma=False).task
    assert entry is not None
    await asyncio.to_thread(action, entry.digest)
    return _task_info(entry, frontend)
