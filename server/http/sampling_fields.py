"""The fields by which /generate, completions and chats choose tokens.

Limits that are settings (max_n, max_stop, …) are checked by the service, which knows the settings.
"""

import dataclasses
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from server.engine.request import SamplingParams
from server.http.body import at_most
from server.http.structured_outputs import Structured

MAX_SEED = 2**53 - 1  # the largest integer that every JSON client keeps exact
MAX_NAMED_TOKENS = 1024  # in one field; every step looks them up


def _list_texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_token_ids(biases: dict[str, float]) -> dict[str, float]:
    for token_id in biases:
        is_number = token_id.isascii() and token_id.isdecimal()
        if not is_number or len(token_id) > 9:
            raise ValueError(f"Input should have token ids as keys, not {token_id[:20]!r}")
    return biases


StopText = Annotated[str, Field(min_length=1, max_length=256)]
StopTexts = Annotated[
    list[StopText],
    Field(fail_fast=True),
    Field(max_length=MAX_NAMED_TOKENS),
    BeforeValidator(_list_texts, json_schema_input_type=StopText | list[StopText]),
]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Temperature = Annotated[float, Field(ge=0, le=2, description="0: greedy.")]
TopK = Annotated[int, Field(ge=-1), AfterValidator(lambda k: max(k, 0))]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[dict[str, Bias], AfterValidator(_check_token_ids), at_most(MAX_NAMED_TOKENS)]


class TokenChoice(Structured):
    """How tokens are chosen, and what ends an answer: the fields of every generating route."""

    crma: bool | None = Field(
        None, description="CRMA backbone on or off; null: as the adapter was trained."
    )
    min_tokens: int = Field(
        0, ge=0, description="Nothing ends the answer before it has so many tokens."
    )
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: TopK = Field(0, description="0 or -1: off.")
    min_p: float = Field(
        0, ge=0, le=1, description="Least probability, as a share of the most probable token's."
    )
    repetition_penalty: float = Field(
        1, ge=0.01, le=2, description="Over tokens of prompt and answer; 1: off."
    )
    presence_penalty: float = Field(
        0, ge=-2, le=2, description="Subtracted from the logits of tokens that the answer has."
    )
    frequency_penalty: float = Field(
        0, ge=-2, le=2, description="The same, once for each time that the answer has them."
    )
    logit_bias: LogitBias = Field(
        {}, description="Token ids, and what is added to their logits, from -100 to 100."
    )
    seed: Seed | None = Field(
        None, description="Answer i of n draws from seed + i; null: drawn, and in the answer."
    )
    stop: StopTexts = Field(
        [], description="Texts that end an answer and are not part of it; one, or a list."
    )
    stop_token_ids: list[int] = Field(
        [], max_length=MAX_NAMED_TOKENS, description="Tokens that end an answer, likewise."
    )
    include_stop_str_in_output: bool = Field(
        False, description="What ends the answer is part of it."
    )
    ignore_eos: bool = Field(
        False, description="Go on past the model's end of the answer; for measurements."
    )
    skip_special_tokens: bool = Field(True, description="Special tokens have no text.")
    stream: bool = Field(False, description="Answer as server-sent events.")
    timeout_s: float | None = Field(
        None, gt=0, description="Deadline of this request in seconds; null: the server's."
    )

    def chosen(self, **more: int | bool | None) -> SamplingParams:
        """The fields that the engine knows by the same name, and `more` of its fields.

        Raises:
            InvalidField: as `Structured.constraint`.
        """
        known = {each.name for each in dataclasses.fields(SamplingParams)}
        fields = self.model_dump(include=known)
        fields["constraint"] = self.constraint()
        fields["stop"] = tuple(self.stop)
        fields["stop_token_ids"] = tuple(self.stop_token_ids)
        biases = self.logit_bias.items()
        fields["logit_bias"] = tuple((int(token_id), bias) for token_id, bias in biases)
        return SamplingParams(**{**fields, **more})


class Sampled(TokenChoice):
    """The fields of every generating route but /v1/responses."""

    max_tokens: int | None = Field(16, ge=1, description="Most tokens to generate.")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="The newer name of max_tokens, and counts before it."
    )
    n: int = Field(1, ge=1, description="Answers to draw.")

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None: as many as the context has room for."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    def sampling(self, **more: int | bool | None) -> SamplingParams:
        """As `chosen`. Without a `token_limit`, `max_tokens` still has to be set."""
        return self.chosen(max_tokens=self.token_limit or 0, **more)
