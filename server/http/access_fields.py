"""What the access log says of a request beside its route and status.

A route leaves it in the request's state: who asked (`caller`), the adapters that it resolved
(`selection`), what ran in the engine (`generations`), and the code of an error (`error_code`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.service.caller import Caller
from server.service.generation import Generation
from server.service.outcome import Outcome

Fields = dict[str, Any]


def access_fields(state: Mapping[str, Any]) -> Fields:
    """The fields of the line for a request whose answer has ended."""
    fields: Fields = {"error": state.get("error_code")}
    caller: Caller | None = state.get("caller")
    if caller is not None:
        fields["key"] = caller.name or None  # nobody was told apart
    selection = state.get("selection")
    if selection is not None:
        fields["task_digest"] = selection.task_digest
        fields["crma"] = selection.crma_digest is not None
        fields["crma_digest"] = selection.crma_digest
    generations: Sequence[Generation] = state.get("generations", ())
    if generations:
        fields["task"] = generations[0].task
    outcomes = [each.outcome() for each in generations if each.has_run]
    return {**fields, **_engine_fields(outcomes)} if outcomes else fields


def _engine_fields(outcomes: Sequence[Outcome]) -> Fields:
    """Tokens and times of the prompts of a request that have run.

    Tokens are those of all prompts. Times are seconds: the shortest wait, the longest of the rest.
    """
    fields: Fields = {
        "prompt_tokens": sum(each.prompt_tokens for each in outcomes),
        "output_tokens": sum(sum(each.output_tokens) for each in outcomes),
        "cached_tokens": sum(each.cached_tokens for each in outcomes),
        "finish_reason": ",".join(_distinct(outcomes)),
    }
    timings = [each.timings for each in outcomes if each.timings is not None]
    if len(timings) == len(outcomes):
        fields["queue_s"] = _rounded(min(each.queue_s for each in timings))
        fields["prefill_s"] = _longest(each.prefill_s for each in timings)
        fields["decode_s"] = _longest(each.decode_s for each in timings)
        fields["total_s"] = _rounded(max(each.e2e_s for each in timings))
    return fields


def _distinct(outcomes: Iterable[Outcome]) -> list[str]:
    """The finish reasons, each once, in the order of the answers."""
    reasons = [str(reason) for each in outcomes for reason in each.reasons]
    return list(dict.fromkeys(reasons))


def _longest(seconds: Iterable[float | None]) -> float | None:
    """The longest of the times that are known; None if none is."""
    longest = max((each for each in seconds if each is not None), default=None)
    return None if longest is None else _rounded(longest)


def _rounded(seconds: float) -> float:
    return round(seconds, 4)
