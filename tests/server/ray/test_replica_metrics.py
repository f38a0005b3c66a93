"""server.ray.replica_metrics: each replica, beside the sums of all."""

from prometheus_client import CollectorRegistry, generate_latest
from replicas import remote_engine
from scripted_engine import ScriptedEngine

from server.engine.request import EngineStats
from server.ray.call import Status
from server.ray.replica_metrics import ReplicaMetrics


def test_each_replica_that_runs_has_its_series_and_one_that_ended_has_none() -> None:
    engine, _ = remote_engine([ScriptedEngine()])
    registry = CollectorRegistry()
    registry.register(ReplicaMetrics(engine))
    a = EngineStats(num_requests_waiting=3, resident=("x", "y"), generation_tokens=7)
    engine.fleet.see_all([Status("a", a), Status("b", EngineStats())])
    engine.counters.num_retried = 2
    shown = generate_latest(registry).decode().splitlines()
    assert "crma_replicas 2.0" in shown
    assert 'crma_replica_num_requests_waiting{replica="a"} 3.0' in shown
    assert 'crma_replica_resident_adapters{replica="a"} 2.0' in shown
    assert 'crma_replica_generation_tokens_total{replica="a"} 7.0' in shown
    assert 'crma_replica_kv_cache_usage_perc{replica="b"} 0.0' in shown
    assert "crma_requests_retried_total 2.0" in shown
    assert "crma_requests_lost_total 0.0" in shown
    engine.fleet.see_all([Status("b", EngineStats())])
    assert not any('"a"' in line for line in generate_latest(registry).decode().splitlines())
