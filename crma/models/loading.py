"""Loads a pulled base model: frozen, on a device, in a dtype that the hardware has."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from crma.core.errors import ConfigError
from crma.models.base_model import BaseModel


def compute_alone() -> None:
    """This thread computes without others' help. To be called by it, whatever it does later.

    torch gives a thread its number of threads when it first asks, which may be long after one was set for it, and then
    it is the number that any thread has set last. So it has to ask first.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)


def resolve_device(device: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises ConfigError for a device that is not here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "no CUDA device is available to torch",
            field="device",
            value=device,
            allowed="auto, cpu",
        )
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware computes in it, else float32."""
    if dtype == "auto":
        fast = (
            torch.cuda.is_bf16_supported()
            if device.type == "cuda"
            else torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        return torch.bfloat16 if fast else torch.float32
    allowed = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in allowed:
        raise ConfigError("unknown dtype", field="dtype", value=dtype, allowed=["auto", *allowed])
    return allowed[dtype]


def load_model(base: BaseModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The frozen base in evaluation mode. Nothing is fetched."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype, local_files_only=True)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation(
            "eager"
        )  # torch's fused attention drops the soft cap without a word
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """The tokenizer that was pulled with the base."""
    return AutoTokenizer.from_pretrained(base.path, local_files_only=True)
