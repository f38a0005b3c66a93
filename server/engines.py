"""The engines by name: the one place that knows which there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crma.core.cache import cache_home
from crma.models.base_model import BaseModel
from server.engine.inference_engine import InferenceEngine
from server.engine.native.kv_size import KvSize
from server.engine.native.launch import EngineConfig, start_engine
from server.engine.vllm import launch as vllm_launch
from server.settings import Settings, set_defaults

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def new_engine(
    settings: Settings, base: BaseModel, tokenizer: PreTrainedTokenizerBase
) -> InferenceEngine:
    """The engine that the settings name, in this process; it runs.

    Args:
        tokenizer: of the base model, for the engine alone.

    Raises:
        CrmaError: what it cannot serve, named.
    """
    settings.check_engine()
    if settings.engine == "vllm":
        return _start_vllm(settings, base)
    return start_engine(base, _engine_config(settings), tokenizer)


def _engine_config(settings: Settings) -> EngineConfig:
    return EngineConfig(
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        kernel=settings.kernel,
        kernel_folder=(settings.home or cache_home()) / "kernels",
        num_threads=settings.num_threads,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        kv_size=KvSize(settings.kv_cache_tokens, settings.kv_cache_mib),
        prefix_caching=settings.prefix_caching,
        max_loaded_adapters=settings.max_loaded_adapters,
        max_adapter_bytes=_max_adapter_bytes(settings),
        max_queue=settings.max_queue,
        target_step_s=settings.target_step_s,
        step_timeout_s=settings.step_timeout_s,
    )


def _start_vllm(settings: Settings, base: BaseModel) -> InferenceEngine:
    config = vllm_launch.EngineConfig(
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.vllm_quantization,
        num_threads=settings.num_threads,
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        kv_size=KvSize(settings.kv_cache_tokens, settings.kv_cache_mib),
        memory_share=settings.memory_share,
        prefix_caching=settings.prefix_caching,
        max_loras=settings.max_loras,
        max_lora_rank=settings.max_lora_rank,
        max_loaded_adapters=settings.max_loaded_adapters,
        max_adapter_bytes=_max_adapter_bytes(settings),
        max_queue=settings.max_queue,
    )
    set_defaults(vllm_launch.environment(config))
    return vllm_launch.start_engine(base, config)


def _max_adapter_bytes(settings: Settings) -> int | None:
    return None if settings.max_adapter_mib is None else settings.max_adapter_mib * 2**20
