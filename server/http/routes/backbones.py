"""The CRMA backbone: its versions and history, and how an administrator changes which serves."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter

from crma.access.scope import Scope
from crma.core.errors import NotFound, StoreError
from crma.store.entry import BackboneEntry
from server.http.audited import audited
from server.http.auth import TheCaller, require_admin, require_key
from server.http.dependencies import TheFrontend
from server.http.error_handlers import documented
from server.http.history import shown_history
from server.http.publishing_schemas import PromoteRequest
from server.service.audit import Act
from server.service.caller import Caller
from server.service.frontend import Frontend
from server.service.promoter import Candidate, Promotion

router = APIRouter(prefix="/backbones", dependencies=[require_key])
admin = APIRouter(prefix="/backbones")


@router.get("", responses=documented(401, 403))
async def backbones(frontend: TheFrontend, caller: TheCaller) -> dict[str, Any]:
    """The versions of the backbone, the oldest first, and which of them served when.

    `problem` says why a version may not serve; null: it may. `blend` has the two that a version was
    made of. `history` has the changes of what serves, and the promotions that changed nothing, each
    with its evidence. A key that may not use every task sees no evidence, which names them.
    `promotion` is for admins: the one that runs, or ran last; null: none since the server started.
    """
    return _shown(frontend, caller)


@admin.get("/promotion", responses=documented(401, 403, 404), dependencies=[require_admin])
async def promotion(frontend: TheFrontend) -> dict[str, Any]:
    """The promotion that runs on this server, or ran last since it started.

    `status` is running, done, failed or cancelled. `lines` is what the gate said last. `evidence`
    has its decision: `lambda` is the weight of the candidate that may serve, 0 if the backbone that
    serves stays.
    """
    return _promotion_shown(_last(frontend))


@admin.delete("/promotion", responses=documented(401, 403, 404, 503, 507))
async def cancel_promotion(
    frontend: TheFrontend, act: Annotated[Act, audited("cancel promotion")]
) -> dict[str, Any]:
    """Cancel the promotion that runs; then it has changed nothing."""
    last = _last(frontend)
    act.about["version"] = last.candidate.version
    await frontend.promoter.stop()
    return _promotion_shown(last)


@admin.post("/rollback", responses=documented(401, 403, 404, 409, 503, 507))
async def roll_back_backbone(
    frontend: TheFrontend, caller: TheCaller, act: Annotated[Act, audited("roll back backbone")]
) -> dict[str, Any]:
    """Let the backbone serve that served before, as `crma store rollback`.

    A task that does not fit it goes back too, or stops if it served nothing before.
    """
    frontend.check_ready()
    await frontend.publisher.roll_back_backbone()
    shown = _shown(frontend, caller)
    act.about["version"] = shown["serving"]
    return shown


@admin.post(
    "/{version}/promote",
    status_code=202,
    responses=documented(400, 401, 403, 404, 409, 413, 422, 503, 507),
)
async def promote(
    version: str,
    body: PromoteRequest,
    frontend: TheFrontend,
    act: Annotated[Act, audited("promote")],
) -> dict[str, Any]:
    """Begin to promote a version, as `crma store promote`: `GET /backbones/promotion` follows it.

    The gate scores every task under the candidate, with a second copy of the base model on this
    machine. With `dry_run` false the candidate, or a blend, then serves if no task suffers.
    """
    frontend.check_ready()
    act.about.update(version=version, dry_run=body.dry_run)
    candidate = Candidate(
        version,
        dry_run=body.dry_run,
        margin=body.margin,
        newcomer_margin=body.newcomer_margin,
        allow_ungated=tuple(body.allow_ungated),
    )
    return _promotion_shown(frontend.promoter.start(candidate))


def _last(frontend: Frontend) -> Promotion:
    """The last promotion. Raises NotFound if this server has run none."""
    last = frontend.promoter.last
    if last is None:
        message = "no promotion has run since this server started"
        allowed = "POST /backbones/{version}/promote"
        raise NotFound(message, field="promotion", allowed=allowed)
    return last


def _promotion_shown(promotion: Promotion) -> dict[str, Any]:
    return {
        **asdict(promotion.candidate),
        "started": promotion.started,
        "status": promotion.status,
        "lines": list(promotion.lines),
        "evidence": promotion.evidence,
        "error": promotion.error,
    }


def _shown(frontend: Frontend, caller: Caller) -> dict[str, Any]:
    record = frontend.registry.backbone_record()
    versions = []
    for version, entry in record.versions.items():
        about = {"version": version, "serves": version == record.serving}
        versions.append({**about, **_version_shown(entry)})
    history = shown_history(record.history, caller)
    last = frontend.promoter.last if Scope.ADMIN in caller.scopes else None
    return {
        "serving": record.serving,
        "versions": versions,
        "history": history,
        "promotion": None if last is None else _promotion_shown(last),
    }


def _version_shown(entry: BackboneEntry | StoreError) -> dict[str, Any]:
    if isinstance(entry, StoreError):
        return {"problem": entry.message}
    fields = {"digest", "lineage", "blend", "licence", "created"}
    manifest = entry.manifest.model_dump(mode="json", include=fields, by_alias=True)
    return {"problem": None, **manifest}
