"""The benchmark's rows: the load of each, and how fast the machine could serve it at most."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class Workload:
    """Requests that name the models in turn.

    Args:
        measure: the figure that the row is about.
        models: model names; request i asks for `models[i % len(models)]`.
        num_requests: number of requests.
        concurrency: number of requests in flight.
        prompt_tokens: length of each prompt.
        new_tokens: length of each answer.
    """

    measure: str = "output_tok_s"
    models: tuple[str, ...] = ("base",)
    num_requests: int = 32
    concurrency: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 128

    def requests(self, seed: str) -> list[tuple[str, list[int]]]:
        """Draw the model and the prompt's token ids of each request.

        The prompts share no beginning, so a prefix cache cannot help.
        """
        rng = random.Random(seed)
        requests = []
        for i in range(self.num_requests):
            prompt = [rng.randrange(300, 40000) for _ in range(self.prompt_tokens)]
            requests.append((self.models[i % len(self.models)], prompt))
        return requests

    def short(self) -> Self:
        """A small version: to warm up, or to check that a benchmark works."""
        num_requests = min(self.num_requests, self.concurrency)
        new_tokens = min(self.new_tokens, 8)
        return replace(self, num_requests=num_requests, new_tokens=new_tokens)

    def base_models(self) -> set[str]:
        """The names an engine must list to serve this workload, without their CRMA suffix."""
        return {model.partition(":")[0] for model in self.models}


LORAS = tuple(f"lora-{i}" for i in range(8))  # random adapters, which `peers.py` writes
TASKS = ("code", "finance", "legal", "medical", "science")  # of the shipped store
CRMA_OFF = tuple(f"{task}:crma-off" for task in TASKS)
CRMA_ON = tuple(f"{task}:crma-on" for task in TASKS)
# The number of tasks is odd, so over ten requests each task has CRMA once off and once on.
CRMA_ALTERNATING = tuple((CRMA_ON if i % 2 else CRMA_OFF)[i % len(TASKS)] for i in range(10))

PREFILL = Workload("prefill_tok_s", num_requests=4, concurrency=1, prompt_tokens=512, new_tokens=1)
ROWS = {
    "mixed": Workload(models=LORAS),
    "base": Workload(),
    "single": Workload("decode_tok_s", num_requests=1, concurrency=1),
    "prefill": PREFILL,
    "prefill-lora": replace(PREFILL, models=LORAS[3:4]),
}
CRMA_ROWS = {
    "crma-off": Workload(models=CRMA_OFF),
    "crma-half": Workload(models=CRMA_ALTERNATING),
    "crma-on": Workload(models=CRMA_ON),
}
RATIOS = (
    ("mixed", "base"),
    ("prefill-lora", "prefill"),
    ("crma-half", "crma-off"),
    ("crma-on", "crma-off"),
)


def speed_limit(workload: Workload, limits: Mapping[str, float]) -> float:
    """Tokens/s of a machine that only reads and multiplies the base model's weights.

    Attention, LoRA and, in a decoding row, the prompts are not part of it.

    Args:
        workload: the row.
        limits: what the machine can do, as `peers.measure_limits` returns it.
    """
    if workload.measure == "prefill_tok_s":
        return limits["prefill_tok_s"]
    return min(workload.concurrency * limits["read_tok_s"], limits["gemm_tok_s"])
