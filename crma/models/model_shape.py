"""The shape of a base model: what an adapter must fit.

Finding it takes transformers' model classes, which take seconds to import. So it is recorded once
beside the pulled model, in a hidden file that is no part of the model:

    {"config": sha256 of config.json, "transformers": its version,
     "shape": {"num_layers": ..., "hidden_size": ..., "linears": {module path: [out, in]},
               "embedding": {module path: [out, in]}, "head": {module path: [out, in]},
               "biased": [module path]}}

The shape follows from `config.json` and from transformers' code, so a record made from another
config or by another version is ignored and replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from crma.core.digests import file_digest
from crma.core.errors import UnsupportedModel
from crma.core.files import replace_record
from crma.models.base_model import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = ".model_shape.json"


@dataclass(frozen=True)
class ModelShape:
    """What an adapter must fit.

    Attributes:
        num_layers: decoder blocks.
        hidden_size: the width of the residual stream.
        linears: module path -> (out, in) of every linear in the decoder blocks, in model order.
        embedding: the same of the embedding, as `injection.embedding_shape`.
        head: the same of the head, as `injection.head_shape`.
        biased: paths of the linears that have a bias.
    """

    num_layers: int
    hidden_size: int
    linears: Mapping[str, tuple[int, int]]
    embedding: Mapping[str, tuple[int, int]]
    head: Mapping[str, tuple[int, int]]
    biased: Sequence[str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        """The shape of a model in memory. Raises UnsupportedModel if it is no plain decoder."""
        from crma.method import injection

        _, blocks = injection.decoder_blocks(model)
        linears = injection.linear_shapes(model)
        head = injection.head_shape(model)
        biased = [path for path in (*linears, *head) if model.get_submodule(path).bias is not None]
        return cls(
            len(blocks),
            model.config.hidden_size,
            linears,
            injection.embedding_shape(model),
            head,
            biased,
        )


@dataclass(frozen=True)
class _Record:
    """A shape, and what it was computed from."""

    config: str
    transformers: str
    shape: ModelShape


_RECORD: TypeAdapter[_Record] = TypeAdapter(_Record)


def read_shape(base: BaseModel) -> ModelShape:
    """The shape of a pulled model; no weight is read.

    It comes from the record beside the model. If there is none that is valid, it is computed and
    recorded; a folder that cannot be written is left as it is.

    Raises:
        UnsupportedModel: transformers cannot build the model, or it is no plain decoder.
    """
    path = base.path / RECORD
    config = file_digest(base.path / "config.json")
    transformers = version("transformers")
    with suppress(OSError, ValidationError):
        found = _RECORD.validate_json(path.read_bytes())
        if found.config == config and found.transformers == transformers:
            return found.shape
    shape = _compute(base)
    with suppress(OSError):
        replace_record(path, _RECORD.dump_json(_Record(config, transformers, shape)))
    return shape


def _compute(base: BaseModel) -> ModelShape:
    """The shape of the model that the config describes, built without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base.path, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many kinds for a config that it cannot use
        message = f"transformers cannot build {base.name} from its config: {error}"
        raise UnsupportedModel(
            message, field="model", value=base.name, allowed="a causal language model"
        ) from error
    return ModelShape.of(model)
