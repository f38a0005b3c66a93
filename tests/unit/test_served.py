"""crma.served: a store's adapters without a server; each variant with its own, nothing instead of what is missing."""

from pathlib import Path

import pytest
import tiny

from crma.errors import ConfigError, LineageMismatch, NotFound
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
        tiny.publish(store, base, name, seed, backbone=under)
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
    crma, texts = served.store.backbone().digest, set()
    for question, item in zip(questions.questions, body["items"], strict=True):
        task = served.store.task(question.task).digest
        for variant, uses in (("task+crma", (task, crma)), ("task", (task, None)), ("base", (None, None))):
            selection, text = served.selection(variant, question.task), item["outputs"][variant]["text"]
            assert selection == uses
            assert served.answers(
                question.task, served.plan(variant, question.task), [question.question], max_tokens=5
            ) == [text]
            texts.add(text)
    assert len(texts) > 6
    assert body["provenance"]["base"] == served.base.digest
