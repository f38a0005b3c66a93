"""GET /adapters, and what an administrator may do with one: load, unload, pin, unpin."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import APIRouter, Depends

from crma.store import TaskEntry
from server.auth import require_admin, require_key
from server.engine.request import EngineError
from server.errors import ApiError
from server.frontend import Frontend, TheFrontend
from server.routes.responses import errors
from server.schemas import AdaptersResponse, BackboneInfo, TaskInfo

router = APIRouter()
admin = APIRouter(prefix="/adapters/{task}", dependencies=[Depends(require_admin)])

ADMIN_ERRORS = errors(401, 403, 404, 409)


@router.get("/adapters", response_model=AdaptersResponse, responses=errors(401), dependencies=[Depends(require_key)])
async def adapters(frontend: TheFrontend) -> AdaptersResponse:
    """The base model, the backbone that serves, and each task's serving version."""
    resident = frontend.registry.pool.resident()
    backbone = frontend.registry.backbone
    info = None
    if backbone is not None:
        certificate = backbone.manifest.certificate
        info = BackboneInfo(version=backbone.version, digest=backbone.digest, certificate=certificate)
    tasks = [_task_info(entry, resident) for entry in frontend.registry.serving_tasks()]
    return AdaptersResponse(base=frontend.model, backbone=info, tasks=tasks)


def _task_info(entry: TaskEntry, resident: tuple[str, ...]) -> TaskInfo:
    manifest = entry.manifest
    return TaskInfo(
        name=entry.name,
        version=entry.version,
        digest=entry.digest,
        rank=manifest.rank,
        scaling=manifest.scaling,
        target_modules=list(manifest.target_modules),
        lineage=manifest.backbone,
        measured=manifest.measured,
        resident=entry.digest in resident,
    )


@admin.post("/load", response_model=TaskInfo, responses=ADMIN_ERRORS)
async def load(task: str, frontend: TheFrontend) -> TaskInfo:
    """Brings an adapter (`name` or `name@version`) into memory before a request needs it."""
    return await _apply(frontend, task, frontend.registry.pool.load)


@admin.post("/unload", response_model=TaskInfo, responses=ADMIN_ERRORS)
async def unload(task: str, frontend: TheFrontend) -> TaskInfo:
    """Frees its memory; it loads again when a request needs it. 409 while requests use it or it is pinned."""
    try:
        return await _apply(frontend, task, frontend.registry.pool.unload)
    except EngineError as error:
        raise ApiError(str(error), status=409, code="adapter_in_use", field="task", value=task) from error


@admin.post("/pin", response_model=TaskInfo, responses=ADMIN_ERRORS)
async def pin(task: str, frontend: TheFrontend) -> TaskInfo:
    """Loads it, and keeps it in memory until it is unpinned. Once is enough."""
    return await _apply(frontend, task, frontend.registry.pin)


@admin.post("/unpin", response_model=TaskInfo, responses=ADMIN_ERRORS)
async def unpin(task: str, frontend: TheFrontend) -> TaskInfo:
    """Takes back `pin`; requests that use the adapter keep it."""
    return await _apply(frontend, task, frontend.registry.unpin)


async def _apply(frontend: Frontend, task: str, action: Callable[[str], None]) -> TaskInfo:
    entry = frontend.resolve(task, crma=False).task
    assert entry is not None
    await asyncio.to_thread(action, entry.digest)
    return _task_info(entry, frontend.registry.pool.resident())
