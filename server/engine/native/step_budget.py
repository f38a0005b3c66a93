"""How many tokens of prompts fit into a step, so that running streams go on in good time. No torch.

A step with decode alone takes some time; each token of a prompt adds to it. Both are measured, step
by step.
"""

from dataclasses import dataclass, field

FEWEST_TOKENS = 128  # with fewer, a token of a prompt takes two to three times as long
MEMORY = 0.7  # how much of what was measured counts on after one more step


@dataclass(eq=False)
class StepBudget:
    """The tokens of prompts that a step may compute.

    Args:
        target_s: how long a step may take, in seconds. A step in which prompts take no longer than
            decode may take longer: else prompts would starve where decode is slow.
    """

    target_s: float
    _decode_s: float = field(default=0.0, init=False)  # of a step without prompts
    _prompt_s: float = field(default=0.0, init=False)  # of prompts, in recent steps
    _prompt_tokens: float = field(default=0.0, init=False)  # likewise

    def max_prompt_tokens(self) -> int:
        """Return the number for the next step."""
        if not self._prompt_tokens:
            return FEWEST_TOKENS  # nothing is measured yet
        seconds = max(self.target_s - self._decode_s, self._decode_s)
        seconds_a_token = max(self._prompt_s / self._prompt_tokens, 1e-9)
        return max(FEWEST_TOKENS, int(seconds / seconds_a_token))

    def measure(self, seconds: float, num_prompt_tokens: int, num_decodes: int) -> None:
        """Record a step.

        Args:
            seconds: what it took.
            num_prompt_tokens: of all prompts.
            num_decodes: the sequences in decode beside them.
        """
        if not num_prompt_tokens:
            self._decode_s = MEMORY * self._decode_s + (1 - MEMORY) * seconds
            return
        decode_s = self._decode_s if num_decodes else 0.0
        self._prompt_s = MEMORY * self._prompt_s + max(0.0, seconds - decode_s)
        self._prompt_tokens = MEMORY * self._prompt_tokens + num_prompt_tokens
