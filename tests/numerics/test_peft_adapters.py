"""Every kind of PEFT adapter is served as PEFT computes it, or refused with what to do instead.

PEFT is the oracle: it loads the folder that it saved, and the folder that the store made of it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import tiny_configs
import torch
from peft.tuners.lora.config import KasaConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from crma.core.errors import InvalidAdapter
from crma.core.selection import BASE, AdapterSelection
from crma.method.injection import Injection, Plan
from crma.models.base_model import BaseModel
from crma.models.model_shape import ModelShape
from crma.models.pull import pull
from crma.store.adapter_store import AdapterStore
from crma.store.entry import TaskEntry
from crma.store.peft_format import CONFIG, WEIGHTS
from server.engine.request import SamplingParams

pytestmark = [
    # PEFT reads a deprecated attribute, warns of patterns that match nothing, of tied weights and
    # of fan_in_fan_out on linears, and of embeddings that it saves.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
TOLERANCE = 1e-4  # of a logit and of a log-probability, in fp32
PROMPT = tuple(range(3, 27))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEOX = ["query_key_value", "dense"]
QV = ["q_proj", "v_proj"]
ENDS = ["q_proj", "lm_head", "embed_tokens"]

Change = Callable[[dict[str, Any], dict[str, Tensor]], None]
"""Changes a config and tensors that PEFT saved, as another tool might have."""


def renamed(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """As a checkpoint of the whole model has them."""
    for key in list(tensors):
        new = key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        if new.endswith("lora_magnitude_vector"):
            new += ".default.weight"
        if ".lora_embedding_" in new:
            new += ".default"
        tensors[new] = tensors.pop(key)


def unchanged(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """As `save_pretrained` leaves them."""


def with_fields(**fields: Any) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config.update(fields)

    return change


@dataclass(frozen=True)
class Kind:
    """A kind of adapter: what PEFT is asked for, and what is changed in its files."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    family: str = "llama"
    change: Change = unchanged


SERVED = [
    Kind("plain"),
    Kind("plain, mistral", family="mistral"),
    Kind("plain, biased linears", family="qwen2"),
    Kind("plain, normed heads", family="qwen3"),
    Kind("plain, gemma2", family="gemma2"),
    Kind("plain, fused linears", {"target_modules": ["qkv_proj", "down_proj"]}, "phi3"),
    Kind("plain, gpt_neox", {"target_modules": NEOX}, "gpt_neox"),
    Kind("adapter name in keys", change=renamed),
    Kind("fan_in_fan_out on linears", {"fan_in_fan_out": True}),
    Kind("rank pattern", {"rank_pattern": {r"^model\.layers\.1\..*q_proj": 2, "v_proj": 7}}),
    Kind("rank pattern, group", {"rank_pattern": {r"layers\.(0|1)+\.self_attn\.(q|k)_proj": 2}}),
    Kind("rank pattern, lookahead", {"rank_pattern": {r"layers\.(?!0).*q_proj": 2}}),
    Kind("alpha pattern", {"alpha_pattern": {"layers.0.self_attn.q_proj": 1, ".*v_proj": 11}}),
    Kind("rsLoRA", {"use_rslora": True, "rank_pattern": {"v_proj": 2}}),
    Kind("target regex", {"target_modules": r".*layers\.1.*(q_proj|down_proj)"}),
    Kind("all-linear", {"target_modules": "all-linear"}),
    Kind(
        "all-linear in the file",
        {"target_modules": "all-linear"},
        change=with_fields(target_modules="all-linear"),
    ),
    Kind("suffixes", {"target_modules": ["self_attn.q_proj", "model.layers.0.mlp.up_proj"]}),
    Kind("layers_to_transform", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    Kind("exclude_modules", {"exclude_modules": r".*layers\.0.*q_proj"}),
    Kind("dropout", {"lora_dropout": 0.3}),
    Kind("gaussian", {"init_lora_weights": "gaussian"}),
    Kind("false", {"init_lora_weights": False}),
    Kind("orthogonal", {"init_lora_weights": "orthogonal"}),
    Kind("MiCA", {"init_lora_weights": "mica"}),
    Kind("eva", change=with_fields(init_lora_weights="eva")),
    Kind("bias=lora_only, no biases", {"bias": "lora_only"}),
    Kind("bias=all, no biases", {"bias": "all"}),
    Kind("bias=lora_only", {"bias": "lora_only"}, "qwen2"),
    Kind("bias=all, all of them adapted", {"bias": "all", "target_modules": ALL}, "qwen2"),
    Kind("bias=lora_only, gpt_neox", {"bias": "lora_only", "target_modules": NEOX}, "gpt_neox"),
    Kind("bias=lora_only, name in keys", {"bias": "lora_only"}, "qwen2", renamed),
    Kind("DoRA, bias=lora_only", {"use_dora": True, "bias": "lora_only"}, "qwen2"),
    Kind("lora_bias and bias", {"lora_bias": True, "bias": "lora_only"}, "qwen2"),
    Kind("lora_bias", {"lora_bias": True, "target_modules": ALL}),
    Kind("lora_bias, biased linears", {"lora_bias": True}, "qwen2"),
    Kind("lora_bias, gpt_neox", {"lora_bias": True, "target_modules": NEOX}, "gpt_neox"),
    Kind("DoRA", {"use_dora": True, "target_modules": ALL}),
    Kind("DoRA, name in keys", {"use_dora": True}, change=renamed),
    Kind(
        "DoRA, rsLoRA, patterns",
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    ),
    Kind("DoRA, fan_in_fan_out", {"use_dora": True, "fan_in_fan_out": True}),
    Kind("DoRA, biased linears", {"use_dora": True, "target_modules": ALL}, "qwen2"),
    Kind("DoRA, normed heads", {"use_dora": True, "target_modules": ALL}, "qwen3"),
    Kind("DoRA, gemma3", {"use_dora": True, "target_modules": ALL}, "gemma3"),
    Kind("DoRA, gpt_neox", {"use_dora": True, "target_modules": NEOX}, "gpt_neox"),
    Kind("head", {"target_modules": ["q_proj", "lm_head"]}),
    Kind("head, tied", {"target_modules": ["q_proj", "lm_head"]}, "tied"),
    Kind("head, gemma2", {"target_modules": ["q_proj", "lm_head"]}, "gemma2"),
    Kind("embedding", {"target_modules": ["q_proj", "embed_tokens"]}),
    Kind("embedding, name in keys", {"target_modules": ENDS}, change=renamed),
    Kind("embedding and head, tied", {"target_modules": ENDS}, "tied"),
    Kind(
        "tied adapters of both",
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
        "tied",
    ),
    Kind(
        "tied adapters, one named",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_rslora": True},
        "tied",
    ),
    Kind("embedding and head, gemma2", {"target_modules": ENDS}, "gemma2"),
    Kind("DoRA on both, gemma3", {"use_dora": True, "target_modules": ENDS}, "gemma3"),
    Kind(
        "embedding and head, gpt_neox",
        {"target_modules": [*NEOX, "embed_in", "lm_head"]},
        "gpt_neox",
    ),
    Kind("DoRA on embedding and head", {"use_dora": True, "target_modules": ENDS}),
    Kind("DoRA on both, tied", {"use_dora": True, "target_modules": ENDS}, "tied"),
    Kind(
        "DoRA on both, gpt_neox",
        {"use_dora": True, "target_modules": ["embed_in", "lm_head"]},
        "gpt_neox",
    ),
]


REFUSED = [
    (Kind("PiSSA", {"init_lora_weights": "pissa"}), "path_initial_model_for_weight_conversion"),
    (Kind("OLoRA", {"init_lora_weights": "olora"}), "path_initial_model_for_weight_conversion"),
    (
        Kind("CorDA", change=with_fields(init_lora_weights="corda")),
        "path_initial_model_for_weight_conversion",
    ),
    (
        Kind("LoRA-GA", change=with_fields(init_lora_weights="lora_ga")),
        "path_initial_model_for_weight_conversion",
    ),
    (Kind("MonteCLoRA", change=with_fields(monteclora_config={"samples": 2})), "merge_and_unload"),
    (Kind("BD-LoRA", change=with_fields(use_bdlora=True)), "merge_and_unload"),
    (Kind("LoftQ", change=with_fields(init_lora_weights="loftq")), "merge_and_unload"),
    (Kind("modules_to_save", {"modules_to_save": ["lm_head"]}), "merge_and_unload"),
    (Kind("token indices", {"trainable_token_indices": [1, 2]}), "merge_and_unload"),
    (
        Kind("target_parameters", {"target_parameters": ["o_proj.weight"], "target_modules": []}),
        "merge_and_unload",
    ),
    (Kind("layer_replication", change=with_fields(layer_replication=[[0, 2]])), "merge_and_unload"),
    (Kind("biases of other linears", {"bias": "all"}, "qwen2"), "merge_and_unload"),
    (Kind("biases of norms", {"bias": "all", "target_modules": NEOX}, "gpt_neox"), "merge_and"),
    (Kind("aLoRA", {"alora_invocation_tokens": [5]}), "without alora_invocation_tokens"),
    (Kind("KaSA", {"kasa_config": KasaConfig()}), "merge_and_unload"),
    (Kind("VeLoRA", {"velora_config": VeloraConfig(num_groups=2)}), "merge_and_unload"),
    (Kind("QALoRA", change=with_fields(use_qalora=True)), "merge_and_unload"),
    (Kind("Arrow", change=with_fields(arrow_config={"top_k": 3})), "one by one"),
    (Kind("Megatron", change=with_fields(megatron_config={"a": 1})), "remove the field"),
    (Kind("classifier", {"task_type": "FEATURE_EXTRACTION"}), "train a LoRA instead"),
    (Kind("a field of a later PEFT", change=with_fields(new_field=0.5)), "merge_and_unload"),
    (Kind("IA3", change=with_fields(peft_type="IA3")), "merge_and_unload"),
    (Kind("AdaLoRA", change=with_fields(peft_type="ADALORA")), "merge_and_unload"),
    (Kind("prefixes", change=with_fields(peft_type="PREFIX_TUNING")), "train a LoRA instead"),
    (Kind("prompts", change=with_fields(peft_type="PROMPT_TUNING")), "train a LoRA instead"),
]


@cache
def model(family: str) -> Any:
    """The tiny model of a family; "tied": the Llama, with one weight for embedding and head."""
    if family != "tied":
        return tiny.injection(family)
    config = tiny_configs.FAMILIES["llama"](tie_word_embeddings=True)
    made = AutoModelForCausalLM.from_config(config)
    state = tiny.injection().model.state_dict()
    made.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    return Injection(made.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], BaseModel]:
    """The pulled model of a family: imports compare embeddings with its weights."""

    @cache
    def base(family: str) -> BaseModel:
        folder = tmp_path_factory.mktemp(family)
        model(family).model.save_pretrained(folder / "tiny")
        tiny.tokenizer().save_pretrained(folder / "tiny")
        return pull(str(folder / "tiny"), home=folder / "home")

    return base


def save(kind: Kind, folder: Path) -> None:
    """Write a random adapter of a kind as PEFT does."""
    torch.manual_seed(2)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": QV, **kind.config}
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", **settings})
    made = peft.get_peft_model(tiny.fresh(model(kind.family)), config)
    for name, parameter in made.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= torch.rand_like(parameter) + 0.5
        elif name.endswith("base_layer.bias"):
            parameter.data += torch.randn_like(parameter)
        elif "lora_" in name:
            nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5)
    made.save_pretrained(str(folder))
    tensors = load_file(folder / WEIGHTS)
    saved = json.loads((folder / CONFIG).read_text())
    saved["base_model_name_or_path"] = "someone/tiny"
    kind.change(saved, tensors)
    (folder / CONFIG).write_text(json.dumps(saved))
    save_file(tensors, folder / WEIGHTS)


@torch.no_grad()
def by_peft(family: str, folder: Path, ids: Tensor) -> Tensor:
    """Logits that PEFT computes from a folder."""
    made = peft.PeftModel.from_pretrained(tiny.fresh(model(family)), str(folder))
    return made.eval()(ids).logits


def imported(kind: Kind, tmp_path: Path, base: BaseModel) -> TaskEntry:
    save(kind, tmp_path / "peft")
    shape = ModelShape.of(model(kind.family).model)
    return AdapterStore(tmp_path / "store").import_peft(tmp_path / "peft", "odd", base, shape=shape)


def served(kind: Kind, entry: TaskEntry, **options: Any) -> tuple[tuple[int, ...], Tensor]:
    """Answer and log-probabilities of the engine, beside the base model and a plain LoRA."""
    inj = model(kind.family)
    adapters = {"odd": entry.load(), "plain": tiny.lora(inj, 5, "all-linear", seed=3)}
    adapters["crma"] = tiny.backbone(inj)
    engine, pool = tiny.make_engine(inj, adapters, **options)
    for digest in adapters:
        pool.load(digest)
    sampling = SamplingParams(8, logprobs=0, prompt_logprobs=0)
    selections = [
        AdapterSelection("plain"),
        AdapterSelection("odd"),
        BASE,
        AdapterSelection("plain", "crma"),
    ]
    for number, selection in enumerate(selections):
        prompt = PROMPT if selection.task_digest == "odd" else PROMPT[: 5 + number]
        engine.add(tiny.Request(str(number), prompt, sampling=sampling, selection=selection))
    tokens: list[int] = []
    logprobs: list[float] = []
    while engine.scheduler.unfinished():
        for output in engine.step():
            if output.request_id == "1":
                tokens += output.token_ids
                logprobs += [each.logprob for each in (*output.prompt_logprobs, *output.logprobs)]
    return tuple(tokens), torch.tensor(logprobs)


def greatest_difference(kind: Kind, tmp_path: Path, base: BaseModel) -> float:
    """Of the logits of the hooks and of the engine's log-probabilities, from PEFT's."""
    entry = imported(kind, tmp_path, base)
    tokens, logprobs = served(kind, entry)
    ids = torch.tensor([[*PROMPT, *tokens]])
    theirs = by_peft(kind.family, tmp_path / "peft", ids)
    again = by_peft(kind.family, entry.path, ids)
    expected = theirs[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    inj = model(kind.family)
    with torch.inference_mode(), inj.active(Plan([(None, entry.load())])):
        ours = inj.model(ids).logits
    with torch.inference_mode():
        base_logits = inj.model(ids).logits
    assert (base_logits - theirs).abs().max() > 0.1
    differences = [(again - theirs), (ours - theirs), (logprobs - expected)]
    return max(each.abs().max().item() for each in differences)


@pytest.mark.parametrize("kind", SERVED, ids=lambda kind: kind.name)
def test_it_is_served_as_peft_computes_it(
    kind: Kind, tmp_path: Path, bases: Callable[[str], BaseModel]
) -> None:
    assert greatest_difference(kind, tmp_path, bases(kind.family)) < TOLERANCE


@pytest.mark.parametrize(("kind", "advice"), REFUSED, ids=lambda value: getattr(value, "name", ""))
def test_what_is_not_served_is_refused_with_what_to_do(
    kind: Kind, advice: str, tmp_path: Path, bases: Callable[[str], BaseModel]
) -> None:
    with pytest.raises(InvalidAdapter) as refused:
        imported(kind, tmp_path, bases(kind.family))
    assert advice in refused.value.message
    assert refused.value.field
    assert not (tmp_path / "store").exists()


def test_a_pissa_adapter_is_served_once_it_is_converted_as_the_refusal_says(
    tmp_path: Path, bases: Callable[[str], BaseModel]
) -> None:
    torch.manual_seed(2)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=QV, init_lora_weights="pissa"
    )
    made = peft.get_peft_model(tiny.fresh(model("llama")), config)
    made.save_pretrained(str(tmp_path / "initial"))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        trained = made.eval()(ids).logits
    folder = tmp_path / "peft"
    made.save_pretrained(
        str(folder), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    shape = ModelShape.of(model("llama").model)
    store = AdapterStore(tmp_path / "store")
    entry = store.import_peft(folder, "task", bases("llama"), shape=shape)
    inj = model("llama")
    with torch.inference_mode(), inj.active(Plan([(None, entry.load())])):
        torch.testing.assert_close(inj.model(ids).logits, trained, rtol=0, atol=TOLERANCE)
