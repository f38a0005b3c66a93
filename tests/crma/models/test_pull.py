"""crma.models.pull and base_model: the cache holds a model complete, with its digests, or not."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, AutoTokenizer

from crma.core.digests import content_digest, file_digest
from crma.core.errors import PullError
from crma.models.base_model import BaseModel, find_base, read_base
from crma.models.pull import MODEL_SUFFIXES, NO_MODEL_FILES, pull


@pytest.fixture
def folder(base: BaseModel, tmp_path: Path) -> Path:
    """A model in the Hugging Face layout."""
    return shutil.copytree(base.path.parents[2] / "tiny", tmp_path / "tiny-llama")


def test_a_local_folder_is_pulled_and_loads_with_the_same_weights_and_tokenizer(
    folder: Path, tmp_path: Path
) -> None:
    base = pull(str(folder), home=tmp_path / "home")
    assert base.path == tmp_path / "home" / "models" / "tiny-llama"
    assert base.sources == {path.name: file_digest(path) for path in folder.iterdir()}
    assert base.digest == content_digest(base.sources)
    assert read_base(base.path, verify=True) == base
    assert find_base("tiny-llama", home=tmp_path / "home") == base

    given = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    pulled = AutoModelForCausalLM.from_pretrained(base.path).state_dict()
    assert all(torch.equal(given[name], pulled[name]) for name in given)
    text = "café 🙂"
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    assert tokenizer(text).input_ids == tiny.tokenizer()(text).input_ids


def test_pulling_again_does_no_work(folder: Path, tmp_path: Path) -> None:
    base = pull(str(folder), home=tmp_path / "home")
    written = base.path.stat().st_mtime_ns
    assert pull(str(folder), home=tmp_path / "home") == base
    assert base.path.stat().st_mtime_ns == written


def test_a_pulled_folder_is_used_where_it_lies(folder: Path, tmp_path: Path) -> None:
    base = pull(str(folder), home=tmp_path / "home")
    assert pull(str(base.path), home=tmp_path / "elsewhere") == base
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("raised", "reported"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, PullError)]
)
def test_an_interrupted_pull_leaves_nothing_and_can_be_repeated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: type, reported: type
) -> None:
    copy = shutil.copyfile
    copied: list[Path] = []

    def copy_two_files(source: Path, target: Path) -> None:
        if len(copied) == 2:
            raise raised
        copied.append(copy(source, target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copy_two_files)
        with pytest.raises(reported):
            pull(str(folder), home=tmp_path)
    assert list((tmp_path / "models").iterdir()) == []
    assert read_base(pull(str(folder), home=tmp_path).path, verify=True).name == "tiny-llama"


def test_the_next_pull_finds_a_damaged_file(folder: Path, tmp_path: Path) -> None:
    base = pull(str(folder), home=tmp_path)
    tiny.flip_bit(base.path / "model.safetensors")
    assert read_base(base.path) == base
    with pytest.raises(PullError, match=r"model\.safetensors.*Delete .* and pull the model again"):
        pull(str(folder), home=tmp_path)


def test_a_base_json_that_is_unreadable_or_contradicts_itself_is_refused(tmp_path: Path) -> None:
    lies = '{"name": "x", "digest": "sha256:0", "sources": {"a": "sha256:1"}, "files": {}}'
    for content in ("", "[]", '{"name": "x"}', lies):
        (tmp_path / "base.json").write_text(content)
        with pytest.raises(PullError, match="is damaged"):
            read_base(tmp_path)


def test_another_model_of_the_same_name_is_refused(folder: Path, tmp_path: Path) -> None:
    pull(str(folder), home=tmp_path)
    tiny.flip_bit(folder / "config.json")
    with pytest.raises(PullError, match="already holds another model named tiny-llama"):
        pull(str(folder), home=tmp_path)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_folder_without_a_config_or_safe_weights_is_refused(
    folder: Path, tmp_path: Path, missing: str
) -> None:
    (folder / missing).rename(folder / "pytorch_model.bin")
    with pytest.raises(PullError, match="pickled ones can run code"):
        pull(str(folder), home=tmp_path)


@pytest.mark.parametrize("source", ["no-such-folder", "../up", "a/b/c"])
def test_an_unknown_source_is_refused_before_anything_is_written(
    tmp_path: Path, source: str
) -> None:
    home = tmp_path / "home"
    for look_up in (pull, find_base):
        with pytest.raises(PullError, check=lambda error: error.value == source):
            look_up(source, home=home)
    assert not home.exists()


def test_a_repository_brings_no_hidden_files_which_would_be_taken_for_our_records() -> None:
    names = ["config.json", ".serving.json", ".tokenizer.json", "onnx/config.json", "base.bin"]
    allowed = [f"*{suffix}" for suffix in MODEL_SUFFIXES]
    taken = filter_repo_objects(names, allow_patterns=allowed, ignore_patterns=NO_MODEL_FILES)
    assert list(taken) == ["config.json"]
