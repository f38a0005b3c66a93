"""Loads a pulled base model: frozen, on a device, in a dtype that the hardware computes in."""

from __future__ import annotations

import platform
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from crma.core.errors import ConfigError
from crma.models.base_model import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FIRST_WITH_BFLOAT16 = (8, 0)  # Ampere; T4 is 7.5 and V100 7.0


def compute_alone() -> None:
    """Make torch compute on the calling thread only, for as long as this thread lives.

    Read the thread count before setting it: torch otherwise adopts, at this thread's first
    operation, the last value that any thread set.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)


def resolve_device(device: str) -> torch.device:
    """The device of a setting.

    Args:
        device: a torch device, or "auto": CUDA if there is one, otherwise the CPU.

    Raises:
        ConfigError: CUDA is asked for and not available.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        message = "device: torch finds no CUDA device"
        raise ConfigError(message, field="device", value=device, allowed="auto, cpu")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of a setting.

    Args:
        dtype: "bfloat16", "float16", "float32", or "auto": bfloat16 if the hardware computes in it,
            otherwise float16 on a GPU and float32 on a CPU.
        device: where the model will run.

    Raises:
        ConfigError: `dtype` is none of these.
    """
    if dtype == "auto":
        return _serving_dtype(device)
    if dtype not in DTYPES:
        message = f"dtype: {dtype!r} is not supported"
        raise ConfigError(message, field="dtype", value=dtype, allowed=["auto", *DTYPES])
    return DTYPES[dtype]


def training_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of a setting in which a model trains.

    "auto" is float32 where float16 would serve: small gradients are 0 in float16.

    Raises:
        ConfigError: as `resolve_dtype`.
    """
    resolved = resolve_dtype(dtype, device)
    return torch.float32 if (dtype, resolved) == ("auto", torch.float16) else resolved


def _serving_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return cuda_dtype(torch.cuda.get_device_capability(device))
    return torch.bfloat16 if computes_in_bfloat16(device) else torch.float32


def cuda_dtype(capability: tuple[int, int]) -> torch.dtype:
    """The dtype that serves on a GPU of this compute capability.

    GPUs before Ampere only emulate bfloat16, in float32; torch calls that supported.
    """
    return torch.bfloat16 if capability >= FIRST_WITH_BFLOAT16 else torch.float16


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself."""
    if device.type == "cuda":
        return cuda_dtype(torch.cuda.get_device_capability(device)) == torch.bfloat16
    if platform.machine() == "x86_64":
        # torch calls every AVX-512 supported; without the instructions it converts to float.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    has_mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # macOS's torch has not


def await_transformers() -> None:
    """Wait until transformers is imported, in whichever thread that began.

    `from transformers import …` fails while another thread imports it for the first time: it sees
    the module that transformers replaces at the end of its own import.
    """
    import_module("transformers")


def load_model(base: BaseModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load the base model, frozen and in evaluation mode. Nothing is fetched."""
    await_transformers()
    from transformers import AutoModelForCausalLM  # here, because it imports the code of models
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype, local_files_only=True)
    if getattr(model.config, "attn_logit_softcapping", None):
        # torch's fused attention silently ignores the soft cap.
        model.set_attn_implementation("eager")
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was pulled with the base model. Nothing is fetched.

    A server has one that needs less memory: `crma.models.serving_record.serving_tokenizer`.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.path, local_files_only=True)
