"""Every call to the server as plain data: what is sent, and how the answer is read. No input or output happens here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar, get_args, get_origin, get_type_hints

from crma_client.errors import InvalidArgument, ProtocolError, StatusError, status_error, stream_error
from crma_client.sse import Event, EventParser
from crma_client.types import (
    AblationReport,
    AdapterListing,
    Generation,
    Question,
    Token,
    expect,
    read,
    read_generation,
)

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")


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


class AblationOptions(TypedDict, total=False):
    """What an ablation takes: a `question_set` the server knows by name, or `questions` sent along.

    timeout_s: the server's deadline for each item, in seconds.
    margin: the difference in accuracy within which two variants count as equivalent.
    repeat: run variants that resolve to the same adapters apart instead of sharing their results.
    """

    question_set: str | None
    questions: Sequence[Question] | None
    tasks: Sequence[str] | None
    variants: Sequence[str] | None
    scorer: str | None
    max_tokens: int | None
    seed: int | None
    margin: float | None
    repeat: bool | None
    timeout_s: float | None


_GENERATE = {"prompt": str, **get_type_hints(GenerateOptions)}
_ABLATION = get_type_hints(AblationOptions)


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and the reading of its answer. `accepts`: the statuses that `parse` understands."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    body: Mapping[str, Any] | None = None
    accepts: tuple[int, ...] = (200,)

    def answer(self, response: httpx.Response) -> T:
        """The parsed answer; raises StatusError for any other status, ProtocolError for an answer that is no answer."""
        if response.status_code not in self.accepts:
            raise refusal(response)
        return self.parse(response)


def generate(prompt: str, options: Mapping[str, Any]) -> Call[Generation]:
    """POST /generate."""
    body = _body(_GENERATE, {"prompt": prompt, **options})
    return Call("POST", "/generate", lambda response: read_generation(_json(response)), body)


def stream(prompt: str, options: Mapping[str, Any]) -> Call[TokenReader]:
    """POST /generate with "stream": true."""
    body = _body(_GENERATE, {"prompt": prompt, **options})
    return Call("POST", "/generate", lambda _: TokenReader(), {**body, "stream": True})


def ablation(options: Mapping[str, Any]) -> Call[AblationReport]:
    """POST /ablation, answered when it is done."""
    body = _body(_ABLATION, options)
    if "questions" in body:
        body["questions"] = [asdict(question) for question in body["questions"]]
    return Call("POST", "/ablation", lambda response: read(AblationReport, _json(response)), body)


ADAPTERS: Call[AdapterListing] = Call("GET", "/adapters", lambda response: read(AdapterListing, _json(response)))
HEALTH: Call[bool] = Call("GET", "/healthz", lambda response: response.status_code == 200, accepts=(200, 503))
READY: Call[bool] = Call("GET", "/readyz", lambda response: response.status_code == 200, accepts=(200, 503))
METRICS: Call[str] = Call("GET", "/metrics", lambda response: response.text)


class TokenReader:
    """The bytes of one stream in, tokens out; after the `done` event `result` is the whole Generation."""

    def __init__(self) -> None:
        self._events = EventParser()
        self._texts: dict[int, list[str]] = {}
        self._logprobs: dict[int, list[float]] = {}
        self._result: Generation | None = None

    def feed(self, chunk: bytes) -> Iterator[Token]:
        """The tokens that `chunk` completes, one by one: those before an `error` event come before GenerationFailed."""
        for event in self._events.feed(chunk):
            token = self._take(event)
            if token is not None:
                yield token

    @property
    def result(self) -> Generation:
        """Raises ProtocolError while the stream has not brought its `done` event."""
        if self._result is None:
            raise ProtocolError("the stream has no result before its done event: read it to its end first")
        return self._result

    def close(self) -> None:
        """To be called at the end of the stream. Raises ProtocolError if it ended without `done` or `error`."""
        if self._result is None:
            raise ProtocolError("the stream ended without its done event")

    def _take(self, event: Event) -> Token | None:
        """The event's token, if it is one. Events this version does not know are passed over."""
        if event.name == "error":
            raise stream_error(_event_data(event))
        if event.name == "done":
            self._result = read_generation(self._assemble(_event_data(event)))
        if event.name != "token":
            return None
        token = read(Token, _event_data(event))
        self._texts.setdefault(token.index, []).append(token.text)
        if token.logprob is not None:
            self._logprobs.setdefault(token.index, []).append(token.logprob)
        return token

    def _assemble(self, done: dict[str, Any]) -> dict[str, Any]:
        """The body of /generate from that of `done`, which has no texts: they are what the tokens brought."""
        if done.get("choices") is None:
            return self._choice(done, 0)
        choices = [expect(Mapping, choice, "choices") for choice in expect(list, done["choices"], "choices")]
        return {**done, "choices": [self._choice(c, expect(int, c.get("index"), "choices.index")) for c in choices]}

    def _choice(self, done: Mapping[str, Any], index: int) -> dict[str, Any]:
        logprobs = done.get("logprobs") or self._logprobs.get(index)
        return {**done, "text": "".join(self._texts.get(index, [])), "logprobs": logprobs}


def refusal(response: httpx.Response) -> StatusError:
    """The error for an answer with an unexpected status; its content must have been read."""
    try:
        body = response.json()
    except ValueError:
        body = None
    return status_error(response.status_code, body, response.headers.get("retry-after"))


def _json(response: httpx.Response) -> object:
    try:
        return response.json()
    except ValueError as error:
        raise ProtocolError("the answer is not JSON", status=response.status_code, value=response.text[:200]) from error


def _event_data(event: Event) -> dict[str, Any]:
    try:
        data: dict[str, Any] = expect(dict, json.loads(event.data), event.name)
    except ValueError as error:
        raise ProtocolError(f"the data of the {event.name} event is not JSON", value=event.data[:200]) from error
    return data


def _body(kinds: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON to send: `given` without its Nones. Raises InvalidArgument for an unknown name or a wrong type; limits
    are the server's to state."""
    for name, value in given.items():
        if name not in kinds:
            raise InvalidArgument(f"no option is called {name}", field=name, value=value, allowed=sorted(kinds))
        if not _fits(kinds[name], value):
            allowed = getattr(kinds[name], "__name__", str(kinds[name]))
            raise InvalidArgument(f"{name} must be of type {allowed}", field=name, value=value, allowed=allowed)
    return {name: value for name, value in given.items() if value is not None}


def _fits(kind: Any, value: Any) -> bool:
    """Whether `value` is of type `kind`, and JSON can carry it: no NaN, no lone surrogate, no bool as a number."""
    if get_origin(kind) is UnionType:
        return any(_fits(each, value) for each in get_args(kind))
    if get_origin(kind) in (Sequence, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(get_args(kind)[0], item) for item in value)
    if kind is Question:
        hints = get_type_hints(Question).items()
        return isinstance(value, Question) and all(_fits(hint, getattr(value, name)) for name, hint in hints)
    if kind is str:
        return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, bool) or value is None:
        return type(value) is kind
    return isinstance(value, (int, float)) and math.isfinite(value) if kind is float else isinstance(value, kind)
