"""What is asked of the audit and of the usage."""

from datetime import date
from typing import Annotated, get_args

from pydantic import BaseModel, ConfigDict, Field

from crma.store.manifest import NAME_PATTERN
from server.records.usage import Column

Text = Annotated[str, Field(max_length=256, pattern=r"^[^\x00-\x1f]*$")]
EACH: tuple[Column, ...] = get_args(Column)


class AuditQuery(BaseModel):
    """Which acts are wanted."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000, description="At most so many.")
    before: int | None = Field(
        None, ge=1, lt=2**63, description="The `id` of an act: only earlier ones."
    )
    who: Text | None = Field(None, description="Only acts of the key of this name.")
    what: Text | None = Field(None, description="Only this act, such as publish or delete.")


class UsageQuery(BaseModel):
    """Which usage is wanted, and in what sums. Days are those of UTC."""

    model_config = ConfigDict(extra="forbid")

    first_day: date | None = Field(
        None, alias="from", description="The first day; by default 29 days before the last."
    )
    last_day: date | None = Field(None, alias="to", description="The last day; by default today.")
    key: Text | None = Field(None, description="Only that of the key of this name.")
    task: str | None = Field(
        None,
        pattern=f"^{NAME_PATTERN}$",
        description="Only that of this task; base: the base model without one.",
    )
    by: tuple[Column, ...] = Field(
        EACH, max_length=len(EACH), description="A sum for each of these; may be repeated."
    )
