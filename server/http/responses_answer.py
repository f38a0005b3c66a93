"""The answer of /v1/responses: OpenAI's response object, whole or as its typed events."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from server.engine.request import FinishReason, RequestOutput
from server.http.answer import Answer, event, tokens
from server.http.error_handlers import error_body
from server.http.openai_logprobs import chat_logprob
from server.http.responses_schemas import ResponsesRequest
from server.service.errors import ApiError

PLACE = {"output_index": 0, "content_index": 0}
"""Of the one text in the one message of an answer."""


@dataclass
class ResponsesAnswer(Answer[ResponsesRequest]):
    """One message with one text.

    A stream is `response.created`, `in_progress`, `output_item.added`, `content_part.added`, an
    `output_text.delta` a token, the `done` of each, and `response.completed` or `incomplete`.
    """

    _created: int = field(default_factory=lambda: int(time.time()), init=False)
    _num_events: int = field(default=0, init=False)

    def body(self) -> dict[str, Any]:
        """The whole response."""
        is_cut = self._finish_reason is FinishReason.LENGTH
        return self._response(
            "incomplete" if is_cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            output=[self._message(self._item_status, [self._part()])],
            usage=self._usage(),
            provenance=self.provenance(),
        )

    def events(self, _: int, output: RequestOutput) -> Iterator[str]:
        """A delta for each token that brings text, or has a log-probability to report."""
        if self._num_events == 0:
            yield from self._opening()
        for token_id, text, logprob in tokens(output):
            logprobs = []
            if token_id is not None and logprob is not None:
                logprobs = [chat_logprob(self.frontend.texts, token_id, logprob)]
            if text or logprobs:
                yield self._text_event("delta", delta=text, logprobs=logprobs)

    def done(self) -> Iterator[str]:
        """The end of the text, of its message and of the response."""
        body = self.body()
        message = body["output"][0]
        part = message["content"][0]
        yield self._text_event("done", text=part["text"], logprobs=part["logprobs"])
        yield self._part_event("done", part)
        yield self._item_event("done", message)
        yield self._event(f"response.{body['status']}", response=body)

    def failed(self, error: ApiError, path: str) -> Iterator[str]:
        """OpenAI's `error`, then the response with the same error."""
        shown = error_body(error, path)["error"]
        yield self._event(
            "error", code=shown["code"], message=shown["message"], param=shown["param"]
        )
        reason = {"code": "server_error", "message": shown["message"]}
        yield self._event("response.failed", response=self._response("failed", error=reason))

    # Parts of a response -----------------------------------------------------------------------

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        """OpenAI's object, with what was asked for; `more` of its fields replace the empty ones."""
        asked = self.asked
        return {
            "id": self.generation.request.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": asked.model,
            "output": [],
            "usage": None,
            "metadata": asked.metadata,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_logprobs": asked.top_logprobs,
            "text": {"format": self._format, "verbosity": "medium"},
            "tools": [],
            "tool_choice": asked.tool_choice or "auto",
            "parallel_tool_calls": True,
            "max_tool_calls": None,
            "reasoning": {"effort": None, "summary": None},
            "truncation": "disabled",
            "service_tier": "default",
            "background": False,
            "store": False,
            "previous_response_id": None,
            "user": asked.user,
            **more,
        }

    @property
    def _format(self) -> dict[str, Any]:
        asked = self.asked.text.format
        return {"type": asked.type, **asked.model_dump(exclude_unset=True, by_alias=True)}

    @property
    def _item_id(self) -> str:
        return self.generation.request.id.replace("resp", "msg", 1)

    @property
    def _finish_reason(self) -> FinishReason | None:
        return self.generation.sequences[0].last.finish_reason

    @property
    def _item_status(self) -> str:
        return "incomplete" if self._finish_reason is FinishReason.LENGTH else "completed"

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _part(self) -> dict[str, Any]:
        """The text so far."""
        sequence = self.generation.sequences[0]
        pairs = zip(sequence.token_ids, sequence.logprobs, strict=False)
        logprobs = [chat_logprob(self.frontend.texts, *pair) for pair in pairs]
        return {
            "type": "output_text",
            "text": sequence.text,
            "annotations": [],
            "logprobs": logprobs,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.generation.usage()
        input_tokens = usage["prompt_tokens"]
        output_tokens = usage["completion_tokens"]
        return {
            "input_tokens": input_tokens,
            "input_tokens_details": {
                "cached_tokens": usage["cached_tokens"],
                "cache_write_tokens": 0,
            },
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": input_tokens + output_tokens,
        }

    # Events ------------------------------------------------------------------------------------

    def _opening(self) -> Iterator[str]:
        """The events before the first token: everything that is in progress, still empty."""
        empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        response = self._response("in_progress")
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        yield self._item_event("added", self._message("in_progress", []))
        yield self._part_event("added", empty)

    def _text_event(self, what: str, **fields: Any) -> str:
        return self._event(f"response.output_text.{what}", item_id=self._item_id, **PLACE, **fields)

    def _part_event(self, what: str, part: dict[str, Any]) -> str:
        kind = f"response.content_part.{what}"
        return self._event(kind, item_id=self._item_id, **PLACE, part=part)

    def _item_event(self, what: str, item: dict[str, Any]) -> str:
        return self._event(f"response.output_item.{what}", output_index=0, item=item)

    def _event(self, kind: str, **fields: Any) -> str:
        """An event with its number, counted from 0."""
        number = self._num_events
        self._num_events += 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)
