"""The engine on vLLM: as transformers on the real model, and safe from a fault of vLLM on CPUs."""

import asyncio
import itertools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny

from crma.core.selection import BASE, AdapterSelection
from crma.method.backbone import Backbone
from crma.method.injection import Injection, plan_rows
from crma.method.lora import Lora
from crma.models.base_model import find_base
from crma.models.loading import load_model, load_tokenizer, resolve_device, resolve_dtype
from crma.models.reference import generate
from server.engine.errors import EngineStopped
from server.engine.inference_engine import InferenceEngine
from server.engine.request import Request, SamplingParams

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),  # what vLLM imports warns, and that is none of our code
    pytest.mark.skipif(find_spec("vllm") is None, reason="make e2e-vllm runs this"),
]
MODEL = "SmolLM2-135M-Instruct"
PROMPTS = (
    "The capital of France is",
    "Which court decides on appeals from the district courts?",
    "A patient has had a fever for three days, and",
    "def fibonacci(n):\n",
    "Of all the rivers in Asia,",
)
NUM_TOKENS = 12
TOLERANCE = 1e-3  # of log-probabilities in float32, between two ways to compute 30 layers

Answer = tuple[list[int], list[float]]


def adapters(inj: Injection) -> dict[str, Lora | Backbone]:
    """Two tasks and a backbone that change what a real model says, and leave it in range."""
    known: dict[str, Lora | Backbone] = {
        "task-0": tiny.lora(inj, 2, "attention", seed=0),
        "task-1": tiny.lora(inj, 5, "all-linear", seed=1),
        "crma-0": tiny.backbone(inj, seed=0),
    }
    for adapter in known.values():
        if isinstance(adapter, Lora):
            for pair in adapter.pairs.values():
                pair.B.mul_(0.05)
    return known


@pytest.mark.parametrize("tensor_parallel_size", [1, 3])
async def test_a_mixed_batch_answers_as_transformers_does(
    tensor_parallel_size: int, record_property: Callable[[str, object], None]
) -> None:
    """Three processes share the 9 heads and 3 key-value heads of SmolLM2-135M."""
    from vllm_engine import start

    base = find_base(MODEL)
    device = resolve_device("cpu")
    inj = Injection(load_model(base, device, resolve_dtype("float32", device)))
    known = adapters(inj)
    selections = [
        BASE,
        AdapterSelection("task-0"),
        AdapterSelection("task-1"),
        AdapterSelection(None, "crma-0"),
        AdapterSelection("task-0", "crma-0"),
        AdapterSelection("task-1", "crma-0"),
    ]
    tokenizer = load_tokenizer(base)
    prompts = [tuple(tokenizer.encode(prompt)) for prompt in PROMPTS]
    asked = list(itertools.product(selections, prompts))
    engine = start(
        base,
        tensor_parallel_size=tensor_parallel_size,
        max_num_seqs=len(asked),
        max_num_batched_tokens=256,
        max_loras=5,
        max_queue=100,
    )
    for digest, adapter in known.items():
        engine.register(digest, lambda adapter=adapter: adapter, 1000)
    answers = [ask(engine, prompt, each, index) for index, (each, prompt) in enumerate(asked)]
    found = await asyncio.gather(*answers)
    await engine.close()
    distances = []
    for (selection, prompt), (tokens, logprobs) in zip(asked, found, strict=True):
        wanted = oracle(inj, known, selection, prompt)
        assert (selection, tuple(tokens)) == (selection, wanted[0])
        distances += [abs(a - b) for a, b in zip(logprobs, wanted[1], strict=True)]
    record_property("answers", len(asked))
    record_property("largest_difference", max(distances))
    assert max(distances) < TOLERANCE
    assert len({tuple(tokens) for tokens, _ in found}) > len(PROMPTS)


def oracle(
    inj: Injection,
    known: dict[str, Lora | Backbone],
    selection: AdapterSelection,
    prompt: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Tokens and log-probabilities of an answer alone, in transformers."""
    loras = {d: each for d, each in known.items() if isinstance(each, Lora)}
    backbones = {
        d: each.folded("cpu", inj.model.dtype)
        for d, each in known.items()
        if isinstance(each, Backbone)
    }
    plan = plan_rows([selection], loras, backbones)
    made = generate(inj, prompt, plan, max_tokens=NUM_TOKENS)
    return made.token_ids, made.logprobs


async def ask(
    engine: InferenceEngine, prompt: tuple[int, ...], selection: AdapterSelection, index: int
) -> Answer:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    request = Request(str(index), prompt, sampling=sampling, selection=selection)
    outputs = [output async for output in engine.submit(request)]
    tokens = [token for output in outputs for token in output.token_ids]
    return tokens, [each.logprob for output in outputs for each in output.logprobs]


async def test_the_check_at_the_start_finds_adapters_on_rows_of_the_base(tmp_path: Path) -> None:
    """vLLM 0.32 gives rows of the base model another's adapter, without our guard."""
    from vllm_engine import start

    engine = start(tiny.pulled_base(tmp_path, "llama_parallel"), guards_base_rows=False)
    with pytest.raises(EngineStopped, match="base beside other requests differs from base alone"):
        await engine.warm_up()
    await engine.close()
