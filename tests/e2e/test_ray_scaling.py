"""Replicas that come with the load and go without it.

They need the extra `ray`, and are skipped without it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray_cluster import LONG, TASKS, Cluster, Load, needs_ray, running, tiny_settings

pytestmark = [pytest.mark.e2e, needs_ray]
SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_requests": 2,
    "upscale_delay_s": 0,
    "downscale_delay_s": 1,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("scaling")
    with running(folder, tiny_settings(folder), autoscaling=SCALING) as served:
        yield served


def test_load_makes_a_second_replica_start_and_less_of_it_takes_one_away(
    cluster: Cluster, record_property: Callable[[str, object], None]
) -> None:
    """No request is lost at either, nor retried."""
    cluster.wait_until("replicas", 1.0)
    assert cluster.client.post("/adapters/medical/pin").status_code == 200
    with Load(cluster, 12, max_tokens=40) as many:
        cluster.wait_until("replicas", 2.0)
        while min(cluster.measured("replica_generation_tokens_total")) < LONG:
            assert cluster.process.poll() is None
        assert min(cluster.measured("replica_resident_adapters")) > 0, "both have what is pinned"
    made_by_two = cluster.value("generation_tokens_total")
    with Load(cluster, 2, max_tokens=LONG) as few:  # one on each of them
        cluster.wait_until("replicas", 1.0)
    for load in (many, few):
        assert set(load.endings) == {("whole", "done"), ("stream", "done")}
        record_property("endings", {" ".join(key): count for key, count in load.endings.items()})
    assert cluster.value("requests_lost_total") == cluster.value("requests_retried_total") == 0
    assert cluster.value("generation_tokens_total") > made_by_two, "also what has ended did"
    for task in TASKS:
        cluster.generate(prompt="one", task=task, max_tokens=2)
    before = cluster.value("adapter_load_seconds_count")
    cluster.generate(prompt="two", task="medical", max_tokens=2)
    assert cluster.value("adapter_load_seconds_count") == before, "the one that stays is warm"


def test_what_outlasts_the_time_to_drain_runs_again_or_is_said_to_be_lost(tmp_path: Path) -> None:
    settings = {**tiny_settings(tmp_path), "drain_timeout_s": 0}
    with running(tmp_path, settings, autoscaling={**SCALING, "downscale_delay_s": 0}) as cluster:
        with Load(cluster, 12, max_tokens=40):
            cluster.wait_until("replicas", 2.0)
        with Load(cluster, 2, max_tokens=LONG) as few:
            cluster.wait_until("replicas", 1.0)
        num_lost = few.endings["stream", "replica_lost"]
        assert few.endings["whole", "done"] == few.num_ended("whole")
        assert few.endings["stream", "done"] == few.num_ended("stream") - num_lost
        assert cluster.value("requests_lost_total") == num_lost
        assert cluster.value("requests_retried_total") + num_lost > 0
