"""server.engine.vllm.launch"""

from dataclasses import replace

import pytest
import torch
from vllm_engine import CONFIG

from crma.core.errors import ConfigError
from crma.models.base_model import BaseModel
from server.engine.vllm import launch
from server.engine.vllm.launch import environment, start_engine


def test_a_cpu_is_named_to_vllm_and_its_threads_are_shared_by_the_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    config = replace(CONFIG, num_threads=0, tensor_parallel_size=3)
    found = environment(config)
    assert found["VLLM_TARGET_DEVICE"] == "cpu"
    assert found["OMP_NUM_THREADS"] == "2"
    assert environment(replace(config, num_threads=1))["OMP_NUM_THREADS"] == "1"


def test_a_pipeline_on_cpus_is_refused_by_name(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "check_versions", lambda: None)
    with pytest.raises(ConfigError, match="pipeline") as caught:
        start_engine(base, replace(CONFIG, pipeline_parallel_size=2))
    assert caught.value.field == "pipeline_parallel_size"
