"""server.ray.fleet: many engines as one."""

from server.engine.request import EngineStats
from server.ray.call import Status
from server.ray.fleet import Fleet


def status(name: str, **stats: object) -> Status:
    return Status(name, EngineStats(**stats))  # type: ignore[arg-type]


def test_counters_and_gauges_are_summed_over_the_replicas() -> None:
    fleet = Fleet()
    fleet.see_all(
        [
            status("a", num_steps=3, num_requests_running=2, kv_cache_usage=0.5, num_blocks=8),
            status("b", num_steps=4, num_requests_running=1, kv_cache_usage=0.1, num_blocks=8),
        ]
    )
    stats = fleet.stats()
    assert (stats.num_steps, stats.num_requests_running, stats.num_blocks) == (7, 3, 16)
    assert stats.kv_cache_usage == 0.3
    assert not stats.has_failed


def test_an_adapter_is_resident_if_some_replica_has_it() -> None:
    fleet = Fleet()
    fleet.see_all([status("a", resident=("x", "y")), status("b", resident=("y", "z"))])
    assert fleet.stats().resident == ("x", "y", "z")


def test_counters_never_go_down_when_replicas_come_and_go() -> None:
    fleet = Fleet()
    assert fleet.see_all([status("a", generation_tokens=5, num_requests_running=1)]) == {"a"}
    assert fleet.see_all([status("b", generation_tokens=1)]) == {"b"}
    stats = fleet.stats()
    assert (stats.generation_tokens, stats.num_requests_running) == (6, 0)
    fleet.see(status("a", generation_tokens=9))  # it had only been late
    assert fleet.stats().generation_tokens == 10
    assert fleet.see_all([status("a", generation_tokens=9)]) == set()
    assert fleet.stats().generation_tokens == 10


def test_without_a_replica_the_engine_has_failed_and_says_why() -> None:
    fleet = Fleet()
    fleet.see_all([status("a", num_steps=1)])
    fleet.see_all([])
    stats = fleet.stats()
    assert (stats.has_failed, stats.failure, stats.num_steps) == (True, "no replica runs", 1)
