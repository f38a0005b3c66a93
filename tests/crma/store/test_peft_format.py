"""PEFT's files: ours load in PEFT, PEFT's load here, with one meaning; others are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from published import BASE
from tiny import fresh, injection, lora
from tiny_configs import FAMILIES
from torch import Tensor, nn

from crma.core.errors import InvalidAdapter
from crma.method.injection import Injection, Plan, target_names
from crma.method.lora import Lora, LoraPair
from crma.models.model_shape import ModelShape
from crma.store.adapter_store import AdapterStore
from crma.store.peft_format import (
    CONFIG,
    WEIGHTS,
    StoredLora,
    check_fits,
    lora_from_peft,
    lora_to_peft,
)
from crma.store.stored_tensor import StoredTensor, read_tensors, write_tensors

pytestmark = [
    # PEFT reads a deprecated attribute,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # and warns of patterns that match nothing, as it should.
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
]
INJECTION = injection()
SHAPE = ModelShape.of(INJECTION.model)
INPUT = torch.arange(3, 27).reshape(2, 12)
LORA = lora(INJECTION, 4, "attention", seed=1)
FILES = lora_to_peft(StoredLora.of(LORA), base_name="tiny")
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

Files = tuple[dict[str, Any], dict[str, StoredTensor]]


@torch.no_grad()
def assert_means_the_same(folder: Path, ours: Lora, inj: Injection = INJECTION) -> None:
    """PEFT computes from the folder what we compute, which is not what the base model computes."""
    theirs = peft.PeftModel.from_pretrained(fresh(inj), str(folder)).eval()(INPUT).logits
    assert (inj.model(INPUT).logits - theirs).abs().max() > 0.1
    with inj.active(Plan(tasks=[(None, ours)])):
        torch.testing.assert_close(inj.model(INPUT).logits, theirs, rtol=0, atol=2e-5)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> None:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes(write_tensors(tensors))


def stored(tensors: dict[str, Tensor]) -> dict[str, StoredTensor]:
    """Tensors of any dtype, as they come out of a file."""
    return read_tensors(safetensors.torch.save(tensors), WEIGHTS)


def saved_by_peft(folder: Path, inj: Injection = INJECTION, **config: Any) -> Files:
    """A LoRA with random A and B as PEFT saves it."""
    torch.manual_seed(2)
    settings = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj"],
        **config,
    }
    model = peft.get_peft_model(fresh(inj), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(str(folder))
    tensors = read_tensors((folder / WEIGHTS).read_bytes(), WEIGHTS)
    return json.loads((folder / CONFIG).read_text()), tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_from_peft_means_the_same_in_the_store_and_back_in_peft(
    family: str, tmp_path: Path
) -> None:
    """An import has no lineage and no record of its training."""
    inj = injection(family)
    shape = ModelShape.of(inj.model)
    store = AdapterStore(tmp_path / "store")
    folder = tmp_path / "peft"
    saved_by_peft(folder, inj, target_modules=list(target_names(inj.model, "all-linear")))
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")  # left by a trainer; never opened
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")  # as in the Hub's cache
    entry = store.import_peft(folder, "task", BASE, shape=shape)
    manifest = entry.manifest
    assert (manifest.backbone, manifest.trained_on) == (None, None)
    assert store.task("task") == entry
    for each in (folder, entry.path):
        assert_means_the_same(each, entry.load(shape), inj)
    assert store.verify() == []


def test_peft_computes_from_our_files_what_we_compute(tmp_path: Path) -> None:
    """Some modules have another rank or scaling, and one layer lacks a module of the other."""
    (first, a), (second, b), (third, _), *_ = sorted(LORA.pairs.items())
    changed = {
        first: LoraPair(a.A[:3], a.B[:, :3], 1.7),
        second: LoraPair(b.A, b.B, 0.3),
    }
    pairs = {path: pair for path, pair in (LORA.pairs | changed).items() if path != third}
    irregular = Lora(LORA.config, pairs)
    write(tmp_path / "ours", *lora_to_peft(StoredLora.of(irregular), base_name="tiny"))
    assert_means_the_same(tmp_path / "ours", irregular)


CONFIGS = [
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 3}},
    # The first pattern that matches counts.
    {"alpha_pattern": {"v_proj": 11, "layers.0.self_attn.v_proj": 1}},
    {
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"v_pro.": 5},
        "use_rslora": True,
    },
    # These match no whole name, so they have no effect in PEFT.
    {"rank_pattern": {"proj": 2, "layers.1": 2, "_proj": 2}},
    {"target_modules": r".*layers\.1.*(q_proj|down_proj)"},
    {"layers_to_transform": 0, "layers_pattern": "layers"},
    {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": ["model.layers.0.mlp.up_proj", "o_proj"]},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_we_compute_from_pefts_files_what_peft_computes(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    content, tensors = saved_by_peft(tmp_path, **config)
    # PEFT sorts the patterns; a file from elsewhere need not be sorted.
    content["alpha_pattern"] = dict(reversed(content["alpha_pattern"].items()))
    (tmp_path / CONFIG).write_text(json.dumps(content))
    read = lora_from_peft(content, tensors)
    check_fits(content, read, SHAPE)
    ours = read.to_lora()
    assert_means_the_same(tmp_path, ours)
    # Our files of the same LoRA mean the same again.
    again = lora_from_peft(*lora_to_peft(read, base_name="tiny")).to_lora()
    assert again.pairs.keys() == ours.pairs.keys()
    for a, b in zip(again.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    scalings = [[pair.scaling for pair in each.pairs.values()] for each in (again, ours)]
    assert scalings[0] == pytest.approx(scalings[1], rel=1e-15)


OTHER_MEANINGS = [
    ("peft_type", "LOHA"),
    ("use_dora", True),
    ("init_lora_weights", "pissa"),
    ("a_new_field", 0.5),
    ("target_modules", ["k_proj"]),
    ("r", 8),
    ("lora_alpha", float("nan")),
    ("lora_alpha", 10**400),
    ("rank_pattern", {"q_proj": 8}),
    ("alpha_pattern", {"(": 1}),
    ("alpha_pattern", {"(?=a)(a+)+b": 1}),
]
UNUSABLE = [
    ({KEY: None}, "lora_A.weight is missing"),
    ({KEY: torch.zeros(5, 32)}, "shapes do not match the rank"),
    ({KEY: torch.full((4, 32), float("-inf"), dtype=torch.bfloat16)}, "NaN or infinity"),
    ({KEY.replace("_A", "_B"): torch.full((32, 4), 3e38)}, "overflow as they are served"),
    ({KEY: torch.zeros(4, 32, dtype=torch.int8)}, "Unsupported dtype"),
    ({KEY.replace(".weight", ".bias"): torch.zeros(4)}, "Not a tensor of a LoRA"),
    ({KEY.replace("layers", "../layers"): torch.zeros(4, 32)}, "Not a tensor of a LoRA"),
    ({KEY.replace("lora_A", "lora_A.other"): torch.zeros(4, 32)}, "there twice"),
    ({KEY: None, KEY.replace("lora_A", "lora_A.x"): torch.zeros(4, 32)}, "several adapters"),
    ({KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}, "does not say so"),
    ({KEY.replace("lora_A.weight", "base_layer.bias"): torch.ones(32)}, "does not say so"),
    ({KEY.replace("lora_A.weight", "bias"): torch.ones(32)}, "that was trained"),
    ({KEY.replace("q_proj.lora_A", "q_norm"): torch.ones(8)}, "trained or resized"),
    (dict.fromkeys(FILES[1]), "no LoRA tensor"),
]
REFUSED = [
    *(({field: value}, {}, field) for field, value in OTHER_MEANINGS),
    *(({}, *each) for each in UNUSABLE),
]


@pytest.mark.parametrize(("fields", "changes", "reason"), REFUSED)
def test_a_config_or_tensor_with_another_meaning_is_refused(
    fields: dict[str, Any], changes: dict[str, Tensor | None], reason: str
) -> None:
    config, tensors = FILES
    config = {**config, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], **fields}
    added = stored({name: tensor for name, tensor in changes.items() if tensor is not None})
    kept = {name: tensor for name, tensor in tensors.items() if name not in changes}
    with pytest.raises(
        InvalidAdapter, check=lambda error: None not in (error.field, error.allowed)
    ) as caught:
        lora_from_peft(config, kept | added)
    assert fields or reason in caught.value.message


def test_every_targeted_module_must_have_tensors() -> None:
    fewer = Lora(LORA.config, dict(sorted(LORA.pairs.items())[1:]))
    with pytest.raises(InvalidAdapter, match="targets modules without tensors"):
        check_fits(FILES[0], StoredLora.of(fewer), SHAPE)


def test_a_bias_of_a_linear_that_has_none_is_refused() -> None:
    """PEFT ignores it in silence."""
    config = {**FILES[0], "bias": "lora_only"}
    bias = stored({KEY.replace("lora_A.weight", "base_layer.bias"): torch.ones(32)})
    read = lora_from_peft(config, FILES[1] | bias)
    with pytest.raises(InvalidAdapter, match="of the base model has none"):
        check_fits(config, read, SHAPE)


def test_an_adapter_that_overflows_as_it_serves_is_not_imported(tmp_path: Path) -> None:
    """Its weights are finite, and a scaling of 2 is not in them."""
    store = AdapterStore(tmp_path / "store")
    folder = tmp_path / "peft"
    config, tensors = FILES
    huge = {
        key: StoredTensor.of(torch.full(tensor.shape, 3e38)) if "lora_B" in key else tensor
        for key, tensor in tensors.items()
    }
    write(folder, config, huge)
    with pytest.raises(InvalidAdapter, match=r"k_proj: The weights overflow") as caught:
        store.import_peft(folder, "imported", BASE, shape=SHAPE)
    assert str(folder) in caught.value.message
    assert not store.root.exists()


def test_an_adapter_that_does_not_fit_the_base_model_is_not_imported(tmp_path: Path) -> None:
    """Damaged files are refused as in the store: see test_integrity."""
    store = AdapterStore(tmp_path / "store")
    folder = tmp_path / "peft"
    write(folder, *FILES)
    shape = replace(SHAPE, linears={"model.layers.0.mlp.up_proj": (24, 16)})
    with pytest.raises(InvalidAdapter, match="No such linear layer"):
        store.import_peft(folder, "imported", BASE, shape=shape)
    assert not store.root.exists()
