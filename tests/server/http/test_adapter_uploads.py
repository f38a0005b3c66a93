"""POST /adapters: what is uploaded serves, and of what is refused nothing remains."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from admin import ADMIN, contents, upload
from api import BASE, Serve, Served

from crma.store.adapter_store import AdapterStore
from crma.store.manifest import TASK_FILES
from server.http.body import EXAMPLES
from server.http.upload import MAX_FIELD_BYTES

FORM = "multipart/form-data; boundary=x"
CONFIG, WEIGHTS = TASK_FILES
REFUSALS = [
    # What is sent beside or in place of a good upload, the status, the code and the field.
    ({"name": None}, {}, 422, "invalid_field", "name"),
    ({"name": "Upper"}, {}, 422, "invalid_field", "name"),
    ({"name": "../x"}, {}, 422, "invalid_field", "name"),
    ({"name": "base"}, {}, 422, "invalid_field", "name"),
    ({"licence": ""}, {}, 422, "invalid_field", "licence"),
    ({"licence": "x" * (MAX_FIELD_BYTES + 1)}, {}, 422, "invalid_field", "licence"),
    ({"nmae": "x"}, {}, 422, "unknown_field", "nmae"),
    ({"trust_base": "perhaps"}, {}, 422, "invalid_field", "trust_base"),
    ({"prompt_format": "loud"}, {}, 422, "invalid_field", "prompt_format"),
    ({"prompt_format": "template"}, {}, 422, "invalid_field", "prompt_format"),
    ({}, {"chat_template.jinja": b"\xff"}, 409, "invalid_adapter", "chat_template.jinja"),
    ({}, {"tokenizer.json": b"{"}, 409, "invalid_adapter", "tokenizer.json"),
    ({}, {CONFIG: None}, 409, "invalid_adapter", CONFIG),
    ({}, {WEIGHTS: None}, 409, "invalid_adapter", WEIGHTS),
    ({}, {CONFIG: b"{"}, 409, "invalid_adapter", CONFIG),
    ({}, {WEIGHTS: b"\x80\x02pickle"}, 409, "invalid_adapter", WEIGHTS),
    ({}, {"adapter_model.bin": b"x"}, 422, "invalid_field", "files"),
    ({}, {"manifest.json": b"{}"}, 422, "invalid_field", "files"),
    ({}, {"../adapter_config.json": b"{}"}, 422, "invalid_field", "files"),
    ({}, {"/etc/passwd": b"x"}, 422, "invalid_field", "files"),
]


@pytest.fixture
async def served(serve: Serve, own: AdapterStore) -> Served:
    return await serve(store=own.root, admin_key="root")


async def test_an_upload_serves_at_once_as_the_next_version_of_its_task(
    served: Served, own: AdapterStore, peft: Path
) -> None:
    before = contents(own)
    response = await upload(served, peft)
    assert response.status_code == 201, response.text
    info = response.json()
    example = EXAMPLES["/adapters"]["answers"]["application/json"]["example"]
    assert list(info) == list(example["tasks"][0])
    assert (info["name"], info["version"], info["lineage"]) == ("new", "v1", None)
    entry = own.task("new")
    assert entry.digest == info["digest"]
    assert entry.manifest.licence == "MIT"
    assert (await served.generate(task="new")).json()["provenance"]["task"] == entry.digest
    assert (await upload(served, peft, {"licence": None})).json()["version"] == "v2"
    assert own.channels().tasks["new"] == "v2"
    assert {path for path in contents(own) - before if not path.startswith("tasks/new")} == set()
    assert own.verify(base=BASE) == []


@pytest.mark.parametrize(("fields", "files", "status", "code", "field"), REFUSALS)
async def test_a_refused_upload_names_what_is_wrong_and_leaves_nothing(
    served: Served,
    own: AdapterStore,
    peft: Path,
    fields: dict[str, Any],
    files: dict[str, Any],
    status: int,
    code: str,
    field: str,
) -> None:
    before = contents(own)
    response = await upload(served, peft, fields, files)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), response.text
    assert error["field"] == field
    assert error["allowed"] is not None
    assert ".incoming-" not in response.text
    assert contents(own) == before
    assert (await upload(served, peft)).status_code == 201


async def test_what_is_sent_twice_is_refused(served: Served, peft: Path) -> None:
    parts = [("files", (CONFIG, b"{}")), ("files", (CONFIG, b"{}"))]
    response = await served.client.post("/adapters", data={"name": "x"}, files=parts, headers=ADMIN)
    assert (response.status_code, response.json()["error"]["field"]) == (422, "files")
    parts = [("name", (None, "a")), ("name", (None, "b"))]
    response = await served.client.post("/adapters", files=parts, headers=ADMIN)
    assert (response.status_code, response.json()["error"]["field"]) == (422, "name")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", FORM),
        (b"--x\r\n", FORM),
        (b"nothing like a form", FORM),
        (b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nnew', FORM),
        (b'--x\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nnew\r\n--x--', FORM),
        (b"--x--", "multipart/form-data"),
        (b"{}", "application/json"),
        (b"name=new", "application/x-www-form-urlencoded"),
    ],
)
async def test_a_body_that_is_no_whole_form_is_malformed(
    served: Served, own: AdapterStore, content: bytes, kind: str
) -> None:
    before = contents(own)
    headers = {**ADMIN, "Content-Type": kind}
    response = await served.client.post("/adapters", content=content, headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "malformed_body"
    assert contents(own) == before


async def test_an_upload_is_read_no_further_than_its_limit_and_leaves_nothing(
    serve: Serve, own: AdapterStore
) -> None:
    served = await serve(store=own.root, admin_key="root", max_upload_mib=1)
    before = contents(own)
    num_sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal num_sent
        disposition = f'form-data; name="files"; filename="{WEIGHTS}"'
        yield f"--x\r\nContent-Disposition: {disposition}\r\n\r\n".encode()
        while True:
            num_sent += 2**16
            yield b"\xff" * 2**16

    headers = {**ADMIN, "Content-Type": FORM}
    response = await served.client.post("/adapters", content=pieces(), headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["allowed"] == "<= 1048576 bytes"
    assert num_sent < 2**20 + 2**18
    assert contents(own) == before


async def test_a_client_that_leaves_while_uploading_leaves_nothing(
    served: Served, own: AdapterStore
) -> None:
    before = contents(own)
    disposition = f'form-data; name="files"; filename="{WEIGHTS}"'
    start = f"--x\r\nContent-Disposition: {disposition}\r\n\r\nabc".encode()
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": start, "more_body": True},
        {"type": "http.disconnect"},
    ]
    seen: list[set[str]] = []
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        seen.append(contents(own) - before)
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status", 0))

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/adapters",
        "query_string": b"",
        "headers": [
            (b"authorization", b"Bearer root"),
            (b"content-type", FORM.encode()),
        ],
    }
    await served.app(scope, receive, send)
    assert any(path.endswith(WEIGHTS) for path in seen[-1]), "it was being written"
    assert statuses[0] == 499
    assert contents(own) == before


async def test_without_the_admin_key_no_byte_of_an_upload_is_read(
    serve: Serve, own: AdapterStore, peft: Path
) -> None:
    served = await serve(store=own.root, admin_key="root", api_keys="user")
    for headers, status in (({}, 401), ({"Authorization": "Bearer user"}, 403)):

        async def unread() -> AsyncIterator[bytes]:
            raise AssertionError("read")
            yield b""

        kind = {"Content-Type": FORM, **headers}
        response = await served.client.post("/adapters", content=unread(), headers=kind)
        assert response.status_code == status


async def test_a_store_that_cannot_be_written_is_named(
    served: Served, own: AdapterStore, peft: Path
) -> None:
    (own.root / ".lock").unlink()
    (own.root / ".lock").mkdir()
    response = await upload(served, peft)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (507, "store_not_writable")
    assert error["field"] == "CRMA_STORE"
    assert "Is a directory" in error["message"]


async def test_an_adapter_of_another_base_is_published_only_if_its_base_is_trusted(
    served: Served, own: AdapterStore, peft: Path
) -> None:
    before = contents(own)
    config = json.loads((peft / CONFIG).read_text())
    foreign = {CONFIG: json.dumps({**config, "base_model_name_or_path": "org/other"}).encode()}
    response = await upload(served, peft, {}, foreign)
    assert (response.status_code, response.json()["error"]["code"]) == (409, "base_mismatch")
    assert "org/other" in response.json()["error"]["message"]
    assert contents(own) == before
    assert (await upload(served, peft, {"trust_base": "true"}, foreign)).status_code == 201
