"""The answer of a chat with tools: a text, calls of functions, or both."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from crma.models.tools import HERMES, ToolMarkup
from server.engine.request import FinishReason, TokenLogprob
from server.http.openai_answer import ChatAnswer
from server.http.tool_calls import ToolCallReader
from server.service.generation import SequenceResult


@dataclass
class ToolAnswer(ChatAnswer):
    """As `ChatAnswer`; a choice that calls functions ends for `tool_calls`.

    markup: how calls are written in the answer's text.
    """

    markup: ToolMarkup = HERMES
    _readers: dict[int, ToolCallReader] = field(default_factory=dict, init=False)

    def choice(self, index: int, sequence: SequenceResult) -> dict[str, Any]:
        """The assistant's message; its content is null if there are calls alone."""
        choice = super().choice(index, sequence)
        reader = self._reader(index)
        parts = [each.get("content") or "" for each in reader.read(sequence.text, is_last=True)]
        content = "".join(parts)
        message = {**choice["message"], "content": content}
        if reader.calls:
            message |= {"content": content.rstrip() or None, "tool_calls": reader.calls}
        return {**choice, "message": message}

    def deltas(
        self, index: int, token_id: int | None, text: str, logprob: TokenLogprob | None
    ) -> list[dict[str, Any]]:
        """What a token adds to text or calls; nothing while it cannot be told which."""
        logprobs = None
        if token_id is not None and logprob is not None:
            logprobs = self._logprobs([(token_id, logprob)])
        found = self._reader(index).read(text)
        if logprobs is not None and not found:
            found = [{}]
        parts = self._with_role(index, found)
        return [{**part, "logprobs": None if i else logprobs} for i, part in enumerate(parts)]

    def held_back(self, index: int) -> list[dict[str, Any]]:
        """The end of the text."""
        found = self._reader(index).read("", is_last=True)
        return [{**part, "logprobs": None} for part in self._with_role(index, found)]

    def finish_reason(self, index: int, reason: str | None) -> str | None:
        """A complete answer with calls ends for them."""
        has_calls = bool(self._reader(index).calls)
        return "tool_calls" if has_calls and reason == FinishReason.STOP else reason

    def _with_role(self, index: int, found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        parts = []
        for delta in found:
            role = {"role": "assistant"} if self.begins(index) else {}
            parts.append({"delta": {**role, **delta}})
        return parts

    def _reader(self, index: int) -> ToolCallReader:
        if index not in self._readers:
            self._readers[index] = ToolCallReader(self.markup)
        return self._readers[index]
