"""crma.served: a store's adapters without a server; each variant with its own, nothing instead of what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from crma.errors import ConfigError, LineageMismatch, NotFound
from crma.generate import generate
from crma.pull import BaseModel
from crma.question_set import parse_question_set
from crma.served import Served, ablate
from crma.store import AdapterStore

LINE = '{{"id": "{0}-{1}", "task": "{0}", "question": "Is it {1}?", "answers": ["x"]}}\n'
QUESTIONS = "".join(LINE.format(task, i) for i in range(3) for task in ("one", "two")).encode()


@pytest.fixture(scope="module")
def served(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Tasks one and two under a backbone, and one that never saw it."""
    store = AdapterStore(tmp_path_factory.mktemp("store"))
    backbone = tiny.publish_backbone(store, base).digest
    for seed, (name, under) in enumerate((("one", backbone), ("two", backbone), ("alone", None))):
        tiny.publish(store, base, name, seed, under=under)
    return Served(base, store, device="cpu", dtype="float32")


def test_what_is_not_there_is_refused_and_never_the_base(served: Served, base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        served.selection("task", "three")
    with pytest.raises(LineageMismatch):
        served.selection("task+crma", "alone")
    without = Served(base, AdapterStore(tmp_path), device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match="needs"):
        without.selection("crma", "one")


def test_an_ablation_answers_each_question_as_it_is_answered_alone(served: Served) -> None:
    questions, notes = parse_question_set("mine", QUESTIONS), []
    body = ablate(served, questions, ("task+crma", "task", "base", "base"), max_tokens=5, note=notes.append)
    assert list(body["variants"]) == ["task+crma", "task", "base", "base#2"]
    assert len(notes) == 6  # two tasks; the null run shares its answers
    crma, stop, texts = served.store.backbone().digest, tiny.FORMAT.stop_id(served.tokenizer), set()
    for question, item in zip(questions.questions, body["items"], strict=True):
        prompt = tiny.FORMAT.encode(served.tokenizer, question.question)
        for variant in ("task+crma", "task", "base"):
            selection = served.selection(variant, question.task)
            assert selection.crma_digest == (crma if "crma" in variant else None)
            assert selection.task_digest == (served.store.task(question.task).digest if "task" in variant else None)
            plan = served.plan(selection)
            ids = generate(served.injection, prompt, plan, max_tokens=5, stop_ids=[stop]).token_ids
            texts.add(served.tokenizer.decode(ids, skip_special_tokens=True))
            assert item["outputs"][variant]["text"] == served.tokenizer.decode(ids, skip_special_tokens=True)
    assert len(texts) > 6
    assert body["provenance"]["base"] == served.base.digest
