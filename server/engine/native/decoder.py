"""A lean forward pass of Llama-like models, from the configuration and weights of the Hugging Face model.

What it saves against transformers' modules: linears that read the same input are one product, weights lie as the CPU's
matrix unit reads them, and a layer is some twenty operations. The arithmetic is the modules' own, which are its oracle;
roundings of bf16 are theirs too, but for the sum of a linear and its adapters.

Shapes as in kv_cache.py; T tokens, d the hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm, silu
from transformers import PreTrainedModel

from crma.method.backbone import FoldedPair
from crma.method.injection import Plan, decoder_blocks
from server.engine.native.kernel import Int8Weight, Kernel
from server.engine.native.kv_cache import PagedKv, attend
from server.engine.native.lora_stack import Site

Linear = Callable[[Tensor], Tensor]  # [T, in] -> [T, out]

FEW_ROWS = (
    64  # up to so many the kernel adds a backbone's deltas, row by row; beyond, two products do
)
COVERED = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
SITES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def covers(model: PreTrainedModel) -> bool:
    """Whether a `Decoder` computes what the model does."""
    return type(model).__name__ in COVERED and model.config.hidden_act == "silu"


@dataclass(frozen=True)
class _Layer:
    """One linear a site; norms [d]; head_norms [H + h, e] of queries and keys (Qwen 3); window: positions it sees."""

    sites: tuple[Site, ...]
    linears: tuple[Linear, ...]
    attention_norm: Tensor
    mlp_norm: Tensor
    head_norms: Tensor | None
    window: int | None


class Decoder:
    """The forward pass of a model that it `covers`, over the paged KV cache.

    Args:
        take_weights: leave the model none, so that nothing is in memory twice: only the decoder can run it then. Else
            both compute with the same weights.
        kernel: computes what is not a product, if there is one.
        int8: it computes the products too, of weights in 8 bits.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        *,
        take_weights: bool = False,
        kernel: Kernel | None = None,
        int8: bool = False,
    ) -> None:
        self.config = model.config
        self.kernel = kernel
        joined = partial(_in_int8, kernel) if int8 and kernel is not None else _joined
        self.head_size: int = getattr(model.config, "head_dim", None) or (
            model.config.hidden_size // model.config.num_attention_heads
        )
        path, blocks = decoder_blocks(model)
        inner = model.get_submodule(path.rpartition(".")[0])
        words: nn.Embedding = model.get_input_embeddings()
        if (
            take_weights
        ):  # what is used as it lies must not hold the file in memory that all of it was read from
            for parameter in (words.weight, *(p for p in model.parameters() if p.dim() == 1)):
                parameter.data = parameter.data.clone()
        self._rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = inner.rotary_emb
        self._embedding, self._norm = words.weight.data, inner.norm.weight.data
        self._layers = [self._layer(f"{path}.{i}", block, joined) for i, block in enumerate(blocks)]
        self._head = joined([model.get_output_embeddings()])
        if take_weights:
            for parameter in model.parameters():
                parameter.data = parameter.data.new_empty(0)

    @property
    def sites(self) -> list[Site]:
        """Of all layers: the linears whose outputs are one product."""
        return [site for layer in self._layers for site in layer.sites]

    def _layer(self, path: str, block: Any, joined: Callable[[list[nn.Linear]], Linear]) -> _Layer:
        config, attention = self.config, block.self_attn
        norms = None
        if hasattr(attention, "q_norm"):
            pairs = (
                (attention.q_norm, config.num_attention_heads),
                (attention.k_norm, config.num_key_value_heads),
            )
            norms = torch.cat([norm.weight.data.expand(count, -1) for norm, count in pairs])
        return _Layer(
            sites=tuple(tuple(f"{path}.{name}" for name in site) for site in SITES),
            linears=tuple(joined([block.get_submodule(name) for name in site]) for site in SITES),
            attention_norm=block.input_layernorm.weight.data,
            mlp_norm=block.post_attention_layernorm.weight.data,
            head_norms=norms,
            window=getattr(attention, "sliding_window", getattr(config, "sliding_window", None)),
        )

    def forward(self, input_ids: Tensor, positions: Tensor, paged: PagedKv, plan: Plan) -> Tensor:
        """Logits [rows, vocab] of the plan's head rows; input_ids, positions [T]. No gradients."""
        h = embedding(input_ids, self._embedding)
        cos, sin = (table[0, :, None] for table in self._rotary(h, positions[None]))
        half = self.head_size // 2
        rotation = cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        inject = [self._injected(h, rows, pairs) for rows, pairs in plan.backbones]
        for index, layer in enumerate(self._layers):
            self._run(index, layer, h, rotation, paged, plan)
            for add in inject:
                add(index)
        h = h if plan.head_rows is None else h[plan.head_rows]
        return self._head(self._normed(h, self._norm))

    def _injected(
        self, h: Tensor, rows: Tensor | None, pairs: Sequence[FoldedPair]
    ) -> Callable[[int], None]:
        """What adds a backbone's delta of a layer to its rows (None: all) of h [T, d], in place."""
        on = torch.full((len(h),), 0 if rows is None else -1, device=h.device)
        on = on if rows is None else on.index_fill_(0, rows, 0)
        if (kernel := self.kernel) is not None and len(h) <= FEW_ROWS:
            rank, d = pairs[0].A.shape
            first, spans = torch.tensor([0, rank]), torch.tensor([[0, d]] * rank)
            assert pairs[0].B.mT.is_contiguous()
            return lambda index: kernel.add_lora(
                h, h, pairs[index].A, pairs[index].B.mT, first, spans, on
            )
        off = on[:, None] < 0

        def add(index: int) -> None:
            # All rows are read and some add nothing: cheaper than to take the others out and put them back.
            A, B = pairs[index]
            h.add_(linear(linear(h, A).masked_fill_(off, 0), B))

        return add

    def _run(
        self,
        index: int,
        layer: _Layer,
        h: Tensor,
        rotation: tuple[Tensor, Tensor],
        paged: PagedKv,
        plan: Plan,
    ) -> None:
        """One block on the residual stream h [T, d], in place."""

        def product(site: int, x: Tensor, y: Tensor | None = None) -> Tensor:
            """The linear and adapters of a site; added to y, if there is one."""
            z = layer.linears[site](x)
            if plan.stacked is not None:
                plan.stacked.add_(layer.sites[site], z, x)
            return z if y is None else y.add_(z)

        T, queries, e = len(h), self.config.num_attention_heads, self.head_size
        heads = product(0, self._normed(h, layer.attention_norm)).view(
            T, -1, e
        )  # queries, keys, values
        if self.kernel is not None:
            eps = self.config.rms_norm_eps
            self.kernel.rotate(
                heads, layer.head_norms, eps, rotation, paged.cache[index], paged.slots
            )
        else:
            turned = heads[:, : queries + self.config.num_key_value_heads]
            if layer.head_norms is not None:
                turned.copy_(self._normed(turned, layer.head_norms))
            cos, sin = rotation
            torch.add(turned * cos, turned.roll(e // 2, -1) * sin, out=turned)
            paged.store(index, heads[:, queries:])
        mixed = attend(paged, index, heads[:, :queries], e**-0.5, layer.window)
        product(1, mixed.view(T, -1), h)
        gate_up = product(2, self._normed(h, layer.mlp_norm))
        if self.kernel is not None:
            y = self.kernel.gate(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            y = silu(gate).mul_(up)
        product(3, y, h)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.kernel is not None and x.dim() == 2:
            return self.kernel.norm(x, weight, self.config.rms_norm_eps)
        return rms_norm(x, x.shape[-1:], None, self.config.rms_norm_eps).mul_(
            weight
        )  # rounded twice, as the modules do


def _in_int8(kernel: Kernel, linears: list[nn.Linear]) -> Linear:
    """`_joined` in 8 bits."""
    weight = Int8Weight.of(torch.cat([one.weight for one in linears]))
    bias = torch.cat([one.bias for one in linears]) if linears[0].bias is not None else None
    return lambda x: (
        kernel.product(x, weight) if bias is None else kernel.product(x, weight).add_(bias)
    )


def _joined(linears: list[nn.Linear]) -> Linear:
    """Linears on the same input as one, outputs side by side.

    In bf16 on a CPU the weights are packed once instead of in each product; else the linears' weights become views.
    """
    weight = (
        linears[0].weight.data if len(linears) == 1 else torch.cat([one.weight for one in linears])
    )
    bias = torch.cat([one.bias for one in linears]) if linears[0].bias is not None else None
    if (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    for one, rows in zip(
        linears, torch.split(weight, [one.out_features for one in linears]), strict=True
    ):
        one.weight.data = rows
    return partial(linear, weight=weight, bias=bias)
