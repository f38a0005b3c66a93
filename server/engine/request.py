"""What crosses the engine seam: a Request goes in, RequestOutputs come out. No torch, no HTTP."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from crma.core.selection import BASE, AdapterSelection


class FinishReason(StrEnum):
    """Why a sequence ended. Only `stop` and `length` are successes."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Validated at the edge (server/schemas.py); the engine trusts it.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and the penalties' 1, 0 and 0 are off. The repetition penalty is
    of prompt and answer (Keskar et al. 2019), the other two of the answer only (OpenAI). `seed` makes a sampled request
    repeatable: sequence i of n draws from seed + i. `stop` strings end a sequence and are not part of its text.
    `logprobs` k returns, for every sampled token, its log-probability and the k most probable tokens, all under the
    model's own distribution; `prompt_logprobs` k the same for the prompt's tokens from number `prompt_logprobs_from` on
    (number 0 has none). None: off.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1
    ignore_eos: bool = False


class TokenLogprob(NamedTuple):
    """The log-probability of one token, and (id, log-probability) of the most probable ones, most probable first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One user call. Times are seconds of time.monotonic().

    `stop_token_ids` end a sequence beside the model's own end tokens (an adapter's prompt format has one). One that is
    not `interactive` uses what the others leave: it starts after them, and gives way where they have no room.
    """

    id: str
    prompt_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    selection: AdapterSelection = BASE
    arrival: float = 0.0
    deadline: float | None = None
    interactive: bool = True


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from arrival: until first scheduled, until the first token, until the end."""

    queue_s: float
    ttft_s: float | None
    e2e_s: float


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """New tokens of one sequence of one request.

    `text` is the new text only (a delta; may be empty while a multi-byte character or a possible stop
    string is held back). `logprobs` has one entry a new token where asked for. The first output of sequence 0 carries
    `prompt_logprobs` where asked for: one entry a prompt token. The last output of a sequence carries
    finish_reason and the totals; after the last output of the last sequence the iterator ends. `error` is set exactly
    when finish_reason is error or, with the reason "deadline" or "unloaded", abort. `cause` is what the load of an
    adapter raised; the stream raises it instead of giving this output.
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    cause: Exception | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    timings: Timings | None = None


@dataclass
class EngineCounters:
    """Totals since the start."""

    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0


@dataclass
class PoolCounters:
    """Totals of the adapter pool since the start."""

    adapter_loads: int = 0
    adapter_load_seconds: float = 0.0
    adapter_evictions: int = 0


@dataclass
class EngineStats(EngineCounters, PoolCounters):
    """A snapshot for metrics and /adapters. Counters only grow; kv_cache_usage is the share of blocks in use."""

    has_failed: bool = False
    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.0
    resident: tuple[str, ...] = ()
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
