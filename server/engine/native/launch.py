"""Builds the native engine on a base model and starts its thread."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from crma.core.errors import ConfigError
from crma.method.injection import Injection
from crma.models.base_model import BaseModel
from crma.models.loading import load_model, resolve_device, resolve_dtype
from crma.models.rope import RopeScaling, context_length, rope_scaling
from crma.models.serving_record import serving_tokenizer
from server.engine.inference_engine import ServedModel
from server.engine.native.adapter_pool import AdapterPool
from server.engine.native.async_engine import AsyncEngine
from server.engine.native.bare_model import bare_model
from server.engine.native.block_pool import BlockPool, root_key
from server.engine.native.cpu_quota import cpu_quota
from server.engine.native.engine import Engine, model_stop_ids
from server.engine.native.kernel import Kernel
from server.engine.native.kv_cache import block_bytes
from server.engine.native.kv_size import MIB, KvSize
from server.engine.native.model_runner import ModelRunner
from server.engine.native.scheduler import Scheduler
from server.engine.native.step_budget import StepBudget
from server.engine.native.step_watchdog import StepWatchdog

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BLOCK_SIZE = 16  # tokens of a KV cache block, the unit of allocation and of prefix sharing
KV_REUSE = 4  # as many tokens as running sequences may have, so often: the rest is prefixes


@dataclass(frozen=True)
class EngineConfig:
    """The settings of the native engine; `server/settings.py` says what each means and its default.

    kernel: "auto", "on", "off" or the name of a class of processors.
    kernel_folder: where the native kernel is built. max_adapter_bytes: None for no limit.
    target_step_s and step_timeout_s: 0 for none.
    """

    device: str
    dtype: str
    quantization: Literal["none", "int8"]
    kernel: str
    kernel_folder: Path
    num_threads: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_size: KvSize
    prefix_caching: bool
    max_loaded_adapters: int
    max_adapter_bytes: int | None
    max_queue: int
    target_step_s: float = 0.0
    step_timeout_s: float = 0.0


def start_engine(
    base: BaseModel, config: EngineConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> AsyncEngine:
    """Loads the model and starts the engine's thread.

    Args:
        tokenizer: of the base model, which no other thread changes; None: it is loaded.

    Raises:
        CrmaError: the model cannot be served with this configuration.
    """
    num_threads = config.num_threads or _num_cpus()
    # One thread for everything but the engine's own thread, which sets its number in a step
    # (model_runner.py).
    torch.set_num_threads(1)
    _check_step(config)
    device = resolve_device(config.device)
    computes_in = resolve_dtype(config.dtype, device)
    kernel = _native_kernel(device, computes_in, config)
    injection = Injection(_load(base, device, computes_in, kernel))
    model = injection.model
    if tokenizer is None:
        tokenizer = serving_tokenizer(base)
    max_model_len = min(config.max_model_len, context_length(model.config))
    rope = _rope_beyond(model, max_model_len)
    dtype = _dtype_name(computes_in, config.quantization)
    blocks = _blocks(model, config, max_model_len)
    pool = AdapterPool(injection, config.max_loaded_adapters, config.max_adapter_bytes)
    runner = ModelRunner(
        injection,
        pool,
        blocks,
        num_threads,
        take_weights=True,
        kernel=kernel,
        int8=config.quantization == "int8",
        rope=rope,
    )
    root_of = (
        (lambda selection: root_key(base.digest, dtype, *selection))
        if config.prefix_caching
        else None
    )
    scheduler = Scheduler(blocks, config.max_num_seqs, config.max_num_batched_tokens, root_of, rope)
    stop_ids = model_stop_ids(tokenizer, model.generation_config.eos_token_id)
    num_tokens = _num_tokens(model, tokenizer)
    budget = StepBudget(config.target_step_s) if config.target_step_s else None
    engine = Engine(runner, scheduler, tokenizer, stop_ids, max_model_len, num_tokens, budget)
    served = ServedModel(
        name=base.name,
        digest=base.digest,
        dtype=dtype,
        max_model_len=max_model_len,
        num_tokens=num_tokens,
    )
    return AsyncEngine(engine, served, config.max_queue, StepWatchdog(config.step_timeout_s))


def _load(
    base: BaseModel, device: torch.device, dtype: torch.dtype, kernel: Kernel | None
) -> PreTrainedModel:
    """The base model: without its code where the decoder needs none."""
    model = bare_model(base, device, dtype, is_mapped=kernel is not None)
    if model is None:
        return load_model(base, device, dtype)
    return cast("PreTrainedModel", model)  # it stands for one


def _num_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many token ids exist: both for the tokenizer and as rows of the model."""
    # The tokenizer's length is less than its last id where ids are left out.
    num_known: int = max(tokenizer.get_vocab().values()) + 1
    num_rows: int = model.get_input_embeddings().num_embeddings
    return min(num_known, num_rows, model.get_output_embeddings().out_features)


def _rope_beyond(model: PreTrainedModel, max_model_len: int) -> RopeScaling | None:
    """How frequencies depend on the length; None if no sequence is long enough for that."""
    scaling = rope_scaling(model.config)
    if scaling is None or max_model_len <= scaling.original:
        return None
    return scaling


def _check_step(config: EngineConfig) -> None:
    """Raises ConfigError where a step is too small for the sequences that it must hold."""
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise ConfigError(
            "max_num_batched_tokens is too small: every running sequence takes a token a step",
            field="max_num_batched_tokens",
            value=config.max_num_batched_tokens,
            allowed=f">= max_num_seqs, {config.max_num_seqs}",
        )


def _blocks(model: PreTrainedModel, config: EngineConfig, max_model_len: int) -> BlockPool:
    """The blocks of the KV cache. Raises ConfigError if a sequence does not fit."""
    of_block = block_bytes(model, BLOCK_SIZE)
    config.kv_size.check(max_model_len, of_block, BLOCK_SIZE)
    free_bytes = None
    if model.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(model.device)
    useful = KV_REUSE * config.max_num_seqs * max_model_len
    num_blocks = config.kv_size.num_blocks(
        of_block, BLOCK_SIZE, free_bytes=free_bytes, useful_tokens=useful
    )
    num_tokens = (num_blocks - 1) * BLOCK_SIZE
    logger.info("KV cache: %d tokens, %d MiB", num_tokens, num_blocks * of_block // MIB)
    return BlockPool(num_blocks, BLOCK_SIZE)


def _dtype_name(dtype: torch.dtype, quantization: str) -> str:
    """ "bfloat16", or "bfloat16+int8": int8 weights give other keys and values, so another cache
    identity.
    """
    name = str(dtype).removeprefix("torch.")
    return name if quantization == "none" else f"{name}+{quantization}"


def _num_cpus() -> int:
    """The cores of this process, or fewer where a container has a smaller share."""
    cores = torch.get_num_threads()
    return min(cores, cpu_quota() or cores)


def _native_kernel(device: torch.device, dtype: torch.dtype, config: EngineConfig) -> Kernel | None:
    """The kernel for a device and dtype; None if off, or if "auto" and it cannot be built.

    Raises:
        ConfigError: it is required and cannot be built or run, the device is no CPU, or the dtype
            is float16.
    """
    if config.kernel == "off":
        return None
    try:
        if device.type != "cpu":
            message = "the native kernel runs on CPUs only"
            raise ConfigError(message, field="kernel", value=config.kernel, allowed="device=cpu")
        if dtype == torch.float16:
            message = "the native kernel does not compute in float16"
            allowed = "dtype=bfloat16, dtype=float32"
            raise ConfigError(message, field="kernel", value=config.kernel, allowed=allowed)
        cpu_class = None if config.kernel in ("auto", "on") else config.kernel
        kernel = Kernel(dtype, config.kernel_folder, cpu_class)
    except ConfigError as error:
        if config.kernel != "auto":
            raise
        logger.info("no native kernel: %s", error.message)
        return None
    logger.info("native kernel: %s", kernel.cpu_class.name)
    return kernel
