"""LoRA adapters in PEFT's files: written so that PEFT loads them, read so that they mean what they mean to PEFT.

Read against PEFT 0.21: `tuners/lora/config.py` (the fields), `tuners/lora/layer.py` (scaling), `utils/other.py`
(`get_pattern_key`), `tuners/tuners_utils.py` (`check_target_module_exists`). What has another meaning than
y += scaling · (x Aᵀ) Bᵀ on a linear is refused with the reason, and so is every field or tensor that is not known.

Shapes: A [r, in]; B [out, r].
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from crma.errors import InvalidAdapter
from crma.lora import Lora, LoraConfig, LoraPair

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_KEY = re.compile(r"base_model\.model\.(?P<path>\w+(?:\.\w+)*)\.lora_(?P<side>[AB])\.weight", re.ASCII)
_LAYER = re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")  # PEFT's: the first numbered part of a module path

# Fields that change what an adapter computes, and why each is refused when it is set.
_REFUSED = {
    "use_dora": "DoRA rescales the base weights",
    "modules_to_save": "it replaces whole modules of the base model",
    "fan_in_fan_out": "its weights are stored transposed",
    "lora_bias": "it adds a bias to the base model",
    "alora_invocation_tokens": "an activated LoRA is off for a part of the prompt",
    "trainable_token_indices": "it changes embeddings",
    "layer_replication": "it changes the depth of the base model",
    "target_parameters": "it targets parameters, not linear layers",
    "megatron_config": "it is made for Megatron's layers",
    "use_qalora": "QALoRA pools the input",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes among adapters",
    "kasa_config": "KaSA truncates the base weights",
    "monteclora_config": "it samples its weights",
    "velora_config": "VeLoRA keeps tensors of its own",
}
# Fields that say how an adapter was trained or where it sits: the tensors decide, and they are checked.
_HARMLESS = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config exclude_modules
    inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout
    lora_ga_config megatron_core peft_type peft_version qalora_group_size r rank_pattern revision runtime_config
    target_modules task_type use_rslora
    """.split()  # noqa: SIM905 (27 quoted words are harder to read)
)
_ONE_OF: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, MiCA) change the base weights or freeze a factor.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "use_rslora": (True, False),
}
_DEFAULTS = {"task_type": None, "bias": "none", "init_lora_weights": True, "use_rslora": False}


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
            alpha_pattern[re.escape(path)] = _plain(pair.scaling * rank)
        for side, tensor in (("A", pair.A), ("B", pair.B)):
            tensors[f"base_model.model.{path}.lora_{side}.weight"] = tensor.detach().to("cpu", dtype).contiguous()
    targets, layers = _targets(lora.pairs)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.config.rank,
        "lora_alpha": _plain(lora.config.alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "target_modules": targets,
        "layers_to_transform": layers,
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
    _check_fields(config)
    rank, alpha = _rank("r", config.get("r")), _alpha("lora_alpha", config.get("lora_alpha"))
    ranks = [(_pattern("rank_pattern", key), _rank(key, value)) for key, value in _items(config, "rank_pattern")]
    alphas = [(_pattern("alpha_pattern", key), _alpha(key, value)) for key, value in _items(config, "alpha_pattern")]
    rslora = config.get("use_rslora", False)
    pairs = {}
    for path, sides in sorted(_paths(tensors).items()):
        if len(sides) != 2:
            raise _invalid("One of lora_A and lora_B is missing.", path, sorted(sides), ["A", "B"])
        A, B, r = sides["A"], sides["B"], _match(ranks, path, rank)
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != r or B.shape[1] != r or 0 in (A.shape[1], B.shape[0]):
            raise _invalid("Not the shapes of its rank.", path, _shapes(A, B), f"A [{r}, in], B [out, {r}]")
        for side, tensor in sides.items():
            _check_values(f"{path}.lora_{side}", tensor)
        pairs[path] = LoraPair(A, B, _match(alphas, path, alpha) / (math.sqrt(r) if rslora else r))
    if not pairs:
        raise _invalid("No LoRA tensor.", WEIGHTS, 0, "base_model.model.<module>.lora_A.weight and .lora_B.weight")
    _check_targeted(config, pairs)
    names = tuple(sorted({_last(path) for path in pairs}))
    return Lora(LoraConfig(rank, alpha / math.sqrt(rank) * rank if rslora else alpha, names), pairs)


def check_fits(config: Mapping[str, Any], lora: Lora, shapes: Mapping[str, tuple[int, int]]) -> None:
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
            raise _invalid("No such linear layer in the base model.", path, path, f"modules named {names}")
        out_features, in_features = shapes[path]
        if pair.B.shape[0] != out_features or pair.A.shape[1] != in_features:
            allowed = f"A [r, {in_features}], B [{out_features}, r]"
            raise _invalid("Does not fit the base model.", path, _shapes(pair.A, pair.B), allowed)
    missing = sorted(path for path in shapes if path not in lora.pairs and _is_targeted(config, path) is True)
    if missing:
        raise _invalid("The config targets modules without tensors.", missing[0], missing[:5], "A and B for each")


def _check_fields(config: Mapping[str, Any]) -> None:
    for field, allowed in _ONE_OF.items():
        value = config.get(field, _DEFAULTS.get(field))
        if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in allowed):
            raise _invalid("Only plain LoRA adapters of causal language models are read.", field, value, list(allowed))
    for field, value in config.items():
        if value and field in _REFUSED:
            raise _invalid(f"Not a plain LoRA: {_REFUSED[field]}.", field, value, "not set")
        if value and field not in _HARMLESS and field not in _REFUSED:
            raise _invalid("A field this version does not know may change the meaning.", field, value, "not set")
    targets = config.get("target_modules")
    if not targets or not (isinstance(targets, str) or _is_strings(targets)):
        raise _invalid("No target modules.", "target_modules", targets, "a pattern or a list of names")
    excluded = config.get("exclude_modules") or []
    if not (isinstance(excluded, str) or _is_strings(excluded)):
        raise _invalid("Not module names.", "exclude_modules", excluded, "a pattern or a list of names")


def _paths(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module path -> side -> tensor. Every tensor is used or refused."""
    paths: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            reasons = (("lora_embedding", "LoRA on embeddings"), ("magnitude", "DoRA"), ("bias", "a bias"))
            reason = next((reason for part, reason in reasons if part in key), "a tensor that is not a plain LoRA's")
            allowed = "base_model.model.<module>.lora_<A|B>.weight"
            raise _invalid(f"Not supported: {reason}.", key, _shapes(tensor), allowed)
        paths[match["path"]][match["side"]] = tensor
    return paths


def _check_values(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise _invalid("Not a supported dtype.", name, str(tensor.dtype), [str(dtype) for dtype in DTYPES])
    if not torch.isfinite(tensor).all():
        raise _invalid("Holds NaN or infinity.", name, "not finite", "finite numbers")


def _check_targeted(config: Mapping[str, Any], pairs: Collection[str]) -> None:
    """Tensors that the config does not target would be ignored by PEFT."""
    for path in pairs:
        if _is_targeted(config, path) is False:
            raise _invalid("Has tensors but is not targeted.", path, path, config["target_modules"])


def _is_targeted(config: Mapping[str, Any], path: str) -> bool | None:
    """PEFT's `check_target_module_exists`; None where that takes running a pattern: then the tensors decide."""
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    if isinstance(targets, str) or isinstance(excluded, str) or config.get("layers_pattern"):
        return None
    if any(_ends(path, name) for name in excluded):
        return False
    if path in targets:
        return True
    layers = config.get("layers_to_transform")
    match = _LAYER.match(path)
    if layers is not None and layers != [] and not (match and int(match["layer"]) in _as_list(layers)):
        return False
    return any(_ends(path, target) for target in targets)


def _targets(paths: Iterable[str]) -> tuple[list[str], list[int] | None]:
    """The shortest config that targets exactly these modules: names and layers if they are a grid, else full paths."""
    by_layer: dict[int | None, set[str]] = defaultdict(set)
    for path in paths:
        match = _LAYER.match(path)
        layer = int(match["layer"]) if match else None
        by_layer[layer].add(path[: match.start("layer")] + path[match.end("layer") :] if match else path)
    first, *others = by_layer.values()
    if None in by_layer or any(names != first for names in others):
        return sorted(paths), None
    return sorted({_last(path) for path in paths}), sorted(layer for layer in by_layer if layer is not None)


def _match(patterns: Iterable[tuple[re.Pattern[str], Any]], path: str, default: Any) -> Any:
    """PEFT's `get_pattern_key`: the first pattern that matches the end of the path, from its start or after a dot."""
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def _pattern(field: str, key: str) -> re.Pattern[str]:
    """Compiles one key as PEFT does. Refuses what can take exponential time: it would hang whoever reads the file."""
    quantifiers = len(re.findall(r"(?<!\\)[*+?{]", key))
    if len(key) > 256 or quantifiers > 3 or re.search(r"\)[*+{]", key):
        raise _invalid("The pattern is too complex.", field, key, "<= 3 quantifiers, none after a group")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError) as error:
        raise _invalid(f"Not a pattern: {error}.", field, key, "a regular expression") from error


def _rank(field: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _invalid("Not a rank.", field, value, "a whole number >= 1")
    return value


def _alpha(field: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e6:
        raise _invalid("Not an alpha.", field, value, "a number within ±1e6")
    return float(value)


def _items(config: Mapping[str, Any], field: str) -> Iterable[tuple[str, Any]]:
    value = config.get(field) or {}
    if not isinstance(value, dict):
        raise _invalid("Not a mapping.", field, value, "pattern -> number")
    return value.items()


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _plain(alpha: float) -> float:
    """16.0 as 16, as PEFT writes it."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _shapes(*tensors: Tensor) -> list[list[int]]:
    return [list(tensor.shape) for tensor in tensors]


def _invalid(message: str, field: str, value: Any, allowed: Any) -> InvalidAdapter:
    return InvalidAdapter(f"{field}: {message}", field=field, value=repr(value)[:200], allowed=allowed)
