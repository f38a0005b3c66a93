"""The benchmark's rows: the load of each, and how fast the machine could serve it at most."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Self


class Request(NamedTuple):
    """One completion to ask for."""

    model: str
    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests that name the models in turn.

    Args:
        measure: the figure that the row is about.
        models: model names; request i asks for `models[i % len(models)]`.
        num_requests: number of requests.
        concurrency: number of requests in flight, unless they arrive at random.
        prompt_tokens: length of each prompt.
        new_tokens: length of each answer.
        in_random_order: each turn names the models in another order, drawn from the seed.
        spread: lengths are drawn between a `spread`-th of the above and `spread` times it, their
            logarithms uniform; 1: all have the above.
        arrival_share: requests arrive at random (Poisson), as many a second as this share of what
            the row `ARRIVALS_OF` reached on the same engine; None: the next one is sent when one
            has ended.
        arrivals_per_s: what that is; set when it is known.
    """

    measure: str = "output_tok_s"
    models: tuple[str, ...] = ("base",)
    num_requests: int = 32
    concurrency: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 64
    in_random_order: bool = False
    spread: int = 1
    arrival_share: float | None = None
    arrivals_per_s: float | None = None

    @property
    def is_static(self) -> bool:
        """Whether batches of one size and length can answer it."""
        return self.spread == 1 and self.arrival_share is None

    def requests(self, seed: str) -> list[Request]:
        """Draw model, prompt and length of each request.

        The prompts share no beginning, so a prefix cache cannot help.
        """
        rng = random.Random(seed)
        requests: list[Request] = []
        while len(requests) < self.num_requests:
            turn = list(self.models)
            if self.in_random_order:
                rng.shuffle(turn)
            requests += [self._request(model, rng) for model in turn]
        return requests[: self.num_requests]

    def _request(self, model: str, rng: random.Random) -> Request:
        prompt_tokens = self._length(self.prompt_tokens, rng)
        new_tokens = self._length(self.new_tokens, rng)
        return Request(model, [rng.randrange(300, 40000) for _ in range(prompt_tokens)], new_tokens)

    def _length(self, typical: int, rng: random.Random) -> int:
        if self.spread == 1:
            return typical
        factor: float = self.spread ** rng.uniform(-1, 1)
        return max(1, round(typical * factor))

    def arrival_times(self, seed: str) -> list[float]:
        """Seconds from the start at which each request arrives; needs `arrivals_per_s`."""
        assert self.arrivals_per_s is not None
        rng = random.Random(f"arrivals {seed}")
        times = []
        now = 0.0
        for _ in range(self.num_requests):
            times.append(now)
            now += rng.expovariate(self.arrivals_per_s)
        return times

    def short(self) -> Self:
        """A small version, which names every model: to warm up, or to check that all works."""
        num_requests = min(self.num_requests, max(self.concurrency, len(self.models)))
        new_tokens = min(self.new_tokens, 8)
        return replace(self, num_requests=num_requests, new_tokens=new_tokens)

    def base_models(self) -> set[str]:
        """The names an engine must list to serve this workload, without their CRMA suffix."""
        return {model.partition(":")[0] for model in self.models}


MANY_LORAS = tuple(f"lora-{i}" for i in range(64))  # random adapters, which `peers.py` writes
LORAS = MANY_LORAS[:8]
TASKS = ("code", "finance", "legal", "medical", "science")  # of the shipped store
CRMA_OFF = tuple(f"{task}:crma-off" for task in TASKS)
CRMA_ON = tuple(f"{task}:crma-on" for task in TASKS)
# The number of tasks is odd, so over ten requests each task has CRMA once off and once on.
CRMA_ALTERNATING = tuple((CRMA_ON if i % 2 else CRMA_OFF)[i % len(TASKS)] for i in range(10))

PREFILL = Workload("prefill_tok_s", num_requests=4, concurrency=1, prompt_tokens=512, new_tokens=1)
SINGLE = Workload("decode_tok_s", num_requests=1, concurrency=1)
CHURN = Workload(num_requests=64, new_tokens=8, in_random_order=True)
ARRIVALS_OF = "mixed"
ROWS = {
    "mixed": Workload(models=LORAS),
    "base": Workload(),
    "single": SINGLE,
    "prefill": PREFILL,
    "prefill-lora": replace(PREFILL, models=LORAS[3:4]),
    "random-length": Workload(models=LORAS, spread=4),
    "poisson": Workload("ttft_p95_s", LORAS, num_requests=48, arrival_share=0.7),
    "long": replace(SINGLE, prompt_tokens=1936),
}
CRMA_ROWS = {
    "crma-off": Workload(models=CRMA_OFF),
    "crma-half": Workload(models=CRMA_ALTERNATING),
    "crma-on": Workload(models=CRMA_ON),
}
CHURN_ROWS = {
    "churn-none": CHURN,
    "churn-8": replace(CHURN, models=LORAS),
    "churn-64": replace(CHURN, models=MANY_LORAS),
}
# In this order, so that a row's memory is not that of adapters which only later rows name.
GROUPS: tuple[Mapping[str, Workload], ...] = (ROWS, CRMA_ROWS, CHURN_ROWS)
ALL_ROWS = {**ROWS, **CRMA_ROWS, **CHURN_ROWS}
RATIOS = (
    ("mixed", "base"),
    ("prefill-lora", "prefill"),
    ("long", "single"),
    ("crma-half", "crma-off"),
    ("crma-on", "crma-off"),
    ("churn-64", "churn-8"),
    ("churn-8", "churn-none"),
)


def speed_limit(workload: Workload, limits: Mapping[str, float], weight_bytes: int = 2) -> float:
    """Tokens/s of a machine that only reads and multiplies the base model's weights.

    Attention, LoRA and, in a decoding row, the prompts are not part of it.

    Args:
        workload: the row.
        limits: what the machine can do, as `limits.measure_limits` returns it.
        weight_bytes: of one weight. With 1, the rates of products hold only where they are not
            what binds: with one request at a time.
    """
    if workload.measure == "prefill_tok_s":
        return limits["prefill_tok_s"]
    reading = workload.concurrency * limits["read_tok_s"] * 2 / weight_bytes
    return min(reading, limits["gemm_tok_s"])


def chosen_rows(names: frozenset[str]) -> list[dict[str, Workload]]:
    """The groups with only the named rows, and the row that arrivals at random need."""
    wanted = set(names)
    if any(ALL_ROWS[name].arrival_share is not None for name in names):
        wanted.add(ARRIVALS_OF)
    groups = []
    for group in GROUPS:
        chosen = {name: row for name, row in group.items() if name in wanted}
        if chosen:
            groups.append(chosen)
    return groups
