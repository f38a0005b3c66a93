"""Rotary frequencies that depend on the length of a sequence. No torch.

Most models turn a position by the same frequencies in every sequence. Two kinds of scaling do not
(`modeling_rope_utils.py` of transformers; decision 43 has the reasons for what follows):

- longrope (Phi-3): short factors up to the original length, long ones for every token of a longer
  sequence. One that grows past it is computed anew, as `Phi3ForCausalLM.generate` does.
- dynamic (NTK): beyond the original length the frequencies follow the length. The tokens of a
  prompt have those of its length; each later token has those of the length up to itself, and what
  was computed before stays, as in every `generate` of transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class RopeScaling:
    """Says which length's frequencies turn a token. Up to the original length all are the same.

    Args:
        kind: "mixed": the layers' kinds differ, which nothing here can follow.
        original: the longest sequence, in tokens, that is not scaled.
    """

    kind: Literal["longrope", "dynamic", "mixed"]
    original: int

    def length_at(self, position: int, num_prompt_tokens: int, num_tokens: int) -> int:
        """Return the length whose frequencies turn the token at a position.

        Args:
            num_tokens: the sequence's length: the prompt, and the answer so far.

        Returns:
            `original` for unscaled frequencies. Equal lengths have equal frequencies.
        """
        if self.kind == "longrope":
            return min(max(num_tokens, self.original), self.original + 1)
        return max(self.original, num_prompt_tokens, position + 1)

    def is_outgrown(self, num_tokens: int) -> bool:
        """Whether a sequence that has just grown to a length has to be computed anew."""
        return self.kind == "longrope" and num_tokens == self.original + 1


def rope_scaling(config: "PretrainedConfig") -> RopeScaling | None:
    """Return how a model's frequencies depend on the length; None: they do not."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_layer = [value for value in parameters.values() if isinstance(value, Mapping)]
    found = [_of_layers(config, one) for one in by_layer or [parameters]]
    scalings = [scaling for scaling in found if scaling is not None]
    if not scalings:
        return None
    if not by_layer:
        return scalings[0]
    return RopeScaling("mixed", min(scaling.original for scaling in scalings))


def context_length(config: "PretrainedConfig") -> int:
    """Return the longest sequence that a model can compute, in tokens.

    Of a dynamic model it is the original length times the factor, as vLLM has it.
    """
    length: int = config.max_position_embeddings
    scaling = rope_scaling(config)
    if scaling is None or scaling.kind != "dynamic":
        return length
    return int(length * config.rope_parameters["factor"])


def _of_layers(config: "PretrainedConfig", parameters: Mapping[str, Any]) -> RopeScaling | None:
    """The scaling of the layers that share these parameters."""
    kind = str(parameters.get("rope_type", "default"))
    if kind == "longrope":
        return RopeScaling("longrope", parameters["original_max_position_embeddings"])
    if "dynamic" in kind:
        return RopeScaling("dynamic", config.max_position_embeddings)
    return None
