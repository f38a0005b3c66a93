"""What is sent to the server, and how the answer is read. No input or output happens here."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import httpx

from crma_client.errors import InvalidArgument, ProtocolError, status_error, stream_error
from crma_client.sse import EventParser
from crma_client.types import Choice, Generation, Token, read, read_generation


class GenerateOptions(TypedDict, total=False):
    """What `generate` and `stream` take beside the prompt; what is left out, or None, is left to the server.

    task: a task adapter's name, `name@version` for one version; none = the base model.
    crma: True or False; left out, on exactly if the task adapter was trained with CRMA.
    raw: send the prompt as it is, without the adapter's prompt format.
    temperature 0 is greedy; sampled choice i of n draws from seed + i.
    ignore_eos: go on to max_tokens past the end of the answer; for measurements.
    timeout_s: the server's deadline for this request, in seconds.
    """

    task: str | None
    crma: bool | None
    raw: bool | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    n: int | None
    stop: str | Sequence[str] | None
    logprobs: bool | None
    ignore_eos: bool | None
    timeout_s: float | None


def checked(response: httpx.Response, *accepts: int) -> httpx.Response:
    """The response, if its status is 200, 202 or one of `accepts`; else StatusError (its content must be there)."""
    if response.status_code in (200, 202, *accepts):
        return response
    try:
        body = response.json()
    except ValueError:
        body = None
    raise status_error(response.status_code, body, response.headers.get("retry-after"))


def read_answer(response: httpx.Response) -> Generation:
    """The answer of POST /generate."""
    return read_generation(_json(checked(response).content))


def read_object(response: httpx.Response) -> dict[str, Any]:
    """An answer that is a JSON object."""
    return read(dict, _json(checked(response).content))


def read_list(response: httpx.Response) -> list[Any]:
    """An answer that is a JSON array."""
    return read(list, _json(checked(response).content))


def read_text(response: httpx.Response) -> str:
    """An answer that is text."""
    return checked(response).text


def read_probe(response: httpx.Response) -> bool:
    """Whether GET /healthz or /readyz says yes; 503 is no."""
    return checked(response, 503).status_code == 200


class TokenReader:
    """One streamed answer: bytes in, tokens out; after the `done` event `result` is the whole Generation."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._events = EventParser()
        self._seen: list[Token] = []
        self._result: Generation | None = None

    @property
    def result(self) -> Generation:
        """The whole answer, texts included; raises ProtocolError before the stream has been read to its end."""
        if self._result is None:
            raise ProtocolError("there is no result: the stream has not brought its done event")
        return self._result

    def _feed(self, chunk: bytes) -> Iterator[Token]:
        """The tokens that `chunk` completes, one by one: those before an `error` event come before GenerationFailed.
        Events this version does not know are passed over."""
        for name, data in self._events.feed(chunk):
            if name == "error":
                raise stream_error(_json(data))
            if name == "done":
                answer = read_generation(_json(data))
                self._result = replace(answer, choices=tuple(map(self._with_text, answer.choices)))
            if name == "token":
                self._seen.append(read(Token, _json(data)))
                yield self._seen[-1]

    def _with_text(self, choice: Choice) -> Choice:
        """The choice of a `done` event, which has no text, with what its tokens brought."""
        tokens = [token for token in self._seen if token.index == choice.index]
        logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
        return replace(
            choice, text="".join(token.text for token in tokens), logprobs=logprobs or None
        )


def _json(text: str | bytes) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ProtocolError(f"the answer is not JSON: {error}", value=text[:200]) from error


def write_body(fields: Mapping[str, Any]) -> bytes:
    """The JSON to send: what is not None. Raises InvalidArgument for a value that JSON does not have; all else, names
    included, is the server's to judge."""
    body = {name: value for name, value in fields.items() if value is not None}
    try:
        return json.dumps(body).encode()
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"an argument cannot be written as JSON: {error}", field="body", value=body
        ) from error
