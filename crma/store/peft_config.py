"""`adapter_config.json`: what it says of a LoRA, and why other adapters are refused.

The rules follow PEFT 0.21: `tuners/lora/config.py` (the fields), `tuners/lora/layer.py` (scaling),
`utils/other.py` (`get_pattern_key`) and `tuners/tuners_utils.py` (`check_target_module_exists`).
A field that is not known here and is set is refused, and every refusal says what to do instead.
"""

import json
import math
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from crma.core.errors import InvalidAdapter
from crma.core.files import invalid
from crma.store.manifest import TASK_FILES, parse_record
from crma.store.pattern import compile_pattern

CONFIG, WEIGHTS = TASK_FILES
ALL_LINEAR = "all-linear"

MERGE = (
    "merge it with PEFT's merge_and_unload(), save the merged model, and serve that as a base model"
)
CONVERT = (
    "save it with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…), "
    "which makes a plain LoRA of it"
)
RETRAIN = "train a LoRA instead"

# Fields that record how an adapter was trained or where it is. `fan_in_fan_out` is one of them:
# PEFT itself unsets it on linears.
_HARMLESS = """
    auto_mapping base_model_name_or_path corda_config eva_config fan_in_fan_out inference_mode
    loftq_config lora_dropout lora_ga_config megatron_core peft_version qalora_group_size revision
    runtime_config
""".split()  # noqa: SIM905 (quoted words are harder to read)

# Field -> why it is refused if it is set, and what to do.
_REFUSED = {
    "modules_to_save": ("It replaces whole modules of the base model", MERGE),
    "trainable_token_indices": ("It replaces the embeddings of single tokens", MERGE),
    "target_parameters": ("It adapts parameters that belong to no linear", MERGE),
    "layer_replication": ("It repeats layers of the base model", MERGE),
    "use_qalora": ("It pools the inputs of a GPTQ model's linears", MERGE),
    "velora_config": ("VeLoRA is not known here", MERGE),
    "monteclora_config": ("MonteCLoRA samples its weights", MERGE),
    "use_bdlora": ("BD-LoRA's matrices are block-diagonal", MERGE),
    "kasa_config": ("KaSA changes the base model's weights", MERGE),
    "alora_invocation_tokens": (
        "aLoRA acts only after its invocation tokens, so it cannot be merged either",
        "train it without alora_invocation_tokens",
    ),
    "arrow_config": (
        "Arrow routes every token to one of several adapters",
        "import those adapters one by one",
    ),
    "megatron_config": (
        "It was made for Megatron's parallel layers",
        "if its modules are plain linears, remove the field",
    ),
}
_VIRTUAL_TOKENS = """
    PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING ADAPTION_PROMPT CPT
""".split()  # noqa: SIM905
# Initialisations that leave the base weights as they are. The forward pass of MiCA is LoRA's.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_CONVERTIBLE_STARTS = ("pissa", "olora", "corda", "lora_ga")

_Rank = Annotated[int, Field(ge=1)]
_Alpha = Annotated[float, Field(ge=-1e6, le=1e6)]
_Flag = bool | None
_Modules = str | frozenset[str]  # a pattern, or names
_Value = TypeVar("_Value")


class PeftConfig(BaseModel):
    """The fields of `adapter_config.json` that decide what a LoRA computes.

    `target_modules` is a list of names, or one string: a regular expression, or "all-linear".
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    # The biases that it trains are tensors of the file; a base model without biases has none. Those
    # of modules without a LoRA are refused.
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str | None = True
    r: _Rank
    lora_alpha: _Alpha
    use_rslora: _Flag = False
    use_dora: _Flag = False
    lora_bias: _Flag = False
    # Where the head shares the embedding's weight, a target among the two stands for both.
    ensure_weight_tying: _Flag = False
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    target_modules: str | list[str] = Field(min_length=1)
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    def rank(self, path: str) -> int:
        """The rank of the pair on a module."""
        return _first_match(self.rank_pattern, path, self.r)

    def scaling(self, path: str) -> float:
        """The factor of x Aᵀ Bᵀ on a module: alpha / rank, or with rsLoRA alpha / sqrt(rank)."""
        alpha = _first_match(self.alpha_pattern, path, self.lora_alpha)
        return self._scaling(alpha, self.rank(path))

    @property
    def common_alpha(self) -> float:
        """r times the scaling of every module that no pattern matches."""
        if not self.use_rslora:
            return self.lora_alpha
        return self._scaling(self.lora_alpha, self.r) * self.r

    def targets(self, path: str) -> bool:
        """PEFT's `check_target_module_exists`, for a linear in the decoder blocks or elsewhere.

        "all-linear" matches every path: which modules it means, the base model says.
        """
        if self.exclude_modules and _names(self._excluded, path):
            return False
        if self.target_modules == ALL_LINEAR:
            return True
        if not _names(self._targeted, path):
            return False
        is_whole = isinstance(self._targeted, str) or path in self._targeted
        return is_whole or self._transforms_layer_of(path)

    @cached_property
    def _targeted(self) -> _Modules:
        return _as_set(self.target_modules)

    @cached_property
    def _excluded(self) -> _Modules:
        return _as_set(self.exclude_modules or [])

    def _scaling(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _transforms_layer_of(self, path: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        forms = [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        if self.layers_pattern:
            named = self.layers_pattern
            patterns = [named] if isinstance(named, str) else named
            forms = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
        for form in forms:
            match = compile_pattern("layers_pattern", form).match(path)
            if match is not None:
                index = int(match.group("idx"))
                return index == layers if isinstance(layers, int) else index in layers
        return False


def parse_config(config: Mapping[str, Any]) -> PeftConfig:
    """The config of a LoRA that can be served.

    Raises:
        InvalidAdapter: it is another kind of adapter, or a field is wrong; the error says what to
            do.
    """
    _check_type(config)
    for field, (reason, advice) in _REFUSED.items():
        value = config.get(field)
        if value:
            raise refused(reason, field, value, advice)
    return _parsed(json.dumps(config).encode())  # in its order: that of patterns has a meaning


@lru_cache(8)  # one may have megabytes
def _parsed(data: bytes) -> PeftConfig:
    """The config in JSON: kept, because many adapters have the same. Raises as `parse_config`."""
    peft = parse_record(PeftConfig, data, CONFIG)
    for field, value in (peft.model_extra or {}).items():
        if value and field not in _HARMLESS:
            raise refused("This field is not known, and may change the result", field, value, MERGE)
    if peft.use_dora and peft.lora_bias:
        raise refused("PEFT itself does not know DoRA with lora_bias", "lora_bias", True, MERGE)
    _check_start(peft.init_lora_weights)
    return peft


def refused(reason: str, field: str, value: object, advice: str) -> InvalidAdapter:
    """An InvalidAdapter whose message ends with what to do about it."""
    return invalid(f"{reason}: {advice}.", field, value, advice)


def _check_type(config: Mapping[str, Any]) -> None:
    """Raises InvalidAdapter for another PEFT type than LoRA, or another task than text."""
    peft_type = config.get("peft_type")
    if peft_type in _VIRTUAL_TOKENS:
        raise refused("Virtual tokens cannot be merged or served", "peft_type", peft_type, RETRAIN)
    if isinstance(peft_type, str) and peft_type != "LORA":
        raise refused("Not a LoRA", "peft_type", peft_type, f"{MERGE}, or {RETRAIN}")
    task = config.get("task_type")
    if isinstance(task, str) and task != "CAUSAL_LM":
        reason = "Made for a model with another head than a causal language model's"
        raise refused(reason, "task_type", task, f"{RETRAIN}, of the task type CAUSAL_LM")


def _check_start(start: bool | str | None) -> None:
    """Raises InvalidAdapter for an initialisation that changes the base model's weights."""
    if start in _PLAIN_STARTS:
        return
    reason = "This initialisation changes the base model's weights"
    converts = str(start).lower().startswith(_CONVERTIBLE_STARTS)
    raise refused(reason, "init_lora_weights", start, CONVERT if converts else MERGE)


def _as_set(modules: str | list[str]) -> _Modules:
    return modules if isinstance(modules, str) else frozenset(modules)


def _names(modules: _Modules, path: str) -> bool:
    """Whether a pattern matches a whole path, or one of the names ends it, from a dot on."""
    if isinstance(modules, str):
        return compile_pattern("modules", modules).fullmatch(path) is not None
    return not modules.isdisjoint(_endings(path))


@lru_cache(4096)
def _endings(path: str) -> tuple[str, ...]:
    """A path, and what comes after each of its dots: kept, because all adapters have the same."""
    names = path.split(".")
    return tuple(".".join(names[first:]) for first in range(len(names)))


def _first_match(patterns: Mapping[str, _Value] | None, path: str, default: _Value) -> _Value:
    """PEFT's `get_pattern_key`: the value of the first pattern that matches.

    A pattern matches the end of the path, from its start or after a dot.
    """
    for key, value in (patterns or {}).items():
        if compile_pattern("pattern", rf"(.*\.)?({key})$").match(path):
            return value
    return default
