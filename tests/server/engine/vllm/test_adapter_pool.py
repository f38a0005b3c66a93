"""server.engine.vllm.adapter_pool"""

import pytest
import tiny
import torch

from crma.core.errors import InvalidAdapter
from crma.method.lora import Lora, LoraConfig, LoraPair
from server.engine.vllm.adapter_pool import HostAdapterPool


def make_pool(max_rank: int = 8) -> HostAdapterPool:
    return HostAdapterPool(tiny.injection(), 3, None, max_rank)


def test_plain_adapters_load_scaled_and_folded() -> None:
    pool = make_pool()
    for digest in ("task-1", "crma-0"):
        adapter = tiny.adapters(tiny.injection())[digest]
        pool.register(digest, lambda adapter=adapter: adapter)
        pool.load(digest)
    assert {pair.scaling for pair in pool.loras["task-1"].pairs.values()} == {1.0}
    assert len(pool.backbones["crma-0"]) == len(tiny.injection().blocks)
    pool.close()


def on_head() -> Lora:
    ((path, (out, in_)),) = tiny.injection().head.items()
    pair = LoraPair(torch.ones(1, in_), torch.ones(out, 1), 1.0)
    return Lora(LoraConfig(1, 1.0, ("lm_head",)), {path: pair})


@pytest.mark.parametrize(
    ("adapter", "max_rank", "named"),
    [
        (on_head, 8, "lm_head: vLLM adapts linears of the blocks only"),
        (lambda: tiny.adapters(tiny.injection())["task-1"], 4, "rank 5, and CRMA_MAX_LORA_RANK=4"),
        (lambda: tiny.adapters(tiny.injection())["crma-0"], 3, "rank 4, and CRMA_MAX_LORA_RANK=3"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_by_name(
    adapter: object, max_rank: int, named: str
) -> None:
    assert callable(adapter)
    pool = make_pool(max_rank)
    pool.register("odd", adapter)
    with pytest.raises(InvalidAdapter, match=named):
        pool.load("odd")
    assert pool.resident() == ()
    pool.close()


def test_a_dora_is_refused_by_name() -> None:
    made = tiny.adapters(tiny.injection())["task-3"]
    assert isinstance(made, Lora)
    linears = {path: pair for path, pair in made.pairs.items() if path in tiny.injection().shapes}
    pool = make_pool()
    pool.register("dora", lambda: Lora(made.config, linears))
    with pytest.raises(InvalidAdapter, match="DoRA"):
        pool.load("dora")
    pool.close()
