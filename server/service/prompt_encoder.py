"""Prompts to token ids, off the event loop."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from crma.models.plain_tokenizer import for_another_thread
from crma.models.prompts import (
    BASE_TEMPLATE,
    RAW_FORMAT,
    AsSent,
    Conversation,
    Format,
    TemplateFormat,
    encode_text,
)
from crma.models.tools import renders_calls
from server.engine.errors import QueueFull
from server.service.errors import DeadlineExceeded, Draining, InvalidField
from server.service.fair_queue import FairQueue
from server.service.text_limit import TextLimit, TextTooLong, text_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORT = 8192
"""Characters of a prompt that is encoded in a few milliseconds."""

Prompt = str | Sequence[int] | Conversation
"""Text; or token ids; or a conversation."""


class EncodedPrompt(NamedTuple):
    """Token ids of a prompt and of a given answer after it, and the token that ends an answer."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    stop_id: int


Encode = Callable[["PreTrainedTokenizerBase"], EncodedPrompt]
Work = tuple[Encode, asyncio.Future[EncodedPrompt]]


@dataclass(eq=False)
class _Lane:
    """A thread that encodes one prompt at a time.

    Attributes:
        tokenizer: others may encode at the same time.
        max_chars: the longest prompt it takes.
    """

    tokenizer: PreTrainedTokenizerBase
    max_chars: float
    thread: ThreadPoolExecutor
    is_busy: bool = False


class PromptEncoder:
    """Encodes prompts in two threads, one of which is always free of long prompts.

    Those that wait share the threads fairly by owner (`FairQueue`).

    Args:
        tokenizer: used by nobody else.
        num_tokens: token ids of a prompt must lie below it.
        max_waiting: prompts that may wait to be encoded; one more is refused.
        max_model_len: the most tokens of a prompt that can be answered.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_tokens: int,
        max_waiting: int,
        max_model_len: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens
        self.max_waiting = max_waiting
        self.max_model_len = max_model_len
        self.limit: TextLimit | None = text_limit(tokenizer, max_model_len)
        self._queue: FairQueue[Work] = FairQueue()
        self._lanes = (
            _Lane(tokenizer, math.inf, ThreadPoolExecutor(1, "encode")),
            _Lane(for_another_thread(tokenizer), SHORT, ThreadPoolExecutor(1, "encode-short")),
        )
        self._is_closed = False

    async def encode(
        self,
        prompt: Prompt,
        prompt_format: Format | None,
        *,
        raw: bool,
        add_special_tokens: bool = True,
        answer: str | None,
        prompt_name: str = "prompt",
        owner: str = "",
        deadline: float | None = None,
        has_to_fit: bool = False,
    ) -> EncodedPrompt:
        """Encode a prompt and, where one is given, the answer that follows it.

        Args:
            prompt: text and conversations go through `prompt_format`.
            prompt_format: it also says which token ends an answer. None: the base model has no chat
                template.
            raw: the text is encoded as it is (`AsSent`).
            add_special_tokens: whether raw text gets those that the tokenizer adds.
            prompt_name: the prompt's name in errors about its token ids.
            owner: whose share of the threads it uses.
            deadline: in seconds of time.monotonic(); None: it may wait for ever.
            has_to_fit: refuse a text that surely has over `max_model_len` tokens unencoded.

        Raises:
            InvalidField: a token id that does not exist, or text with a token that the model lacks.
            ConfigError: the chat template refuses this conversation.
            TextTooLong: the text cannot fit.
            QueueFull: `max_waiting` prompts wait already, and no other owner has more of them.
            DeadlineExceeded: it waited until the deadline.
            Draining: the server stops.
        """
        if not isinstance(prompt, str | Conversation):
            self.check_ids(prompt, prompt_name)
        default = BASE_TEMPLATE if isinstance(prompt, Conversation) else RAW_FORMAT
        used = prompt_format or default
        if raw:
            used = AsSent(used, add_special_tokens)

        def encode(tokenizer: PreTrainedTokenizerBase) -> EncodedPrompt:
            if has_to_fit:
                self._check_length(tokenizer, prompt, answer or "", used)
            prompt_ids = self._prompt_ids(tokenizer, prompt, used)
            answer_ids = [] if answer is None else encode_text(tokenizer, answer)
            self._check_rows((*prompt_ids, *answer_ids))
            stop_id = used.stop_id(tokenizer)
            return EncodedPrompt(tuple(prompt_ids), tuple(answer_ids), stop_id)

        cost = _num_chars(prompt) + len(answer or "")
        return await self._run(encode, owner, cost, deadline)

    async def _run(
        self, encode: Encode, owner: str, cost: int, deadline: float | None
    ) -> EncodedPrompt:
        """Wait for a thread, and for its result."""
        if self._is_closed:
            raise _stopping()
        encoded: asyncio.Future[EncodedPrompt] = asyncio.get_running_loop().create_future()
        ticket = self._queue.push(owner, cost, (encode, encoded))
        self._start_waiting()
        if len(self._queue) > self.max_waiting:
            surplus = self._queue.newest_of_greediest(owner) or ticket
            self._queue.remove(surplus)
            _refuse(surplus.item, QueueFull(self.max_waiting, retry_after=1.0))
        seconds = None if deadline is None else deadline - time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                return await encoded
        except TimeoutError as error:
            message = "the request's deadline passed before its prompt was encoded"
            raise DeadlineExceeded(message, field="timeout_s") from error
        finally:
            self._queue.remove(ticket)

    def _start_waiting(self) -> None:
        """Give every idle thread the next prompt that it takes."""
        for lane in self._lanes:
            work = None if lane.is_busy or self._is_closed else self._queue.pop(lane.max_chars)
            if work is not None:
                encode, encoded = work
                lane.is_busy = True
                loop = asyncio.get_running_loop()
                running = loop.run_in_executor(lane.thread, encode, lane.tokenizer)
                running.add_done_callback(partial(self._finish, lane, encoded))

    def _finish(
        self,
        lane: _Lane,
        encoded: asyncio.Future[EncodedPrompt],
        ran: asyncio.Future[EncodedPrompt],
    ) -> None:
        """Hand on a result, unless nobody waits for it any more; start the next prompt."""
        lane.is_busy = False
        error = None if ran.cancelled() else ran.exception()
        if not encoded.done():
            if ran.cancelled():
                encoded.set_exception(_stopping())
            elif error is not None:
                encoded.set_exception(error)
            else:
                encoded.set_result(ran.result())
        self._start_waiting()

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones too; an incomplete character is shown as �."""
        # Decoding only reads the tokenizer, so it need not wait for the thread that encodes.
        return self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)

    def token_strs(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the tokenizer's vocabulary has it: "Ġthe", not " the"."""
        return self.tokenizer.convert_ids_to_tokens(list(token_ids))

    def close(self) -> None:
        """End the threads; what waits for them raises Draining. Twice is as good as once."""
        self._is_closed = True
        work = self._queue.pop()
        while work is not None:
            _refuse(work, _stopping())
            work = self._queue.pop()
        for lane in self._lanes:
            lane.thread.shutdown(wait=False, cancel_futures=True)

    def check_ids(self, token_ids: Sequence[int], name: str) -> None:
        """Raises InvalidField that names the first token id out of range, as `name.position`."""
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id < self.num_tokens:
                field = f"{name}.{position}"
                allowed = f"0 to {self.num_tokens - 1}"
                message = f"{field}: no such token"
                raise InvalidField(message, field=field, value=token_id, allowed=allowed)

    def _check_length(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str, used: Format
    ) -> None:
        """Raises TextTooLong for a text that cannot fit, without encoding it."""
        if self.limit is None or not isinstance(prompt, str | Conversation):
            return
        if _num_chars(prompt) + len(answer) <= self.limit.num_chars:
            return
        # The prompt format decides what of it is encoded: templates may leave something out.
        if isinstance(prompt, str):
            text = used.render(tokenizer, prompt)
        else:
            text = used.render_conversation(tokenizer, prompt)
        if self.limit.exceeded_by(text + answer):
            num_chars = len(text) + len(answer)
            raise TextTooLong(num_chars, self.limit.of(text + answer), self.max_model_len)

    def _check_rows(self, token_ids: Sequence[int]) -> None:
        """Raises InvalidField for a token of the tokenizer that the model has no row for."""
        unknown = [token_id for token_id in token_ids if token_id >= self.num_tokens]
        if unknown:
            text = self.text(unknown[:1])
            message = f"the base model has no embedding for the token {text!r}"
            allowed = f"text whose token ids are below {self.num_tokens}"
            raise InvalidField(message, field="prompt", value=text, allowed=allowed)

    def _check_calls(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversation: Conversation,
        prompt_format: Format,
    ) -> None:
        """Raises InvalidField for calls in messages that the model would not see."""
        calling = [i for i, turn in enumerate(conversation.turns) if turn.tool_calls]
        template = prompt_format.template if isinstance(prompt_format, TemplateFormat) else None
        if calling and not renders_calls(tokenizer, template):
            field = f"messages.{calling[0]}.tool_calls"
            message = f"{field}: this model's chat template does not render tool calls"
            value = len(conversation.turns[calling[0]].tool_calls or ())
            allowed = "messages without tool_calls; or tools beside them, which brings a form"
            raise InvalidField(message, field=field, value=value, allowed=allowed)

    def _prompt_ids(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, prompt_format: Format
    ) -> Sequence[int]:
        if isinstance(prompt, str):
            return prompt_format.encode(tokenizer, prompt)
        if isinstance(prompt, Conversation):
            self._check_calls(tokenizer, prompt, prompt_format)
            return prompt_format.encode_conversation(tokenizer, prompt)
        return prompt


def _num_chars(prompt: Prompt) -> int:
    """About how many characters a prompt has; of token ids, how many there are."""
    if not isinstance(prompt, Conversation):
        return len(prompt)
    texts = (turn.content or "" for turn in prompt.turns)
    more = [turn.tool_calls for turn in prompt.turns if turn.tool_calls]
    return sum(map(len, texts)) + len(
        json.dumps([more, prompt.tools, dict(prompt.template_kwargs)])
    )


def _refuse(work: Work, error: Exception) -> None:
    """Raise an error where the result of `work` is awaited."""
    _, encoded = work
    if not encoded.done():
        encoded.set_exception(error)


def _stopping() -> Draining:
    return Draining("the server is stopping and encodes no more prompts")
