"""vLLM's plugin `crma`: it makes known the models with a tap after every block.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`.
"""

TAPPED = {
    "LlamaForCausalLM": "CrmaLlamaForCausalLM",
    "MistralForCausalLM": "CrmaMistralForCausalLM",
    "Qwen2ForCausalLM": "CrmaQwen2ForCausalLM",
    "Qwen3ForCausalLM": "CrmaQwen3ForCausalLM",
    "Gemma2ForCausalLM": "CrmaGemma2ForCausalLM",
    "Gemma3ForCausalLM": "CrmaGemma3ForCausalLM",
    "Phi3ForCausalLM": "CrmaPhi3ForCausalLM",
    "GPTNeoXForCausalLM": "CrmaTransformersForCausalLM",
}
"""The architecture in a model's config -> that of vLLM's model with taps."""

TAP = "crma_tap"  # the last name of a tap's path
GUARD = "crma_guard"  # in vLLM's `additional_config`; False only to show the fault without it
NUM_TOKENS = "crma_num_tokens"  # likewise: token ids lie below it, in prompts and answers

MODULE = "server.engine.vllm.tapped_models"


def register() -> None:
    """Make the models known to vLLM; they are imported where one is loaded."""
    from vllm import ModelRegistry

    for name in TAPPED.values():
        ModelRegistry.register_model(name, f"{MODULE}:{name}")
