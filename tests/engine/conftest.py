"""The engines that the conformance suite runs against.

To add an engine, write a function that makes one and put it into ENGINES. Those on vLLM have the
mark `vllm`: `make e2e-vllm` runs them.
"""

import json
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import pytest_asyncio
import tiny
from replicas import remote_engine
from scripted_engine import FIRST_TOKEN, TINY, Ending, ScriptedEngine

from crma.method.backbone import Backbone
from crma.method.lora import Lora
from server.engine.inference_engine import InferenceEngine
from server.engine.native.async_engine import AsyncEngine
from server.engine.request import FinishReason, Request, SamplingParams

MAX_QUEUE = 8
OTHER_TOKEN = 299
Token = tuple[int, str]
MakeEngine = Callable[[], InferenceEngine]
WORDS = ("the ", "naïve ", "café ", "is ", "free ", "and ", "the other ", "answers ")


class DrawnEngine(ScriptedEngine):
    """A scripted engine whose text depends on the prompt, the adapters and the seed only.

    Its tokens are words. Biases make one token of all, whose text is the first word. Of choices the
    answer is one, as a single token.
    """

    def tokens(self, request: Request, index: int) -> list[tuple[int, str]]:
        sampling = request.sampling
        seed = None
        if sampling.temperature > 0:
            seed = (sampling.seed or 0) + index
        draw = random.Random(repr((request.prompt_ids, request.selection, seed)))
        if sampling.constraint is not None:
            return [(FIRST_TOKEN, draw.choice(json.loads(sampling.constraint.source)))]
        words = [draw.choice(WORDS) for _ in range(sampling.max_tokens)]
        tokens = list(enumerate(words, FIRST_TOKEN))
        if sampling.logit_bias:
            likeliest, _ = max(sampling.logit_bias, key=lambda pair: pair[1])
            tokens = [(likeliest, WORDS[0])] * sampling.max_tokens
        return _cut_at_text(_cut_at_token(tokens, sampling), sampling)

    def last(self, request: Request) -> Ending:
        sampling = request.sampling
        if sampling.stop or sampling.stop_token_ids or sampling.constraint:
            return FinishReason.STOP, None
        return FinishReason.LENGTH, None


def _cut_at_token(tokens: list[Token], sampling: SamplingParams) -> list[Token]:
    """The tokens up to the first that ends them; before `min_tokens` none may."""
    for position, (token_id, _) in enumerate(tokens):
        if token_id not in sampling.stop_token_ids:
            continue
        if position >= sampling.min_tokens:
            return tokens[: position + sampling.include_stop_str_in_output]
        tokens[position] = (OTHER_TOKEN, WORDS[0])
    return tokens


def _cut_at_text(tokens: list[Token], sampling: SamplingParams) -> list[Token]:
    """The tokens up to the first stop string that ends after `min_tokens` of them."""
    texts = [text for _, text in tokens]
    text = "".join(texts)
    num_exempt = len("".join(texts[: sampling.min_tokens]))  # characters
    found = []
    for stop in sampling.stop:
        start = text.find(stop, max(0, num_exempt - len(stop) + 1))
        if start >= 0:
            found.append(start + len(stop) * sampling.include_stop_str_in_output)
    if not found:
        return tokens
    kept: list[Token] = []
    num_left = min(found)  # characters
    for token_id, word in tokens:
        kept.append((token_id, word[:num_left]))
        num_left -= len(kept[-1][1])
        if num_left == 0:
            break
    return kept


def native_engine() -> InferenceEngine:
    """The native engine on the tiny model."""
    core, _ = tiny.make_engine(tiny.injection(), {}, max_num_seqs=4)
    return AsyncEngine(core, TINY, MAX_QUEUE)


def scripted_engine() -> InferenceEngine:
    """The engine that the tests of the routes use."""
    return DrawnEngine(max_queue=MAX_QUEUE, max_length=400)


def engine_of_replicas() -> InferenceEngine:
    """The engine of an ingress, on two replicas that have the native engine."""
    remote, _ = remote_engine([native_engine(), native_engine()], max_model_len=400)
    return remote


@contextmanager
def running_vllm(**parallel: int) -> Iterator[MakeEngine]:
    """An engine on vLLM's processes, which run until the block ends."""
    if find_spec("vllm") is None:  # not imported yet: it reads the environment first
        pytest.skip("make e2e-vllm runs this in an environment with vLLM")
    from vllm_engine import SharedVllm

    with tempfile.TemporaryDirectory() as folder:
        shared = SharedVllm(Path(folder), MAX_QUEUE, **parallel)
        try:
            yield shared.make_engine
        finally:
            shared.close()


Engines = Callable[[], AbstractContextManager[MakeEngine]]
ENGINES: dict[str, Engines] = {
    "native": lambda: nullcontext(native_engine),
    "scripted": lambda: nullcontext(scripted_engine),
    "replicas": lambda: nullcontext(engine_of_replicas),
    "vllm": running_vllm,
    "vllm-tensor-parallel": partial(running_vllm, tensor_parallel_size=3),
}
# What vLLM imports warns, and that is none of our code.
OF_VLLM = (pytest.mark.vllm, pytest.mark.filterwarnings("default"))
PARAMS = [pytest.param(name, marks=OF_VLLM if name.startswith("vllm") else ()) for name in ENGINES]


@pytest.fixture(scope="module", params=PARAMS)
def make_engine(request: pytest.FixtureRequest) -> Iterator[MakeEngine]:
    """Makes engines of one kind, one after the other."""
    with ENGINES[request.param]() as make:
        yield make


@pytest.fixture
def known(request: pytest.FixtureRequest) -> dict[str, Lora | Backbone]:
    """Adapters for the model of the engine, by digest."""
    is_vllm = request.node.callspec.params["make_engine"].startswith("vllm")
    return tiny.adapters(tiny.injection("llama_parallel" if is_vllm else "llama"))


@pytest_asyncio.fixture(loop_scope="module")
async def engine(
    make_engine: MakeEngine, known: dict[str, Lora | Backbone]
) -> AsyncIterator[InferenceEngine]:
    """A running engine with three tasks and two backbones registered; closed afterwards."""
    engine = make_engine()
    for digest, adapter in known.items():
        engine.register(digest, lambda adapter=adapter: adapter, 1000)
    yield engine
    await engine.close()
