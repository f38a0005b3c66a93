"""Bodies of the routes by which an administrator publishes adapters."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue

from crma.core.errors import InvalidAdapter
from crma.store.manifest import check_name
from server.http.body import Body, at_most
from server.http.neutral_fields import Ignored, Neutral


def _check_name(name: str) -> str:
    try:
        return check_name(name)
    except InvalidAdapter as error:
        raise ValueError(f"Input should be a task name: {error.allowed}") from error


TRUST_BASE = "Publish it even if its config names another base model."
PROMPT_FORMAT = (
    "raw, chat (the base model's chat template) or template (the adapter's own); null: the first "
    "that there is of template, chat and raw."
)
PromptFormatName = Literal["raw", "chat", "template"]
TaskName = Annotated[str, AfterValidator(_check_name)]


class UploadForm(Body):
    """The fields of an upload beside its files."""

    name: TaskName
    licence: str = Field("unknown", min_length=1, max_length=200)
    trust_base: bool = Field(False, description=TRUST_BASE)
    prompt_format: PromptFormatName | None = Field(None, description=PROMPT_FORMAT)


class LoadLoraRequest(Body):
    """vLLM's request to add a LoRA."""

    lora_name: TaskName = Field(description="The task to publish it under.")
    lora_path: str = Field(
        min_length=1, description="A PEFT folder, absolute or relative to an import root."
    )
    trust_base: bool = Field(False, description=f"{TRUST_BASE} Ours.")
    prompt_format: PromptFormatName | None = Field(None, description=f"{PROMPT_FORMAT} Ours.")
    load_inplace: bool = Field(False, description="Replace the task if it serves already.")
    is_3d_lora_weight: Annotated[JsonValue, Neutral(False)] = None


class UnloadLoraRequest(Body):
    """vLLM's request to take a LoRA out."""

    lora_name: str
    lora_int_id: Ignored = None


class PromoteRequest(Body):
    """How a backbone is judged, and whether it serves if no task suffers."""

    dry_run: bool = Field(True, description="Decide, and change nothing.")
    margin: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of its loss by which a task may get worse; 0.002 nats are added.",
    )
    newcomer_margin: float = Field(
        0.1, ge=0, le=1, description="The same for a task that nobody uses yet."
    )
    allow_ungated: Annotated[list[TaskName], at_most(1000)] = Field(
        [], description="Tasks that need not be scored, since they have no validation data here."
    )
