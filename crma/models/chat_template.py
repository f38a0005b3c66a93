"""What a chat template makes of a conversation: text, and token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from crma.core.errors import ConfigError
from crma.models.inert_text import encode_rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from crma.models.prompts import Conversation

PARAMETERS = frozenset(  # of transformers' `apply_chat_template`
    {
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "kwargs",
    }
)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, template: str | None = None
) -> list[int]:
    """Token ids of a conversation, up to the next answer, as `apply_chat_template` gives them.

    Special tokens that a message, a tool or a variable spells are text (`encode_rendered`).

    Args:
        template: the chat template; None: the tokenizer's own.

    Raises:
        ConfigError: there is no template, it refuses this conversation, or a variable is reserved.
    """
    renderer = _renderer(tokenizer, conversation, template)
    return encode_rendered(tokenizer, renderer, template_input(conversation))


def render_chat(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, template: str | None = None
) -> str:
    """The text that `encode_chat` encodes; raises as that does."""
    return _renderer(tokenizer, conversation, template)(template_input(conversation))


def _renderer(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, template: str | None
) -> Callable[[Mapping[str, Any]], str]:
    """Renders what `template_input` gives. Raises ConfigError as `encode_chat`; so does it."""
    check_there_is(tokenizer, template)
    _check_variables(tokenizer, conversation.template_kwargs)

    def rendered(given: Mapping[str, Any]) -> str:
        try:
            return render(tokenizer, template, given)
        except Exception as error:  # a template may raise anything
            message = f"the chat template refuses these messages: {error}"
            roles = [turn.role for turn in conversation.turns]
            raise ConfigError(message, field="messages", value=roles) from error

    return rendered


def check_there_is(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Raises ConfigError if there is neither this template nor one of the tokenizer's own."""
    if not template and not tokenizer.chat_template:
        message = "the base model has no chat template"
        allowed = "a model with one; or raw prompts"
        raise ConfigError(message, field="chat_template", value=None, allowed=allowed)


def _check_variables(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> None:
    """Raises ConfigError for a variable that the server itself gives to templates."""
    reserved = {"messages", *PARAMETERS, *tokenizer.special_tokens_map} - {"documents"}
    for name in template_kwargs:
        if name in reserved:
            where = "chat_template_kwargs"
            message = f"{where}: the server itself sets {name!r}"
            allowed = "variables of the template's own, such as enable_thinking"
            raise ConfigError(message, field=where, value=name, allowed=allowed)


def template_input(conversation: Conversation) -> dict[str, Any]:
    """The arguments of `apply_chat_template`, which drops the keys of a message that are None."""
    messages = [turn._asdict() for turn in conversation.turns]
    tools = list(conversation.tools) if conversation.tools else None
    return {"conversation": messages, "tools": tools, **conversation.template_kwargs}


def render(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    given: Mapping[str, Any],
    *,
    generate: bool = True,
) -> str:
    """The text that a template makes of `given`; `generate`: up to where the answer begins."""
    return str(
        tokenizer.apply_chat_template(
            **given, chat_template=template, tokenize=False, add_generation_prompt=generate
        )
    )
