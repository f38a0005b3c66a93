"""Prompts to token ids, off the event loop."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

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
from server.service.errors import InvalidField

Prompt = str | Sequence[int] | Conversation
"""Text; or token ids; or a conversation."""


class EncodedPrompt(NamedTuple):
    """Token ids of a prompt and of a given answer after it, and the token that ends an answer."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    stop_id: int


class PromptEncoder:
    """Encodes one prompt at a time in a thread: two threads must not use one fast tokenizer.

    Args:
        tokenizer: used by nobody else.
        num_tokens: token ids of a prompt must lie below it.
        max_waiting: prompts that may wait to be encoded; one more is refused.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, num_tokens: int, max_waiting: int
    ) -> None:
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens
        self.max_waiting = max_waiting
        self._thread = ThreadPoolExecutor(1, "encode")
        self._slots = asyncio.Semaphore(max_waiting + 1)  # one is encoded, the others wait

    async def encode(
        self,
        prompt: Prompt,
        prompt_format: Format | None,
        *,
        raw: bool,
        add_special_tokens: bool = True,
        answer: str | None,
        prompt_name: str = "prompt",
    ) -> EncodedPrompt:
        """Encode a prompt and, where one is given, the answer that follows it.

        Args:
            prompt: text and conversations go through `prompt_format`.
            prompt_format: it also says which token ends an answer. None: the base model has no chat
                template.
            raw: the text is encoded as it is (`AsSent`).
            add_special_tokens: whether raw text gets those that the tokenizer adds.
            prompt_name: the prompt's name in errors about its token ids.

        Raises:
            InvalidField: a token id that does not exist, or text with a token that the model lacks.
            ConfigError: the chat template refuses this conversation.
            QueueFull: `max_waiting` prompts wait already.
        """
        if not isinstance(prompt, str | Conversation):
            self.check_ids(prompt, prompt_name)
        if self._slots.locked():
            raise QueueFull(self.max_waiting, retry_after=1.0)

        default = BASE_TEMPLATE if isinstance(prompt, Conversation) else RAW_FORMAT
        used = prompt_format or default
        if raw:
            used = AsSent(used, add_special_tokens)

        def encode() -> EncodedPrompt:
            prompt_ids = self._prompt_ids(prompt, used)
            answer_ids = [] if answer is None else encode_text(self.tokenizer, answer)
            self._check_rows((*prompt_ids, *answer_ids))
            stop_id = used.stop_id(self.tokenizer)
            return EncodedPrompt(tuple(prompt_ids), tuple(answer_ids), stop_id)

        async with self._slots:
            return await asyncio.get_running_loop().run_in_executor(self._thread, encode)

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones too; an incomplete character is shown as �."""
        # Decoding only reads the tokenizer, so it need not wait for the thread that encodes.
        return self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)

    def token_strs(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the tokenizer's vocabulary has it: "Ġthe", not " the"."""
        return self.tokenizer.convert_ids_to_tokens(list(token_ids))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def check_ids(self, token_ids: Sequence[int], name: str) -> None:
        """Raises InvalidField that names the first token id out of range, as `name.position`."""
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id < self.num_tokens:
                field = f"{name}.{position}"
                allowed = f"0 to {self.num_tokens - 1}"
                message = f"{field}: no such token"
                raise InvalidField(message, field=field, value=token_id, allowed=allowed)

    def _check_rows(self, token_ids: Sequence[int]) -> None:
        """Raises InvalidField for a token of the tokenizer that the model has no row for."""
        unknown = [token_id for token_id in token_ids if token_id >= self.num_tokens]
        if unknown:
            text = self.text(unknown[:1])
            message = f"the base model has no embedding for the token {text!r}"
            allowed = f"text whose token ids are below {self.num_tokens}"
            raise InvalidField(message, field="prompt", value=text, allowed=allowed)

    def _check_calls(self, conversation: Conversation, prompt_format: Format) -> None:
        """Raises InvalidField for calls in messages that the model would not see."""
        calling = [i for i, turn in enumerate(conversation.turns) if turn.tool_calls]
        template = prompt_format.template if isinstance(prompt_format, TemplateFormat) else None
        if calling and not renders_calls(self.tokenizer, template):
            field = f"messages.{calling[0]}.tool_calls"
            message = f"{field}: this model's chat template does not render tool calls"
            value = len(conversation.turns[calling[0]].tool_calls or ())
            allowed = "messages without tool_calls; or tools beside them, which brings a form"
            raise InvalidField(message, field=field, value=value, allowed=allowed)

    def _prompt_ids(self, prompt: Prompt, prompt_format: Format) -> Sequence[int]:
        if isinstance(prompt, str):
            return prompt_format.encode(self.tokenizer, prompt)
        if isinstance(prompt, Conversation):
            self._check_calls(prompt, prompt_format)
            return prompt_format.encode_conversation(self.tokenizer, prompt)
        return prompt
