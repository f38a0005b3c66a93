"""Fields of OpenAI and vLLM that this server takes where they do not change the answer.

Some never do, by their definition: those are ignored. The others each have a neutral value, at
which things are as they are without the field. Any other value is refused by name.
"""

import json
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, JsonValue
from pydantic_core import core_schema

from server.http.body import Body

Ignored = Annotated[Any, Field(description="Ignored: it does not change the answer.")]


class Neutral:
    """Annotates a field that is taken at these values and null, and refused at any other."""

    def __init__(self, *values: Any) -> None:
        self.values = values
        self.listed = [*values, None]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, _: core_schema.CoreSchema, __: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": self.listed}

    def _check(self, given: Any) -> Any:
        if not any(_is_same(given, value) for value in self.values):
            allowed = " or ".join(json.dumps(value) for value in self.listed)
            raise ValueError(f"Input should be {allowed}: this server has nothing else")
        return given


def _is_same(given: Any, value: Any) -> bool:
    """Whether two values are the same in JSON: 1 is 1.0, and is not true."""
    return isinstance(given, bool) == isinstance(value, bool) and bool(given == value)


class NeutralFields(Body):
    """Those of both of OpenAI's generating routes."""

    user: Ignored = None
    metadata: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None

    store: Annotated[JsonValue, Neutral(False)] = None
    service_tier: Annotated[JsonValue, Neutral("auto", "default")] = None

    # vLLM's
    use_beam_search: Annotated[JsonValue, Neutral(False)] = None
    length_penalty: Annotated[JsonValue, Neutral(1)] = None
    spaces_between_special_tokens: Annotated[JsonValue, Neutral(True)] = None
    truncate_prompt_tokens: Annotated[JsonValue, Neutral()] = None
    allowed_token_ids: Annotated[JsonValue, Neutral()] = None
    bad_words: Annotated[JsonValue, Neutral([])] = None
    priority: Annotated[JsonValue, Neutral(0)] = None
    return_token_ids: Annotated[JsonValue, Neutral(False)] = None
    return_tokens_as_token_ids: Annotated[JsonValue, Neutral(False)] = None
    prompt_logprobs: Annotated[JsonValue, Neutral()] = None
    cache_salt: Annotated[JsonValue, Neutral("")] = None
    kv_transfer_params: Annotated[JsonValue, Neutral({})] = None
    logits_processors: Annotated[JsonValue, Neutral([])] = None
    mm_processor_kwargs: Annotated[JsonValue, Neutral({})] = None
    detokenize: Annotated[JsonValue, Neutral(True)] = None


class NeutralCompletionFields(NeutralFields):
    """Those of /v1/completions."""

    suffix: Annotated[JsonValue, Neutral("")] = None

    # of chats
    tools: Annotated[JsonValue, Neutral([])] = None
    tool_choice: Annotated[JsonValue, Neutral("none")] = None
    parallel_tool_calls: Ignored = None  # without tools there are no calls
    chat_template_kwargs: Annotated[JsonValue, Neutral({})] = None
    add_generation_prompt: Annotated[JsonValue, Neutral(True)] = None
    top_logprobs: Annotated[JsonValue, Neutral()] = None


class NeutralChatFields(NeutralFields):
    """Those of /v1/chat/completions."""

    prediction: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    functions: Annotated[JsonValue, Neutral([])] = None
    function_call: Annotated[JsonValue, Neutral("none")] = None
    modalities: Annotated[JsonValue, Neutral(["text"])] = None
    audio: Annotated[JsonValue, Neutral()] = None
    moderation: Annotated[JsonValue, Neutral()] = None
    reasoning_effort: Annotated[JsonValue, Neutral("none")] = None
    verbosity: Annotated[JsonValue, Neutral("medium")] = None
    web_search_options: Annotated[JsonValue, Neutral()] = None

    # of completions
    best_of: Annotated[JsonValue, Neutral(1)] = None
    suffix: Annotated[JsonValue, Neutral("")] = None

    # vLLM's
    add_special_tokens: Annotated[JsonValue, Neutral(False)] = None
    echo: Annotated[JsonValue, Neutral(False)] = None
    add_generation_prompt: Annotated[JsonValue, Neutral(True)] = None
    continue_final_message: Annotated[JsonValue, Neutral(False)] = None
    include_reasoning: Annotated[JsonValue, Neutral(True)] = None
    documents: Annotated[JsonValue, Neutral([])] = None
    chat_template: Annotated[JsonValue, Neutral()] = None
