"""The names of tensors in PEFT's files, and the part of an adapter that each one is.

    base_model.model.<module>.lora_A.weight                   A of a linear
    base_model.model.<module>.lora_B.weight, .lora_B.bias     B, and its own bias
    base_model.model.<module>.lora_embedding_A, _B            A and B of an embedding
    base_model.model.<module>.lora_magnitude_vector           of DoRA
    base_model.model.<module>.base_layer.bias                 in place of an adapted linear's bias
    base_model.model.<module>.base_layer.weight               a copy of the base model's weight

A checkpoint that was not written by `save_pretrained` has the adapter's name inside, as in
`…lora_A.default.weight`.
"""

import re
from functools import lru_cache
from typing import NamedTuple

PREFIX = "base_model.model."
FORMS = f"{PREFIX}<module>.lora_A.weight, .lora_B.weight and their kin"
MAX_KEY = 2048  # characters of a name; a path has at most half as many
_PATH = re.compile(r"\w{1,64}(\.\w{1,64}){0,15}", re.ASCII)

# How a name ends after the module -> the part of the adapter. `*` is the adapter's name.
_ENDINGS = {
    "lora_A.weight": "A",
    "lora_A.*.weight": "A",
    "lora_B.weight": "B",
    "lora_B.*.weight": "B",
    "lora_B.bias": "lora_bias",
    "lora_B.*.bias": "lora_bias",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_A.*": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_embedding_B.*": "embedding_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.*.weight": "magnitude",
    "base_layer.bias": "own_bias",
    "base_layer.weight": "weight",
}
_MARKS = {ending.split(".")[0] for ending in _ENDINGS}
WRITTEN = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "embedding_A": "lora_embedding_A",
    "embedding_B": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector",
    "own_bias": "base_layer.bias",
}
"""The part of an adapter -> how `save_pretrained` ends its name."""


class PeftKey(NamedTuple):
    """What the name of a tensor says.

    Attributes:
        path: of the module.
        part: of the adapter: a key of `WRITTEN`; or "weight", a copy of the base model's.
        adapter: the adapter's name, if it is inside; None: it is not. The names of own_bias and
            weight never have one.
    """

    path: str
    part: str
    adapter: str | None


def parse_key(key: str) -> PeftKey | None:
    """The parts of a tensor's name; None if it is no name of a LoRA's tensor."""
    if len(key) > MAX_KEY:
        return None
    return _parsed(key)


@lru_cache(4096)  # all adapters have the same
def _parsed(key: str) -> PeftKey | None:
    if not key.startswith(PREFIX):
        return None
    names = key.removeprefix(PREFIX).split(".")
    end = next((i for i, name in enumerate(names) if name in _MARKS), 0)
    path = ".".join(names[:end])
    ending = names[end:]
    adapter = None
    if ".".join(ending) not in _ENDINGS and len(ending) > 1:
        adapter = ending[1]
        ending[1] = "*"
    part = _ENDINGS.get(".".join(ending))
    if part is None or _PATH.fullmatch(path) is None:
        return None
    return PeftKey(path, part, adapter)
