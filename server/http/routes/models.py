"""GET /v1/models: cards of what `model` may name, with vLLM's fields beside OpenAI's."""

from datetime import datetime
from typing import Any

from fastapi import APIRouter

from crma.store.entry import TaskEntry
from server.http.auth import TheCaller, require_key
from server.http.dependencies import TheFrontend
from server.http.error_handlers import documented
from server.http.model_name import BASE, resolve_model
from server.http.openai_schemas import OpenAIErrorBody
from server.service.frontend import Frontend

router = APIRouter(prefix="/v1", dependencies=[require_key])

LIST_ERRORS = documented(401, 403, 404, 503, body=OpenAIErrorBody, example_of="/v1/models")
CARD_ERRORS = documented(
    401, 403, 404, 409, 503, body=OpenAIErrorBody, example_of="/v1/models/{model}"
)


@router.get("/models", responses=LIST_ERRORS)
async def models(frontend: TheFrontend, caller: TheCaller) -> dict[str, Any]:
    """What `model` may name: the base model and every serving task that the key may use.

    `:crma-on` or `:crma-off` may follow the name. `root` is what answers: the base model's own
    name, or the version of the task; `parent` is the model that a task adapter is made for.
    """
    entries = frontend.registry.serving_tasks(caller)
    tasks = [_card(each.name, each, frontend) for each in entries]
    return {"object": "list", "data": [_card(BASE, None, frontend), *tasks]}


@router.get("/models/{model}", responses=CARD_ERRORS)
async def model(model: str, frontend: TheFrontend, caller: TheCaller) -> dict[str, Any]:
    """One of the models, or a version of it."""
    return _card(model, resolve_model(model, None, frontend, caller).task, frontend)


def _card(name: str, entry: TaskEntry | None, frontend: Frontend) -> dict[str, Any]:
    """A model as OpenAI describes it, then vLLM's fields; clients size their prompts by them."""
    created = 0
    root = frontend.model.name
    if entry is not None:
        created = int(datetime.fromisoformat(entry.manifest.created).timestamp())
        root = f"{entry.name}@{entry.version}"
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": frontend.model.name,
        "root": root,
        "parent": None if entry is None else BASE,
        "max_model_len": frontend.model.max_model_len,
        "permission": [_permission(root, created)],
    }


def _permission(root: str, created: int) -> dict[str, Any]:
    """OpenAI's former permissions, which vLLM keeps: every key may do the same."""
    return {
        "id": f"modelperm-{root}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
