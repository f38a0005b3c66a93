"""server.engine.native.launch: which settings the engine starts with, and which it refuses."""

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_configs
from transformers import AutoModelForCausalLM

from crma.core.errors import ConfigError
from crma.core.selection import BASE
from crma.models.base_model import BaseModel
from server.engine.native import launch
from server.engine.native.async_engine import AsyncEngine
from server.engine.native.bare_model import BareModel
from server.engine.native.kv_size import KvSize
from server.engine.native.launch import EngineConfig, start_engine
from server.engine.request import FinishReason, Request, RequestOutput, SamplingParams

NO_COMPILER = ConfigError(
    "there is no C++ compiler", field="kernel", value="on", allowed="c++ or g++ on the PATH"
)


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    """The smallest engine for the tiny base, without the native kernel."""
    return EngineConfig(
        device="cpu",
        dtype="float32",
        quantization="none",
        kernel="off",
        kernel_folder=tmp_path / "kernel",
        num_threads=1,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        max_model_len=64,
        kv_size=KvSize(tokens=64),
        prefix_caching=True,
        max_loaded_adapters=2,
        max_adapter_bytes=None,
        max_queue=4,
    )


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernel cannot be built."""

    def fail(*_: Any) -> None:
        raise NO_COMPILER

    monkeypatch.setattr(launch, "Kernel", fail)


def cache_root(engine: AsyncEngine) -> Any:
    """The key that the cached blocks of base requests start from."""
    root_of = engine.engine.scheduler.root_of
    assert root_of is not None
    return root_of(BASE)


async def answer(engine: AsyncEngine) -> list[RequestOutput]:
    """The outputs of a request for two tokens; the engine is closed afterwards."""
    request = Request("r", (5, 9, 40), sampling=SamplingParams(max_tokens=2, ignore_eos=True))
    try:
        return [output async for output in engine.submit(request)]
    finally:
        await engine.close()


async def test_a_started_engine_answers_and_describes_its_model(
    base: BaseModel, config: EngineConfig
) -> None:
    engine = start_engine(base, config)
    outputs = await answer(engine)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert outputs[-1].completion_tokens == 2
    assert engine.model.name == base.name
    assert engine.model.digest == base.digest
    assert engine.model.dtype == "float32"
    assert engine.model.max_model_len == 64
    assert engine.model.num_tokens == 300


async def test_the_context_is_no_longer_than_the_models_own(
    base: BaseModel, config: EngineConfig
) -> None:
    engine = start_engine(base, replace(config, max_model_len=4096, kv_size=KvSize(tokens=512)))
    await engine.close()
    assert engine.model.max_model_len == 512


@pytest.mark.parametrize(("num_rows", "num_tokens"), [(280, 280), (320, 301)])
def test_token_ids_are_those_of_tokenizer_and_embedding_both(
    num_rows: int, num_tokens: int
) -> None:
    """The tokenizer's length counted: one with ids left out, or more of them than the model."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_tokens(["<new>"])
    model = AutoModelForCausalLM.from_config(tiny_configs.FAMILIES["llama"](vocab_size=num_rows))
    assert launch._num_tokens(model, tokenizer) == num_tokens


@pytest.mark.parametrize(("max_model_len", "is_scaled"), [(12, False), (64, True)])
async def test_frequencies_are_followed_only_where_a_sequence_can_outgrow_them(
    tmp_path: Path, config: EngineConfig, max_model_len: int, is_scaled: bool
) -> None:
    """The context of a dynamic model was cut to the length up to which nothing is scaled."""
    dynamic = tiny.pulled_base(tmp_path / "base", "llama_dynamic")
    engine = start_engine(dynamic, replace(config, max_model_len=max_model_len))
    outputs = await answer(engine)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert engine.model.max_model_len == max_model_len
    assert (engine.engine.scheduler.rope is not None) == is_scaled


def test_a_step_smaller_than_the_running_sequences_is_refused(
    base: BaseModel, config: EngineConfig
) -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens") as caught:
        start_engine(base, replace(config, max_num_seqs=8, max_num_batched_tokens=7))
    error = caught.value
    assert error.field == "max_num_batched_tokens"
    assert error.value == 7
    assert error.allowed == ">= max_num_seqs, 8"


def test_a_cache_smaller_than_one_sequence_is_refused(
    base: BaseModel, config: EngineConfig
) -> None:
    with pytest.raises(ConfigError, match="kv_cache_tokens") as caught:
        start_engine(base, replace(config, max_model_len=64, kv_size=KvSize(tokens=63)))
    error = caught.value
    assert error.field == "kv_cache_tokens"
    assert error.value == 63
    assert error.allowed == ">= max_model_len, 64"


async def test_limits_that_just_fit_are_accepted(base: BaseModel, config: EngineConfig) -> None:
    engine = start_engine(
        base, replace(config, max_num_batched_tokens=2, kv_size=KvSize(tokens=64))
    )
    outputs = await answer(engine)
    assert outputs[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.usefixtures("no_compiler")
def test_a_required_kernel_that_cannot_be_built_says_why(
    base: BaseModel, config: EngineConfig
) -> None:
    with pytest.raises(ConfigError) as caught:
        start_engine(base, replace(config, kernel="on"))
    assert caught.value is NO_COMPILER


@pytest.mark.usefixtures("no_compiler")
async def test_an_optional_kernel_that_cannot_be_built_is_logged_and_left_out(
    base: BaseModel, config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, launch.__name__)
    engine = start_engine(base, replace(config, kernel="auto"))
    outputs = await answer(engine)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert "no native kernel: there is no C++ compiler" in caplog.text


@pytest.mark.usefixtures("no_compiler")
async def test_a_kernel_that_is_off_is_not_built(
    base: BaseModel, config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, launch.__name__)
    engine = start_engine(base, replace(config, kernel="off"))
    await engine.close()
    assert "kernel" not in caplog.text


async def test_int8_weights_change_the_dtype_name_and_share_no_cache_with_others(
    base: BaseModel, config: EngineConfig
) -> None:
    library = tiny.library()
    if library is None:
        pytest.skip("no C++ compiler")
    plain = start_engine(base, config)
    int8 = replace(config, quantization="int8", kernel="on", kernel_folder=library.parent)
    quantized = start_engine(base, int8)
    outputs = [await answer(plain), await answer(quantized)]
    assert [each[-1].finish_reason for each in outputs] == [FinishReason.LENGTH] * 2
    assert plain.model.dtype == "float32"
    assert quantized.model.dtype == "float32+int8"
    assert cache_root(plain) != cache_root(quantized)


async def test_prefixes_are_not_shared_where_prefix_caching_is_off(
    base: BaseModel, config: EngineConfig
) -> None:
    engine = start_engine(base, replace(config, prefix_caching=False))
    await engine.close()
    assert engine.engine.scheduler.root_of is None


async def test_the_size_of_the_cache_can_be_said_in_mib(
    base: BaseModel, config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, launch.__name__)
    engine = start_engine(base, replace(config, kv_size=KvSize(mib=1)))
    outputs = await answer(engine)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    # 2 layers, keys and values of 2 heads of 8 numbers of 4 bytes: 256 bytes a token
    assert engine.engine.runner.kv.nbytes == 2**20
    assert "KV cache: 4080 tokens, 1 MiB" in caplog.text


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
async def test_only_a_model_that_is_not_covered_is_loaded_with_its_code(
    tmp_path: Path, config: EngineConfig, family: str
) -> None:
    base = tiny.pulled_base(tmp_path / "base", family)
    engine = start_engine(base, config)
    outputs = await answer(engine)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    model: object = engine.engine.runner.injection.model
    assert isinstance(model, BareModel) == (family == "llama")


async def test_float16_is_served_on_a_cpu_without_the_kernel(
    base: BaseModel, config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, launch.__name__)
    engine = start_engine(base, replace(config, dtype="float16", kernel="auto"))
    outputs = await answer(engine)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert engine.model.dtype == "float16"
    assert "does not compute in float16" in caplog.text


def test_a_kernel_that_is_required_for_float16_is_refused(
    base: BaseModel, config: EngineConfig
) -> None:
    with pytest.raises(ConfigError) as caught:
        start_engine(base, replace(config, dtype="float16", kernel="on"))
    assert caught.value.field == "kernel"
    assert caught.value.allowed == "dtype=bfloat16, dtype=float32"
