"""The answers of POST /v1/chat/completions as frozen dataclasses, whole and streamed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crma_client.errors import ProtocolError, stream_error
from crma_client.sse import EventParser
from crma_client.types import Token, read, read_json

END = "[DONE]"


@dataclass(frozen=True)
class ChatChoice:
    """One of the n answers to a conversation.

    Args:
        index: position among the n answers.
        finish_reason: "stop", "length" or "tool_calls".
        message: the assistant's turn, which the next request may repeat in its messages.
    """

    index: int
    finish_reason: str
    message: Mapping[str, Any]

    @property
    def text(self) -> str:
        """What the assistant says; empty if it only calls functions."""
        return str(self.message.get("content") or "")

    @property
    def tool_calls(self) -> Sequence[Mapping[str, Any]]:
        """The functions that the assistant calls."""
        return tuple(self.message.get("tool_calls") or ())


@dataclass(frozen=True)
class Chat:
    """A complete answer of POST /v1/chat/completions.

    Args:
        id: the server's name for the request.
        choices: the n answers.
        usage: prompt_tokens, completion_tokens, total_tokens; empty if a stream did not say.
        provenance: digests of what produced the answer, as of a Generation.
        raw: the whole answer as JSON; of a stream, its last chunk with a choice.
    """

    id: str
    choices: tuple[ChatChoice, ...]
    usage: Mapping[str, Any]
    provenance: Mapping[str, Any]
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def text(self) -> str:
        """What the first choice says."""
        return self.choices[0].text

    @property
    def message(self) -> Mapping[str, Any]:
        """The turn of the first choice."""
        return self.choices[0].message

    @property
    def tool_calls(self) -> Sequence[Mapping[str, Any]]:
        """The functions that the first choice calls."""
        return self.choices[0].tool_calls


def read_chat(data: object) -> Chat:
    """Read an answer. Raises ProtocolError if the JSON is not one."""
    body = read(dict, data)
    if not body.get("choices"):
        raise ProtocolError("the answer has no choices", field="choices")
    return read(Chat, {**body, "raw": body})


class ChatReader:
    """Turns the bytes of a streamed answer into tokens and, at its end, a Chat."""

    def __init__(self) -> None:
        self._events = EventParser()
        self._messages: dict[int, dict[str, Any]] = {}
        self._reasons: dict[int, Any] = {}
        self._last: dict[str, Any] = {}
        self._usage: Mapping[str, Any] = {}
        self._has_ended = False

    def feed(self, chunk: bytes) -> Iterator[Token]:
        """Yield the tokens that `chunk` completes.

        Raises:
            GenerationFailed: at an error, after the tokens that precede it.
            ProtocolError: a chunk is not in the documented format.
        """
        for _, data in self._events.feed(chunk):
            if data == END:
                self._has_ended = True
                continue
            body = read(dict, read_json(data))
            if body.get("error"):
                raise stream_error(body)
            yield from self._read_chunk(body)

    def result(self) -> Chat:
        """The whole answer. Raises ProtocolError if the stream has not ended."""
        if not self._has_ended:
            raise ProtocolError(f"there is no result: the stream has not sent {END}")
        choices = [
            {"index": index, "finish_reason": self._reasons.get(index), "message": message}
            for index, message in sorted(self._messages.items())
        ]
        return read_chat({**self._last, "choices": choices, "usage": self._usage})

    def _read_chunk(self, body: dict[str, Any]) -> Iterator[Token]:
        self._usage = body.get("usage") or self._usage
        for choice in read(list, body.get("choices")):
            self._last = body
            index = read(int, read(dict, choice).get("index"))
            delta = read(dict, choice.get("delta"))
            empty = {"role": "assistant", "content": ""}
            message = self._messages.setdefault(index, empty)
            for call in read(list, delta.get("tool_calls") or []):
                self._add_call(message, call)
            self._reasons[index] = choice.get("finish_reason") or self._reasons.get(index)
            text = read(str, delta.get("content") or "")
            message["content"] += text
            if text:
                yield Token(index, text, _logprob(choice))

    def _add_call(self, message: dict[str, Any], delta: object) -> None:
        """Add a part of a function call: the arguments of one come in several chunks."""
        part = read(dict, delta)
        function = read(dict, part.get("function") or {})
        arguments = read(str, function.get("arguments") or "")
        calls = message.setdefault("tool_calls", [])
        index = read(int, part.get("index"))
        if index == len(calls):
            named = {"name": function.get("name"), "arguments": arguments}
            calls.append({"id": part.get("id"), "type": "function", "function": named})
        elif 0 <= index < len(calls):
            calls[index]["function"]["arguments"] += arguments
        else:
            raise ProtocolError(f"a part of function call {index} comes before its beginning")


def _logprob(choice: Mapping[str, Any]) -> float | None:
    """The log-probability of a chunk's token, if the chunk has one."""
    content = read(list, read(dict, choice.get("logprobs") or {}).get("content") or [])
    return read(float, read(dict, content[0]).get("logprob")) if content else None
