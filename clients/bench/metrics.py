"""Throughput and latency, computed from the times at which tokens arrived.

Times are in seconds of one clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median, quantiles

Metrics = dict[str, float | None]
"""The figures of one run, by name; None where no request gave a value."""

Key = tuple[str, str]
"""Row and engine."""

Results = dict[Key, list[Metrics]]
"""The metrics of each repetition."""


@dataclass(frozen=True)
class RequestResult:
    """What the load generator observed of one request.

    Args:
        sent_at: when it was sent.
        token_times: when each token arrived; several may arrive at once.
        num_tokens: number of tokens generated.
        error: why it failed; None if it succeeded.
    """

    sent_at: float
    token_times: Sequence[float] = field(default=())
    num_tokens: int = 0
    error: str | None = None


def percentile(values: Sequence[float], percent: int) -> float | None:
    """Interpolate linearly between the two nearest of the sorted values.

    Args:
        values: in any order; the result is None if there are none.
        percent: from 1 to 99.
    """
    if not values:
        return None
    if len(values) == 1:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def compute_metrics(
    results: Sequence[RequestResult], duration: float, prompt_tokens: int | None
) -> Metrics:
    """Compute the figures of one run. Failed requests count in `failed` and nowhere else.

    - `output_tok_s`: generated tokens of all requests, per second of the run
    - `ttft_*`: from sending to the first token; p50, p95 and p99 are percentiles
    - `itl_*`: every gap between two tokens of a request, pooled
    - `decode_tok_s`: tokens/s of one request after its first token, median
    - `prefill_tok_s`: prompt tokens divided by TTFT, median

    Args:
        results: all requests of the run.
        duration: seconds from the first request to the last answer.
        prompt_tokens: length of each prompt; None: they differ.
    """
    succeeded = [result for result in results if result.error is None]
    output_tok_s = None
    if succeeded:
        output_tok_s = sum(result.num_tokens for result in succeeded) / duration
    ttft = [result.token_times[0] - result.sent_at for result in succeeded]
    gaps: list[float] = []
    decode_tok_s = []
    for result in succeeded:
        times = result.token_times
        gaps += [later - earlier for earlier, later in pairwise(times)]
        if len(times) > 1:
            decode_tok_s.append((result.num_tokens - 1) / (times[-1] - times[0]))
    prefill_tok_s = None
    if prompt_tokens is not None:
        prefill_tok_s = percentile([prompt_tokens / seconds for seconds in ttft], 50)
    return {
        "failed": len(results) - len(succeeded),
        "output_tok_s": output_tok_s,
        "ttft_p50_s": percentile(ttft, 50),
        "ttft_p95_s": percentile(ttft, 95),
        "ttft_p99_s": percentile(ttft, 99),
        "itl_p50_s": percentile(gaps, 50),
        "itl_p95_s": percentile(gaps, 95),
        "itl_p99_s": percentile(gaps, 99),
        "decode_tok_s": percentile(decode_tok_s, 50),
        "prefill_tok_s": prefill_tok_s,
    }


def summarize(values: Sequence[float | None]) -> dict[str, float] | None:
    """Median, minimum and maximum of the values that are not None, to four significant digits.

    None if there is no such value.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    summary = {"median": median(known), "min": min(known), "max": max(known)}
    return {name: float(f"{value:.4g}") for name, value in summary.items()}


def ratios(a: Sequence[float | None], b: Sequence[float | None]) -> list[float | None]:
    """a / b of each repetition; None where there is no figure of one of them."""
    return [x / y if x is not None and y else None for x, y in zip(a, b, strict=True)]
