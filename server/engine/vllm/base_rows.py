"""vLLM's LoRA on CPUs, with rows of the base model left alone.

vLLM 0.32 gives a row without an adapter the index -1 and looks its weights up with it: it gets
those of the last slot. Once every slot has held an adapter, rows of the base model get another
request's. On GPUs its kernels skip such rows.

Imported in vLLM's processes only.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from vllm.lora.punica_wrapper import punica_cpu

# Shapes: n rows; x [n, in]; weights [slots, 1, out, in] or [slots, out, in]; y [n, at least out];
# slots [n] the slot of each row, -1 for none.


def guard_base_rows() -> None:
    """Replace the products of vLLM's LoRA on CPUs, in this process, by those of this module."""
    punica_cpu.bgmv_shrink = shrink
    punica_cpu.bgmv_expand = expand
    punica_cpu.bgmv_expand_slice = expand_slice
    punica_cpu.sgmv_shrink = _by_sequence(shrink)
    punica_cpu.sgmv_expand = _by_sequence(expand)
    punica_cpu.sgmv_expand_slice = _by_sequence(expand_slice)


def shrink(x: Tensor, weights: Tensor, y: Tensor, slots: Tensor, scaling: float = 1.0) -> None:
    """y = scaling · x Aᵀ of each row's slot. Rows without one keep y, which vLLM made of zeros."""
    for rows, weight in _groups(weights, slots):
        product = x[rows].to(y.dtype) @ weight.to(y.dtype).mT
        y[rows, : weight.shape[0]] = scaling * product


def expand(x: Tensor, weights: Tensor, y: Tensor, slots: Tensor, add_inputs: bool = True) -> None:
    """y += x Bᵀ of each row's slot; without `add_inputs`, y = x Bᵀ. Other rows stay."""
    # vLLM pads the outputs of a model and of its LoRAs differently.
    expand_slice(x, weights, y, slots, 0, min(weights.shape[-2], y.shape[1]), add_inputs)


def expand_slice(
    x: Tensor,
    weights: Tensor,
    y: Tensor,
    slots: Tensor,
    start: int,
    size: int,
    add_inputs: bool = True,
) -> None:
    """As `expand`, for the columns of y from `start`, as many as `size`."""
    columns = y[:, start : start + size]
    for rows, weight in _groups(weights, slots):
        product = x[rows].to(y.dtype) @ weight[:size].to(y.dtype).mT
        if add_inputs:
            columns.index_add_(0, rows, product)
        else:
            columns[rows] = product


def _groups(weights: Tensor, slots: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows [k], weight [out, in]) of each slot that rows have."""
    for slot in set(slots.tolist()):
        if slot >= 0:
            (rows,) = torch.where(slots == slot)
            yield rows, weights[slot].flatten(0, -2)


def _by_sequence(product: Callable[..., None]) -> Callable[..., None]:
    """A product whose slots are given for each sequence instead of each row."""

    def by_sequence(
        x: Tensor,
        weights: Tensor,
        y: Tensor,
        _starts: Tensor,
        lengths: Tensor,
        slots: Tensor,
        _num_sequences: int,
        _max_length: int,
        _num_tokens: int,
        *options: object,
    ) -> None:
        product(x, weights, y, torch.repeat_interleave(slots, lengths), *options)

    return by_sequence
