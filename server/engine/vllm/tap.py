"""The tap: where a CRMA backbone is added to the residual stream, as a LoRA that vLLM serves.

Imported in vLLM's processes only.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear
from vllm.model_executor.models.utils import PPMissingLayer

from server.engine.vllm.plugin import TAP


class Tap(ReplicatedLinear):
    """A linear [d, d] of zeros that has no weights: only the LoRA that a row has on it counts.

    Args:
        hidden_size: d.
        prefix: its path in the model.
    """

    def __init__(self, hidden_size: int, prefix: str) -> None:
        LinearBase.__init__(self, hidden_size, hidden_size, prefix=prefix, disable_tp=True)
        self.bias = None
        # vLLM reads the device and dtype of a LoRA from here. No parameter: no checkpoint has it.
        self.register_buffer("weight", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [.., d] -> zeros [.., d], and no bias."""
        return torch.zeros_like(x), None


def add_taps(model: nn.Module, num_layers: int, hidden_size: int) -> None:
    """Put a tap behind every block of a model of vLLM.

    Under pipeline parallelism a process has only some of the blocks.

    Args:
        model: the whole model, whose blocks are the one ModuleList of `num_layers`.

    Raises:
        ValueError: it has no such list, or several.
    """
    stacks = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if len(stacks) != 1:
        raise ValueError(f"{type(model).__name__} has {len(stacks)} stacks of {num_layers} blocks")
    ((path, blocks),) = stacks
    for index, block in enumerate(blocks):
        if not isinstance(block, PPMissingLayer):
            block.add_module(TAP, Tap(hidden_size, f"{path}.{index}.{TAP}"))
            block.register_forward_hook(_add_tap)


def _add_tap(block: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
    """Add the tap's output to that of its block.

    The tap is looked up here: vLLM puts a layer with LoRAs in its place after the model is made.
    """
    tap = block.get_submodule(TAP)
    if not isinstance(output, tuple):  # transformers' own blocks
        return output + tap(output)[0]
    hidden, residual = output  # vLLM's: the residual stream is their sum
    stream = hidden if residual is None else hidden + residual
    return hidden + tap(stream)[0], residual
