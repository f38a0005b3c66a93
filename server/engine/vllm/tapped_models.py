"""vLLM's models with a tap after every block, under the names that `plugin.py` registers.

Imported in vLLM's processes only.
"""

from typing import Any

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
from server.engine.vllm.tap import add_taps

GUARD = "crma_guard"  # in vLLM's `additional_config`; False only to show the fault without it


class Tapped:
    """Adds the taps when a model is made. It comes before vLLM's class among the bases."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
        if current_platform.is_cpu() and vllm_config.additional_config.get(GUARD, True):
            guard_base_rows()
        config = vllm_config.model_config.hf_config
        add_taps(self, config.num_hidden_layers, config.hidden_size)


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
