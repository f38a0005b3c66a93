"""The base model that runs train adapters on, as it is loaded for training."""

from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from crma.method.injection import Injection
from crma.models.base_model import BaseModel
from crma.models.loading import load_model, load_tokenizer, resolve_device, training_dtype
from crma.training.ranks import ALONE, Ranks
from crma.training.shards import load_shards


class TrainingModel(NamedTuple):
    """A frozen base model to train on, one run or several at a time.

    Attributes:
        injection: the hooks on the model.
        tokenizer: the model's.
        serving_attention: the attention implementation that serves the model; training may use
            another one.
    """

    injection: Injection
    tokenizer: PreTrainedTokenizerBase
    serving_attention: str


def load_training_model(base: BaseModel, dtype: str, ranks: Ranks = ALONE) -> TrainingModel:
    """Load the base model, or this process's part of it.

    Args:
        base: a pulled base model.
        dtype: as in the configuration of a run.
        ranks: the processes that train together.
    """
    device = resolve_device("auto")
    resolved = training_dtype(dtype, device)
    if ranks.sharded:
        model = load_shards(base, device, resolved, ranks)
    else:
        model = load_model(base, device, resolved)
    serving_attention = model.config._attn_implementation
    if device.type == "cpu":
        # The backward pass of torch's fused attention takes a third of a step there.
        model.set_attn_implementation("eager")
    if device.type == "cuda":
        # Its backward pass gives NaN where rows are padded (cuDNN before 9.26; torch prefers it
        # from 2.11 on): https://github.com/pytorch/pytorch/issues/196678
        torch.backends.cuda.enable_cudnn_sdp(False)
    return TrainingModel(Injection(model), load_tokenizer(base), serving_attention)
