"""The configs of the tiny models: small sizes of every family that is served."""

from functools import partial

import transformers
from parallel import SHARED_HEADS
from transformers import PretrainedConfig

VOCAB = 300
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    # Wide: logits as far apart as a trained model's, so that rounding does not decide an argmax.
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GQA = {"num_key_value_heads": 2}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
SOFT_CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0}
FAMILIES: dict[str, partial[PretrainedConfig]] = {
    "llama": partial(transformers.LlamaConfig, **SIZES, **GQA),
    "mistral": partial(transformers.MistralConfig, **SIZES, **GQA, sliding_window=8),
    "qwen2": partial(transformers.Qwen2Config, **SIZES, **GQA),
    "qwen3": partial(transformers.Qwen3Config, **SIZES, **GQA, head_dim=8),
    "gemma2": partial(transformers.Gemma2Config, **SIZES, **GQA, **GEMMA, **SOFT_CAPS),
    "gemma3": partial(transformers.Gemma3TextConfig, **SIZES, **GQA, **GEMMA),
    "phi3": partial(transformers.Phi3Config, **SIZES, **GQA),
    "gpt_neox": partial(transformers.GPTNeoXConfig, **SIZES),
}
TIED = {"llama_tied": partial(transformers.LlamaConfig, **SIZES, **GQA, tie_word_embeddings=True)}
WIDE = {f"{name}_wide": partial(FAMILIES[name], head_dim=16) for name in ("llama", "gemma2")}
PARALLEL = {"llama_parallel": partial(transformers.LlamaConfig, **{**SIZES, **SHARED_HEADS})}
# Models whose rotary frequencies depend on the length of a sequence, from 13 tokens on.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 3.0, 6.0, 12.0],
    "original_max_position_embeddings": 12,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
LONG = {**SIZES, **GQA, "rope_parameters": LONGROPE}
SHORT = {**SIZES, **GQA, "rope_parameters": DYNAMIC, "max_position_embeddings": 12}
SCALED: dict[str, partial[PretrainedConfig]] = {
    "phi3_longrope": partial(transformers.Phi3Config, **LONG, original_max_position_embeddings=12),
    "llama_longrope": partial(transformers.LlamaConfig, **LONG),
    "llama_dynamic": partial(transformers.LlamaConfig, **SHORT),
    "gemma2_dynamic": partial(transformers.Gemma2Config, **SHORT, **GEMMA, **SOFT_CAPS),
}
CONFIGS = {**FAMILIES, **TIED, **WIDE, **PARALLEL, **SCALED}
