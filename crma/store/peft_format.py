"""LoRA adapters in PEFT's files: written so that PEFT loads them, read so that they mean what they mean to PEFT.

Read against PEFT 0.21: `tuners/lora/config.py` (the fields), `tuners/lora/layer.py` (scaling), `utils/other.py`
(`get_pattern_key`), `tuners/tuners_utils.py` (`check_target_module_exists`). What has another meaning than
y += scaling · (x Aᵀ) Bᵀ on a linear is refused, and so is every field or tensor that is not known.

Shapes: A [r, in]; B [out, r].
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from crma.core.files import invalid
from crma.method.lora import Lora, LoraConfig, LoraPair
from crma.store.manifest import TASK_FILES, parse_record

CONFIG, WEIGHTS = TASK_FILES
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The repetitions are bounded because patterns from the config run over the paths.
_KEY = re.compile(
    r"base_model\.model\.(?P<path>\w{1,64}(\.\w{1,64}){0,15})\.lora_(?P<side>[AB])\.weight",
    re.ASCII,
)

# Fields that say how an adapter was trained or where it sits. Any other that is not in `PeftConfig` changes what the
# adapter computes (use_dora, modules_to_save, fan_in_fan_out, layer_replication, …) or may do so, and must not be set.
_HARMLESS = """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config inference_mode loftq_config
    lora_dropout lora_ga_config megatron_core peft_version qalora_group_size revision runtime_config
""".split()  # noqa: SIM905 (quoted words are harder to read)

_Rank = Annotated[int, Field(ge=1)]
_Alpha = Annotated[float, Field(ge=-1e6, le=1e6)]


class PeftConfig(BaseModel):
    """The fields of `adapter_config.json` that decide what a plain LoRA computes; a string of targets is a pattern."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    bias: Literal["none"] = "none"
    # The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, MiCA) change the base weights or freeze a factor.
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
        """PEFT's `check_target_module_exists`; None where more than names decides: then the tensors do."""
        narrowed = (
            self.exclude_modules
            or self.layers_to_transform not in (None, [])
            or self.layers_pattern
        )
        if narrowed or isinstance(self.target_modules, str):
            return None
        return f".{path}".endswith(tuple(f".{name}" for name in self.target_modules))


def lora_to_peft(
    lora: Lora, *, base_name: str, dtype: torch.dtype | None = torch.bfloat16
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A LoRA as the contents of `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        lora: its pairs decide; ranks and scalings that differ from its config's become PEFT patterns.
        base_name: for PEFT's `base_model_name_or_path`; the store binds by digest instead.
        dtype: of the stored tensors; None keeps each as it is.
    """
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    for path, pair in sorted(lora.pairs.items()):
        rank = pair.A.shape[0]
        if rank != lora.config.rank:
            rank_pattern[re.escape(path)] = rank
        if pair.scaling != lora.config.alpha / rank:
            alpha_pattern[re.escape(path)] = pair.scaling * rank
        for side, tensor in (("A", pair.A), ("B", pair.B)):
            tensors[f"base_model.model.{path}.lora_{side}.weight"] = (
                tensor.detach().to("cpu", dtype).contiguous()
            )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.config.rank,
        "lora_alpha": lora.config.alpha,
        "target_modules": sorted(lora.pairs),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    return config, tensors


def lora_from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Lora:
    """The LoRA that PEFT would make of these files; the tensors keep their dtype.

    `config.alpha` of the result is such that alpha / rank is the scaling (with rsLoRA, PEFT's is alpha / sqrt(rank)).

    Raises:
        InvalidAdapter: anything that is not a plain LoRA on linear layers, is incomplete, or is not finite.
    """
    peft = _parse(config)
    ranks = [(_pattern(key), rank) for key, rank in (peft.rank_pattern or {}).items()]
    alphas = [(_pattern(key), alpha) for key, alpha in (peft.alpha_pattern or {}).items()]
    pairs = {}
    for path, sides in sorted(_paths(tensors).items()):
        if len(sides) != 2:
            raise invalid("One of lora_A and lora_B is missing.", path, sorted(sides), ["A", "B"])
        A, B, r = sides["A"], sides["B"], _match(ranks, path, peft.r)
        if (
            A.ndim != 2
            or B.ndim != 2
            or A.shape[0] != r
            or B.shape[1] != r
            or 0 in (A.shape[1], B.shape[0])
        ):
            raise invalid(
                "Not the shapes of its rank.", path, _shapes(A, B), f"A [{r}, in], B [out, {r}]"
            )
        if peft.targets(path) is False:
            raise invalid(
                "Has tensors that PEFT would ignore: it is not targeted.",
                path,
                path,
                peft.target_modules,
            )
        pairs[path] = LoraPair(
            A, B, _match(alphas, path, peft.lora_alpha) / (math.sqrt(r) if peft.use_rslora else r)
        )
    if not pairs:
        raise invalid(
            "No LoRA tensor.",
            WEIGHTS,
            0,
            "base_model.model.<module>.lora_A.weight and .lora_B.weight",
        )
    alpha = peft.lora_alpha / math.sqrt(peft.r) * peft.r if peft.use_rslora else peft.lora_alpha
    return Lora(LoraConfig(peft.r, alpha, tuple(sorted({_last(path) for path in pairs}))), pairs)


def check_fits(
    config: Mapping[str, Any], lora: Lora, shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Every pair fits a linear of the base model, and every linear that the config targets has its pair.

    Args:
        config: the adapter's PEFT config.
        lora: what `lora_from_peft` made with it.
        shapes: module path -> (out, in) of every linear in the decoder blocks.

    Raises:
        InvalidAdapter: a module the base does not have, a wrong shape, or a missing pair.
    """
    for path, pair in lora.pairs.items():
        if path not in shapes:
            names = sorted({_last(known) for known in shapes})
            raise invalid(
                "No such linear layer in the base model.", path, path, f"modules named {names}"
            )
        out_features, in_features = shapes[path]
        if pair.B.shape[0] != out_features or pair.A.shape[1] != in_features:
            allowed = f"A [r, {in_features}], B [{out_features}, r]"
            raise invalid("Does not fit the base model.", path, _shapes(pair.A, pair.B), allowed)
    peft = _parse(config)
    missing = sorted(
        path for path in shapes if path not in lora.pairs and peft.targets(path) is True
    )
    if missing:
        raise invalid(
            "The config targets modules without tensors.",
            missing[0],
            missing[:5],
            "A and B for each",
        )


def _parse(config: Mapping[str, Any]) -> PeftConfig:
    peft = parse_record(
        PeftConfig, json.dumps(config).encode(), CONFIG
    )  # the order of patterns has a meaning
    for field, value in (peft.model_extra or {}).items():
        if value and field not in _HARMLESS:
            raise invalid("Not plain LoRA, or not known here.", field, value, "not set")
    return peft


def _paths(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module path -> side -> tensor. Every tensor is used or refused."""
    paths: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise invalid(
                "Not a plain LoRA's.",
                key,
                _shapes(tensor),
                "base_model.model.<module>.lora_<A|B>.weight",
            )
        if tensor.dtype not in DTYPES:
            raise invalid(
                "Not a supported dtype.", key, tensor.dtype, [str(dtype) for dtype in DTYPES]
            )
        if not torch.isfinite(tensor).all():
            raise invalid("Holds NaN or infinity.", key, "not finite", "finite numbers")
        paths[match["path"]][match["side"]] = tensor
    return paths


def _pattern(key: str) -> re.Pattern[str]:
    """Compiles one key as PEFT does. Refuses what can take exponential time: it would hang whoever reads the file."""
    if len(key) > 256 or len(re.findall(r"(?<!\\)[*+?{]", key)) > 2 or re.search(r"\)[*+{]", key):
        raise invalid(
            "The pattern is too complex.", key, key, "<= 2 quantifiers, none after a group"
        )
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError) as error:
        raise invalid(f"Not a pattern: {error}.", key, key, "a regular expression") from error


def _match(patterns: Iterable[tuple[re.Pattern[str], Any]], path: str, default: Any) -> Any:
    """PEFT's `get_pattern_key`: the first pattern that matches the end of the path, from its start or after a dot."""
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _shapes(*tensors: Tensor) -> list[list[int]]:
    return [list(tensor.shape) for tensor in tensors]
