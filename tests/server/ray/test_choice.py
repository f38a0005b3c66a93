"""server.ray.choice: which replica a request goes to."""

from collections import Counter

import pytest

from server.ray.choice import Candidate, by_preference

TASK, OTHER, BACKBONE = "sha256:task", "sha256:other", "sha256:backbone"


def names(candidates: list[Candidate], *adapters: str, max_lead: int = 8) -> list[str]:
    return [each.name for each in by_preference(candidates, adapters, max_lead)]


def test_a_request_goes_where_its_adapters_are_in_memory() -> None:
    warm = Candidate("warm", num_open=5, num_sent=50, warm={TASK, BACKBONE})
    idle = Candidate("idle", warm={OTHER, BACKBONE})
    assert names([idle, warm], TASK, BACKBONE) == ["warm", "idle"]
    assert names([warm, idle], OTHER, BACKBONE) == ["idle", "warm"]


def test_where_none_has_all_its_adapters_it_goes_to_the_least_loaded() -> None:
    """All tasks went to the first replica that had the backbone, which all of them share."""
    has_backbone = Candidate("has backbone", num_open=1, warm={BACKBONE})
    empty = Candidate("empty")
    assert names([has_backbone, empty], TASK, BACKBONE) == ["empty", "has backbone"]


def test_of_equally_loaded_ones_it_goes_to_who_has_the_fewest_adapters() -> None:
    full = Candidate("full", warm={OTHER, BACKBONE})
    empty = Candidate("empty", num_sent=9)
    assert names([full, empty], TASK, BACKBONE) == ["empty", "full"]


def test_a_request_without_adapters_goes_to_the_least_loaded() -> None:
    busy = Candidate("busy", num_open=2)
    idle = Candidate("idle", num_open=1, num_sent=100, warm={TASK})
    assert names([busy, idle]) == ["idle", "busy"]


def test_idle_replicas_take_turns() -> None:
    assert names([Candidate("first", num_sent=4), Candidate("second", num_sent=3)])[0] == "second"


@pytest.mark.parametrize(("num_open", "chosen"), [(8, "warm"), (9, "idle")])
def test_an_adapter_in_much_demand_gets_a_second_replica(num_open: int, chosen: str) -> None:
    warm = Candidate("warm", num_open=num_open, warm={TASK})
    assert names([warm, Candidate("idle")], TASK)[0] == chosen


def test_a_cold_replica_that_is_overloaded_too_comes_last() -> None:
    found = [
        Candidate("cold", num_open=30),
        Candidate("warm", num_open=20, warm={TASK}),
        Candidate("least", num_open=2),
    ]
    assert names(found, TASK) == ["least", "warm", "cold"]


def test_there_may_be_no_replica() -> None:
    assert names([], TASK) == []


def test_adapters_spread_over_replicas_and_stay_there() -> None:
    warm: dict[str, set[str]] = {"a": set(), "b": set()}
    sent: Counter[str] = Counter()
    loads = 0
    for number in range(60):
        needed = {f"task {number % 6}", BACKBONE}
        candidates = [Candidate(name, 0, sent[name], warm[name]) for name in warm]
        chosen = by_preference(candidates, needed, 8)[0].name
        loads += len(needed - warm[chosen])
        warm[chosen] |= needed
        sent[chosen] += 1
    assert loads == 6 + 2, "each task once, and the backbone in both"
    assert sorted(map(len, warm.values())) == [4, 4]
