"""What an administrator publishes and deletes: uploads, imports from a path, vLLM's LoRA routes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from pydantic import ValidationError

from crma.core.errors import StoreError
from crma.store.import_format import TOKENIZER_FILES
from crma.store.incoming import incoming_folder
from crma.store.manifest import TASK_FILES
from server.daemon_threads import DaemonThreads
from server.http.audited import audited
from server.http.dependencies import TheFrontend
from server.http.error_handlers import documented
from server.http.openai_schemas import OpenAIErrorBody
from server.http.publishing_schemas import LoadLoraRequest, UnloadLoraRequest, UploadForm
from server.http.routes.adapters import task_info
from server.http.upload import receive_form
from server.service.audit import Act
from server.service.caller import ADMIN
from server.service.import_roots import find_folder
from server.service.publisher import writing

admin = APIRouter()
openai_admin = APIRouter(prefix="/v1")

UPLOAD_PATH = "/adapters"

_FILES = (*TASK_FILES, *TOKENIZER_FILES)
_FORM = {
    "requestBody": {
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "files"],
                    "properties": {
                        "name": {"type": "string"},
                        "licence": {"type": "string"},
                        "trust_base": {"type": "boolean"},
                        "prompt_format": {"enum": ["raw", "chat", "template"]},
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    },
                }
            }
        },
        "required": True,
    }
}
_LORA_ERRORS = (400, 401, 403, 404, 409, 413, 422, 503, 507)
_LORA_ANSWERS = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
    **documented(*_LORA_ERRORS, body=OpenAIErrorBody),
}


@admin.post(
    UPLOAD_PATH,
    status_code=201,
    responses=documented(400, 401, 403, 409, 413, 422, 503, 507),
    openapi_extra=_FORM,
)
async def upload_adapter(
    request: Request, frontend: TheFrontend, act: Annotated[Act, audited("publish")]
) -> dict[str, Any]:
    """Publish a PEFT LoRA from its files, and serve it.

    A form with `name`, the task's; `licence` if you know it; `trust_base` true if its config names
    this base model by another name; `prompt_format` raw, chat or template to choose one; and
    `files`: adapter_config.json and adapter_model.safetensors, and those of its tokenizer if it
    has a chat template of its own. It is the task's next version, as `crma store import` makes it.
    Nothing remains of an upload that is refused.
    """
    frontend.check_ready()
    with writing():
        threads = frontend.registry.threads
        root = frontend.registry.store.writable_root()
        async with _incoming(root, threads) as folder:
            fields = await receive_form(request, folder, _FILES, UploadForm.model_fields, threads)
            form = _checked(fields)
            act.about["task"] = form.name
            entry = await frontend.publisher.publish(
                folder,
                form.name,
                licence=form.licence,
                trust_base=form.trust_base,
                prompt_format=form.prompt_format,
            )
    act.about.update(version=entry.version, digest=entry.digest)
    return task_info(entry, frontend)


@admin.delete(UPLOAD_PATH + "/{task}", responses=documented(401, 403, 404, 409, 503, 507))
async def delete_adapter(
    task: str, frontend: TheFrontend, act: Annotated[Act, audited("delete")]
) -> dict[str, Any]:
    """Delete a version, `name@version`, or with `name` all versions of a task, from the disk.

    409 for what serves: publish or roll back to another version first, or stop the task with
    /v1/unload_lora_adapter. Requests that run with a deleted version end as they would have.
    """
    frontend.check_ready()
    name, at, version = task.partition("@")
    removed = await frontend.publisher.delete(name, version if at else None)
    act.about["versions"] = removed
    return {"name": name, "deleted": removed}


@admin.post(
    UPLOAD_PATH + "/{task}/rollback",
    responses=documented(401, 403, 404, 409, 503, 507, example_of="/adapters/{task}"),
)
async def roll_back_adapter(
    task: str, frontend: TheFrontend, act: Annotated[Act, audited("roll back")]
) -> dict[str, Any]:
    """Let the version of a task serve that served before, as `crma rollback --channel tasks/NAME`.

    Two calls go back two versions. Requests that run end with the version that they began with.
    """
    frontend.check_ready()
    version = await frontend.publisher.roll_back(task)
    entry = frontend.registry.task(f"{task}@{version}", ADMIN)
    act.about.update(version=version, digest=entry.digest)
    return task_info(entry, frontend)


# A response_class with a media type would also be documented as that of the errors.
@openai_admin.post("/load_lora_adapter", responses=_LORA_ANSWERS, response_class=Response)
async def load_lora_adapter(
    body: LoadLoraRequest, frontend: TheFrontend, act: Annotated[Act, audited("publish")]
) -> PlainTextResponse:
    """vLLM's way to add a LoRA: publish the PEFT folder `lora_path`, and serve it as `lora_name`.

    The path must be below one of this server's import roots; links may not lead out of them.
    """
    act.about["task"] = body.lora_name
    frontend.check_ready()
    find = partial(find_folder, body.lora_path, frontend.settings.import_roots)
    folder = await frontend.registry.threads.run(find)
    entry = await frontend.publisher.publish(
        folder,
        body.lora_name,
        replace=body.load_inplace,
        trust_base=body.trust_base,
        prompt_format=body.prompt_format,
    )
    act.about.update(version=entry.version, digest=entry.digest)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@openai_admin.post("/unload_lora_adapter", responses=_LORA_ANSWERS, response_class=Response)
async def unload_lora_adapter(
    body: UnloadLoraRequest, frontend: TheFrontend, act: Annotated[Act, audited("stop")]
) -> PlainTextResponse:
    """vLLM's way to take a LoRA out: the task serves no more.

    Its versions stay in the store. Requests that run with it end as they would have.
    """
    act.about["task"] = body.lora_name
    frontend.check_ready()
    await frontend.publisher.stop(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@asynccontextmanager
async def _incoming(store: Path, threads: DaemonThreads) -> AsyncIterator[Path]:
    """`incoming_folder`, whose work on files is done off the event loop.

    Errors do not name the folder, which whoever uploads has never seen.
    """
    manager = incoming_folder(store)
    folder = await threads.run(manager.__enter__)
    try:
        yield folder
    except StoreError as error:
        error.message = error.message.replace(f"{folder}: ", "")
        if str(folder) in str(error.value):
            error.value = None
        raise
    finally:
        await threads.run(partial(manager.__exit__, None, None, None))


def _checked(fields: dict[str, str]) -> UploadForm:
    """The form. Raises RequestValidationError for a field, as for those of a JSON body."""
    try:
        return UploadForm.model_validate_strings(fields, strict=False)
    except ValidationError as error:
        problems = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(problems) from error
