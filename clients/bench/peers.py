"""`peers.py MODEL FOLDER`: PEFT and transformers on the benchmark's load, in their own process.

It first writes the adapters lora-0 to lora-7 into FOLDER in PEFT's format: random, rank 8, alpha
16, on every linear layer, B with standard deviation 0.01, and the same every time.

Then it writes a line of JSON with the machine's limits, and one more for each line of stdin. Such a
line is a job, `[[[model, ids], ...], concurrency, new_tokens]`, or `[]` to measure the limits
again. A job runs in static batches: PEFT's mixed batch (`adapter_names`) if adapters are in the
batch, plain transformers if it is all `base`.
"""

import json
import sys
import time
from collections.abc import Callable
from timeit import repeat
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM


def main(model: str, folder: str) -> None:
    """Do jobs until stdin ends."""
    base = load_model(model)
    mixed = add_adapters(load_model(model))
    mixed.save_pretrained(folder)
    mixed.eval()
    with torch.inference_mode():
        _write(measure_limits(base))
        for line in sys.stdin:
            job = json.loads(line)
            if job:
                requests, concurrency, new_tokens = job
                _write(generate(base, mixed, requests, concurrency, new_tokens))
            else:
                _write(measure_limits(base))


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
    for i in range(1, 8):
        mixed.add_adapter(f"lora-{i}", config, autocast_adapter_dtype=False)
    for name, weight in mixed.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    return mixed


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


def measure_limits(base: Any) -> dict[str, float]:
    """Measure how fast the machine reads and multiplies, with all threads, at the best of 50 tries.

    Returns:
        read_gb_s: GB/s read, from as many bytes as the weights have.
        gemm_gf_s: GFLOP/s of a bf16 product with 2048 rows.
        gemm_16_rows_gf_s: GFLOP/s of one with 16 rows, of the model's sizes.
        read_tok_s: tokens/s of one sequence, if each token reads all weights once.
        gemm_tok_s: tokens/s of all sequences, if each token takes two operations a weight at the
            rate of the large product.
        prefill_tok_s: the same without the head, which a prompt needs only once.
    """
    config = base.config
    num_weights = sum(weight.numel() for weight in base.parameters())
    num_without_head = num_weights - config.vocab_size * config.hidden_size
    as_many_bytes = torch.ones(num_weights // 2)  # float32, where the weights are bf16
    read_s = best_time(as_many_bytes.sum)
    large = gemm_rate(2048, 2048, 2048)
    small = gemm_rate(16, config.hidden_size, config.intermediate_size)
    return {
        "read_gb_s": 2e-9 * num_weights / read_s,
        "gemm_gf_s": large / 1e9,
        "gemm_16_rows_gf_s": small / 1e9,
        "read_tok_s": 1 / read_s,
        "gemm_tok_s": large / 2 / num_weights,
        "prefill_tok_s": large / 2 / num_without_head,
    }


def best_time(call: Callable[[], object]) -> float:
    """The fewest seconds that one of 50 calls took."""
    return min(repeat(call, number=1, repeat=50))


def gemm_rate(rows: int, inner: int, columns: int) -> float:
    """Operations per second of the bf16 product [rows, inner] x [inner, columns]."""
    x = torch.ones(rows, inner, dtype=torch.bfloat16)
    weight = torch.ones(columns, inner, dtype=torch.bfloat16)
    num_operations = 2 * rows * inner * columns
    return num_operations / best_time(lambda: torch.nn.functional.linear(x, weight))


def _write(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
