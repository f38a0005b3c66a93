"""crma.store.import_format: what an import is asked with, and whose vocabulary it may have."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from crma.core.errors import ConfigError, InvalidAdapter
from crma.models.base_model import BaseModel
from crma.models.prompts import BASE_TEMPLATE, RAW_FORMAT, Conversation, TemplateFormat, Turn
from crma.store.adapter_store import AdapterStore
from crma.store.import_format import check_vocabulary, describe, import_format

OWN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)


@pytest.fixture
def adapter(base: BaseModel, store: AdapterStore, tmp_path: Path) -> Path:
    """A PEFT folder with the base model's own tokenizer, as a trainer leaves it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(store.task("medical").path / name, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base.path / name, folder)
    return folder


@pytest.fixture
def without_template(base: BaseModel, tmp_path: Path) -> BaseModel:
    """The base model without its chat template."""
    path = tmp_path / "plain"
    shutil.copytree(base.path, path)
    (path / "chat_template.jinja").unlink()
    return replace(base, path=path)


def edit(file: Path, **change: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_the_default_is_its_own_template_then_the_base_models_then_raw(
    adapter: Path, base: BaseModel, without_template: BaseModel
) -> None:
    assert import_format(adapter, base) == BASE_TEMPLATE
    assert import_format(adapter, without_template) == RAW_FORMAT
    (adapter / "chat_template.jinja").write_text(OWN)
    for each in (base, without_template):
        assert import_format(adapter, each) == TemplateFormat(OWN)
    assert import_format(adapter, base, "chat") == BASE_TEMPLATE
    assert import_format(adapter, base, "raw") == RAW_FORMAT


@pytest.mark.parametrize("value", [OWN, [{"name": "default", "template": OWN}]])
def test_a_template_in_the_tokenizers_config_counts_too(
    value: Any, adapter: Path, base: BaseModel
) -> None:
    edit(adapter / "tokenizer_config.json", chat_template=value)
    assert import_format(adapter, base, "template") == TemplateFormat(OWN)


def test_a_template_sees_the_adapters_own_end_token(adapter: Path, base: BaseModel) -> None:
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content + eos_token }}")
    edit(adapter / "tokenizer_config.json", eos_token={"content": "<|im_start|>"})
    own = import_format(adapter, base)
    tokenizer = tiny.tokenizer()
    assert tokenizer.decode(own.encode(tokenizer, "the")) == "the<|im_start|>"
    assert own.stop_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_start|>")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("template", "the adapter's folder has no chat template"),
        ("chat", "the base model tiny has no chat template"),
        ("chatml", "there is no 'chatml'"),
    ],
)
def test_a_format_that_is_not_there_is_refused_by_name(
    name: str, said: str, adapter: Path, without_template: BaseModel
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        import_format(adapter, without_template, name)
    assert (caught.value.field, caught.value.value) == ("prompt_format", name)


def test_a_template_that_renders_no_user_turn_is_refused_with_its_own_words(
    adapter: Path, base: BaseModel
) -> None:
    (adapter / "chat_template.jinja").write_text("{{ raise_exception('tools only') }}")
    with pytest.raises(InvalidAdapter, match="tools only") as caught:
        import_format(adapter, base)
    assert caught.value.field == "chat_template.jinja"


def test_another_vocabulary_is_refused_and_its_tokens_named(adapter: Path, base: BaseModel) -> None:
    check_vocabulary(adapter, base)
    (adapter / "added_tokens.json").write_text(json.dumps({"[PAD]": 300}))
    with pytest.raises(InvalidAdapter, match=r"differ in 1 tokens, from '\[PAD\]'"):
        check_vocabulary(adapter, base)
    (adapter / "added_tokens.json").unlink()
    tokenizer = json.loads((adapter / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InvalidAdapter, match="differ in 2 tokens"):
        check_vocabulary(adapter, base)
    (adapter / "tokenizer.json").unlink()
    (adapter / "tokenizer_config.json").unlink()
    check_vocabulary(adapter, base)  # no tokenizer: the base model's


def test_an_import_records_its_format_which_answers_every_conversation(
    adapter: Path, base: BaseModel, store: AdapterStore
) -> None:
    (adapter / "chat_template.jinja").write_text(OWN)
    entry = store.import_peft(adapter, "own", base)
    recorded = AdapterStore(store.root).task("own").prompt_format
    assert recorded == entry.prompt_format == TemplateFormat(OWN)
    tokenizer = tiny.tokenizer()
    turns = (Turn("user", "the"), Turn("assistant", "is"), Turn("user", "free"))
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=OWN, add_generation_prompt=True
    )["input_ids"]
    assert recorded.encode_conversation(tokenizer, Conversation(turns)) == expected
    assert describe(recorded) == "template: the adapter's own chat template"
    assert store.verify(base=base) == []


@pytest.mark.parametrize(("name", "recorded"), [("raw", RAW_FORMAT), ("chat", BASE_TEMPLATE)])
def test_every_format_survives_the_store(
    name: str, recorded: Any, adapter: Path, base: BaseModel, store: AdapterStore
) -> None:
    entry = store.import_peft(adapter, "other", base, prompt_format=name)
    assert AdapterStore(store.root).task("other").prompt_format == entry.prompt_format == recorded
    assert describe(recorded).startswith(name)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", {"model": []}),
        ("tokenizer.json", {"model": {"vocab": [["a"]]}}),
        ("tokenizer.json", {"added_tokens": [{"content": "x"}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}),
    ],
)
def test_a_file_that_no_tokenizer_writes_is_refused_by_name(
    file: str, change: dict[str, Any], adapter: Path, base: BaseModel, store: AdapterStore
) -> None:
    """It was a KeyError, and over HTTP a 500."""
    edit(adapter / file, **change)
    with pytest.raises(InvalidAdapter) as caught:
        store.import_peft(adapter, "new", base)
    assert caught.value.field == file
