"""server.engine.native.bare_model: the same model as transformers loads, without its code."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_configs
import torch
import transformers
from paths import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from crma.core.selection import AdapterSelection
from crma.method.injection import Injection
from crma.models.base_model import BaseModel
from crma.models.loading import load_model
from crma.models.pull import pull
from crma.models.serving_record import read_served
from server.engine.native.bare_model import BareModel, bare_model
from server.engine.native.engine import Engine
from server.engine.request import RequestOutput

CPU = torch.device("cpu")
COVERED = ("llama", "mistral", "qwen2", "qwen3", "llama_tied")
SELECTIONS = (("task-1", "crma-0"), ("task-3", None), (None, "crma-1"), (None, None))
LLAMA = partial(transformers.LlamaConfig, **tiny_configs.SIZES, **tiny_configs.GQA)
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, partial[PretrainedConfig]] = {
    **{family: {**tiny_configs.FAMILIES, **tiny_configs.TIED}[family] for family in COVERED},
    "biases": partial(LLAMA, attention_bias=True, mlp_bias=True),
    "wide heads": partial(LLAMA, head_dim=16),
    "windows": partial(
        transformers.Qwen2Config, **tiny_configs.SIZES, **tiny_configs.GQA, **WINDOWS
    ),
    "biases of qwen3": partial(tiny_configs.FAMILIES["qwen3"], attention_bias=True),
    "linear": partial(
        LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "yarn": partial(LLAMA, rope_parameters=YARN),
    "llama3": partial(LLAMA, rope_parameters=LLAMA3),
}


def pulled(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> BaseModel:
    """A random model in a dtype, pulled."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms start at 1 and biases at 0, which would hide mistakes
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype).save_pretrained(folder / "tiny")
    return pull(str(folder / "tiny"), home=folder / "home")


def bare(base: BaseModel, dtype: torch.dtype = torch.float32, *, is_mapped: bool = False) -> Any:
    """The bare model, as an Injection takes it."""
    model = bare_model(base, CPU, dtype, is_mapped=is_mapped)
    assert model is not None
    return model


def answers(engine: Engine, digests: list[str]) -> list[list[RequestOutput]]:
    """The outputs of a request for each of some selections, all in one batch."""
    for digest in digests:
        engine.pool.load(digest)
    found: list[list[RequestOutput]] = [[] for _ in SELECTIONS]
    for i, selection in enumerate(SELECTIONS):
        request = tiny.ask(str(i), AdapterSelection(*selection), logprobs=1, prompt_logprobs=1)
        engine.add(request)
    while engine.scheduler.unfinished():
        for output in engine.step():
            found[int(output.request_id)].append(replace(output, timings=None))
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_it_has_the_modules_and_weights_of_transformers_model(
    config: partial[PretrainedConfig], tmp_path: Path
) -> None:
    base = pulled(tmp_path, config(), torch.float32)
    ours = bare(base)
    theirs: Any = load_model(base, CPU, torch.float32)
    found, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert Injection(ours).all_shapes == Injection(theirs).all_shapes
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    is_tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == is_tied
    for one, other in zip(ours.model.layers, theirs.model.layers, strict=True):
        windows = [getattr(each.self_attn, "sliding_window", None) for each in (one, other)]
        assert windows[0] == windows[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_its_rotary_embedding_has_the_same_bits(
    config: partial[PretrainedConfig], dtype: torch.dtype, tmp_path: Path
) -> None:
    base = pulled(tmp_path, config(), torch.float32)
    x = torch.zeros(1, dtype=dtype)
    positions = torch.tensor([[0, 1, 7, 63, 64, 500]])
    ours = bare(base).model.rotary_emb(x, positions)
    model: Any = load_model(base, CPU, torch.float32)
    theirs = model.model.rotary_emb(x, positions)
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("native", [False, True], ids=["torch", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", COVERED)
def test_answers_have_the_bits_of_those_with_transformers_model(
    family: str, dtype: torch.dtype, native: bool, tmp_path: Path
) -> None:
    """With the kernel its weights stay in the file until they are packed."""
    if native and tiny.library() is None:
        pytest.skip("no C++ compiler")
    base = pulled(tmp_path, CONFIGS[family](), torch.bfloat16)
    known = tiny.adapters(tiny.injection(family))
    options: dict[str, Any] = {"max_resident": 6, "take_weights": True, "native": native}
    models = (bare(base, dtype, is_mapped=native), load_model(base, CPU, dtype))
    engines = [tiny.make_engine(Injection(model), known, **options)[0] for model in models]
    assert isinstance(engines[0].runner.injection.model, BareModel)
    found, expected = (answers(engine, sorted(known)) for engine in engines)
    assert found == expected


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_the_file_is_let_go_once_its_weights_are_packed(family: str, tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if tiny.library() is None or not maps.exists():
        pytest.skip("no C++ compiler, or not Linux")
    base = pulled(tmp_path, CONFIGS[family](), torch.bfloat16)
    file = str(base.path / "model.safetensors")
    injection = Injection(bare(base, is_mapped=True))
    assert maps.read_text().count(file) > len(injection.blocks)  # a mapping for each, and others
    engine, _ = tiny.make_engine(injection, {}, take_weights=True)
    assert file not in maps.read_text()
    assert engine.runner.injection.model.dtype == torch.float32


@pytest.mark.parametrize("family", ["gpt_neox", "phi3", "gemma2"])
def test_a_model_of_another_family_is_left_to_transformers(family: str, tmp_path: Path) -> None:
    base = pulled(tmp_path, tiny_configs.FAMILIES[family](), torch.float32)
    assert bare_model(base, CPU, torch.float32) is None


@pytest.mark.parametrize("family", ["llama_dynamic", "llama_longrope"])
def test_frequencies_that_follow_the_length_are_left_to_transformers(
    family: str, tmp_path: Path
) -> None:
    base = pulled(tmp_path, tiny_configs.SCALED[family](), torch.float32)
    assert bare_model(base, CPU, torch.float32) is None


@pytest.mark.parametrize("change", ["more", "less", "shape", "integers", "twice"])
def test_other_tensors_than_expected_are_left_to_transformers(change: str, tmp_path: Path) -> None:
    base = pulled(tmp_path, CONFIGS["llama"](), torch.float32)
    file = base.path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    changed = {
        "more": {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        "less": {key: tensor for key, tensor in tensors.items() if key != name},
        "shape": {**tensors, name: tensors[name].mT.contiguous()},
        "integers": {**tensors, name: tensors[name].to(torch.int8)},
        "twice": tensors,
    }
    save_file(changed[change], file, {"format": "pt"})
    if change == "twice":
        save_file({name: tensors[name] + 1}, base.path / "other.safetensors", {"format": "pt"})
    assert bare_model(base, CPU, torch.float32) is None


def test_quantized_weights_are_left_to_transformers(tmp_path: Path) -> None:
    base = pulled(tmp_path, CONFIGS["llama"](), torch.float32)
    config = json.loads((base.path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (base.path / "config.json").write_text(json.dumps(config))
    assert bare_model(base, CPU, torch.float32) is None


def test_a_model_in_several_files_is_read_from_all(tmp_path: Path) -> None:
    base = pulled(tmp_path, CONFIGS["llama"](), torch.float32)
    file = base.path / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    for number, some in enumerate((names[::2], names[1::2])):
        part = {name: tensors[name] for name in some}
        save_file(part, base.path / f"model-{number}.safetensors", {"format": "pt"})
    file.unlink()
    found = dict(bare(base).named_parameters())
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in names)


SERVES = """
import asyncio, sys
from pathlib import Path
from crma.models.base_model import read_base
from server.engine.native.kv_size import KvSize
from server.engine.native.launch import EngineConfig, start_engine

home = Path(sys.argv[1])
config = EngineConfig(
    "cpu", "float32", "none", "auto", home / "kernels", 1, 2, 16, 64, KvSize(64), True, 2, None, 4
)
engine = start_engine(read_base(home / "models" / "tiny"), config)
asyncio.run(engine.warm_up())
print([name for name in sys.argv[2:] if name in sys.modules])
"""


@pytest.mark.e2e
def test_a_covered_model_is_served_without_transformers(tmp_path: Path) -> None:
    """It took half of a start."""
    base = tiny.pulled_base(tmp_path)
    read_served(base)  # as `crma pull` does
    heavy = ["transformers", "huggingface_hub", "accelerate", "torch._dynamo", "scipy"]
    command = [sys.executable, "-c", SERVES, str(base.path.parents[1]), *heavy]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=True)
    assert run.stdout.decode().strip() == "[]"
