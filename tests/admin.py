"""What an administrator sends to the app under test, and what is in its store afterwards."""

from pathlib import Path
from typing import Any

import httpx
from api import Served

from crma.store.adapter_store import AdapterStore
from crma.store.manifest import TASK_FILES

ADMIN = {"Authorization": "Bearer root"}


async def upload(
    served: Served,
    peft: Path,
    fields: dict[str, Any] | None = None,
    files: dict[str, bytes | None] | None = None,
    headers: dict[str, str] = ADMIN,
) -> httpx.Response:
    """Send a good upload, changed by `fields` and `files`; None leaves one out."""
    data = {"name": "new", "licence": "MIT", **(fields or {})}
    sent = {name: (peft / name).read_bytes() for name in TASK_FILES}
    sent.update(files or {})
    parts = [("files", (name, content)) for name, content in sent.items() if content is not None]
    data = {name: value for name, value in data.items() if value is not None}
    return await served.client.post("/adapters", data=data, files=parts, headers=headers)


async def delete(served: Served, task: str) -> httpx.Response:
    return await served.client.delete(f"/adapters/{task}", headers=ADMIN)


async def lora(served: Served, action: str, name: str, **body: Any) -> httpx.Response:
    """vLLM's load or unload."""
    body = {"lora_name": name, **body}
    return await served.client.post(f"/v1/{action}_lora_adapter", json=body, headers=ADMIN)


def contents(store: AdapterStore) -> set[str]:
    """Everything in the store but the file of the lock."""
    paths = store.root.rglob("*")
    return {str(path.relative_to(store.root)) for path in paths} - {".lock"}
