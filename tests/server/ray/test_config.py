"""server.ray.config: what a cluster runs."""

from pathlib import Path

import pytest
from paths import ROOT

from crma.core.errors import ConfigError
from server.ray.config import UNSUPPORTED, Autoscaling, ReplicasConfig


def read(tmp_path: Path, text: str) -> ReplicasConfig:
    path = tmp_path / "replicas.yaml"
    path.write_text(text)
    return ReplicasConfig.read(path)


def test_a_file_has_replicas_resources_and_settings(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "replicas: 3\nnum_gpus: 1\nsettings: {max_num_seqs: 4, api_keys: 'a,b'}\n",
    )
    assert (config.replicas, config.num_gpus, config.affinity) == (3, 1, True)
    settings = config.server_settings()
    assert settings.max_num_seqs == 4
    assert len(settings.api_keys) == 2


def test_an_empty_file_has_the_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "") == ReplicasConfig()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("replica: 2", "replica"),
        ("replicas: 0", "replicas"),
        ("autoscaling: {min_replicas: 1}", "autoscaling.max_replicas"),
        ("autoscaling: {min_replicas: 3, max_replicas: 2}", "autoscaling"),
        ("- replicas", ""),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, text: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert caught.value.field == field


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    for text in ("{", "a: b: c"):
        with pytest.raises(ConfigError, match=r"replicas\.yaml cannot be read"):
            read(tmp_path, text)
    with pytest.raises(ConfigError, match="cannot be read"):
        ReplicasConfig.read(tmp_path / "none.yaml")


def test_a_setting_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="max_seqs") as caught:
        ReplicasConfig(settings={"max_seqs": 1}).server_settings()
    assert "max_num_seqs" in caught.value.allowed  # type: ignore[operator]


def test_a_setting_that_ray_serve_does_not_honour_is_refused_wherever_it_comes_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match="health_port"):
        ReplicasConfig(settings={"health_port": 8001}).server_settings()
    monkeypatch.setenv("CRMA_HEAD_TIMEOUT_S", "3")
    with pytest.raises(ConfigError, match="head_timeout_s"):
        ReplicasConfig().server_settings()


def test_the_page_names_every_key_and_every_setting_that_is_refused() -> None:
    page = (ROOT / "docs/replicas.md").read_text("utf-8")
    for name in (*ReplicasConfig.model_fields, *Autoscaling.model_fields):
        assert f"`{name}`" in page
    for name in UNSUPPORTED:
        assert f"`CRMA_{name.upper()}`" in page


def test_only_a_cluster_of_its_own_is_told_that_it_may_be_open() -> None:
    """Where others had started the cluster, without keys, the server was open to all."""
    own = ReplicasConfig(settings={"max_num_seqs": 4})
    assert own.for_processes().settings == {"max_num_seqs": 4, "allow_open": True}
    of_others = ReplicasConfig(address="auto", settings={"max_num_seqs": 4})
    assert of_others.for_processes() == of_others


def test_processes_of_vllm_share_the_cpus_of_their_replica() -> None:
    """Each had as many threads as the replica has CPUs."""
    config = ReplicasConfig(num_cpus=6, settings={"engine": "vllm", "tensor_parallel_size": 3})
    assert config.environment(config.server_settings()) == {"OMP_NUM_THREADS": "2"}
    one = ReplicasConfig(num_cpus=0.5, settings={"engine": "vllm"})
    assert one.environment(one.server_settings()) == {"OMP_NUM_THREADS": "1"}
    native = ReplicasConfig(num_cpus=6)
    assert native.environment(native.server_settings()) == {}
