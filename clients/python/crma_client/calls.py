"""Builds requests and reads answers, for both clients. Nothing here uses the network."""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, TypedDict
from urllib.parse import quote, urlencode

import httpx

from crma_client.chats import Chat, read_chat
from crma_client.errors import (
    ConnectionFailed,
    InvalidArgument,
    JobFailed,
    TimedOut,
    status_error,
)
from crma_client.types import Generation, read, read_generation, read_json

CONNECT_S = 10.0
FILES = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER_FILES = (
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "added_tokens.json",
)
"""What of a PEFT folder is uploaded; the tokenizer's only if they are there."""


class Form(TypedDict):
    """Arguments of an httpx request."""

    data: dict[str, str]
    files: Sequence[tuple[str, BinaryIO]]
    headers: dict[str, str]


class SamplingOptions(TypedDict, total=False):
    """Options of every generating method, which `Client.generate` documents.

    Type checkers and editors take them as keyword arguments of each method (PEP 692). Written out,
    they would be as many parameters in eight signatures.

    An option that is absent or None is not sent: the server decides.
    """

    task: str | None
    crma: bool | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    n: int | None
    structured_outputs: Mapping[str, Any] | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    logprobs: bool | None
    top_logprobs: int | None
    timeout_s: float | None


class GenerateOptions(SamplingOptions, total=False):
    """Options of `generate` and `stream`."""

    raw: bool | None
    format_of: str | None
    add_special_tokens: bool | None
    prompt_logprobs: bool | None


class ChatOptions(SamplingOptions, total=False):
    """Options of `chat` and `stream_chat`, which `Client.chat` documents."""

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    response_format: Mapping[str, Any] | None
    chat_template_kwargs: Mapping[str, Any] | None


def server_url(base_url: str) -> httpx.URL:
    """Parse the address of a server.

    Raises:
        InvalidArgument: it is not a URL. A missing or unknown scheme shows at the first request.
    """
    with transport_errors():
        return httpx.URL(str(base_url))


def headers(api_key: str | None) -> dict[str, str]:
    """Headers of every request, with `api_key` as bearer token.

    Raises:
        InvalidArgument: a header cannot carry the key. The error does not contain the key.
    """
    fields = {"Content-Type": "application/json"}
    if api_key is not None:
        if not (api_key.isascii() and api_key.isprintable()):
            raise InvalidArgument("api_key must be printable ASCII", field="api_key")
        fields["Authorization"] = f"Bearer {api_key}"
    return fields


def generate_body(prompt: str, options: Mapping[str, Any], *, stream: bool = False) -> bytes:
    """The body of POST /generate; raises as `write_body`."""
    fields = {**options, "prompt": prompt}
    if stream:
        fields["stream"] = True
    return write_body(fields)


def chat_body(
    messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], *, stream: bool = False
) -> bytes:
    """The body of POST /v1/chat/completions; raises as `write_body`."""
    model = options.get("task") or "base"
    fields = {**options, "task": None, "model": model, "messages": list(messages)}
    if stream:
        fields["stream"] = True
        fields["stream_options"] = {"include_usage": True}
    return write_body(fields)


def ablation_path(id: str) -> str:
    """The path of one ablation job."""
    return f"/ablation/{quote(id, safe='')}"


def events_path(id: str) -> str:
    """The path of the progress of one ablation job."""
    return f"{ablation_path(id)}/events"


def question_set_path(name: str) -> str:
    """The path of one question set."""
    return f"/question_sets/{quote(name, safe='')}"


def adapter_path(task: str, act: str = "") -> str:
    """The path of one task adapter, as `name` or `name@version`; or of an act on it."""
    path = f"/adapters/{quote(task, safe='@')}"
    return f"{path}/{act}" if act else path


def promote_path(version: str) -> str:
    """The path that promotes one version of the backbone."""
    return f"/backbones/{quote(version, safe='')}/promote"


def run_path(id: str) -> str:
    """The path of one training run, whose id has slashes."""
    return f"/runs/{quote(id)}"


def query_path(path: str, fields: Mapping[str, Any]) -> str:
    """A path with those fields as its query that are not None; the server judges their values."""
    sent = {name: value for name, value in fields.items() if value is not None}
    return f"{path}?{urlencode(sent, doseq=True)}"


def upload_fields(
    name: str, licence: str | None, trust_base: bool, prompt_format: str | None
) -> dict[str, str | None]:
    """The fields of an upload beside its files; `Client.upload_adapter` documents them."""
    trusted = "true" if trust_base else None
    named = {"name": name, "licence": licence, "trust_base": trusted}
    return {**named, "prompt_format": prompt_format}


@contextmanager
def upload_form(folder: str | PathLike[str], fields: Mapping[str, str | None]) -> Iterator[Form]:
    """The files of a PEFT folder and the fields that are not None, as httpx sends a form.

    The files are open within the block, and read while they are sent.

    Raises:
        InvalidArgument: a file cannot be opened.
    """
    boundary = secrets.token_hex(16)
    names = [*FILES, *(name for name in TOKENIZER_FILES if Path(folder, name).exists())]
    with ExitStack() as opened:
        try:
            files = [("files", opened.enter_context(open(Path(folder) / n, "rb"))) for n in names]
        except OSError as error:
            message = f"folder must hold {' and '.join(FILES)}: {error}"
            raise InvalidArgument(message, field="folder", value=str(folder)) from error
        yield {
            "data": {name: value for name, value in fields.items() if value is not None},
            "files": files,
            "headers": {"Content-Type": f"multipart/form-data; boundary={boundary}"},
        }


def write_body(fields: Mapping[str, Any]) -> bytes:
    """Write the fields that are not None as JSON. The server judges their names and values.

    Raises:
        InvalidArgument: a value has no form in JSON.
    """
    body = {name: value for name, value in fields.items() if value is not None}
    try:
        return json.dumps(body).encode()
    except (TypeError, ValueError) as error:
        message = f"an argument cannot be written as JSON: {error}"
        raise InvalidArgument(message, field="body", value=body) from error


def time_limits(timeout: float | None) -> httpx.Timeout:
    """The limits of a client: `timeout` for everything, and at most CONNECT_S for a connection."""
    connect = CONNECT_S if timeout is None else min(timeout, CONNECT_S)
    return httpx.Timeout(timeout, connect=connect)


@contextmanager
def transport_errors() -> Iterator[None]:
    """Turn the errors that httpx raises in the block, and only those, into errors of this package.

    Raises:
        TimedOut: the client's timeout expired.
        InvalidArgument: `base_url` is not the address of a server.
        ConnectionFailed: any other failure of the connection.
    """
    try:
        yield
    except httpx.TimeoutException as error:
        raise TimedOut(f"the server did not answer in time ({type(error).__name__})") from error
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        message = f"base_url must be the http or https address of a server: {error}"
        raise InvalidArgument(message, field="base_url") from error
    except (httpx.RequestError, httpx.StreamError) as error:
        reason = str(error) or type(error).__name__
        raise ConnectionFailed(f"no complete answer from the server: {reason}") from error


def checked(response: httpx.Response, *accepted: int) -> httpx.Response:
    """Return the response if its status is 200, 201, 202 or one of `accepted`.

    Raises:
        StatusError: any other status. The body of the response must have been read.
    """
    if response.status_code in (200, 201, 202, *accepted):
        return response
    try:
        body = response.json()
    except ValueError:
        body = None
    raise status_error(response.status_code, body, response.headers.get("retry-after"))


def read_answer(response: httpx.Response) -> Generation:
    """Read the answer of POST /generate."""
    return read_generation(read_json(response.content))


def read_chat_answer(response: httpx.Response) -> Chat:
    """Read the answer of POST /v1/chat/completions."""
    return read_chat(read_json(response.content))


def job_result(job: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of a background job; None while it waits or runs.

    Raises:
        JobFailed: it ended without one.
    """
    status = read(str, job.get("status"))
    if status in ("queued", "running"):
        return None
    if status != "done":
        reason = job.get("error") or "there is no report"
        raise JobFailed(f"the job {job.get('id')} is {status}: {reason}", value=job.get("id"))
    return read(dict, job.get("result"))


def read_object(response: httpx.Response) -> dict[str, Any]:
    """Read an answer that is a JSON object."""
    return read(dict, read_json(response.content))


def read_list(response: httpx.Response) -> list[Any]:
    """Read an answer that is a JSON array."""
    return read(list, read_json(response.content))


def read_lines(response: httpx.Response) -> list[dict[str, Any]]:
    """Read an answer in JSON Lines: an object a line."""
    return [read(dict, read_json(line)) for line in response.content.split(b"\n") if line]


def read_text(response: httpx.Response) -> str:
    """Read an answer that is plain text."""
    return response.text


def read_probe(response: httpx.Response) -> bool:
    """Read the answer of GET /healthz or /readyz, whose status may be 503: no."""
    return response.status_code == 200
