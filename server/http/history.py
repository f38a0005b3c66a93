"""The history of what serves, as a caller may see it."""

from collections.abc import Sequence
from typing import Any

from crma.store.channels import Change
from server.service.caller import Caller


def shown_history(history: Sequence[Change], caller: Caller) -> list[dict[str, Any]]:
    """The changes of a task or of the backbone.

    The evidence of a promotion names every task that was scored, so it is shown only to a caller
    for whom all tasks exist.
    """
    hidden = None if caller.tasks is None else {"evidence"}
    return [each.model_dump(mode="json", by_alias=True, exclude=hidden) for each in history]
