"""vLLM's models with a tap after every block, under the names that `plugin.py` registers.

Imported in vLLM's processes only.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.platforms import current_platform

from server.engine.vllm.base_rows import guard_base_rows
from server.engine.vllm.plugin import GUARD, NUM_TOKENS
from server.engine.vllm.tap import add_taps


class Tapped(nn.Module):
    """Adds the taps when a model is made, and never chooses a token that the tokenizer lacks.

    It comes before vLLM's class among the bases.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **layers: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **layers)  # vLLM's class
        options = vllm_config.additional_config
        self.num_tokens: int = options[NUM_TOKENS]
        if current_platform.is_cpu() and options[GUARD]:
            guard_base_rows()
        config = vllm_config.model_config.hf_config
        add_taps(self, config.num_hidden_layers, config.hidden_size)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[rows, d] -> [rows, vocabulary], -inf for rows of the head that are no tokens."""
        logits: Tensor | None = super().compute_logits(hidden_states)  # type: ignore[misc]
        if logits is not None:
            logits[:, self.num_tokens :] = -torch.inf
        return logits


class CrmaLlamaForCausalLM(Tapped, LlamaForCausalLM):
    """Llama."""


class CrmaMistralForCausalLM(Tapped, MistralForCausalLM):
    """Mistral."""


class CrmaQwen2ForCausalLM(Tapped, Qwen2ForCausalLM):
    """Qwen 2."""


class CrmaQwen3ForCausalLM(Tapped, Qwen3ForCausalLM):
    """Qwen 3."""


class CrmaGemma2ForCausalLM(Tapped, Gemma2ForCausalLM):
    """Gemma 2."""


class CrmaGemma3ForCausalLM(Tapped, Gemma3ForCausalLM):
    """Gemma 3."""


class CrmaPhi3ForCausalLM(Tapped, Phi3ForCausalLM):
    """Phi-3."""


class CrmaTransformersForCausalLM(Tapped, TransformersForCausalLM):
    """Families that vLLM serves with transformers' code: GPT-NeoX."""
