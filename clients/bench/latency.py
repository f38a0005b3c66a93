"""What is computed from the times at which tokens came. Times are seconds of one clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median, quantiles


@dataclass(frozen=True)
class Answer:
    """One request: when it was sent, when its tokens came (several may come at once), and how many there were."""

    start: float
    times: Sequence[float] = field(default=())
    num_tokens: int = 0
    error: str | None = None


def percentile(values: Sequence[float], percent: int) -> float | None:
    """Between the two nearest of the sorted values, linearly; None of no values. `percent` is 1 to 99."""
    several = values if len(values) > 1 else [*values, *values]
    return quantiles(several, n=100, method="inclusive")[percent - 1] if values else None


def measures(answers: Sequence[Answer], wall: float, prompt_tokens: int) -> dict[str, float | None]:
    """Of one run that took `wall` seconds. What failed is in no figure but `failed`.

    TTFT is from sending to the first token; ITL every gap between tokens, pooled; `decode_tok_s` of one stream, without
    its first token; `prefill_tok_s` prompt tokens by TTFT; both are medians over the requests.
    """
    good = [answer for answer in answers if answer.error is None]
    ttft = [answer.times[0] - answer.start for answer in good]
    gaps = [later - earlier for answer in good for earlier, later in pairwise(answer.times)]
    decode = [
        (each.num_tokens - 1) / (each.times[-1] - each.times[0])
        for each in good
        if len(each.times) > 1
    ]
    return {
        "failed": len(answers) - len(good),
        "output_tok_s": sum(answer.num_tokens for answer in good) / wall if good else None,
        **{f"ttft_p{p}_s": percentile(ttft, p) for p in (50, 95)},
        **{f"itl_p{p}_s": percentile(gaps, p) for p in (50, 99)},
        "decode_tok_s": percentile(decode, 50),
        "prefill_tok_s": percentile([prompt_tokens / each for each in ttft], 50),
    }


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Median, least and most of the repetitions that have a value, to four digits; None where none has."""
    known = [value for value in values if value is not None]
    found = {"median": median(known), "min": min(known), "max": max(known)} if known else {}
    return {name: float(f"{value:.4g}") for name, value in found.items()} or None
