"""The engines that the conformance suite runs against.

To add one: a function here, and its name in ENGINES.
"""

import random
from collections.abc import AsyncIterator

import pytest
import tiny
from scripted_engine import TINY, Ending, ScriptedEngine

from server.engine.inference_engine import InferenceEngine
from server.engine.native.async_engine import AsyncEngine
from server.engine.request import FinishReason, Request

MAX_QUEUE = 8
WORDS = ("the ", "naïve ", "café ", "is ", "free ", "and ", "the other ", "answers ")


class DrawnEngine(ScriptedEngine):
    """A scripted engine whose text follows from the prompt, the adapters and the seed."""

    def pieces(self, request: Request, index: int) -> list[str]:
        sampling = request.sampling
        seed = None
        if sampling.temperature > 0:
            seed = (sampling.seed or 0) + index
        draw = random.Random(repr((request.prompt_ids, request.selection, seed)))
        words = [draw.choice(WORDS) for _ in range(sampling.max_tokens)]
        return _cut("".join(words), words, sampling.stop)

    def last(self, request: Request) -> Ending:
        return (FinishReason.STOP if request.sampling.stop else FinishReason.LENGTH), None


def _cut(text: str, words: list[str], stop: tuple[str, ...]) -> list[str]:
    """The words up to the first stop string, which is not among them."""
    found = [text.index(each) for each in stop if each in text]
    if not found:
        return words
    kept: list[str] = []
    left = min(found)
    for word in words:
        kept.append(word[:left])
        left -= len(kept[-1])
        if not left:
            break
    return kept


def native_engine() -> InferenceEngine:
    """The native engine on the tiny model."""
    core, _ = tiny.make_engine(tiny.injection(), {}, max_num_seqs=4)
    return AsyncEngine(core, TINY, MAX_QUEUE)


def scripted_engine() -> InferenceEngine:
    """The engine of the API tests."""
    return DrawnEngine(max_queue=MAX_QUEUE, max_length=400)


ENGINES = {"native": native_engine, "scripted": scripted_engine}


@pytest.fixture(params=ENGINES)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[InferenceEngine]:
    """A running engine with three tasks and two backbones registered; closed afterwards."""
    engine = ENGINES[request.param]()
    for digest, adapter in tiny.adapters(tiny.injection()).items():
        engine.register(digest, lambda adapter=adapter: adapter, 1000)
    yield engine
    await engine.close()
