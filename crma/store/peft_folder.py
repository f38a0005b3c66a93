"""A folder in which PEFT, or a tool like it, has left an adapter: what an import reads of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crma.core.errors import BaseMismatch, NotFound
from crma.core.files import invalid
from crma.models.base_model import BaseModel
from crma.models.model_shape import ModelShape
from crma.store.entry import Contents, read_weights
from crma.store.manifest import TASK_FILES
from crma.store.peft_config import CONFIG, MERGE, WEIGHTS, refused
from crma.store.peft_key import PREFIX, parse_key
from crma.store.stored_tensor import StoredTensor

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_HUB_CACHE = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_JOIN_SHARDS = (
    'python -c "import glob; from safetensors.torch import load_file, save_file; '
    "save_file({k: v for f in glob.glob('adapter_model-*.safetensors') "
    "for k, v in load_file(f).items()}, 'adapter_model.safetensors')\""
)
_CONVERT_PICKLE = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "t = torch.load('{}', map_location='cpu', weights_only=True); "
    "save_file({{k: v.clone().contiguous() for k, v in t.items()}}, 'adapter_model.safetensors')\""
)


def read_folder(
    path: Path, base: BaseModel, *, shape: ModelShape | None, trust_base: bool
) -> Contents:
    """The config and the tensors of an adapter that was made for a base model.

    Only `adapter_config.json` and `adapter_model.safetensors` are opened. Links are followed,
    because the Hub's cache is made of them.

    Args:
        path: the folder.
        base: the base model that will serve it.
        shape: of the base model. If given, copies of its embedding and its head, which PEFT saves
            with adapters on them, are compared with the base model and left out.
        trust_base: accept the name of another base model.

    Raises:
        NotFound: there is no such folder.
        InvalidAdapter: a file is missing, too large or malformed, or is of a kind that is not read;
            the error says how to convert it.
        BaseMismatch: it names another base model.
    """
    if not path.is_dir():
        message = "There is no such folder."
        raise NotFound(message, field="path", value=str(path), allowed="a folder that PEFT saved")
    _check_files(path)
    config, tensors = read_weights([(path / file).resolve() for file in TASK_FILES])
    if not trust_base:
        _check_base(config, base)
    if shape is not None:
        tensors = _without_copies(tensors, base, shape)
    return config, tensors


def _check_files(path: Path) -> None:
    """Raises InvalidAdapter if the two files are not there, and says what to do."""
    if not (path / CONFIG).exists():
        message = "No such file: this is no folder that PEFT saved."
        raise invalid(message, CONFIG, path, list(TASK_FILES))
    if (path / WEIGHTS).exists():
        return
    names = sorted(each.name for each in path.iterdir())
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if shards:
        message = (
            f"The weights are in {len(shards)} parts. Join them in that folder: {_JOIN_SHARDS}"
        )
        raise invalid(message, WEIGHTS, shards, WEIGHTS)
    pickles = [name for name in _PICKLES if name in names]
    if pickles:
        command = _CONVERT_PICKLE.format(pickles[0])
        message = (
            f"{pickles[0]} is a pickle, which can run code when it is loaded, so it is not opened. "
            f"If you trust it, convert it in that folder: {command}"
        )
        raise invalid(message, WEIGHTS, pickles[0], WEIGHTS)
    raise invalid("No such file.", WEIGHTS, path, list(TASK_FILES))


def _check_base(config: Mapping[str, Any], base: BaseModel) -> None:
    """Raises BaseMismatch if the config names another base model, or one revision of it.

    Without a name only shapes can be compared, which is said in the log.
    """
    field = "base_model_name_or_path"
    named = config.get(field)
    if not named:
        logger.warning("%s is not set in %s: only shapes were compared", field, CONFIG)
        return
    if model_name(str(named)) != model_name(base.name):
        message = (
            f"This adapter was made for {named}, and the base model is {base.name}. "
            "If their weights are the same, trust it (--trust-base)."
        )
        raise BaseMismatch(message, field=field, value=str(named), allowed=base.name)
    revision = config.get("revision")
    if revision not in (None, "", "main"):
        message = (
            f"This adapter was made for revision {revision} of {named}, and the revision "
            f"of {base.name} is not known. If their weights are the same, trust it (--trust-base)."
        )
        raise BaseMismatch(message, field="revision", value=str(revision), allowed=["main", None])


def model_name(named: str) -> str:
    """The name of a model without its owner or the folders it lies in, in lower case.

    Args:
        named: a name, a hub id, a folder, a folder in the Hub's cache, or a name in our own.
    """
    parts = re.split(r"[/\\]", named.rstrip("/\\"))
    cached = [match["name"] for match in map(_HUB_CACHE.fullmatch, parts) if match]
    last = cached[-1] if cached else parts[-1]
    return last.rpartition("--")[2].casefold()


def _without_copies(
    tensors: Mapping[str, StoredTensor], base: BaseModel, shape: ModelShape
) -> dict[str, StoredTensor]:
    """The tensors without copies of the base model's embedding and head.

    Raises InvalidAdapter if one of them differs from the base model: then it was trained.
    """
    kept = {}
    for key, tensor in tensors.items():
        path = _copied_module(key)
        if path not in shape.embedding and path not in shape.head:
            kept[key] = tensor
        elif not _is_in_base(base, tensor):
            reason = f"It differs from the weights of {base.name}, so it was trained or resized"
            raise refused(reason, key, list(tensor.shape), MERGE)
    return kept


def _copied_module(key: str) -> str | None:
    """The module of which a tensor is a copy, by its name; None if it is a part of the adapter."""
    found = parse_key(key)
    if found is not None:
        return found.path if found.part == "weight" else None
    return key.removeprefix(PREFIX).removesuffix(".weight")


def _is_in_base(base: BaseModel, tensor: StoredTensor) -> bool:
    """Whether a copy has the base model's numbers, once those are rounded to the copy's dtype."""
    import torch

    from crma.models.base_weights import weights_of_shape

    copy = tensor.to_torch()
    found = weights_of_shape(base, tensor.shape)
    return any(torch.equal(weight.to(copy.dtype), copy) for weight in found)
