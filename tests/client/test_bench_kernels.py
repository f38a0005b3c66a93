"""`bench.kernels`, `bench.limits` and `bench.peers`: what they measure and write."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from bench.limits import best_time, measure_limits
from bench.peers import B_STD, WEIGHTS, write_another
from bench.step_profile import PARTS, StepProfiler
from safetensors.torch import load_file, save_file

from crma.method.injection import Injection

LIMITS = {"read_gb_s": 20.0, "gemm_gf_s": 100.0}


@pytest.mark.e2e
def test_a_profile_has_every_part_of_a_step_and_shares_that_add_up() -> None:
    injection = Injection(tiny.fresh(tiny.injection("llama")))
    kernel = tiny.kernel(injection)
    if kernel is None:
        pytest.skip("no C++ compiler")
    profiler = StepProfiler(injection, tiny.tokenizer(), kernel, LIMITS, max_rows=3, context=20)
    rows = [profiler.measure(1, 0, 2), profiler.measure(3, 5, 2)]
    assert [row["waiting"] for row in rows] == [0, 5]
    assert [row["row"] for row in rows] == ["a step of 1 rows", "a step of 3 rows"]
    for row in rows:
        parts = row["parts"]
        assert tuple(parts) == PARTS
        assert all(part["ms"] > 0 for part in parts.values())
        assert sum(part["ms"] for part in parts.values()) == pytest.approx(row["ms_with_clock"])
        assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
        assert row["limit_ms"] == pytest.approx(sum(part["limit_ms"] for part in parts.values()))
        assert row["share_of_limit"] == pytest.approx(row["limit_ms"] / row["ms"])
    one, three = (row["parts"]["attention"]["limit_ms"] for row in rows)
    assert three == pytest.approx(3 * one)


@pytest.mark.e2e
def test_the_rate_of_products_is_the_best_of_all_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.limits.SIZE", 64)
    monkeypatch.setattr("bench.limits.NUM_WEIGHTS", 1 << 16)
    limits = measure_limits(tiny.kernel(Injection(tiny.fresh(tiny.injection("llama")))))
    by_way = [limits[name] for name in limits if re.fullmatch("gemm_.+_gf_s", name)]
    assert len(by_way) >= 2
    assert limits["gemm_gf_s"] == max(by_way)
    assert limits["gemm_tok_s"] == pytest.approx(limits["gemm_gf_s"] * 1e9 / 2 / (1 << 16))


def test_a_time_is_the_best_of_at_least_three() -> None:
    calls: list[torch.Tensor] = []
    assert best_time(lambda: calls.append(torch.ones(1))) > 0
    assert len(calls) >= 3


def test_another_adapter_has_the_shape_and_config_of_the_first_and_weights_of_its_own(
    tmp_path: Path,
) -> None:
    first = tmp_path / "lora-0"
    first.mkdir()
    (first / "adapter_config.json").write_text("{}")
    shapes = {"q.lora_A.weight": (8, 400), "q.lora_B.weight": (600, 8)}
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(zeros, first / WEIGHTS)
    for name, seed in (("lora-8", 8), ("lora-9", 9), ("again", 8)):
        write_another(first, tmp_path / name, seed)
    eight, nine, again = (
        load_file(tmp_path / name / WEIGHTS) for name in ("lora-8", "lora-9", "again")
    )
    assert (tmp_path / "lora-8" / "adapter_config.json").read_text() == "{}"
    assert {name: tuple(weight.shape) for name, weight in eight.items()} == shapes
    assert all(torch.equal(eight[name], again[name]) for name in shapes)
    assert not any(torch.equal(eight[name], nine[name]) for name in shapes)
    A, B = (eight[name].float() for name in shapes)
    assert 0.045 < A.abs().max() <= 0.0502  # PEFT's: uniform, up to 1 / sqrt(400)
    assert B.std().item() == pytest.approx(B_STD, rel=0.1)
