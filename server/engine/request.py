"""The data that crosses the engine seam: a Request goes in, RequestOutputs come out.

Plain data: no torch, no HTTP.
"""

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


class ConstraintKind(StrEnum):
    """What the source of a constraint is."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What every text of an answer has to be, from its first character to its last.

    Attributes:
        kind: how `source` is read.
        source: a JSON schema as JSON; nothing for any JSON object; a regular expression; a JSON
            list of texts, one of which is the answer; or a grammar in Lark's notation, or GBNF's.
        field: what the request calls it, for errors.
    """

    kind: ConstraintKind
    source: str = ""
    field: str = field(default="constraint", compare=False)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a request are chosen.

    The HTTP edge (server/http/sampling_fields.py) validates the values; the engine trusts them.

    Attributes:
        max_tokens: the most tokens to generate in each sequence. With 0 the prompt is computed, for
            its log-probabilities, and nothing is generated.
        temperature: 0 is greedy.
        top_p: sample only from the most probable tokens that hold this share together; 1 is off.
        top_k: sample only from the k most probable tokens; 0 is off. No upper limit.
        min_p: sample only from tokens with at least this share of the most probable token's
            probability; 0 is off.
        repetition_penalty: on tokens of prompt and answer (Keskar et al. 2019); 1 is off.
        presence_penalty: on tokens that the answer has (OpenAI); 0 is off.
        frequency_penalty: the same, once for each time the answer has them; 0 is off.
        seed: makes a sampled request repeatable: sequence i of n draws from seed + i.
        n: sequences to generate.
        stop: strings that end a sequence; they are no part of its text.
        stop_token_ids: tokens that end a sequence, even with `ignore_eos`, and are no part of it.
        include_stop_str_in_output: what ends a sequence is a part of it: the stop string, or the
            end token, whose text is empty if it is special and `skip_special_tokens`.
        min_tokens: until a sequence has so many, no token may end it, and no stop string that is
            complete by then does.
        logit_bias: (token id, number) pairs: the number is added to the token's logit, before the
            penalties.
        skip_special_tokens: special tokens have no text.
        logprobs: for every sampled token, return its log-probability and the k most probable
            tokens, under the model's unmodified distribution; None is off.
        prompt_logprobs: the same for the tokens of the prompt; None is off.
        prompt_logprobs_from: the first prompt token that `prompt_logprobs` covers, at least 1: the
            token at position 0 has no log-probability.
        ignore_eos: go on to max_tokens past the end tokens of model and prompt format.
        constraint: sample only tokens with which the answer can still become what it has to be. An
            end token may be sampled exactly where the answer may end; with `ignore_eos`, only where
            it cannot go on. None is off.
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
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1
    ignore_eos: bool = False
    constraint: Constraint | None = None


class TokenLogprob(NamedTuple):
    """The log-probability of one token.

    Attributes:
        logprob: natural logarithm.
        top: (id, log-probability) of the most probable tokens in its place, most probable first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One call of a user. Times are seconds of time.monotonic().

    Attributes:
        id: unique among the unfinished requests.
        prompt_ids: at least one token.
        stop_token_ids: tokens that end a sequence, beside the model's own end tokens: that of the
            prompt format. `SamplingParams.stop_token_ids` are those that its user names.
        sampling: how its tokens are chosen.
        selection: its adapters, by digest.
        arrival: when it arrived.
        deadline: when it is cut short; None is never.
        interactive: False for background work such as ablations. Interactive requests run first and
            may preempt the others.
        owner: whose share of the engine it uses.
        cache_salt: it shares cached prefixes only with requests that have the same one: who can
            see `cached_tokens` could else tell what others have sent.
        is_streamed: False: nobody sees its outputs before the last one, so an engine may keep them
            until then, in one for each sequence, and may run it again if what ran it is lost.
    """

    id: str
    prompt_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    selection: AdapterSelection = BASE
    arrival: float = 0.0
    deadline: float | None = None
    interactive: bool = True
    owner: str = ""
    cache_salt: str = ""
    is_streamed: bool = True


@dataclass(frozen=True, slots=True)
class Timings:
    """Times of one sequence, in seconds from the arrival of its request.

    Attributes:
        queue_s: until it first ran.
        ttft_s: until its first token; None if it had none.
        e2e_s: until it ended.
    """

    queue_s: float
    ttft_s: float | None
    e2e_s: float

    @property
    def prefill_s(self) -> float | None:
        """How long the prompt took, from its first step to the first token; None without one."""
        return None if self.ttft_s is None else self.ttft_s - self.queue_s

    @property
    def decode_s(self) -> float | None:
        """How long the tokens after the first one took; None without a first token."""
        return None if self.ttft_s is None else self.e2e_s - self.ttft_s


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """New tokens of one sequence of a request.

    The last output of a sequence has a finish_reason, and with it the totals. The stream of a
    request ends after the last output of its last sequence.

    Attributes:
        request_id: the request.
        index: the sequence's number among the request's n.
        token_ids: the new tokens.
        text: the new text. It may be empty while a multi-byte character or a possible stop string
            is held back.
        logprobs: one for each new token, if asked for.
        prompt_logprobs: in the first output of sequence 0, one for each prompt token from
            `prompt_logprobs_from` on, if asked for.
        finish_reason: why the sequence ended; None while it goes on.
        error: a message, set exactly if finish_reason is `error`, or if it is `abort` because of
            the "deadline", because its adapter was "unloaded", or because what ran it is "lost".
        cause: the exception that loading an adapter raised, or a ConstraintStuck. The stream raises
            it in place of this output.
        completion_tokens: the length of the answer, in tokens (a total).
        cached_tokens: prompt tokens found in the prefix cache (a total).
        timings: of the whole sequence (a total).
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
    """What the engine has done since the start.

    Attributes:
        num_steps: forward passes.
        num_preemptions: sequences sent back to the queue.
        prompt_tokens: of all sequences that have run.
        generation_tokens: of all sequences.
        prefix_cache_queries: prompt tokens looked up in the prefix cache.
        prefix_cache_hits: prompt tokens found there.
    """

    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0


@dataclass
class PoolCounters:
    """What the adapter pool has done since the start."""

    adapter_loads: int = 0
    adapter_load_seconds: float = 0.0
    adapter_evictions: int = 0


@dataclass
class EngineStats(EngineCounters, PoolCounters):
    """A snapshot of the engine, for metrics and /adapters.

    Attributes:
        has_failed: the engine takes no more requests.
        failure: why, if it has failed.
        num_requests_running: requests with a running sequence.
        num_requests_waiting: requests with a waiting sequence.
        kv_cache_usage: the share of blocks in use, from 0 to 1.
        adapter_uses: uses of adapters by running sequences; a task adapter and a backbone are two.
        resident: digests of the adapters in memory.
        running_adapters: digests of the task adapters of running requests.
        waiting_adapters: digests of the task adapters of waiting requests.
        num_blocks: blocks of the KV cache; 0 if the engine does not say.
        block_size: tokens in a block; 0 likewise.
    """

    has_failed: bool = False
    failure: str = ""
    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.0
    adapter_uses: int = 0
    resident: tuple[str, ...] = ()
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    num_blocks: int = 0
    block_size: int = 0
