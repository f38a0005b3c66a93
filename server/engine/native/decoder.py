"""A lean forward pass for Llama-like models, from a Hugging Face model's configuration and weights.

It saves three things against transformers' modules: linears that read the same input are one
product, weights are laid out as the processor reads them best, and a layer takes some twenty
operations. It computes what the modules compute, and they are its oracle. In bf16 it also rounds
where they round, except in the sum of a linear and its adapters.

Shapes: as in kv_cache.py; T tokens; d hidden size; f intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from crma.method.backbone import FoldedPair
from crma.method.frozen_linear import FrozenLinear
from crma.method.injection import (
    Plan,
    RowDeltas,
    decoder_blocks,
    embedding_shape,
    head_shape,
)
from crma.models.serving_record import STEADY_ROPES
from server.engine.native.bare_model import BareModel
from server.engine.native.huge_pages import HugePages
from server.engine.native.joined_linear import JoinedLinear, join, packs
from server.engine.native.kernel import Kernel
from server.engine.native.kv_cache import PagedKv, attend
from server.engine.native.lora_stack import Site
from server.engine.native.lora_table import backbone_uses
from server.engine.native.packed_blocks import PackedBlock, PackedBlocks
from server.engine.native.packed_weight import PackedWeight
from server.engine.native.rotary import Rotary, Rotation, Rotations
from server.engine.native.token_embedding import TokenEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AddDelta = Callable[[int], None]  # adds a backbone's delta of the layer with this index

COVERED = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}

# Linears of a block that read the same input, by their paths in it.
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_OUT = ("self_attn.o_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)


def covers(model: PreTrainedModel) -> bool:
    """Whether a `Decoder` can take the place of the model."""
    if isinstance(model, BareModel):
        return True
    return type(model).__name__ in COVERED and model.config.hidden_act == "silu"


@dataclass(frozen=True)
class _Projection:
    """The linears of one site as a single product, and the site's name to its adapters."""

    site: Site
    joined: JoinedLinear

    def __call__(self, x: Tensor, adapters: RowDeltas | None) -> Tensor:
        """The linear and the rows' adapters: [T, in] -> [T, out]."""
        y = self.joined.linear(x)
        if adapters is not None:
            adapters.add_(self.site, y, x)
        return y


@dataclass(frozen=True)
class _Layer:
    """The weights of one block.

    Attributes:
        attention_norm: [d], before the attention.
        mlp_norm: [d], before the MLP.
        head_norms: [H + h, e], of queries and keys (Qwen 3); None: they are not normed.
        window: how many positions a token sees, the last ones; None: all up to its own.
    """

    qkv: _Projection
    attention_out: _Projection
    gate_up: _Projection
    down: _Projection
    attention_norm: Tensor
    mlp_norm: Tensor
    head_norms: Tensor | None
    window: int | None

    @property
    def projections(self) -> tuple[_Projection, ...]:
        """In the order in which they are computed."""
        return self.qkv, self.attention_out, self.gate_up, self.down


class Decoder:
    """The forward pass of a model that it `covers`, over the paged KV cache.

    Args:
        model: gives configuration and weights, which both share.
        take_weights: empty the model, so that no weight is in memory twice; afterwards only the
            decoder can compute.
        kernel: None: torch computes everything.
        int8: round the linears' weights to 8 bits; needs the kernel.
        rotary: takes the place of the model's rotary embedding.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        *,
        take_weights: bool = False,
        kernel: Kernel | None = None,
        int8: bool = False,
        rotary: Rotary | None = None,
    ) -> None:
        config = model.config
        self.config = config
        self.kernel = kernel
        self.head_size: int = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        path, blocks = decoder_blocks(model)
        inner = model.get_submodule(path.rpartition(".")[0])
        tokens: nn.Embedding = model.get_input_embeddings()
        head: nn.Linear = model.get_output_embeddings()
        if take_weights:
            _own_unpacked_weights(model, tokens, is_shared=_is_shared(tokens, head, kernel, int8))
        self._int8 = int8
        self._memory = HugePages()
        self._frozen: dict[str, FrozenLinear] = {}
        is_steady = rotary is None and _is_steady(config)
        self._rotations = Rotations(rotary or inner.rotary_emb, is_steady=is_steady)
        self._norm = inner.norm.weight.data
        (self._embedding_path,) = embedding_shape(model)
        self._layers: list[_Layer] = []
        for i, block in enumerate(blocks):
            self._layers.append(self._layer(f"{path}.{i}", block))
            if take_weights:
                _empty(block)
        joined = self._join([head])
        self._head = self._projection(tuple(head_shape(model)), joined)
        self._embedding = _embedding(tokens, head, joined, model.dtype)
        if take_weights:
            _empty(model)
        self.packed_blocks = self._packed_blocks()

    @property
    def sites(self) -> list[Site]:
        """All sites, each a group of linears that are one product; the embedding is one too."""
        return list(self._sites())

    def frozen(self, path: str) -> FrozenLinear:
        """A linear of the model, or its embedding, by its path."""
        if path == self._embedding_path:
            return self._embedding.frozen()
        return self._frozen[path]

    def _sites(self) -> Iterator[Site]:
        yield (self._embedding_path,)
        yield self._head.site
        for layer in self._layers:
            for projection in layer.projections:
                yield projection.site

    def _projection(self, site: Site, joined: JoinedLinear) -> _Projection:
        self._frozen.update(zip(site, joined.parts, strict=True))
        return _Projection(site, joined)

    def _join(self, linears: list[nn.Linear]) -> JoinedLinear:
        return join(linears, self.kernel, int8=self._int8, memory=self._memory)

    def _layer(self, path: str, block: Any) -> _Layer:
        def projection(names: tuple[str, ...]) -> _Projection:
            site = tuple(f"{path}.{name}" for name in names)
            linears = [block.get_submodule(name) for name in names]
            return self._projection(site, self._join(linears))

        shared_window = getattr(self.config, "sliding_window", None)
        return _Layer(
            qkv=projection(QKV),
            attention_out=projection(ATTENTION_OUT),
            gate_up=projection(GATE_UP),
            down=projection(DOWN),
            attention_norm=block.input_layernorm.weight.data,
            mlp_norm=block.post_attention_layernorm.weight.data,
            head_norms=self._head_norms(block.self_attn),
            window=getattr(block.self_attn, "sliding_window", shared_window),
        )

    def _head_norms(self, attention: Any) -> Tensor | None:
        if not hasattr(attention, "q_norm"):
            return None
        of_queries = attention.q_norm.weight.data.expand(self.config.num_attention_heads, -1)
        of_keys = attention.k_norm.weight.data.expand(self.config.num_key_value_heads, -1)
        return torch.cat([of_queries, of_keys])

    def _packed_blocks(self) -> PackedBlocks | None:
        """The blocks as the kernel computes them at once; None: it has not packed all weights."""
        if self.kernel is None:
            return None
        blocks = []
        for layer in self._layers:
            linears = [projection.joined for projection in layer.projections]
            if any(joined.packed is None for joined in linears):
                return None
            norms = (layer.attention_norm, layer.mlp_norm, layer.head_norms)
            blocks.append(PackedBlock(linears, *norms, layer.window))
        first_site = self.sites.index(self._layers[0].qkv.site)
        config = self.config
        return PackedBlocks(
            blocks, config.num_attention_heads, config.rms_norm_eps, first_site, self.kernel
        )

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        num_positions: int,
        paged: PagedKv,
        plan: Plan,
    ) -> Tensor:
        """Run the model without gradients and store the tokens' keys and values in the cache.

        Args:
            input_ids: [T].
            positions: [T].
            num_positions: they lie below it.

        Returns:
            Logits [rows, vocab] of the plan's `head_rows`.
        """
        h = self._embedding(input_ids)
        if plan.stacked is not None:
            plan.stacked.add_((self._embedding_path,), h, input_ids)
        rotation = self._rotations.at(positions, num_positions, h)
        if self.packed_blocks is not None:
            self.packed_blocks.run(h, rotation, paged, plan)
        else:
            self._run_layers(h, rotation, paged, plan)
        if plan.head_rows is not None:
            h = h[plan.head_rows]
        return self._head(self._normed(h, self._norm), plan.stacked_head)

    def _run_layers(self, h: Tensor, rotation: Rotation, paged: PagedKv, plan: Plan) -> None:
        """Run all blocks, operation by operation, on the residual stream h [T, d], in place."""
        add_deltas = [self._backbone(h, rows, pairs) for rows, pairs in plan.backbones]
        for index, layer in enumerate(self._layers):
            self._attention(index, layer, h, rotation, paged, plan)
            self._mlp(layer, h, plan)
            for add_delta in add_deltas:
                add_delta(index)

    def _backbone(self, h: Tensor, rows: Tensor | None, pairs: Sequence[FoldedPair]) -> AddDelta:
        """Make the function that adds a backbone's delta to h in place, layer by layer.

        Args:
            h: [T, d], the residual stream.
            rows: of h; None: all.
            pairs: one a layer.
        """
        if self.kernel is not None:
            return _backbone_in_kernel(self.kernel, h, rows, pairs)
        unused = torch.full((len(h), 1), rows is not None, device=h.device)
        if rows is not None:
            unused.index_fill_(0, rows, False)

        def add_delta(layer: int) -> None:
            # Multiply all rows and blank the unused ones: cheaper than to gather and scatter.
            A, B = pairs[layer]
            h.add_(linear(linear(h, A).masked_fill_(unused, 0), B))

        return add_delta

    def _attention(
        self,
        index: int,
        layer: _Layer,
        h: Tensor,
        rotation: Rotation,
        paged: PagedKv,
        plan: Plan,
    ) -> None:
        """Add the block's attention to the residual stream h [T, d], in place."""
        num_tokens = len(h)
        qkv = layer.qkv(self._normed(h, layer.attention_norm), plan.stacked)
        heads = qkv.view(num_tokens, -1, self.head_size)  # [T, H + 2h, e]: queries, keys, values
        if self.kernel is not None:
            eps, cache = self.config.rms_norm_eps, paged.cache[index]
            self.kernel.rotate(heads, layer.head_norms, eps, rotation, cache, paged.slots)
        else:
            self._rotate_and_store(index, layer, heads, rotation, paged)
        query = heads[:, : self.config.num_attention_heads]
        attended = attend(paged, index, query, self.head_size**-0.5, layer.window)
        h.add_(layer.attention_out(attended.view(num_tokens, -1), plan.stacked))

    def _rotate_and_store(
        self, index: int, layer: _Layer, heads: Tensor, rotation: Rotation, paged: PagedKv
    ) -> None:
        """`Kernel.rotate` in torch: turn queries and keys in place, store keys and values."""
        num_queries = self.config.num_attention_heads
        num_turned = num_queries + self.config.num_key_value_heads
        turned = heads[:, :num_turned]  # queries and keys
        if layer.head_norms is not None:
            turned.copy_(self._normed(turned, layer.head_norms))
        cos, sin = rotation
        torch.add(turned * cos, turned.roll(self.head_size // 2, -1) * sin, out=turned)
        paged.store(index, heads[:, num_queries:])

    def _mlp(self, layer: _Layer, h: Tensor, plan: Plan) -> None:
        """Add the block's MLP to the residual stream h [T, d], in place."""
        gate_up = layer.gate_up(self._normed(h, layer.mlp_norm), plan.stacked)  # [T, 2f]
        if self.kernel is not None:
            gated = self.kernel.gate(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            gated = silu(gate).mul_(up)
        h.add_(layer.down(gated, plan.stacked))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        eps = self.config.rms_norm_eps
        if self.kernel is not None and x.dim() == 2:
            return self.kernel.norm(x, weight, eps)
        # Without its weight in the norm, the result is rounded twice, as in the modules.
        return rms_norm(x, x.shape[-1:], None, eps).mul_(weight)


def _is_steady(config: Any) -> bool:
    """Whether a position has the same frequencies in every sequence."""
    return config.rope_parameters.get("rope_type", "default") in STEADY_ROPES


def _backbone_in_kernel(
    kernel: Kernel, h: Tensor, rows: Tensor | None, pairs: Sequence[FoldedPair]
) -> AddDelta:
    uses, table = backbone_uses(rows, pairs, len(h))

    def add_delta(layer: int) -> None:
        assert len(table)  # which is where `uses` points to
        kernel.add_lora(h, h, uses, layer, 1)

    return add_delta


def _embedding(
    tokens: nn.Embedding, head: nn.Linear, joined: JoinedLinear, dtype: torch.dtype
) -> TokenEmbedding:
    """The model's embedding; if its weight is the head's, they share the packed one."""
    is_tied = head.weight is tokens.weight
    if is_tied and isinstance(joined.packed, PackedWeight):
        return TokenEmbedding(joined.packed, dtype)
    return TokenEmbedding(tokens.weight.data, dtype)


def _is_shared(tokens: nn.Embedding, head: nn.Linear, kernel: Kernel | None, int8: bool) -> bool:
    """Whether the embedding will be the packed weight of the head."""
    is_tied = head.weight is tokens.weight
    return is_tied and not int8 and kernel is not None and packs(kernel, [head])


def _own_unpacked_weights(model: PreTrainedModel, tokens: nn.Embedding, *, is_shared: bool) -> None:
    """Copy the weights that the decoder uses unpacked: norms, biases, and the embedding unless it
    is shared.

    They are views of the file that weights were read from, and would keep it in memory.
    """
    unpacked = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    if not is_shared:
        unpacked.append(tokens.weight)
    for parameter in unpacked:
        parameter.data = parameter.data.to(model.dtype, copy=True)


def _empty(module: nn.Module) -> None:
    """Let go of a module's weights."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
