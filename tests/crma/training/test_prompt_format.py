"""crma.training.prompt_format: what a run trains with is recorded, and is what serves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from crma.core.errors import ConfigError
from crma.data.examples import Example
from crma.models.base_model import BaseModel
from crma.models.prompts import RAW_FORMAT, PromptFormat, chat_format
from crma.training.config import TrainConfig
from crma.training.prompt_format import format_of
from crma.training.protocol import Run


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.from_dict({"tasks": ["first"], **changes})


def test_a_base_without_a_template_is_trained_raw_and_the_message_says_how(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = tiny.tokenizer()
    assert format_of(config(), tokenizer) == chat_format(tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match='"raw" or the file of a template') as caught:
        format_of(config(), tokenizer)
    assert "the base model has no chat template" in caught.value.message
    assert (caught.value.field, caught.value.value) == ("prompt_format", "chat")
    assert format_of(config(prompt_format="raw"), tokenizer) == RAW_FORMAT


def test_a_template_file_gives_the_markup(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    file = tmp_path / "qa.jinja"
    file.write_text(
        "{% for m in messages %}Q: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %} A:{% endif %}"
    )
    made = format_of(config(prompt_format=str(file)), tokenizer)
    assert made == PromptFormat("Q: ", "<|im_end|> A:", "<|im_end|>")
    with pytest.raises(ConfigError, match="No such file") as caught:
        format_of(config(prompt_format=str(tmp_path / "absent")), tokenizer)
    assert caught.value.field == "prompt_format"
    absent = str(tmp_path / "absent")
    assert caught.value.message == f"the file {absent!r} cannot be read: No such file or directory"


def test_a_run_trains_and_publishes_in_the_configured_format(
    base: BaseModel, write_task: Callable[..., None], tmp_path: Path
) -> None:
    write_task(tmp_path / "first", ("yes", "no"))
    values = {
        "tasks": [str(tmp_path / "first")],
        "prompt_format": "raw",
        "epochs": 1,
        "dtype": "float32",
        "lora": {"rank": 2, "alpha": 4.0},
        "crma": {"num_streams": 2, "stream_rank": 2},
    }
    run = Run(TrainConfig.from_dict(values), base, tmp_path / "run", lambda *_: None)
    tokenizer = run.evaluator.tokenizer
    [row] = run.evaluator.encode([Example("the <|im_end|>", "is")])
    assert row.prompt == tokenizer.encode("the <|im_end|>", split_special_tokens=True)
    assert row.answer[-1] == tokenizer.eos_token_id
    run.execute()
    assert run.snapshots.store.task("first").prompt_format == RAW_FORMAT
