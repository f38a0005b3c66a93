"""How long a sequence may be, how many an engine takes at once, and whose."""

from collections import Counter
from collections.abc import Sequence

from server.engine.errors import PromptTooLong, QueueFull


def check_length(prompt_ids: Sequence[int], max_tokens: int, max_model_len: int) -> None:
    """Check that a prompt and its answer fit the model's context.

    Raises:
        PromptTooLong: they do not, or the prompt is empty.
    """
    length = len(prompt_ids)
    if not 0 < length <= max_model_len - max_tokens:
        raise PromptTooLong(length, max_tokens, max_model_len)


def check_room(
    num_open: Counter[str], owner: str, n: int, *, max_running: int, max_queue: int, step_s: float
) -> None:
    """Check that an engine has room for a request.

    An owner has an equal part of the room even where others have filled it.

    Args:
        num_open: sequences that run and wait, by owner.
        owner: of the request.
        n: its sequences.
        max_running: sequences that run at once.
        max_queue: sequences that may wait beside them.
        step_s: how long a step takes.

    Raises:
        QueueFull: there is none.
    """
    room = max_queue + max_running
    part = room // len({*num_open, owner})
    if num_open.total() + n > room and num_open[owner] + n > part:
        num_waiting = num_open.total() - max_running
        raise QueueFull(max_queue, max(1.0, num_waiting * step_s))
