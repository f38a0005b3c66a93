"""PEFT's files: ours load in PEFT, PEFT's load here, with the same meaning; what has another meaning is refused."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from published import BASE
from tiny import FAMILIES, fresh, injection, lora
from torch import Tensor, nn

from crma.core.errors import InvalidAdapter
from crma.method.injection import Injection, Plan, target_names
from crma.method.lora import Lora, LoraPair
from crma.store.adapter_store import AdapterStore
from crma.store.peft_format import CONFIG, WEIGHTS, check_fits, lora_from_peft, lora_to_peft

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*is_gradient_checkpointing:FutureWarning"
    ),  # PEFT reads what is deprecated
    pytest.mark.filterwarnings(
        "ignore:.*did not match any targeted module:RuntimeWarning"
    ),  # and warns as it should
]
INJECTION = injection()
SHAPES = INJECTION.shapes
INPUT = torch.arange(3, 27).reshape(2, 12)
LORA = lora(INJECTION, 4, "attention", seed=1)
FILES = lora_to_peft(LORA, base_name="tiny", dtype=None)
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@torch.no_grad()
def assert_means_the_same(folder: Path, ours: Lora, inj: Injection = INJECTION) -> None:
    """PEFT, with its own code, computes from the folder what we compute, and not what the base model does."""
    theirs = peft.PeftModel.from_pretrained(fresh(inj), str(folder)).eval()(INPUT).logits
    assert (inj.model(INPUT).logits - theirs).abs().max() > 0.1
    with inj.active(Plan(tasks=[(None, ours)])):
        torch.testing.assert_close(inj.model(INPUT).logits, theirs, rtol=0, atol=2e-5)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def saved_by_peft(
    folder: Path, inj: Injection = INJECTION, **config: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
    return json.loads((folder / CONFIG).read_text()), safetensors.torch.load_file(folder / WEIGHTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_from_peft_means_the_same_in_the_store_and_back_in_peft(
    family: str, tmp_path: Path
) -> None:
    """Imported it has no lineage."""
    inj, store, folder = injection(family), AdapterStore(tmp_path / "store"), tmp_path / "peft"
    saved_by_peft(folder, inj, target_modules=list(target_names(inj.model, "all-linear")))
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")  # what a trainer leaves; never opened
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")  # as in the Hub's cache
    entry = store.import_peft(folder, "task", BASE, shapes=inj.shapes)
    assert (entry.manifest.backbone, entry.prompt_format, entry.manifest.trained_on) == (
        None,
        None,
        None,
    )
    assert store.task("task") == entry
    for each in (folder, entry.path):
        assert_means_the_same(each, entry.load(inj.shapes), inj)
    assert store.verify() == []


def test_peft_computes_from_our_files_what_we_compute(tmp_path: Path) -> None:
    """Other ranks and scalings in some modules, and not the same modules in each layer."""
    (first, a), (second, b), (third, _), *_ = sorted(LORA.pairs.items())
    changed = LORA.pairs | {
        first: LoraPair(a.A[:3], a.B[:, :3], 1.7),
        second: LoraPair(b.A, b.B, 0.3),
    }
    irregular = Lora(LORA.config, {path: pair for path, pair in changed.items() if path != third})
    write(tmp_path / "ours", *lora_to_peft(irregular, base_name="tiny", dtype=None))
    assert_means_the_same(tmp_path / "ours", irregular)


CONFIGS = [
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 3}},
    {
        "alpha_pattern": {"v_proj": 11, "layers.0.self_attn.v_proj": 1}
    },  # the first that matches counts
    {
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"v_pro.": 5},
        "use_rslora": True,
    },
    {
        "rank_pattern": {"proj": 2, "layers.1": 2, "_proj": 2}
    },  # matches no whole name: no effect in PEFT
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
    content["alpha_pattern"] = dict(
        reversed(content["alpha_pattern"].items())
    )  # PEFT sorts them; a file need not
    (tmp_path / CONFIG).write_text(json.dumps(content))
    ours = lora_from_peft(content, tensors)
    assert_means_the_same(tmp_path, ours)
    check_fits(content, ours, SHAPES)
    again = lora_from_peft(
        *lora_to_peft(ours, base_name="tiny", dtype=None)
    )  # and through our files
    assert again.pairs.keys() == ours.pairs.keys()
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True)
    )
    scalings = [[pair.scaling for pair in lora.pairs.values()] for lora in (again, ours)]
    assert scalings[0] == pytest.approx(scalings[1], rel=1e-15)


OTHER_MEANINGS = [
    ("peft_type", "LOHA"),
    ("use_dora", True),
    ("init_lora_weights", "pissa"),
    ("a_new_field", 0.5),
]
OTHER_MEANINGS += [
    ("target_modules", ["k_proj"]),
    ("r", 8),
    ("lora_alpha", float("nan")),
    ("lora_alpha", 10**400),
]
OTHER_MEANINGS += [
    ("rank_pattern", {"q_proj": 8}),
    ("alpha_pattern", {"(": 1}),
    ("alpha_pattern", {"(a+)+b": 1}),
]
UNUSABLE = [
    ({KEY: None}, "One of lora_A and lora_B is missing"),
    ({KEY: torch.zeros(5, 32)}, "shapes of its rank"),
    ({KEY: torch.full((4, 32), float("-inf"), dtype=torch.bfloat16)}, "NaN or infinity"),
    ({KEY: torch.zeros(4, 32, dtype=torch.int8)}, "dtype"),
    ({KEY.replace(".weight", ".bias"): torch.zeros(4)}, "plain LoRA"),
    ({KEY.replace("layers", "../layers"): torch.zeros(4, 32)}, "plain LoRA"),
    (dict.fromkeys(FILES[1]), "No LoRA tensor"),
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
    tensors = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
    with pytest.raises(
        InvalidAdapter, check=lambda error: None not in (error.field, error.allowed)
    ) as caught:
        lora_from_peft(config, tensors)
    assert fields or reason in caught.value.message


def test_tensors_are_there_for_all_that_is_targeted() -> None:
    fewer = Lora(LORA.config, dict(sorted(LORA.pairs.items())[1:]))
    with pytest.raises(InvalidAdapter, match="targets modules without tensors"):
        check_fits(FILES[0], fewer, SHAPES)


def test_a_folder_that_does_not_fit_is_not_imported(tmp_path: Path) -> None:
    """How its files are read, and what is wrong with them, is as for those of the store: test_integrity."""
    store, folder = AdapterStore(tmp_path / "store"), tmp_path / "peft"
    write(folder, *FILES)
    with pytest.raises(InvalidAdapter, match="No such linear layer"):
        store.import_peft(folder, "imported", BASE, shapes={"model.layers.0.mlp.up_proj": (24, 16)})
    assert not store.root.exists()
