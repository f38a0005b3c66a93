"""Prompt formats, the same in training and in serving: how a user's text becomes token ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from crma.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stand-ins for texts while a template is taken apart; no real template contains them.
_SYSTEM = "⟦system⟧"
_USER = "⟦user⟧"


@dataclass(frozen=True)
class PromptFormat:
    """How a user's text becomes a prompt: the model reads head + text + tail.

    Args:
        head: the markup before the text.
        tail: the markup after it, up to where the answer begins.
        stop: the text of the one special token that ends an answer.
    """

    head: str
    tail: str
    stop: str

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        """Token ids of one user turn. Special tokens written in `prompt` are encoded as text."""
        head = tokenizer.encode(self.head, add_special_tokens=False)
        tail = tokenizer.encode(self.tail, add_special_tokens=False)
        return head + encode_text(tokenizer, prompt) + tail

    def encode_answer(self, tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
        """Token ids that training teaches the model to generate: the answer and the stop token."""
        return [*encode_text(tokenizer, answer), self.stop_id(tokenizer)]

    def stop_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The id of the stop token.

        Raises:
            ConfigError: `stop` is not one token of this tokenizer.
        """
        ids = tokenizer.encode(self.stop, add_special_tokens=False)
        if len(ids) != 1:
            message = f"prompt_format.stop: {self.stop!r} is not one token of this tokenizer"
            field = "prompt_format.stop"
            raise ConfigError(message, field=field, value=self.stop, allowed="one token")
        return ids[0]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of user text: no special token is added, and none written in it is recognised."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


class Turn(NamedTuple):
    """One message of a conversation, as chat templates read it.

    Args:
        role: system, user, assistant, or what else the template knows.
        content: its text; None for an assistant's message of tool calls only.
        name: tells speakers of one role apart.
        tool_calls: of an assistant's message.
        tool_call_id: the call that a tool's message answers.
    """

    role: str
    content: str | None
    name: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Everything that a chat template is given.

    Args:
        turns: the messages.
        tools: JSON schemas of the functions that the model may call; None: none.
        template_kwargs: further variables of the template, such as enable_thinking.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def encode_chat(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """Token ids of a conversation by the model's own chat template, up to the next answer.

    The template is given a numbered mark in place of each text, and the marks are replaced after
    encoding its markup. Special tokens written in a text are therefore encoded as text.

    Raises:
        ConfigError: there is no template, it refuses these turns, or it does not show each text
            exactly once.
    """
    turns = conversation.turns
    texts = {f"⟦{index}⟧": each.content for index, each in enumerate(turns) if each.content}
    marks = iter(texts)
    marked = [turn._replace(content=next(marks)) if turn.content else turn for turn in turns]
    roles = [turn.role for turn in turns]
    try:
        rendered = _render(tokenizer, replace(conversation, turns=tuple(marked)))
    except Exception as error:  # a template may raise anything
        message = f"the chat template refuses these messages: {error}"
        raise ConfigError(message, field="messages", value=roles) from error
    parts = re.split(r"(⟦\d+⟧)", rendered)  # markup, mark, markup, mark, …, markup
    if sorted(parts[1::2]) != sorted(texts):
        message = "the chat template does not show each message once"
        raise ConfigError(message, field="messages", value=roles)
    ids: list[int] = []
    for part in parts:
        text = texts.get(part)
        if text is not None:
            ids += encode_text(tokenizer, text)
        else:
            ids += tokenizer.encode(part, add_special_tokens=False)
    return ids


def raw_format(tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """The format of raw prompts: it adds only the start token that the tokenizer itself adds."""
    adds_bos = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    head = str(tokenizer.bos_token) if adds_bos else ""
    return PromptFormat(head=head, tail="", stop=str(tokenizer.eos_token))


def chat_format(tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """The format of one user turn in the model's chat template, without a system turn.

    Raises:
        ConfigError: the tokenizer has no chat template, or its template changes the user's text.
    """
    if not tokenizer.chat_template:
        message = "the tokenizer has no chat template"
        allowed = "a template; or raw prompts"
        raise ConfigError(message, field="chat_template", value=None, allowed=allowed)
    rendered = _render(tokenizer, Conversation((Turn("user", _USER),)))
    if rendered.count(_USER) != 1:
        message = "the chat template changes the user's text"
        raise ConfigError(message, field="chat_template", value=rendered, allowed="the text once")
    head, tail = rendered.split(_USER)
    turn_end = _render(tokenizer, Conversation((Turn("user", _USER),)), generate=False).split(
        _USER
    )[1]
    head = _without_system_turn(tokenizer, head, turn_end)
    return PromptFormat(head=head, tail=tail, stop=_stop_token(tokenizer, turn_end))


def _render(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, generate: bool = True
) -> str:
    """The chat template's text for a conversation; `generate`: up to where the answer begins."""
    tools = conversation.tools
    return str(
        tokenizer.apply_chat_template(
            [turn._asdict() for turn in conversation.turns],
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=generate,
            **conversation.template_kwargs,
        )
    )


def _without_system_turn(tokenizer: PreTrainedTokenizerBase, head: str, turn_end: str) -> str:
    """The head without the system turn that some templates (SmolLM2, Qwen2) insert by themselves.

    Its place is found by rendering a system turn of our own: between its text and the user's stand
    the end of the system turn and the markup that opens the user turn.

    Args:
        tokenizer: its chat template is rendered.
        head: the markup before the text of a single user turn.
        turn_end: the markup that ends a turn.
    """
    turns = (Turn("system", _SYSTEM), Turn("user", _USER))
    try:
        rendered = _render(tokenizer, Conversation(turns))
    except Exception:  # a template without system turns (Gemma) may raise anything
        return head
    before_system, _, rest = rendered.partition(_SYSTEM)
    between = rest.split(_USER)[0]
    inserts_system = (
        rest != ""
        and before_system != head
        and head.startswith(before_system)
        and head.endswith(between)
    )
    if not inserts_system:
        return head
    user_head = between.removeprefix(turn_end)
    bos = tokenizer.bos_token or ""
    # In ChatML, bos is also the marker that opens each turn: the user head has it already.
    bos_opens_turn = head.startswith(bos + "system")
    if head.startswith(bos) and not bos_opens_turn:
        return bos + user_head
    return user_head


def _stop_token(tokenizer: PreTrainedTokenizerBase, turn_end: str) -> str:
    """The first special token in the markup that ends a turn; if there is none, the eos token."""
    specials = [token for token in tokenizer.all_special_tokens if token and token in turn_end]
    return min(specials, key=turn_end.index) if specials else str(tokenizer.eos_token)
