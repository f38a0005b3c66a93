"""`python -m bench.peers MODEL FOLDER [NUMBER]`: PEFT and transformers on the benchmark's load.

They are in a process of their own.

It first writes so many adapters (8), lora-0 and on, into FOLDER in PEFT's format: random, rank 8,
alpha 16, on every linear layer, B with standard deviation 0.01, and the same every time.

Then it writes a line with the type that it computes in, which is the one that this processor
multiplies itself. For each line of stdin, a job, `[[[model, ids], ...], concurrency, new_tokens]`,
it writes a line of JSON. A job runs in static batches: PEFT's mixed batch (`adapter_names`) of the
first 8 adapters if they are in the batch, plain transformers if it is all `base`.
"""

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from crma.models.loading import resolve_dtype

NUM_MIXED = 8
B_STD = 0.01
WEIGHTS = "adapter_model.safetensors"


def main(model: str, folder: str, num_adapters: str = "8") -> None:
    """Do jobs until stdin ends."""
    dtype = resolve_dtype("auto", torch.device("cpu"))
    base = load_model(model).to(dtype)
    mixed = add_adapters(load_model(model))
    mixed.save_pretrained(folder)
    for i in range(NUM_MIXED, int(num_adapters)):
        write_another(Path(folder) / "lora-0", Path(folder) / f"lora-{i}", seed=i)
    mixed.to(dtype).eval()
    _write(str(dtype).removeprefix("torch."))
    with torch.inference_mode():
        for line in sys.stdin:
            requests, concurrency, new_tokens = json.loads(line)
            answer = generate(base, mixed, requests, concurrency, new_tokens)
            _write(json.dumps(answer))


def load_model(path: str) -> Any:
    """The base model in bf16, without an end token, so that every answer has its full length."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def add_adapters(model: Any) -> Any:
    """Wrap a model in PEFT and add the eight random adapters."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    mixed: Any = get_peft_model(model, config, "lora-0", autocast_adapter_dtype=False)
    for i in range(1, NUM_MIXED):
        mixed.add_adapter(f"lora-{i}", config, autocast_adapter_dtype=False)
    for name, weight in mixed.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=B_STD)
    return mixed


def write_another(adapter: Path, folder: Path, seed: int) -> None:
    """Write an adapter with the shape of another, drawn as PEFT draws it, and B as above."""
    rng = torch.Generator().manual_seed(seed)
    weights = load_file(adapter / WEIGHTS)
    for name, weight in weights.items():
        if "lora_B" in name:
            weight.normal_(0, B_STD, generator=rng)
        else:
            bound = 1 / math.sqrt(weight.shape[1])
            weight.uniform_(-bound, bound, generator=rng)
    folder.mkdir()
    shutil.copy(adapter / "adapter_config.json", folder)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


class TokenClock:
    """A streamer for transformers' `generate` that records when each token came."""

    def __init__(self) -> None:
        self._times: list[float] = []

    @property
    def token_times(self) -> list[float]:
        """Without the first call of `put`, which brings the prompt."""
        return self._times[1:]

    def put(self, _: Tensor) -> None:
        """Called with the prompt, and then with each token of the batch."""
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


def generate(
    base: Any, mixed: Any, requests: list[Any], concurrency: int, new_tokens: int
) -> tuple[list[dict[str, Any]], float]:
    """Answer requests batch by batch; a batch starts when the one before has ended.

    Args:
        base: plain transformers.
        mixed: the same model in PEFT, with the adapters.
        requests: (model, token ids) of each; all prompts have one length.
        concurrency: size of a batch.
        new_tokens: length of every answer.

    Returns:
        The fields of a `bench.metrics.RequestResult` for each request, and the seconds all took.
    """
    results = []
    begin = time.perf_counter()
    for first in range(0, len(requests), concurrency):
        models, prompts = zip(*requests[first : first + concurrency], strict=True)
        ids = torch.tensor(prompts)
        clock = TokenClock()
        options: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "streamer": clock,
            "do_sample": False,
            "max_new_tokens": new_tokens,
        }
        sent_at = time.perf_counter()
        if set(models) == {"base"}:
            base.generate(**options)
        else:
            mixed.generate(**options, adapter_names=list(models))
        token_times = clock.token_times
        result = {"sent_at": sent_at, "token_times": token_times, "num_tokens": len(token_times)}
        results += [result] * len(ids)
    return results, time.perf_counter() - begin


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
