"""The base model without its weights: what adapters have to fit, and what ends an answer."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from crma.core.errors import UnsupportedModel
from crma.models.base_model import BaseModel
from server.engine.vllm.plugin import TAPPED

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_skeleton(base: BaseModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model's modules, with weights on the device `meta`, which has no memory.

    Raises:
        UnsupportedModel: this engine has no taps for its architecture.
    """
    config = AutoConfig.from_pretrained(base.path, local_files_only=True)
    architectures = list(config.architectures or ())
    if not architectures or architectures[0] not in TAPPED:
        message = f"the engine vllm does not serve the architecture {architectures}"
        raise UnsupportedModel(message, field="model", value=architectures, allowed=sorted(TAPPED))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with suppress(OSError):  # without that file, its config says what ends an answer
        model.generation_config = GenerationConfig.from_pretrained(base.path, local_files_only=True)
    return model
