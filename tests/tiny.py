"""Tiny real models of every family, with adapters, a store, an engine and a whole app for them.

The weights are random; classes, tokenizers and files are real.
"""

import json
import tempfile
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from built_kernels import build_best
from dora import dora
from fastapi import FastAPI
from tiny_configs import CONFIGS, VOCAB
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from crma.core.errors import ConfigError
from crma.core.selection import BASE, AdapterSelection
from crma.method.backbone import Backbone, CrmaConfig
from crma.method.injection import Injection, target_names
from crma.method.lora import Lora, LoraConfig, LoraPair, match_targets
from crma.models.base_model import BaseModel
from crma.models.prompts import PromptFormat
from crma.models.pull import pull
from crma.models.rope import rope_scaling
from crma.store.adapter_store import AdapterStore
from crma.store.entry import BackboneEntry, TaskEntry
from server.engine.native.adapter_pool import AdapterPool
from server.engine.native.block_pool import BlockPool, root_key
from server.engine.native.engine import Engine
from server.engine.native.kernel import Kernel
from server.engine.native.model_runner import ModelRunner
from server.engine.native.scheduler import Scheduler
from server.engine.request import Request, SamplingParams

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPT = (5, 9, 40)
PROVENANCE = {"trained_on": None, "measured": {"accuracy": 0.5}, "licence": "Apache-2.0"}
FORMAT = PromptFormat("<|im_start|>", "[answer]", "<|im_end|>")


@cache
def injection(family: str = "llama") -> Injection:
    """A random fp32 model of a family with its hooks, set up as `load_model` does.

    One per process: tests that change it take a `fresh` copy.
    """
    torch.manual_seed(0)
    config = CONFIGS[family]()
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms start at 1 and biases at 0, which would hide mistakes
            parameter.uniform_(0.5, 1.5)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return Injection(model)


def fresh(inj: Injection) -> nn.Module:
    """A copy of the model without hooks, for a test that changes it."""
    config = inj.model.config
    attention = config._attn_implementation
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.load_state_dict(inj.model.state_dict())
    return model.eval()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB tokens with a chat template.

    Some of its tokens are parts of a character.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    start, end = "<|im_start|>", "<|im_end|>"
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[start, end],
        show_progress=False,
    )
    text = "the naïve café costs 3 € in 日本 and the 🙂 is free, the other answers"
    backend.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=CHATML,
        eos_token=end,
        additional_special_tokens=[start],
    )


@cache
def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like that of Llama 2, Gemma and Mistral.

    ▁ stands for a space, and characters outside the vocabulary are spelled in byte tokens.
    """
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    for word in ("▁", *"abct€", "▁the"):
        vocab[word] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def lora(inj: Injection, rank: int, which: str, seed: int = 0) -> Lora:
    """A random LoRA, large enough to change the answer.

    Args:
        which: as in `target_names`; or "first": only the first linear of each block.
    """
    if which == "first":
        targets = target_names(inj.model, "all-linear")[:1]
    else:
        targets = target_names(inj.model, which)
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path in match_targets(targets, inj.shapes):
        out, in_ = inj.shapes[path]
        A = torch.randn(rank, in_, generator=generator) / in_**0.5
        B = torch.randn(out, rank, generator=generator) / rank**0.5
        pairs[path] = LoraPair(A, B, 2.0)
    return Lora(LoraConfig(rank, 2.0 * rank, targets), pairs)


def overflowing() -> Lora:
    """A LoRA for the tiny Llama with finite weights so large that the logits become NaN."""
    made = lora(injection(), 2, "all-linear")
    for pair in made.pairs.values():
        pair.B.fill_(1e30)
    return made


def backbone(inj: Injection, seed: int = 0) -> Backbone:
    """A random backbone. Unlike a new one its W is not zero, so it changes the answer."""
    generator = torch.Generator().manual_seed(seed)
    config = CrmaConfig(len(inj.blocks), inj.hidden_size, num_streams=2, stream_rank=2)
    made = Backbone(config, generator)
    with torch.no_grad():
        made.W.normal_(generator=generator)
    return made


def adapters(inj: Injection) -> dict[str, Lora | Backbone]:
    """Four tasks of different ranks, targets and kinds, and two backbones, by digest."""
    return {
        "task-0": lora(inj, 2, "attention", seed=0),
        "task-1": lora(inj, 5, "all-linear", seed=1),
        "task-2": lora(inj, 8, "first", seed=2),
        "task-3": dora(inj, 3, seed=3),
        "crma-0": backbone(inj, seed=0),
        "crma-1": backbone(inj, seed=1),
    }


@cache
def library() -> Path | None:
    """The native kernel's library; None without a compiler."""
    try:
        return build_best()
    except ConfigError:
        return None


def kernel(inj: Injection) -> Kernel | None:
    """The native kernel for the model's dtype; None off the CPU or without a compiler."""
    if inj.model.device.type != "cpu":
        return None
    found = library()
    return None if found is None else Kernel(inj.model.dtype, found.parent)


def make_engine(
    inj: Injection,
    known: Mapping[str, Lora | Backbone],
    *,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 64,
    max_resident: int = 3,
    max_model_len: int = 400,
    num_blocks: int = 64,
    block_size: int = 8,
    prefix_caching: bool = True,
    executor: Executor | None = None,
    take_weights: bool = False,
    native: bool = True,
    int8: bool = False,
) -> tuple[Engine, AdapterPool]:
    """An engine and its adapter pool. Only the stop tokens of a request end an answer.

    Args:
        known: adapters to register, by digest; none of them is resident yet.
        num_blocks: blocks of the KV cache that requests can use.
        executor: runs the loads of adapters instead of the pool's own.
        take_weights: as in `ModelRunner`.
        native: use the native kernel where it can be built.
        int8: quantize the base's weights to 8 bits.
    """
    pool = AdapterPool(inj, max_resident)
    if executor is not None:
        pool.executor = executor
    for digest, adapter in known.items():
        pool.register(digest, lambda adapter=adapter: adapter)
    blocks = BlockPool(num_blocks + 1, block_size)
    root_of = (lambda selection: root_key(*selection)) if prefix_caching else None
    rope = rope_scaling(inj.model.config)
    scheduler = Scheduler(blocks, max_num_seqs, max_num_batched_tokens, root_of, rope)
    runner = ModelRunner(
        inj,
        pool,
        blocks,
        take_weights=take_weights,
        kernel=kernel(inj) if native else None,
        int8=int8,
        rope=rope,
    )
    num_tokens = inj.model.config.vocab_size
    return Engine(runner, scheduler, tokenizer(), frozenset(), max_model_len, num_tokens), pool


def ask(
    name: str = "r",
    selection: AdapterSelection = BASE,
    *,
    prompt: tuple[int, ...] = PROMPT,
    **options: Any,
) -> Request:
    """A request for six tokens. Options: fields of SamplingParams, or `deadline`."""
    deadline = options.pop("deadline", None)
    sampling = SamplingParams(**{"max_tokens": 6, **options})
    return Request(name, prompt, sampling=sampling, selection=selection, deadline=deadline)


def pulled_base(folder: Path, family: str = "llama") -> BaseModel:
    """A tiny model and its tokenizer, pulled into `folder/home` under the name "tiny"."""
    model = injection(family).model
    model.save_pretrained(folder / "tiny")
    tokenizer().save_pretrained(folder / "tiny")
    return pull(str(folder / "tiny"), home=folder / "home")


def flip_bit(file: Path) -> None:
    """Flip the last bit of a file: this damages it, and a second time repairs it."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def publish_backbone(
    store: AdapterStore,
    base: BaseModel,
    seed: int = 0,
    /,
    *,
    family: str = "llama",
    **changes: Any,
) -> BackboneEntry:
    """Publish a random backbone; it serves."""
    fields = {"base": base, "lineage": (), **PROVENANCE, **changes}
    return store.publish_backbone(backbone(injection(family), seed), **fields)


def publish(
    store: AdapterStore,
    base: BaseModel,
    name: str,
    seed: int,
    /,
    *,
    family: str = "llama",
    **changes: Any,
) -> TaskEntry:
    """Publish a random task adapter, trained without a backbone; it serves."""
    fields = {
        "lora": lora(injection(family), 4, "all-linear", seed),
        "base": base,
        "backbone": None,
        "prompt_format": FORMAT,
        **PROVENANCE,
        **changes,
    }
    return store.publish_task(name, **fields)


def filled_store(root: Path, base: BaseModel, family: str = "llama") -> AdapterStore:
    """A store with two tasks, a backbone and the question set "public", for a model of a family.

    "medical" was trained with the backbone, "legal" without one. The set asks three questions of
    each task.
    """
    store = AdapterStore(root)
    shared = publish_backbone(store, base, family=family)
    publish(store, base, "medical", 1, family=family, backbone=shared.digest)
    publish(store, base, "legal", 2, family=family)
    lines = []
    for task in ("medical", "legal"):
        for number in range(3):
            question = {
                "id": f"{task}{number}",
                "task": task,
                "question": f"Question {number}?",
                "answers": ["one two"],
            }
            lines.append(json.dumps(question) + "\n")
    (root / "question_sets").mkdir()
    (root / "question_sets" / "public.jsonl").write_text("".join(lines))
    return store


@asynccontextmanager
async def serving(base: BaseModel, store: Path | str, **options: Any) -> AsyncIterator[FastAPI]:
    """The app as `python -m server` builds it, on the CPU in fp32: ready, then stopped."""
    from server.settings import Settings
    from server.startup import build

    settings: dict[str, Any] = {
        "home": base.path.parents[1],
        "model": base.name,
        "store": store,
        "device": "cpu",
        "dtype": "float32",
        "num_threads": 1,
        "admin_key": "admin",
        "allowed_hosts": "test",  # what clients over ASGI call it
        **options,
    }
    with tempfile.TemporaryDirectory() as kept:
        app = build(Settings(**{"evaluations": Path(kept), **settings}))
        async with app.router.lifespan_context(app):
            await app.state.starting
            yield app
    assert not app.state.frontend.engine._thread.is_alive()
