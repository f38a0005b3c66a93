"""The fields by which every generating route chooses tokens.

Limits that are settings (max_n, max_stop, …) are checked by the service, which knows the settings.
"""

import dataclasses
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from server.engine.request import SamplingParams
from server.http.body import Body

MAX_SEED = 2**53 - 1  # the largest integer that every JSON client keeps exact


def _check_temperature(temperature: float) -> float:
    if 0 < temperature < 0.01:
        raise ValueError("Input should be 0, or from 0.01 to 2")
    return temperature


def _list_texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopText = Annotated[str, Field(min_length=1, max_length=256)]
StopTexts = Annotated[
    list[StopText],
    BeforeValidator(_list_texts, json_schema_input_type=StopText | list[StopText]),
]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Temperature = Annotated[
    float,
    AfterValidator(_check_temperature),
    Field(ge=0, le=2, description="0, or from 0.01."),
]


class Sampled(Body):
    """The fields of every generating route."""

    crma: bool | None = Field(
        None, description="CRMA backbone on or off; null: as the adapter was trained."
    )
    max_tokens: int = Field(16, ge=1, description="Most tokens to generate.")
    top_p: float = Field(1.0, ge=1e-6, le=1)
    presence_penalty: float = Field(
        0, ge=-2, le=2, description="Subtracted from the logits of tokens that the answer has."
    )
    frequency_penalty: float = Field(
        0, ge=-2, le=2, description="The same, once for each time that the answer has them."
    )
    seed: Seed | None = Field(
        None, description="Answer i of n draws from seed + i; null: drawn, and in the answer."
    )
    n: int = Field(1, ge=1, description="Answers to draw.")
    stop: StopTexts = Field(
        [], description="Texts that end an answer and are not part of it; one, or a list."
    )
    stream: bool = Field(False, description="Answer as server-sent events.")
    ignore_eos: bool = Field(
        False, description="Go on to max_tokens past the end of the answer; for measurements."
    )

    def sampling(self, **more: int | bool | None) -> SamplingParams:
        """The fields that the engine knows by the same name, and `more` of its fields."""
        known = {each.name for each in dataclasses.fields(SamplingParams)}
        fields = self.model_dump(include=known)
        fields["stop"] = tuple(self.stop)
        return SamplingParams(**{**fields, **more})
