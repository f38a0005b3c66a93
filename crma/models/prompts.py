"""Prompt formats, the same in training and in serving: how a user's text becomes token ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from crma.core.errors import ConfigError
from crma.models.chat_template import (
    check_there_is,
    encode_chat,
    render,
    render_chat,
    template_input,
)
from crma.models.inert_text import encode_rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stand-ins for texts while a template is taken apart; no real template contains them.
_SYSTEM = "⟦system⟧"
_USER = "⟦user⟧"


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

    @property
    def question(self) -> str | None:
        """The text, if this is one user turn without tools."""
        turn = self.turns[0]
        is_question = len(self.turns) == 1 and turn.role == "user" and not self.tools
        return turn.content if is_question else None


_QUESTION = Conversation((Turn("user", _USER),))


class Format(ABC):
    """How text that is not raw becomes a prompt, and which token ends an answer to it."""

    @abstractmethod
    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        """Token ids of one user turn. Special tokens written in `prompt` are encoded as text."""

    def render(self, _: PreTrainedTokenizerBase, prompt: str) -> str:
        """The text that `encode` encodes. Raises as that does."""
        return prompt

    @abstractmethod
    def stop_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The id of the token that ends an answer.

        Raises:
            ConfigError: it is not one token of this tokenizer.
        """

    def encode_conversation(
        self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation
    ) -> list[int]:
        """Token ids of a conversation.

        One user turn is encoded as in training; what training never saw goes through the base
        model's chat template. Raises ConfigError as `encode_chat`, and for variables of a template
        where none is used.
        """
        if conversation.question is None:
            return encode_chat(tokenizer, conversation)
        if conversation.template_kwargs:
            name = "chat_template_kwargs"
            message = f"{name}: one user turn to this task goes through its adapter's own format"
            value = dict(conversation.template_kwargs)
            raise ConfigError(message, field=name, value=value, allowed={})
        return self.encode(tokenizer, conversation.question)

    def render_conversation(
        self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation
    ) -> str:
        """The text that `encode_conversation` encodes. Raises ConfigError as `encode_chat`."""
        if conversation.question is None:
            return render_chat(tokenizer, conversation)
        return self.render(tokenizer, conversation.question)

    def encode_answer(self, tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
        """Token ids that training teaches the model to generate: the answer and the stop token."""
        return [*encode_text(tokenizer, answer), self.stop_id(tokenizer)]


@dataclass(frozen=True)
class PromptFormat(Format):
    """Markup around a user's text: the model reads head + text + tail, encoded whole.

    Args:
        head: the markup before the text.
        tail: the markup after it, up to where the answer begins.
        stop: the text of the one special token that ends an answer.
    """

    head: str
    tail: str
    stop: str

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        """As `Format.encode`."""
        return encode_rendered(tokenizer, self._marked_up, prompt)

    def render(self, _: PreTrainedTokenizerBase, prompt: str) -> str:
        """As `Format.render`."""
        return self._marked_up(prompt)

    def stop_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """As `Format.stop_id`."""
        return _one_token(tokenizer, self.stop)

    def _marked_up(self, prompt: str) -> str:
        return self.head + prompt + self.tail


@dataclass(frozen=True)
class RawFormat(Format):
    """No markup: the text, after the start token if the tokenizer adds one; eos ends an answer."""

    raw: Literal[True]

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        """As `Format.encode`."""
        return tokenizer.encode(prompt, split_special_tokens=True)

    def stop_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """As `Format.stop_id`."""
        return _one_token(tokenizer, str(tokenizer.eos_token))


@dataclass(frozen=True)
class TemplateFormat(Format):
    """A chat template, exactly as transformers applies it to one user turn.

    It keeps the system turn that some templates (SmolLM2, Qwen2) insert by themselves.

    Args:
        template: its text; None: the base model's own.
    """

    template: str | None

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        """As `Format.encode`. Raises ConfigError as `encode_chat`."""
        return encode_chat(tokenizer, Conversation((Turn("user", prompt),)), self.template)

    def encode_conversation(
        self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation
    ) -> list[int]:
        """Token ids of a conversation in this template. Raises ConfigError as `encode_chat`."""
        return encode_chat(tokenizer, conversation, self.template)

    def render(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
        """As `Format.render`. Raises ConfigError as `encode_chat`."""
        return render_chat(tokenizer, Conversation((Turn("user", prompt),)), self.template)

    def render_conversation(
        self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation
    ) -> str:
        """As `Format.render_conversation`, in this template."""
        return render_chat(tokenizer, conversation, self.template)

    def stop_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """As `Format.stop_id`. Raises ConfigError too if there is no usable template."""
        return _one_token(tokenizer, _template_stop(tokenizer, self.template))


@dataclass(frozen=True)
class AsSent(Format):
    """Raw prompts: nothing is put around the text, and special tokens in it are recognised.

    That is how transformers and vLLM encode a prompt that is not a chat.

    Args:
        ends_as: answers end with the stop token of this format.
        add_special_tokens: add those that the tokenizer adds to a text, such as a start token.
    """

    ends_as: Format
    add_special_tokens: bool = True

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        """Token ids of a raw prompt."""
        return tokenizer.encode(prompt, add_special_tokens=self.add_special_tokens)

    def stop_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """As `Format.stop_id`."""
        return self.ends_as.stop_id(tokenizer)


RAW_FORMAT = RawFormat(True)
BASE_TEMPLATE = TemplateFormat(None)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of user text: no special token is added, and none written in it is recognised."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def chat_format(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> PromptFormat:
    """The format of one user turn in a chat template, without a system turn, to train with.

    Args:
        template: the chat template; None: the tokenizer's own.

    Raises:
        ConfigError: there is no template, or it changes the user's text.
    """
    rendered = _render_question(tokenizer, template)
    if rendered.count(_USER) != 1:
        message = "the chat template changes the user's text"
        raise ConfigError(message, field="chat_template", value=rendered, allowed="the text once")
    head, tail = rendered.split(_USER)
    turn_end = _turn_end(tokenizer, template)
    head = _without_system_turn(tokenizer, template, head, turn_end)
    return PromptFormat(head=head, tail=tail, stop=_stop_token(tokenizer, turn_end))


def check_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Whether a template serves one user turn.

    Raises ConfigError if there is none, it refuses the turn, or it does not show its text.
    """
    if _USER not in _render_question(tokenizer, template):
        message = "the chat template does not show the user's text"
        raise ConfigError(message, field="chat_template", value=template, allowed="the text")


def _render_question(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """What a template makes of one user turn. Raises ConfigError if it makes nothing of it."""
    check_there_is(tokenizer, template)
    try:
        return render(tokenizer, template, template_input(_QUESTION))
    except Exception as error:  # a template may raise anything
        message = f"the chat template refuses one user turn: {error}"
        raise ConfigError(message, field="chat_template", value=template) from error


def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """The markup that ends a user turn."""
    shown = render(tokenizer, template, template_input(_QUESTION), generate=False)
    return shown.partition(_USER)[2]


def base_format(tokenizer: PreTrainedTokenizerBase, *, raw: bool = False) -> Format:
    """The format of the base model itself: its chat template.

    Args:
        raw: prompts are raw, so that a base model without a usable template will do.

    Raises:
        ConfigError: as `check_template`.
    """
    try:
        check_template(tokenizer, None)
    except ConfigError:
        if raw:
            return RAW_FORMAT
        raise
    return BASE_TEMPLATE


@lru_cache(maxsize=64)
def _template_stop(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """The token that ends a turn of a template. Raises ConfigError as `check_template`."""
    check_template(tokenizer, template)
    return _stop_token(tokenizer, _turn_end(tokenizer, template))


def _without_system_turn(
    tokenizer: PreTrainedTokenizerBase, template: str | None, head: str, turn_end: str
) -> str:
    """The head without the system turn that some templates (SmolLM2, Qwen2) insert by themselves.

    Its place is found by rendering a system turn of our own: between its text and the user's stand
    the end of the system turn and the markup that opens the user turn.

    Args:
        template: as in `chat_format`.
        head: the markup before the text of a single user turn.
        turn_end: the markup that ends a turn.
    """
    conversation = Conversation((Turn("system", _SYSTEM), Turn("user", _USER)))
    try:
        rendered = render(tokenizer, template, template_input(conversation))
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


def _one_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of a token that is the whole text. Raises ConfigError if there is none."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        message = f"prompt_format.stop: {text!r} is not one token of this tokenizer"
        raise ConfigError(message, field="prompt_format.stop", value=text, allowed="one token")
    return ids[0]
