"""Single tensors of a pulled model, read from its files without building the model."""

import json
from collections.abc import Sequence

from safetensors import safe_open
from torch import Tensor

from crma.models.base_model import BaseModel

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"


def read_weight(base: BaseModel, names: Sequence[str]) -> Tensor | None:
    """The first of several tensors that is in the files; None if none is.

    Args:
        base: a pulled model.
        names: of the tensors. A tied weight is in the files under one of its names only.
    """
    index = base.path / _INDEX
    if index.is_file():
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        files = dict.fromkeys(names, _WEIGHTS)
    for name in names:
        path = base.path / files.get(name, "")
        if not path.is_file():
            continue
        with safe_open(path, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 (it is no dict)
                return tensors.get_tensor(name)
    return None
