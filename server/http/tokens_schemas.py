"""Bodies of /tokenize and /detokenize: vLLM's."""

from typing import Annotated, Self

from pydantic import Field, JsonValue, model_validator

from crma.models.prompts import Conversation
from server.http.body import Body, example
from server.http.neutral_fields import Neutral
from server.http.openai_message import MAX_MESSAGES, Message
from server.http.small_json import SmallJson

MODEL = "As in /v1; left out: the base model."


class TokenizeRequest(Body):
    """Either `prompt`, encoded as /v1/completions does, or `messages`, as /v1/chat/completions."""

    model_config = example("/tokenize")

    model: str = Field("base", description=MODEL)
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = Field(
        None, min_length=1, max_length=MAX_MESSAGES
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Begin as the tokenizer does, with BOS where it has one; null: for a prompt. "
        "Messages have the special tokens of the chat template, and no others.",
    )
    return_token_strs: bool = Field(False, description="Answer with each token's own string too.")
    chat_template_kwargs: SmallJson = Field(
        {}, description="Further variables of the chat template, for messages."
    )

    add_generation_prompt: Annotated[JsonValue, Neutral(True)] = None
    continue_final_message: Annotated[JsonValue, Neutral(False)] = None
    chat_template: Annotated[JsonValue, Neutral()] = None
    tools: Annotated[JsonValue, Neutral([])] = None

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    def conversation(self) -> Conversation:
        """The messages."""
        turns = tuple(message.turn() for message in self.messages or ())
        return Conversation(turns, template_kwargs=self.chat_template_kwargs)


class DetokenizeRequest(Body):
    """Token ids, to become text."""

    model_config = example("/detokenize")

    model: str = Field("base", description=MODEL)
    tokens: Annotated[list[int], Field(fail_fast=True)]
