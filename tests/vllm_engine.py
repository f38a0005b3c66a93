"""Engines on one vLLM that stays: to start one takes most of a minute."""

from __future__ import annotations

import asyncio
import os
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import tiny

from crma.method.injection import Injection
from crma.models.base_model import BaseModel
from server.engine.native.kv_size import KvSize
from server.engine.vllm.adapter_pool import HostAdapterPool
from server.engine.vllm.launch import EngineConfig, environment, start_engine

if TYPE_CHECKING:
    from server.engine.vllm.engine import VllmEngine

CONFIG = EngineConfig(
    device="cpu",
    dtype="float32",
    quantization=None,
    num_threads=1,
    tensor_parallel_size=1,
    pipeline_parallel_size=1,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_model_len=400,
    kv_size=KvSize(),
    memory_share=None,
    prefix_caching=True,
    max_loras=3,
    max_lora_rank=8,
    max_loaded_adapters=3,
    max_adapter_bytes=None,
    max_queue=8,
)
"""Of the tiny model. There are more selections than slots."""


def start(base: BaseModel, **changes: Any) -> VllmEngine:
    """An engine on a base model, with CONFIG but for `changes`."""
    config = replace(CONFIG, **changes)
    for name, value in environment(config).items():
        os.environ.setdefault(name, value)
    return cast("VllmEngine", start_engine(base, config))


class KeptLlm:
    """vLLM for an engine whose end it outlives."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self.llm, name)

    def shutdown(self) -> None:
        """Leave vLLM as it is."""


class SharedVllm:
    """vLLM on the tiny model, for engines one after the other.

    Args:
        folder: the model is pulled into it.
        max_queue: of each engine.
        parallel: fields of `EngineConfig`.
    """

    def __init__(self, folder: Path, max_queue: int, **parallel: int) -> None:
        self.max_queue = max_queue
        self.engine = start(tiny.pulled_base(folder, "llama_parallel"), **parallel)
        self._ids = self.engine._selections._ids  # vLLM caches by them

    def make_engine(self) -> VllmEngine:
        """A new engine without adapters. Only the stop tokens of a request end its answers."""
        from server.engine.vllm.engine import VllmEngine  # reads the environment
        from server.engine.vllm.request_queue import Limits
        from server.engine.vllm.selections import Selections

        first = self.engine
        injection: Injection = first.pool.injection
        pool = HostAdapterPool(injection, 3, None, CONFIG.max_lora_rank)
        resources = ExitStack()
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        llm: Any = KeptLlm(first._llm)
        selections = Selections(llm, pool, folder, "model.layers", 7)
        selections._ids = self._ids
        limits = Limits(CONFIG.max_num_seqs, self.max_queue, CONFIG.max_loras)
        return VllmEngine(
            llm,
            first.model,
            first._tokenizer,
            frozenset(),
            pool,
            selections,
            first._steps,
            limits,
            resources,
        )

    def close(self) -> None:
        """End vLLM."""
        asyncio.run(self.engine.close())
