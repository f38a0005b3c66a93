"""LoRA adapters in PEFT's files: written so that PEFT loads them, read with the meaning PEFT gives.

The rules follow PEFT 0.21: `tuners/lora/config.py` (the fields), `tuners/lora/layer.py` (scaling),
`utils/other.py` (`get_pattern_key`) and `tuners/tuners_utils.py` (`check_target_module_exists`).
An adapter that does not mean y += scaling · (x Aᵀ) Bᵀ on linears is refused, and so is every field
or tensor that is not known here.

The rules need the names, shapes and bits of tensors, no arithmetic, so they work without torch.

Shapes: A [r, in]; B [out, r].
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from crma.core.files import invalid
from crma.models.model_shape import ModelShape
from crma.store.manifest import TASK_FILES, parse_record
from crma.store.stored_tensor import StoredTensor

if TYPE_CHECKING:
    import torch

    from crma.method.lora import Lora

CONFIG, WEIGHTS = TASK_FILES

# The repetitions are bounded because patterns from the config are matched against the paths.
_KEY = re.compile(
    r"base_model\.model\.(?P<path>\w{1,64}(\.\w{1,64}){0,15})\.lora_(?P<side>[AB])\.weight",
    re.ASCII,
)
_KEYS = "base_model.model.<module>.lora_A.weight and .lora_B.weight"

# Fields that record how an adapter was trained or where it is. Any other field that `PeftConfig`
# lacks (use_dora, modules_to_save, fan_in_fan_out, layer_replication, …) changes the result, or
# may, and must not be set.
_HARMLESS = """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config inference_mode
    loftq_config lora_dropout lora_ga_config megatron_core peft_version qalora_group_size revision
    runtime_config
""".split()  # noqa: SIM905 (quoted words are harder to read)

_Rank = Annotated[int, Field(ge=1)]
_Alpha = Annotated[float, Field(ge=-1e6, le=1e6)]


class PeftConfig(BaseModel):
    """The fields of `adapter_config.json` that decide what a plain LoRA computes.

    `target_modules` is a list of names, or one string, which is a regular expression.
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    bias: Literal["none"] = "none"
    # The other ways (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, MiCA) change the base weights or freeze
    # a factor.
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal"] = True
    r: _Rank
    lora_alpha: _Alpha
    use_rslora: bool = False
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    target_modules: str | list[str] = Field(min_length=1)
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    def targets(self, path: str) -> bool | None:
        """PEFT's `check_target_module_exists`.

        Returns None if the config narrows its targets by more than names: then only the tensors
        say which modules are adapted.
        """
        is_narrowed = (
            self.exclude_modules
            or self.layers_to_transform not in (None, [])
            or self.layers_pattern
        )
        if is_narrowed or isinstance(self.target_modules, str):
            return None
        return f".{path}".endswith(tuple(f".{name}" for name in self.target_modules))

    def scaling(self, alpha: float, rank: int) -> float:
        """The factor of x Aᵀ Bᵀ: alpha / rank, or with rsLoRA alpha / sqrt(rank)."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class StoredPair:
    """The low-rank update of one linear: A [r, in], B [out, r]."""

    A: StoredTensor
    B: StoredTensor
    scaling: float


@dataclass(frozen=True)
class StoredLora:
    """A `crma.method.lora.Lora` that was read from files, or is about to be written.

    Attributes:
        rank: of every pair, unless its tensors have another.
        alpha: rank times the scaling of every pair, unless a pair has another.
        target_modules: the last names of the adapted modules, sorted.
        pairs: module path -> pair.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    pairs: Mapping[str, StoredPair]

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @classmethod
    def of(cls, lora: Lora, dtype: torch.dtype | None = None) -> StoredLora:
        """A LoRA in memory with its tensors cast to `dtype`; None leaves each as it is."""
        pairs = {}
        for path, pair in lora.pairs.items():
            A = StoredTensor.of(pair.A.detach().to("cpu", dtype))
            B = StoredTensor.of(pair.B.detach().to("cpu", dtype))
            pairs[path] = StoredPair(A, B, pair.scaling)
        config = lora.config
        return cls(config.rank, config.alpha, config.target_modules, pairs)

    def to_lora(self) -> Lora:
        """The LoRA that computes with these tensors, in their own dtype and memory."""
        from crma.method.lora import Lora, LoraConfig, LoraPair

        pairs = {
            path: LoraPair(pair.A.to_torch(), pair.B.to_torch(), pair.scaling)
            for path, pair in self.pairs.items()
        }
        return Lora(LoraConfig(self.rank, self.alpha, self.target_modules), pairs)


def lora_to_peft(
    lora: StoredLora, *, base_name: str
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The contents of `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        lora: its pairs decide; ranks and scalings that differ from its own become PEFT patterns.
        base_name: PEFT's `base_model_name_or_path`; the store binds by digest instead.
    """
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    tensors: dict[str, StoredTensor] = {}
    for path, pair in sorted(lora.pairs.items()):
        rank = pair.A.shape[0]
        if rank != lora.rank:
            rank_pattern[re.escape(path)] = rank
        if pair.scaling != lora.alpha / rank:
            alpha_pattern[re.escape(path)] = pair.scaling * rank
        tensors[f"base_model.model.{path}.lora_A.weight"] = pair.A
        tensors[f"base_model.model.{path}.lora_B.weight"] = pair.B
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(lora.pairs),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    return config, tensors


def lora_from_peft(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> StoredLora:
    """The LoRA that PEFT would make of these files; the tensors keep their dtype.

    The result's alpha / rank is the scaling. With rsLoRA it therefore differs from `lora_alpha`.

    Raises:
        InvalidAdapter: it is not a plain LoRA on linears, is incomplete, or is not finite.
    """
    peft = _parse(config)
    ranks = _patterns(peft.rank_pattern)
    alphas = _patterns(peft.alpha_pattern)
    pairs = {}
    for path, sides in sorted(_sides_by_path(tensors).items()):
        rank = _match(ranks, path, peft.r)
        alpha = _match(alphas, path, peft.lora_alpha)
        _check_pair(path, sides, rank)
        if peft.targets(path) is False:
            message = "Not targeted by the config, so PEFT would ignore its tensors."
            raise invalid(message, path, path, peft.target_modules)
        pairs[path] = StoredPair(sides["A"], sides["B"], peft.scaling(alpha, rank))
    if not pairs:
        raise invalid("Holds no LoRA tensor.", WEIGHTS, 0, _KEYS)
    target_modules = tuple(sorted({_last_name(path) for path in pairs}))
    alpha = peft.lora_alpha
    if peft.use_rslora:
        alpha = peft.scaling(alpha, peft.r) * peft.r
    return StoredLora(peft.r, alpha, target_modules, pairs)


def check_fits(config: Mapping[str, Any], lora: StoredLora, shape: ModelShape) -> None:
    """Every pair fits a linear of the base model, and every targeted linear has its pair.

    Args:
        config: the adapter's PEFT config.
        lora: what `lora_from_peft` made with it.
        shape: of the base model.

    Raises:
        InvalidAdapter: a module that the base model lacks, a wrong shape, or a missing pair.
    """
    for path, pair in lora.pairs.items():
        if path not in shape.linears:
            names = sorted({_last_name(known) for known in shape.linears})
            message = "No such linear layer in the base model."
            raise invalid(message, path, path, f"modules named {names}")
        out_features, in_features = shape.linears[path]
        if pair.B.shape[0] != out_features or pair.A.shape[1] != in_features:
            allowed = f"A [r, {in_features}], B [{out_features}, r]"
            raise invalid(
                "Does not fit the base model.", path, _dimensions(pair.A, pair.B), allowed
            )
    peft = _parse(config)
    missing = sorted(
        path for path in shape.linears if path not in lora.pairs and peft.targets(path)
    )
    if missing:
        message = "The config targets modules without tensors."
        raise invalid(message, missing[0], missing[:5], "A and B for each")


def _parse(config: Mapping[str, Any]) -> PeftConfig:
    data = json.dumps(config).encode()  # keeps the order of patterns, which has a meaning
    peft = parse_record(PeftConfig, data, CONFIG)
    for field, value in (peft.model_extra or {}).items():
        if value and field not in _HARMLESS:
            message = "This field is unknown, or makes the adapter more than a plain LoRA."
            raise invalid(message, field, value, "not set")
    return peft


def _sides_by_path(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Module path -> "A" or "B" -> tensor. Every tensor is used or refused."""
    paths: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise invalid("Not a tensor of a plain LoRA.", key, _dimensions(tensor), _KEYS)
        tensor.check_dtype(key)
        if not tensor.is_finite():
            raise invalid("Holds NaN or infinity.", key, "not finite", "finite numbers")
        paths[match["path"]][match["side"]] = tensor
    return paths


def _check_pair(path: str, sides: Mapping[str, StoredTensor], rank: int) -> None:
    """A [rank, in] and B [out, rank] are both there, with in and out at least 1."""
    if len(sides) != 2:
        raise invalid("One of lora_A and lora_B is missing.", path, sorted(sides), ["A", "B"])
    A, B = sides["A"], sides["B"]
    is_matrix = len(A.shape) == len(B.shape) == 2
    if not is_matrix or A.shape[0] != rank or B.shape[1] != rank or 0 in (*A.shape, *B.shape):
        allowed = f"A [{rank}, in], B [out, {rank}]"
        raise invalid("The shapes do not match the rank.", path, _dimensions(A, B), allowed)


def _patterns(values: Mapping[str, Any] | None) -> list[tuple[re.Pattern[str], Any]]:
    return [(_compile(key), value) for key, value in (values or {}).items()]


def _compile(key: str) -> re.Pattern[str]:
    """Compiles one key as PEFT does.

    Refuses patterns that can take exponential time: they would hang whoever reads the file.
    """
    num_quantifiers = len(re.findall(r"(?<!\\)[*+?{]", key))
    repeats_a_group = re.search(r"\)[*+{]", key) is not None
    if len(key) > 256 or num_quantifiers > 2 or repeats_a_group:
        allowed = "<= 2 quantifiers, none after a group"
        raise invalid("The pattern is too complex.", key, key, allowed)
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError) as error:
        raise invalid(f"Not a pattern: {error}.", key, key, "a regular expression") from error


def _match(patterns: Iterable[tuple[re.Pattern[str], Any]], path: str, default: Any) -> Any:
    """PEFT's `get_pattern_key`: the value of the first pattern that matches.

    A pattern matches the end of the path, from its start or after a dot.
    """
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def _last_name(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _dimensions(*tensors: StoredTensor) -> list[list[int]]:
    return [list(tensor.shape) for tensor in tensors]
