"""The modules of a model that the decoder covers, without transformers' code for it.

They have the names, shapes and weights of transformers' modules, and compute nothing: the decoder
does. To import that code takes longer than all else at the start, and more memory than the default
model's KV cache.

A weight may be a view of the model's file until the decoder has packed it. Each block has a mapping
of its own, which ends with its weights: the model is never in memory twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from crma.models.base_model import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # the `model_type` of a config
ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies no length changes
DTYPES = ("BF16", "F16", "F32")  # as safetensors names them


def bare_model(
    base: BaseModel, device: torch.device, dtype: torch.dtype, *, is_mapped: bool = False
) -> BareModel | None:
    """Load a base model without its code.

    Args:
        base: pulled.
        device: of the weights.
        dtype: that the model computes in.
        is_mapped: leave weights that the file has in bfloat16 there, as views, whatever `dtype`.
            Whoever uses them needs the CPU, and has to copy what should stay.

    Returns:
        None: the model is of another kind, or its files do not hold exactly the tensors of this
        one. transformers knows what to do then.
    """
    config = AutoConfig.from_pretrained(base.path, local_files_only=True)
    if not _is_known(config):
        return None
    model = BareModel(config, _generation_config(base, config), device, dtype)
    stored = _stored_tensors(base.path)
    expected = {name: tuple(each.shape) for name, each in model.named_parameters()}
    if {name: each.shape for name, each in stored.items()} != expected:
        return None
    if any(each.dtype not in DTYPES for each in stored.values()):
        return None
    model.load(stored, is_mapped=is_mapped)
    return model


class BareModel(nn.Module):
    """Stands for transformers' model of the same config wherever nothing is computed with it.

    Args:
        config: of one of the FAMILIES.
        generation_config: what stops an answer.
        device: of the weights, once they are loaded.
        dtype: that the model computes in; a weight that is not copied from its file may have
            another.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        generation_config: GenerationConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.generation_config = generation_config
        self.device = device
        self.dtype = dtype
        self.model = _Stack(config, device)
        self.lm_head = _linear(config.hidden_size, config.vocab_size)
        self._tie()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def load(self, stored: Mapping[str, StoredTensor], *, is_mapped: bool) -> None:
        """Take the weights from their files. `is_mapped` is that of `bare_model`."""
        blocks: dict[str, list[str]] = defaultdict(list)
        for name, _ in self.named_parameters():
            block = ".".join(name.split(".")[:3])  # model.layers.0; or a weight outside of them
            blocks[block].append(name)
        for names in blocks.values():
            for name, weight in _mapped(stored, names):
                stays = is_mapped and weight.dtype == torch.bfloat16
                own = weight if stays else weight.to(self.device, self.dtype, copy=True)
                path, _, attribute = name.rpartition(".")
                parameter = nn.Parameter(own, requires_grad=False)
                self.get_submodule(path).register_parameter(attribute, parameter)
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


class _Stack(nn.Module):
    """Everything but the head."""

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__()
        size = config.hidden_size
        self.embed_tokens = _Embedding(config.vocab_size, size, device="meta")
        self.layers = nn.ModuleList(_Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = _Norm(size)
        self.rotary_emb = _Rotary(config, device)


class _Block(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.self_attn = _Attention(config, index)
        self.mlp = _Mlp(config)
        self.input_layernorm = _Norm(config.hidden_size)
        self.post_attention_layernorm = _Norm(config.hidden_size)


class _Attention(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        of_head = _head_size(config)
        size, of_queries = config.hidden_size, config.num_attention_heads * of_head
        of_keys = config.num_key_value_heads * of_head
        before, after = _attention_biases(config)
        self.q_proj = _linear(size, of_queries, before)
        self.k_proj = _linear(size, of_keys, before)
        self.v_proj = _linear(size, of_keys, before)
        self.o_proj = _linear(of_queries, size, after)
        if config.model_type == "qwen3":
            self.q_norm = _Norm(of_head)
            self.k_norm = _Norm(of_head)
        if config.model_type.startswith("qwen"):  # others have one window for all layers
            slides = config.layer_types[index] == "sliding_attention"
            self.sliding_window = config.sliding_window if slides else None


class _Mlp(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        bias = config.model_type == "llama" and config.mlp_bias
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = _linear(size, inner, bias)
        self.up_proj = _linear(size, inner, bias)
        self.down_proj = _linear(inner, size, bias)


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Draw nothing: the weights come from files, and to draw imports torch's compiler."""


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """As `_Linear`."""


class _Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta"), requires_grad=False)


class _Rotary(nn.Module):
    """Cosines and sines of positions, as `LlamaRotaryEmbedding` has them."""

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__()
        frequencies, self.scaling = _frequencies(config)
        self.frequencies = frequencies.to(device)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x gives the dtype; position_ids [b, s] -> cosines, sines [b, s, head size]."""
        angles = position_ids[..., None].float() * self.frequencies
        both = torch.cat((angles, angles), dim=-1)
        return (both.cos() * self.scaling).to(x.dtype), (both.sin() * self.scaling).to(x.dtype)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a model is, and what.

    dtype: as safetensors names it.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]


def _is_known(config: Any) -> bool:
    if config.model_type not in FAMILIES or config.hidden_act != "silu":
        return False
    if getattr(config, "quantization_config", None) is not None:
        return False
    return config.rope_parameters.get("rope_type", "default") in ROPES


def _generation_config(base: BaseModel, config: PreTrainedConfig) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(base.path, local_files_only=True)
    except OSError:  # the model has none
        return GenerationConfig.from_model_config(config)


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in a model's files, by name; none if a name is there twice."""
    found: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                if name in found:
                    return {}
                tensor = tensors.get_slice(name)
                found[name] = StoredTensor(path, tensor.get_dtype(), tuple(tensor.get_shape()))
    return found


def _mapped(
    stored: Mapping[str, StoredTensor], names: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors as views of their files, each file in a mapping that ends with the last of them."""
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        by_file[stored[name].path].append(name)
    for path, some in by_file.items():
        with safe_open(path, framework="pt") as tensors:
            for name in some:
                yield name, tensors.get_tensor(name)


def _linear(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    return _Linear(in_features, out_features, bias, device="meta")


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _attention_biases(config: Any) -> tuple[bool, bool]:
    """Whether the linears before the attention have a bias, and the one after it."""
    if config.model_type == "qwen2":
        return True, False
    if config.model_type == "mistral":
        return False, False
    return config.attention_bias, config.attention_bias


def _frequencies(config: Any) -> tuple[Tensor, float]:
    """The frequencies [head size / 2], and a factor on cosines and sines."""
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config)
        return frequencies, factor
    size = _head_size(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float) / size
    return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0
