"""crma.evaluation.offline: a store's adapters without a server; each variant with its own, nothing instead of what is missing."""

from pathlib import Path

import pytest
import tiny
import torch

from crma.core.errors import ConfigError, LineageMismatch, NotFound
from crma.evaluation.offline import Served, ablate
from crma.evaluation.question_set import inline_question_set, parse_question_set
from crma.models.base_model import BaseModel
from crma.models.prompts import encode_text
from crma.store.adapter_store import AdapterStore

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


def test_what_is_not_there_is_refused_and_never_the_base(
    served: Served, base: BaseModel, tmp_path: Path
) -> None:
    with pytest.raises(NotFound):
        served.selection("task", "three")
    with pytest.raises(LineageMismatch):
        served.selection("task+crma", "alone")
    without = Served(base, AdapterStore(tmp_path), device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match="needs"):
        without.selection("crma", "one")


def test_an_ablation_answers_each_question_as_it_is_answered_alone(served: Served) -> None:
    questions, notes = parse_question_set("mine", QUESTIONS), []
    body = ablate(
        served, questions, ("task+crma", "task", "base", "base"), max_tokens=5, note=notes.append
    )
    assert list(body["variants"]) == ["task+crma", "task", "base", "base#2"]
    assert len(notes) == 6  # two tasks; the null run shares its answers
    crma, texts = served.store.backbone().digest, set()
    for question, item in zip(questions.questions, body["items"], strict=True):
        task = served.store.task(question.task).digest
        for variant, uses in (
            ("task+crma", (task, crma)),
            ("task", (task, None)),
            ("base", (None, None)),
        ):
            selection, text = (
                served.selection(variant, question.task),
                item["outputs"][variant]["text"],
            )
            assert selection == uses
            used = served.plan(variant, question.task)
            assert served.answers(question.task, used, [question.question], max_tokens=5) == [text]
            texts.add(text)
    assert len(texts) > 6
    assert body["provenance"]["base"] == served.base.digest


def test_likelihoods_choose_and_measure_as_one_forward_pass_at_a_time_says(served: Served) -> None:
    choices = ["the other answers", "free", "3 €"]
    lines = [
        {
            "id": str(i),
            "task": "one",
            "question": f"Is it {i}?",
            "answers": choices[1:2],
            "choices": choices,
        }
        for i in range(3)
    ]
    questions = inline_question_set(lines)
    plan, fmt = served.plan("task+crma", "one"), served.evaluator("one").fmt
    expected = []
    for question in questions.questions:
        prompt = fmt.encode(served.tokenizer, question.question)
        for choice in choices:
            ids = encode_text(served.tokenizer, choice)
            with torch.inference_mode(), served.injection.active(plan):
                logits = served.injection.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[
                    0, len(prompt) - 1 : -1
                ]
            expected.append(
                logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum().item()
            )
    body = ablate(served, questions, ["task+crma"], scorer="choice", note=lambda _: None)
    outputs = [item["outputs"]["task+crma"] for item in body["items"]]
    assert [each for output in outputs for each in output["logprobs"]] == pytest.approx(
        expected, abs=1e-4
    )
    assert [output["text"] for output in outputs] == [
        choices[max(range(3), key=expected[3 * i :][:3].__getitem__)] for i in range(3)
    ]
    body = ablate(served, questions, ["task+crma"], scorer="perplexity", note=lambda _: None)
    nats = [item["outputs"]["task+crma"]["logprob_per_token"] for item in body["items"]]
    assert nats == pytest.approx(
        [each / len(encode_text(served.tokenizer, "free")) for each in expected[1::3]], abs=1e-4
    )
