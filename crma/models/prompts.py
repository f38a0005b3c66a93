"""ONE prompt format for training and serving: a user turn, and the token that ends the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from crma.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptFormat:
    """head + prompt + tail is what the model reads; `stop` is the text of the one special token that ends an answer."""

    head: str
    tail: str
    stop: str

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        """Token ids of one user turn. Special tokens written inside `prompt` are text, never markup."""
        head = tokenizer.encode(self.head, add_special_tokens=False)
        tail = tokenizer.encode(self.tail, add_special_tokens=False)
        return head + encode_text(tokenizer, prompt) + tail

    def encode_answer(self, tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
        """Token ids that training asks for: the answer, then the stop token."""
        return [*encode_text(tokenizer, answer), self.stop_id(tokenizer)]

    def stop_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The id of the stop token. Raises ConfigError where `stop` is not one token of this tokenizer."""
        ids = tokenizer.encode(self.stop, add_special_tokens=False)
        if len(ids) != 1:
            message = "stop is not one token of this tokenizer"
            raise ConfigError(
                message, field="prompt_format.stop", value=self.stop, allowed="one token"
            )
        return ids[0]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of user text: no special token is added, and none is read out of it."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


def encode_chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[int]:
    """Token ids of a conversation by the model's own chat template, up to where the assistant's answer begins.

    The template sees a mark in place of each text, so that special tokens inside a text stay text.

    Raises:
        ConfigError: there is no template, or it refuses these turns, or does not show each text once.
    """
    marked = [{"role": turn.role, "content": f"⟦{i}⟧"} for i, turn in enumerate(turns)]
    try:
        rendered = str(
            tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
        )
    except Exception as error:  # templates refuse turns with errors of their own
        message = f"the chat template refuses these messages: {error}"
        raise ConfigError(message, field="messages", value=[turn.role for turn in turns]) from error
    parts = re.split(r"⟦(\d+)⟧", rendered)
    if sorted(map(int, parts[1::2])) != list(range(len(turns))):
        message = "the chat template does not show each message once"
        raise ConfigError(message, field="messages", value=[turn.role for turn in turns])
    ids: list[int] = []
    for at, part in enumerate(parts):  # markup, text, markup, …
        if at % 2:
            ids += encode_text(tokenizer, turns[int(part)].content)
        else:
            ids += tokenizer.encode(part, add_special_tokens=False)
    return ids


def raw_format(tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """The format that adds nothing but the tokenizer's own start token, if it has one."""
    adds = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return PromptFormat(
        head=str(tokenizer.bos_token) if adds else "", tail="", stop=str(tokenizer.eos_token)
    )


def chat_format(tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """The model's chat template for one user turn, without a system turn.

    Some templates put in a system turn of their own when none is given (SmolLM2, Qwen2). It is cut out by
    structure: what stands between a given system text and the user text is "end of turn + user head", and the end of
    a turn is what stands between user text and the generation prompt.

    Raises:
        ConfigError: the tokenizer has no chat template, or one that loses the user's text.
    """
    if not tokenizer.chat_template:
        message = "the tokenizer has no chat template"
        raise ConfigError(
            message, field="chat_template", value=None, allowed="a template; or raw prompts"
        )
    system, user = "⟦system⟧", "⟦user⟧"

    def render(*turns: tuple[str, str], generate: bool = True) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        )

    rendered = render(("user", user))
    if rendered.count(user) != 1:
        message = "the chat template changes the user's text"
        raise ConfigError(message, field="chat_template", value=rendered, allowed="the text once")
    head, tail = rendered.split(user)
    ended = render(("user", user), generate=False).split(user)[1]
    try:
        before_system, _, rest = render(("system", system), ("user", user)).partition(system)
    except (
        Exception
    ):  # templates refuse a system turn with errors of their own (Gemma): then there is none to cut
        before_system, rest = head, ""
    middle = rest.split(user)[0]
    if rest and before_system != head and head.startswith(before_system) and head.endswith(middle):
        bos = tokenizer.bos_token or ""
        # ChatML's bos is also its turn marker: there it belongs to the head and must not be doubled.
        starts = head.startswith(bos) and not head.startswith(bos + "system")
        head = (bos if starts else "") + middle.removeprefix(ended)
    return PromptFormat(head=head, tail=tail, stop=_stop_token(tokenizer, ended))


def _stop_token(tokenizer: PreTrainedTokenizerBase, ended: str) -> str:
    """The special token that ends a turn in `ended`, else the tokenizer's eos."""
    specials = [token for token in tokenizer.all_special_tokens if token and token in ended]
    return min(specials, key=ended.index) if specials else str(tokenizer.eos_token)
