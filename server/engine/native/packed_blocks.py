"""The blocks of a decoder whose weights the kernel has packed: one call computes all of them.

With few rows, what happens in Python between the operations of a block takes longer than most of
the operations. The results have the same bits as when the decoder calls them one by one.

The layouts of the numbers for the kernel, all of 64 bits, are those of cpp/blocks.h.

Shapes: as in kv_cache.py; T rows; d hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crma.method.injection import Plan
from server.engine.native.joined_linear import JoinedLinear
from server.engine.native.kernel import Kernel
from server.engine.native.kv_cache import PagedKv
from server.engine.native.lora_table import LoraRows, backbone_uses
from server.engine.native.packed_weight import Int8Weight

PARTS = ("linears", "attention", "adapters")
"""The parts of a pass whose times the kernel can tell. The rest is norms, rotations, gates."""

NO_ADAPTERS = (0, 0, 0)


@dataclass(frozen=True)
class PackedBlock:
    """One block.

    Attributes:
        linears: QKV, of the attention's output, gate and up, and down; all are packed.
        attention_norm: [d].
        mlp_norm: [d].
        head_norms: [H + h, e]; None: queries and keys are not normed.
        window: how many positions a token sees; None: all up to its own.
    """

    linears: Sequence[JoinedLinear]
    attention_norm: Tensor
    mlp_norm: Tensor
    head_norms: Tensor | None
    window: int | None

    def layout(self) -> list[int]:
        """Its numbers for the kernel."""
        numbers = [number for linear in self.linears for number in _layout(linear)]
        norms = (self.attention_norm, self.mlp_norm, self.head_norms)
        return [*numbers, *map(_address, norms), self.window or 0]


def _layout(joined: JoinedLinear) -> list[int]:
    weight = joined.packed
    assert weight is not None
    scales, sums = None, None
    if isinstance(weight, Int8Weight):
        scales, sums = weight.scales, weight.sums
    sizes = [weight.num_words, weight.in_features, weight.out_features]
    return [_address(weight.panels), *sizes, *map(_address, (joined.bias, scales, sums))]


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()


class PackedBlocks:
    """The blocks of a model.

    Args:
        blocks: in their order.
        num_heads: H.
        eps: of the norms.
        first_site: index of the first block's first site in the tables of adapters; those of all
            blocks follow each other.
        kernel: computes them.

    Attributes:
        taken: int64 [PARTS], to which each run adds nanoseconds; None: times are not taken.
    """

    def __init__(
        self,
        blocks: Sequence[PackedBlock],
        num_heads: int,
        eps: float,
        first_site: int,
        kernel: Kernel,
    ) -> None:
        self._blocks = blocks  # keeps what the layout points to
        self._layout = torch.tensor([block.layout() for block in blocks])
        self._num_heads = num_heads
        self._eps = eps
        self._first_site = first_site
        self._kernel = kernel
        self.taken: Tensor | None = None

    def run(self, h: Tensor, rotation: tuple[Tensor, Tensor], paged: PagedKv, plan: Plan) -> None:
        """Run all blocks on the residual stream, and store keys and values in the cache.

        Args:
            h: [T, d], changes in place.
            rotation: cosines and sines [T, 1, e], the first half of the sines negated.
        """
        num_kv, e = paged.cache.shape[3] // 2, paged.cache.shape[4]
        groups = _group_layout(paged)
        uses = [backbone_uses(rows, pairs, len(h)) for rows, pairs in plan.backbones]
        backbones = torch.tensor([(of_rows.data_ptr(), 1, 0) for of_rows, _ in uses])
        adapters = plan.stacked
        own = NO_ADAPTERS
        if adapters is not None:
            assert isinstance(adapters, LoraRows)
            own = (adapters.addresses.data_ptr(), adapters.pairs_of_site, self._first_site)
        cos, sin = (each.contiguous() for each in rotation)
        # fmt: off
        layout = torch.tensor([
            self._layout.data_ptr(), len(self._blocks), self._num_heads, num_kv, e,
            paged.cache.data_ptr(), paged.cache.shape[1], paged.cache.shape[2],
            len(h), cos.data_ptr(), sin.data_ptr(), paged.slots.data_ptr(),
            groups.data_ptr(), len(groups), *own, backbones.data_ptr(), len(backbones),
            _address(self.taken),
        ])
        # fmt: on
        self._kernel.run_blocks(h, layout, self._eps, e**-0.5)


def _group_layout(paged: PagedKv) -> Tensor:
    rows = []
    for group in paged.groups:
        num_sequences, num_rows = group.positions.shape
        of_sequence = group.blocks.numel() // num_sequences
        addresses = (group.blocks.data_ptr(), of_sequence, group.positions.data_ptr())
        rows.append((*addresses, num_sequences, num_rows))
    return torch.tensor(rows)
