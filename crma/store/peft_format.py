"""LoRA adapters in PEFT's files: written so that PEFT loads them, read with the meaning PEFT gives.

`peft_config.py` says which configs are accepted, and `peft_key.py` what tensors are called. An
adapter that cannot be served exactly is refused, and so is every field or tensor that is not known.

The rules need the names, shapes and bits of tensors, no arithmetic, so they work without torch.

Shapes: A [r, in]; B [out, r]. An embedding is a linear on one-hot rows: in is the vocabulary.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crma.core.files import invalid
from crma.models.model_shape import ModelShape
from crma.store.peft_config import (
    ALL_LINEAR,
    CONFIG,
    MERGE,
    WEIGHTS,
    PeftConfig,
    parse_config,
    refused,
)
from crma.store.peft_key import FORMS, PREFIX, WRITTEN, parse_key
from crma.store.served_range import check_range
from crma.store.stored_tensor import StoredTensor, find_largest

if TYPE_CHECKING:
    import torch

    from crma.method.lora import Lora, LoraPair

__all__ = ["CONFIG", "WEIGHTS", "StoredLora", "check_fits", "lora_from_peft", "lora_to_peft"]

Parts = Mapping[str, StoredTensor]
"""The part of a pair, as `PeftKey.part`, -> its tensor."""


@dataclass(frozen=True)
class StoredPair:
    """What an adapter does to one linear; fields as in `LoraPair` and `LearnedOutput`.

    A [r, in], B [out, r]; magnitude, bias and own_bias [out], or None.
    """

    A: StoredTensor
    B: StoredTensor
    scaling: float
    is_embedding: bool = False
    magnitude: StoredTensor | None = None
    bias: StoredTensor | None = None
    own_bias: StoredTensor | None = None

    @classmethod
    def of(cls, pair: LoraPair, dtype: torch.dtype | None) -> StoredPair:
        """A pair in memory, not bound to a linear, with A and B cast to `dtype`."""
        from crma.method.frozen_linear import LearnedOutput

        A = StoredTensor.of(pair.A.detach().to("cpu", dtype))
        B = StoredTensor.of(pair.B.detach().to("cpu", dtype))
        learned = pair.output or LearnedOutput()
        assert isinstance(learned, LearnedOutput)
        vectors = (
            None if tensor is None else StoredTensor.of(tensor)
            for tensor in (learned.magnitude, learned.bias, learned.own_bias)
        )
        return cls(A, B, pair.scaling, pair.is_embedding, *vectors)

    def to_pair(self) -> LoraPair:
        """The pair that computes with these tensors."""
        from crma.method.frozen_linear import LearnedOutput
        from crma.method.lora import LoraPair

        vectors = [
            None if tensor is None else tensor.to_torch().float()
            for tensor in (self.magnitude, self.bias, self.own_bias)
        ]
        is_plain = not self.is_embedding and all(each is None for each in vectors)
        output = None if is_plain else LearnedOutput(*vectors)
        A, B = self.A.to_torch(), self.B.to_torch()
        return LoraPair(A, B, self.scaling, self.is_embedding, output)

    def parts(self) -> dict[str, StoredTensor]:
        """The tensors, by the part of `PeftKey` that each is."""
        prefix = "embedding_" if self.is_embedding else ""
        parts = {f"{prefix}A": self.A, f"{prefix}B": self.B}
        if self.magnitude is not None:
            parts["magnitude"] = self.magnitude
        if self.bias is not None:
            parts["lora_bias"] = self.bias
        if self.own_bias is not None:
            parts["own_bias"] = self.own_bias
        return parts


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

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors."""
        parts = (part for pair in self.pairs.values() for part in pair.parts().values())
        return sum(part.numel for part in parts)

    @classmethod
    def of(cls, lora: Lora, dtype: torch.dtype | None = None) -> StoredLora:
        """A LoRA in memory with its tensors cast to `dtype`; None leaves each as it is."""
        pairs = {path: StoredPair.of(pair, dtype) for path, pair in lora.pairs.items()}
        config = lora.config
        return cls(config.rank, config.alpha, config.target_modules, pairs)

    def to_lora(self) -> Lora:
        """The LoRA that computes with these tensors, in their own dtype and memory."""
        from crma.method.lora import Lora, LoraConfig

        pairs = {path: pair.to_pair() for path, pair in self.pairs.items()}
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
        for part, tensor in pair.parts().items():
            tensors[f"{PREFIX}{path}.{WRITTEN[part]}"] = tensor
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
    # Only where they are set: the digest of a plain LoRA must not change.
    if any(pair.magnitude is not None for pair in lora.pairs.values()):
        config["use_dora"] = True
    if any(pair.bias is not None for pair in lora.pairs.values()):
        config["lora_bias"] = True
    if any(pair.own_bias is not None for pair in lora.pairs.values()):
        config["bias"] = "lora_only"
    return config, tensors


def lora_from_peft(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> StoredLora:
    """The LoRA that PEFT would make of these files; the tensors keep their dtype.

    The result's alpha / rank is the scaling. With rsLoRA it therefore differs from `lora_alpha`.

    Raises:
        InvalidAdapter: it is not a plain LoRA on linears, is incomplete, or overflows as it serves.
    """
    peft = parse_config(config)
    pairs = {}
    for path, parts in sorted(_parts_by_path(tensors).items()):
        pairs[path] = _pair(peft, path, parts)
        if not peft.ensure_weight_tying:
            _check_targeted(peft, path)
    if not pairs:
        raise invalid("Holds no LoRA tensor.", WEIGHTS, 0, FORMS)
    target_modules = tuple(sorted({_last_name(path) for path in pairs}))
    return StoredLora(peft.r, peft.common_alpha, target_modules, pairs)


def check_fits(config: Mapping[str, Any], lora: StoredLora, shape: ModelShape) -> None:
    """Every pair fits a linear of the base model, and every targeted linear has its pair.

    Args:
        config: the adapter's PEFT config.
        lora: what `lora_from_peft` made with it.
        shape: of the base model.

    Raises:
        InvalidAdapter: a module that the base model lacks, a wrong shape, or a missing pair.
    """
    known = {**shape.embedding, **shape.linears, **shape.head}
    for path, pair in lora.pairs.items():
        if path not in known or pair.is_embedding != (path in shape.embedding):
            names = sorted({_last_name(each) for each in known})
            message = "No such linear layer in the base model."
            raise invalid(message, path, path, f"modules named {names}")
        out_features, in_features = known[path]
        if pair.B.shape[0] != out_features or pair.A.shape[1] != in_features:
            allowed = f"A [r, {in_features}], B [{out_features}, r]"
            raise invalid(
                "Does not fit the base model.", path, _dimensions(pair.A, pair.B), allowed
            )
        if pair.own_bias is not None and path not in shape.biased:
            message = "Holds a bias, and this linear of the base model has none."
            raise invalid(message, path, WRITTEN["own_bias"], "no bias")
    peft = parse_config(config)
    for path in lora.pairs:
        if path not in shape.head or not peft.ensure_weight_tying:
            _check_targeted(peft, path)
    targets = shape.linears if peft.target_modules == ALL_LINEAR else known
    missing = sorted(path for path in targets if path not in lora.pairs and peft.targets(path))
    if missing:
        message = "The config targets modules without tensors."
        raise invalid(message, missing[0], missing[:5], "A and B for each")


def _check_targeted(peft: PeftConfig, path: str) -> None:
    if not peft.targets(path):
        message = "Not targeted by the config, so PEFT would ignore its tensors."
        raise invalid(message, path, path, peft.target_modules)


def _parts_by_path(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Module path -> the parts of its pair. Every tensor is used or refused."""
    paths: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    adapters = set()
    find_largest(tensors.values())
    for key, tensor in tensors.items():
        found = parse_key(key)
        if found is None:
            raise refused(_unknown_tensor(key), key, _dimensions(tensor), MERGE)
        if found.part == "weight":
            raise refused("A copy of the base model's weights", key, _dimensions(tensor), MERGE)
        tensor.check_dtype(key)
        if not tensor.is_finite():
            raise invalid("Holds NaN or infinity.", key, "not finite", "finite numbers")
        if found.part in paths[found.path]:
            raise invalid("A tensor of the same part is there twice.", key, key, "one")
        paths[found.path][found.part] = tensor
        if found.part != "own_bias":
            adapters.add(found.adapter)
    if len(adapters) > 1:
        message = "Holds several adapters, by the names in its tensors."
        raise invalid(message, WEIGHTS, sorted(map(str, adapters)), "one adapter")
    return paths


def _unknown_tensor(key: str) -> str:
    if ".lora_" in key or not key.startswith(PREFIX):
        return f"Not a tensor of a LoRA ({FORMS})"
    if key.endswith(".bias"):
        return "A bias of the base model that was trained"
    return "A module of the base model that was trained or resized"


def _pair(peft: PeftConfig, path: str, parts: Parts) -> StoredPair:
    """The pair of a module.

    Raises InvalidAdapter if a part is missing, too much or misshapen, or the pair overflows.
    """
    is_embedding = "embedding_A" in parts or "embedding_B" in parts
    names = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
    expected = set(names)
    if peft.use_dora:
        expected.add("magnitude")
    if peft.lora_bias and not is_embedding:
        expected.add("lora_bias")
    if peft.bias != "none" and not is_embedding and "own_bias" in parts:
        expected.add("own_bias")
    odd = sorted(expected ^ set(parts))
    if odd:
        verb = "missing" if odd[0] in expected else "there, and the config does not say so"
        message = f"{WRITTEN[odd[0]]} is {verb}."
        raise invalid(message, path, sorted(parts), sorted(expected))
    A, B = (parts[name] for name in names)
    _check_shapes(path, A, B, peft.rank(path))
    vectors = [parts.get(part) for part in ("magnitude", "lora_bias", "own_bias")]
    for vector in vectors:
        if vector is not None and vector.shape != B.shape[:1]:
            allowed = f"[{B.shape[0]}], as B [{B.shape[0]}, r]"
            raise invalid("Not one number an output.", path, _dimensions(vector), allowed)
    check_range(path, A, B, peft.scaling(path), is_normed=bool(peft.use_dora))
    return StoredPair(A, B, peft.scaling(path), is_embedding, *vectors)


def _check_shapes(path: str, A: StoredTensor, B: StoredTensor, rank: int) -> None:
    """A is [rank, in] and B is [out, rank], with in and out at least 1."""
    is_matrix = len(A.shape) == len(B.shape) == 2
    if not is_matrix or A.shape[0] != rank or B.shape[1] != rank or 0 in (*A.shape, *B.shape):
        allowed = f"A [{rank}, in], B [out, {rank}]"
        raise invalid("The shapes do not match the rank.", path, _dimensions(A, B), allowed)


def _last_name(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _dimensions(*tensors: StoredTensor) -> list[list[int]]:
    return [list(tensor.shape) for tensor in tensors]
