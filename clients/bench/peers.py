"""`peers.py MODEL FOLDER`: PEFT and transformers on the benchmark's load, in a process of its own, run by path.

Writes lora-0 to lora-7 into FOLDER, in PEFT's format: random, rank 8, alpha 16, on every linear, B with deviation 0.01,
the same each time. Then a line on stdout with the machine's limits, and one for each line on stdin, which is a job
`[[[model, ids], ...], concurrency, new_tokens]`, or `[]` for the limits again. Jobs are answered in static batches:
those of adapters by PEFT's mixed batch (`adapter_names`), those of `base` by plain transformers.
"""

import json
import sys
import time
from timeit import repeat
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main(model: str, folder: str) -> None:
    """Until stdin ends."""
    base, under = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval() for _ in range(2)
    )
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    mixed: Any = get_peft_model(under, config, "lora-0", autocast_adapter_dtype=False)
    for i in range(1, 8):
        mixed.add_adapter(f"lora-{i}", config, autocast_adapter_dtype=False)
    for name, weight in mixed.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    mixed.save_pretrained(folder)
    mixed.eval()
    for each in (base, under):
        each.generation_config.eos_token_id, each.generation_config.pad_token_id = None, 0
    with torch.inference_mode():
        _write(limits(base))
        for line in sys.stdin:
            job = json.loads(line)
            _write(generate(base, mixed, *job) if job else limits(base))


def generate(base: Any, mixed: Any, requests: list[Any], concurrency: int, new_tokens: int) -> Any:
    """[fields of bench.latency.Answer, ...] and the seconds it took. A batch is sent when the one before has ended."""
    answers, begin = [], time.perf_counter()
    for first in range(0, len(requests), concurrency):
        models, prompts = zip(*requests[first : first + concurrency], strict=True)
        plain, ids = set(models) == {"base"}, torch.tensor(prompts)
        times, start = list[float](), time.perf_counter()
        clock = SimpleNamespace(
            put=lambda _, times=times: times.append(time.perf_counter()), end=lambda: None
        )
        options = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "streamer": clock,
            "do_sample": False,
        }
        options |= {"max_new_tokens": new_tokens} | (
            {} if plain else {"adapter_names": list(models)}
        )
        (base if plain else mixed).generate(**options)
        answer = {
            "start": start,
            "times": times[1:],
            "num_tokens": len(times) - 1,
        }  # the first is the prompt
        answers += [answer] * len(ids)
    return answers, time.perf_counter() - begin


def limits(base: Any) -> dict[str, float]:
    """The best of many tries with all threads: reading as many bytes as the weights have, and bf16 products.

    `read_tok_s`: tokens/s of a sequence, if each reads all weights once; `gemm_tok_s`: of all, if each takes two
    operations a weight at the rate of large products; `prefill_tok_s`: without the head, which a prompt needs once.
    """

    def best(call: Any) -> float:
        return min(repeat(call, number=1, repeat=50))

    def gemm(rows: int, inner: int, columns: int) -> float:
        x, weight = (
            torch.ones(rows, inner, dtype=torch.bfloat16),
            torch.ones(columns, inner, dtype=torch.bfloat16),
        )
        return 2 * rows * inner * columns / best(lambda: torch.nn.functional.linear(x, weight))

    num_weights, config = sum(weight.numel() for weight in base.parameters()), base.config
    read_s, large = (
        best(torch.ones(num_weights // 2).sum),
        gemm(2048, 2048, 2048),
    )  # float32: as many bytes
    few = gemm(16, config.hidden_size, config.intermediate_size)
    without_head = num_weights - config.vocab_size * config.hidden_size
    rates = {
        "read_gb_s": 2e-9 * num_weights / read_s,
        "gemm_gf_s": large / 1e9,
        "gemm_16_rows_gf_s": few / 1e9,
    }
    return rates | {
        "read_tok_s": 1 / read_s,
        "gemm_tok_s": large / 2 / num_weights,
        "prefill_tok_s": large / 2 / without_head,
    }


def _write(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
