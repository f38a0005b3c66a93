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
from types import SimpleNamespace

import torch
from safetensors import safe_open
from torch import Tensor, nn

from crma.models.base_model import BaseModel
from crma.models.serving_record import STEADY_ROPES, Frequencies, read_served

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # the `model_type` of a config
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
    served = read_served(base)
    config = Config(**served.config)
    if not _is_known(config):
        return None
    model = BareModel(config, device, dtype, served.frequencies, served.end_ids)
    stored = _stored_tensors(base.path)
    expected = {name: tuple(each.shape) for name, each in model.named_parameters()}
    if {name: each.shape for name, each in stored.items()} != expected:
        return None
    if any(each.dtype not in DTYPES for each in stored.values()):
        return None
    model.load(stored, is_mapped=is_mapped)
    return model


class Config(SimpleNamespace):
    """The fields of a model's config, as transformers has them."""

    def get_text_config(self) -> Config:
        """Itself: it has no other parts."""
        return self


class BareModel(nn.Module):
    """Stands for transformers' model of the same config wherever nothing is computed with it.

    Args:
        config: of one of the FAMILIES.
        device: of the weights, once they are loaded.
        dtype: that the model computes in; a weight that is not copied from its file may have
            another.
        frequencies: of positions, if they are scaled.
        end_ids: the tokens that end an answer.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        frequencies: Frequencies | None,
        end_ids: int | Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.generation_config = SimpleNamespace(eos_token_id=end_ids)
        self.device = device
        self.dtype = dtype
        self.model = _Stack(config, device, frequencies)
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

    def __init__(
        self, config: Config, device: torch.device, frequencies: Frequencies | None
    ) -> None:
        super().__init__()
        size = config.hidden_size
        self.embed_tokens = _Embedding(config.vocab_size, size, device="meta")
        self.layers = nn.ModuleList(_Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = _Norm(size)
        self.rotary_emb = _Rotary(config, device, frequencies)


class _Block(nn.Module):
    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.self_attn = _Attention(config, index)
        self.mlp = _Mlp(config)
        self.input_layernorm = _Norm(config.hidden_size)
        self.post_attention_layernorm = _Norm(config.hidden_size)


class _Attention(nn.Module):
    def __init__(self, config: Config, index: int) -> None:
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
    def __init__(self, config: Config) -> None:
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

    def __init__(self, config: Config, device: torch.device, scaled: Frequencies | None) -> None:
        super().__init__()
        frequencies = _frequencies(config) if scaled is None else torch.tensor(scaled.values)
        self.frequencies = frequencies.to(device)
        self.scaling = 1.0 if scaled is None else scaled.factor

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


def _is_known(config: Config) -> bool:
    if config.model_type not in FAMILIES or config.hidden_act != "silu":
        return False
    if getattr(config, "quantization_config", None) is not None:
        return False
    return config.rope_parameters.get("rope_type", "default") in STEADY_ROPES


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


def _head_size(config: Config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _attention_biases(config: Config) -> tuple[bool, bool]:
    """Whether the linears before the attention have a bias, and the one after it."""
    if config.model_type == "qwen2":
        return True, False
    if config.model_type == "mistral":
        return False, False
    return config.attention_bias, config.attention_bias


def _frequencies(config: Config) -> Tensor:
    """Unscaled frequencies [head size / 2]."""
    size = _head_size(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float) / size
    return 1.0 / (config.rope_parameters["rope_theta"] ** exponents)
