"""A base model that is divided among the processes that train with it, for one that fits no device.

torch's FSDP2: each process keeps a part of every frozen weight, and a block has its whole weights
only while it computes. Adapters are whole in every process. So all processes have to take part in
every forward pass, also in one that only measures.
"""

from typing import TYPE_CHECKING

import torch
from torch.distributed import device_mesh, fsdp

from crma.core.errors import ConfigError
from crma.method.injection import decoder_blocks
from crma.models.base_model import BaseModel
from crma.models.loading import load_model
from crma.training.ranks import Ranks

if TYPE_CHECKING:
    from accelerate import FullyShardedDataParallelPlugin
    from transformers import PreTrainedModel

VERSION = "2"  # of FSDP


def load_shards(
    base: BaseModel, device: torch.device, dtype: torch.dtype, ranks: Ranks
) -> "PreTrainedModel":
    """Load this process's part of a base model, as `accelerate launch --use_fsdp` asks.

    The processes load one after the other, so a machine's memory holds one whole copy at a time. No
    device ever holds more than its part and one whole block.

    Args:
        base: the base model.
        device: of this process.
        dtype: of the weights.
        ranks: all processes.

    Returns:
        The model, frozen; its forward passes are those of the whole one.

    Raises:
        ConfigError: another version of FSDP was asked for, or that parts stay in main memory.
    """
    plugin = _plugin()
    mesh = device_mesh.init_device_mesh(device.type, (ranks.size,))
    for _ in range(ranks.rank):
        ranks.wait()
    reshard = bool(plugin.reshard_after_forward)
    model = _divided(load_model(base, torch.device("cpu"), dtype), mesh, reshard=reshard)
    for _ in range(ranks.rank, ranks.size):
        ranks.wait()
    return model


def _divided(
    model: "PreTrainedModel", mesh: device_mesh.DeviceMesh, *, reshard: bool
) -> "PreTrainedModel":
    """Keep only this process's part of a model's weights, on its device."""
    _, blocks = decoder_blocks(model)
    for module in (*blocks, model):
        fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    return model


def _plugin() -> "FullyShardedDataParallelPlugin":
    """What `accelerate launch` was told about FSDP."""
    from accelerate import FullyShardedDataParallelPlugin  # here: an extra that few need
    from accelerate.utils import parse_choice_from_env

    found = parse_choice_from_env("FSDP_VERSION", "1")
    if found != VERSION:
        message = "the base model is divided by FSDP2: give --fsdp_version 2 to accelerate launch"
        raise ConfigError(message, field="fsdp_version", value=found, allowed=VERSION)
    plugin = FullyShardedDataParallelPlugin()
    if isinstance(plugin.cpu_offload, fsdp.CPUOffloadPolicy):
        message = "parts of the base model stay on the devices: leave --fsdp_offload_params out"
        raise ConfigError(message, field="fsdp_offload_params", value=True, allowed=False)
    return plugin
