"""A request's sampling options in vLLM's terms. What vLLM would do otherwise is refused by name."""

import json
from typing import Any

from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.sampling_params import SamplingParams as VllmSampling

from crma.models.json_schema import JSON_STYLE, closed
from server.engine.errors import UnsupportedRequest
from server.engine.request import Constraint, ConstraintKind, Request, SamplingParams

LEAST_TEMPERATURE = 0.01  # vLLM samples with this in place of a lower one, unless it is 0
MOST_TEMPERATURE = 2.0
MOST_PENALTY = 2.0


def check_sampling(sampling: SamplingParams) -> None:
    """Check that vLLM does what the options ask for.

    Raises:
        UnsupportedRequest: it does not; the error names the option.
    """
    temperature = sampling.temperature
    if temperature and not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:
        allowed = f"0, or {LEAST_TEMPERATURE} to {MOST_TEMPERATURE}"
        raise _refused("temperature", temperature, allowed)
    for name in ("presence_penalty", "frequency_penalty"):
        penalty = getattr(sampling, name)
        if abs(penalty) > MOST_PENALTY:
            raise _refused(name, penalty, f"-{MOST_PENALTY} to {MOST_PENALTY}")
    if sampling.constraint is None:
        return
    if sampling.logprobs is not None:
        # Its log-probabilities would be those of the allowed tokens only.
        raise _refused("logprobs", sampling.logprobs, "none beside a constraint on the answer")
    if sampling.ignore_eos:
        raise _refused("ignore_eos", True, "false beside a constraint on the answer")


def _refused(field: str, value: object, allowed: str) -> UnsupportedRequest:
    message = f"{field}: the engine vllm cannot do this; allowed is {allowed}"
    return UnsupportedRequest(message, field=field, value=value, allowed=allowed)


def vllm_sampling(request: Request, index: int, end_ids: frozenset[int]) -> VllmSampling:
    """The options of sequence `index` of a request that passed `check_sampling`.

    vLLM returns tokens only: text, and the stop strings in it, are ours (`answer.py`).

    Args:
        end_ids: tokens that end the sequence.
    """
    sampling = request.sampling
    structured = None
    if sampling.constraint is not None:
        structured = _structured(sampling.constraint)
    return VllmSampling(
        max_tokens=max(1, sampling.max_tokens),  # with 0, `answer.py` drops the token
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=None if sampling.seed is None else sampling.seed + index,
        stop_token_ids=sorted(end_ids),
        ignore_eos=True,  # `end_ids` has what ends an answer
        logit_bias=dict(sampling.logit_bias) or None,
        logprobs=sampling.logprobs,
        prompt_logprobs=None if index else sampling.prompt_logprobs,
        structured_outputs=structured,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _structured(constraint: Constraint) -> StructuredOutputsParams:
    """The constraint as our own engine compiles it: vLLM's backend `guidance` is llguidance too."""
    source = constraint.source
    if constraint.kind is ConstraintKind.CHOICE:
        return StructuredOutputsParams(choice=json.loads(source))
    if constraint.kind is ConstraintKind.REGEX:
        return StructuredOutputsParams(regex=source)
    if constraint.kind is ConstraintKind.GRAMMAR:
        return StructuredOutputsParams(grammar=source)
    schema: Any = {"type": "object"}
    if constraint.kind is ConstraintKind.JSON_SCHEMA:
        schema = closed(json.loads(source))
    if isinstance(schema, dict):
        schema.setdefault("x-guidance", JSON_STYLE)
    return StructuredOutputsParams(json=json.dumps(schema))
