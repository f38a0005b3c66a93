"""PEFT's files: ours load in PEFT, PEFT's load here, with the same meaning; what has another meaning is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from published import BASE
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from crma.errors import InvalidAdapter
from crma.lora import Lora, LoraConfig, LoraPair
from crma.peft_format import CONFIG, WEIGHTS, check_fits, lora_from_peft, lora_to_peft
from crma.store import AdapterStore

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT reads what is deprecated
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),  # and warns as it should
]

INPUT = torch.arange(24).reshape(2, 12)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # large weights, so that a wrong scaling shows in the logits
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in path
    }


SHAPES = linears(tiny_llama())


def random_lora(
    rank: int = 4,
    *,
    names: tuple[str, ...] = ("q_proj", "v_proj"),
    alpha: float = 6.0,
    dtype: torch.dtype = torch.float32,
) -> Lora:
    names, generator = ("q_proj", "v_proj"), torch.Generator().manual_seed(1)
    pairs = {}
    for path, (out_features, in_features) in SHAPES.items():
        if path.endswith(names):
            A = torch.randn(rank, in_features, generator=generator).to(dtype)
            pairs[path] = LoraPair(A, torch.randn(out_features, rank, generator=generator).to(dtype), alpha / rank)
    return Lora(LoraConfig(rank, alpha, names), pairs)


@torch.no_grad()
def logits(lora: Lora | None) -> Tensor:
    """Of the tiny model with a LoRA's deltas added to its linears."""
    model = tiny_llama()
    for path, pair in (lora.pairs if lora else {}).items():
        model.get_submodule(path).register_forward_hook(lambda _, args, y, pair=pair: y + pair.delta(args[0]))
    return model(INPUT % 32).logits


@torch.no_grad()
def peft_logits(folder: Path) -> Tensor:
    model = peft.PeftModel.from_pretrained(tiny_llama(), str(folder))
    return model.eval()(INPUT % 32).logits


def write(folder: Path, lora: Lora, dtype: torch.dtype | None) -> None:
    config, tensors = lora_to_peft(lora, base_name="tiny", dtype=dtype)
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def saved_by_peft(folder: Path, **config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A LoRA with random A and B as PEFT saves it."""
    torch.manual_seed(2)
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **config}
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(str(folder))
    config_file = json.loads((folder / CONFIG).read_text())
    return config_file, safetensors.torch.load_file(folder / WEIGHTS)


def irregular(lora: Lora) -> Lora:
    """Other ranks and scalings in some modules, and not the same modules in each layer."""
    pairs = dict(lora.pairs)
    first, second, third, _ = sorted(pairs)
    pairs[first] = LoraPair(pairs[first].A[:3], pairs[first].B[:, :3], 1.7)
    pairs[second] = LoraPair(pairs[second].A, pairs[second].B, 0.3)
    del pairs[third]
    return Lora(lora.config, pairs)


def last_layer(lora: Lora) -> Lora:
    return Lora(lora.config, {path: pair for path, pair in lora.pairs.items() if "layers.1" in path})


@pytest.mark.parametrize("change", [lambda lora: lora, last_layer, irregular], ids=["all", "last layer", "irregular"])
def test_peft_computes_from_our_files_what_we_compute(tmp_path: Path, change: Callable[[Lora], Lora]) -> None:
    lora = change(random_lora())
    write(tmp_path / "ours", lora, torch.float32)
    expected = logits(lora)
    assert (logits(None) - expected).abs().max() > 0.1
    torch.testing.assert_close(peft_logits(tmp_path / "ours"), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 3}},
        {"alpha_pattern": {"v_proj": 11, "layers.0.self_attn.q_proj": 1}},
        {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_pro.": 5}, "use_rslora": True},
        {"rank_pattern": {"proj": 2, "layers.1": 2, "_proj": 2}},  # matches no whole name: no effect in PEFT
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1.*(q_proj|down_proj)"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["model.layers.0.mlp.up_proj", "o_proj"]},
        {"lora_dropout": 0.3, "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_we_compute_from_pefts_files_what_peft_computes(tmp_path: Path, config: dict[str, Any]) -> None:
    config_file, tensors = saved_by_peft(tmp_path, **config)
    lora = lora_from_peft(config_file, tensors)
    expected = peft_logits(tmp_path)
    assert (logits(None) - expected).abs().max() > 0.1
    torch.testing.assert_close(logits(lora), expected, rtol=0, atol=2e-5)
    check_fits(config_file, lora, SHAPES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_written_and_read_again_is_the_same_lora(dtype: torch.dtype) -> None:
    lora = random_lora(dtype=dtype)
    again = lora_from_peft(*lora_to_peft(lora, base_name="tiny", dtype=None))
    assert again.config == lora.config
    assert again.pairs.keys() == lora.pairs.keys()
    for path, pair in lora.pairs.items():
        assert torch.equal(again.pairs[path].A, pair.A)
        assert torch.equal(again.pairs[path].B, pair.B)
        assert again.pairs[path].A.dtype == dtype
        assert again.pairs[path].scaling == pair.scaling


def test_an_import_of_any_shape_keeps_its_meaning_through_our_files(tmp_path: Path) -> None:
    config = {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "exclude_modules": ["layers.0.self_attn.q_proj"]}
    lora = lora_from_peft(*saved_by_peft(tmp_path, **config))
    again = lora_from_peft(*lora_to_peft(lora, base_name="tiny", dtype=None))
    assert again.pairs.keys() == lora.pairs.keys()
    for path, pair in lora.pairs.items():
        assert again.pairs[path].A.shape == pair.A.shape
        assert again.pairs[path].scaling == pytest.approx(pair.scaling, rel=1e-15)


def test_tensors_are_stored_in_bfloat16_unless_asked_otherwise() -> None:
    _, tensors = lora_to_peft(random_lora(), base_name="tiny")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("use_dora", True),
        ("bias", "lora_only"),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("alora_invocation_tokens", [1, 2]),
        ("trainable_token_indices", [3]),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["x"]),
        ("use_qalora", True),
        ("kasa_config", {"beta": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("use_rslora", "yes"),
        ("a_field_of_the_future", 0.5),
        ("target_modules", []),
        ("target_modules", None),
        ("target_modules", [1]),
        ("target_modules", ["k_proj"]),
        ("layers_to_transform", [0]),
        ("exclude_modules", ["q_proj"]),
        ("exclude_modules", 3),
        ("r", 0),
        ("r", 8),
        ("r", True),
        ("r", None),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("lora_alpha", "16"),
        ("rank_pattern", {"q_proj": 8}),
        ("rank_pattern", {"q_proj": "4"}),
        ("rank_pattern", [4]),
        ("alpha_pattern", {"(": 1}),
        ("alpha_pattern", {"(a+)+b": 1}),
        ("alpha_pattern", {".*.*.*.*x": 1}),
    ],
)
def test_a_config_with_another_meaning_is_refused_by_its_field(field: str, value: Any) -> None:
    config, tensors = lora_to_peft(random_lora(), base_name="tiny")
    with pytest.raises(InvalidAdapter) as caught:
        lora_from_peft({**config, field: value}, tensors)
    assert caught.value.field
    assert caught.value.allowed is not None


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("key", "tensor", "reason"),
    [
        (KEY, None, "One of lora_A and lora_B is missing"),
        (KEY, torch.zeros(5, 16), "shapes of its rank"),
        (KEY, torch.zeros(4, 0), "shapes of its rank"),
        (KEY, torch.zeros(4, 16, 1), "shapes of its rank"),
        (KEY, torch.full((4, 16), float("nan")), "NaN"),
        (KEY, torch.full((4, 16), float("-inf"), dtype=torch.bfloat16), "NaN or infinity"),
        (KEY, torch.zeros(4, 16, dtype=torch.int8), "dtype"),
        (KEY, torch.zeros(4, 16, dtype=torch.float64), "dtype"),
        (KEY.replace("q_proj", "k_proj"), torch.zeros(4, 16), "missing"),
        (KEY.replace("lora_A", "lora_magnitude_vector"), torch.zeros(16), "DoRA"),
        (KEY.replace(".weight", ".bias"), torch.zeros(4), "a bias"),
        (KEY.replace("lora_A.weight", "lora_embedding_A"), torch.zeros(4, 16), "embeddings"),
        ("base_model.model.lm_head.weight", torch.zeros(4), "not a plain LoRA"),
        (KEY.removeprefix("base_model.model."), torch.zeros(4, 16), "not a plain LoRA"),
        (KEY.replace("layers", "../layers"), torch.zeros(4, 16), "not a plain LoRA"),
    ],
)
def test_a_tensor_that_cannot_be_used_is_refused_with_the_reason(key: str, tensor: Tensor | None, reason: str) -> None:
    config, tensors = lora_to_peft(random_lora(), base_name="tiny")
    if tensor is None:
        del tensors[key]
    else:
        tensors[key] = tensor
    with pytest.raises(InvalidAdapter, match=reason):
        lora_from_peft(config, tensors)


def test_no_tensors_at_all_is_refused() -> None:
    config, _ = lora_to_peft(random_lora(), base_name="tiny")
    with pytest.raises(InvalidAdapter, match="No LoRA tensor"):
        lora_from_peft(config, {})


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({path: shape for path, shape in SHAPES.items() if "layers.1" not in path}, "No such linear"),
        ({path: (out, 17) for path, (out, _) in SHAPES.items()}, "Does not fit"),
        ({**SHAPES, "model.layers.1.cross.q_proj": (16, 16)}, "without tensors"),
    ],
)
def test_a_base_model_it_does_not_fit_is_refused(shapes: dict[str, tuple[int, int]], reason: str) -> None:
    config, tensors = lora_to_peft(random_lora(), base_name="tiny")
    lora = lora_from_peft(config, tensors)
    check_fits(config, lora, SHAPES)
    with pytest.raises(InvalidAdapter, match=reason):
        check_fits(config, lora, shapes)


def test_a_peft_folder_becomes_a_task_without_lineage(tmp_path: Path) -> None:
    store, folder = AdapterStore(tmp_path / "store"), tmp_path / "peft"
    _, tensors = saved_by_peft(folder, use_rslora=True)
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")  # what a trainer leaves; never opened
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")  # as in the Hub's cache
    entry = store.import_peft(folder, "imported", BASE, shapes=SHAPES)
    assert entry.manifest.backbone is None
    assert entry.prompt_format is None
    assert sorted(path.name for path in entry.path.iterdir()) == [CONFIG, WEIGHTS, "manifest.json"]
    loaded = store.task("imported").load(SHAPES)
    assert loaded.pairs.keys() == {path for path in SHAPES if path.endswith(("q_proj", "v_proj"))}
    for path, pair in loaded.pairs.items():
        assert torch.equal(pair.A, tensors[f"base_model.model.{path}.lora_A.weight"])
        assert pair.scaling == pytest.approx(6 / 4**0.5)
    store.check_integrity()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "Cannot be opened"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\x80\x04."), "not a safetensors file"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "not a JSON object"),
        (shutil.rmtree, "Cannot be opened"),
        (lambda _: None, "No such linear layer"),
    ],
)
def test_a_folder_that_does_not_fit_is_not_imported(tmp_path: Path, damage: Callable[[Path], Any], reason: str) -> None:
    store, folder = AdapterStore(tmp_path / "store"), tmp_path / "peft"
    write(folder, random_lora(), None)
    damage(folder)
    with pytest.raises(InvalidAdapter, match=reason):
        store.import_peft(folder, "imported", BASE, shapes={"model.layers.0.mlp.up_proj": (24, 16)})
    assert not store.root.exists()
