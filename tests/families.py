"""Tokenizers of model families: their real chat templates and special tokens, a tiny vocabulary.

The templates are in `tests/templates/`; its README says where they come from.
"""

import json
from functools import cache
from typing import Any, NamedTuple

from paths import ROOT
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = ROOT / "tests" / "templates"
# Teaches merges across every border between markup and text: the oracle has to merge there too.
TEXT = [
    "user\n\nthe assistant\n the system\n\n\nis",
    "[INST] the [/INST] is </s>\n\n<<SYS>>\n\nthe\n<</SYS>>\n\n",
    "<|user|>\nthe<|end|>\n\n<think>\n\n</think>\n\nthe naïve café 日本 🙂 12 345",
]


class Family(NamedTuple):
    """What is special to a family's tokenizer.

    Args:
        special: its special tokens; bos and eos are among them.
        words: added tokens that are not special.
        sentencepiece: the vocabulary starts words with ▁, and so does the start of a text.
        strips: special tokens take the white space after them, as those of Phi-3.
    """

    special: tuple[str, ...]
    bos: str | None
    eos: str
    words: tuple[str, ...] = ()
    sentencepiece: bool = False
    strips: bool = False


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
COHERE = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>")
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
R1 = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
FAMILIES = {
    "smollm2": Family(CHATML, "<|im_start|>", "<|im_end|>"),
    "qwen2_5": Family(CHATML, None, "<|im_end|>", THINK),
    "qwen3": Family(CHATML, None, "<|im_end|>", THINK),
    "llama2": Family(("<s>", "</s>"), "<s>", "</s>", sentencepiece=True),
    "llama3_1": Family(("<|begin_of_text|>", *HEADERS), "<|begin_of_text|>", "<|eot_id|>"),
    "mistral": Family(("<s>", "</s>"), "<s>", "</s>", sentencepiece=True),
    "gemma3": Family(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "phi3": Family(
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<s>",
        "<|endoftext|>",
        sentencepiece=True,
        strips=True,
    ),
    "zephyr": Family(("<s>", "</s>"), "<s>", "</s>", sentencepiece=True),
    "deepseek_r1": Family(R1, R1[0], R1[1], THINK),
    "glm4": Family((*GLM, "<|endoftext|>"), None, "<|endoftext|>", THINK),
    "cohere": Family(("<BOS_TOKEN>", *COHERE, "<|CHATBOT_TOKEN|>"), "<BOS_TOKEN>", COHERE[1]),
}


@cache
def tokenizer_of(name: str, *, renamed: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a family.

    Args:
        renamed: every special token has another name, in the template too. What spells a special
            token of the family is mere text for this twin.
    """
    family = FAMILIES[name]
    template = (TEMPLATES / f"{name}.jinja").read_text()
    backend = json.loads(_trained(family).to_str())
    new_names = {}
    if renamed:
        new_names = {token: f"⟪{i}⟫" for i, token in enumerate(family.special)}
    for token, new_name in sorted(new_names.items(), key=lambda each: -len(each[0])):
        template = template.replace(token, new_name)
    vocabulary = backend["model"]["vocab"]
    backend["model"]["vocab"] = {new_names.get(text, text): i for text, i in vocabulary.items()}
    for token in backend["added_tokens"]:
        token["content"] = new_names.get(token["content"], token["content"])
    roles: dict[str, Any] = {"eos_token": new_names.get(family.eos, family.eos)}
    if family.bos is not None:
        roles["bos_token"] = new_names.get(family.bos, family.bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), chat_template=template, **roles
    )


def _trained(family: Family) -> Tokenizer:
    """A BPE with the family's special tokens first."""
    backend = Tokenizer(models.BPE(byte_fallback=family.sentencepiece))
    if family.sentencepiece:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        initial_alphabet=[] if family.sentencepiece else pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(each, rstrip=family.strips) for each in family.special],
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 4, trainer)
    if family.sentencepiece:
        backend = _with_bytes(backend)
    backend.add_tokens([AddedToken(each) for each in family.words])
    return backend


def _with_bytes(backend: Tokenizer) -> Tokenizer:
    """The tokenizer with a token for each byte, which sentencepiece falls back on."""
    made = json.loads(backend.to_str())
    vocabulary = made["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    return Tokenizer.from_str(json.dumps(made))
