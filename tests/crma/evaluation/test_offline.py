"""crma.evaluation.offline: an ablation without a server uses exactly the adapters it names."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from crma.core.errors import ConfigError, LineageMismatch, NotFound
from crma.data.examples import Example
from crma.evaluation import offline
from crma.evaluation.ablation import AblationSettings
from crma.evaluation.baselines import naive_bayes
from crma.evaluation.offline import Served, ablate
from crma.evaluation.question_set import QuestionSet, inline_question_set
from crma.models.base_model import BaseModel
from crma.models.prompts import encode_text
from crma.store.adapter_store import AdapterStore

CHOICES = ["the other answers", "free", "3 €"]
SELECTED = {"task+crma": (True, True), "task": (True, False), "base": (False, False)}


def item(task: str, i: int, **change: Any) -> dict[str, Any]:
    made = {"id": f"{task}-{i}", "task": task, "question": f"Is it {i}?", "answers": ["x"]}
    return made | change


QUESTIONS = inline_question_set([item(task, i) for i in range(3) for task in ("one", "two")])


def ignore(_: str) -> None:
    """Discard a line of progress."""


@pytest.fixture(scope="module")
def served(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Tasks "one" and "two" trained under a backbone, and "alone" that never saw one."""
    store = AdapterStore(tmp_path_factory.mktemp("store"))
    backbone = tiny.publish_backbone(store, base).digest
    tiny.publish(store, base, "one", 0, backbone=backbone)
    tiny.publish(store, base, "two", 1, backbone=backbone)
    tiny.publish(store, base, "alone", 2, backbone=None)
    return Served(base, store, device="cpu", dtype="float32")


def test_a_missing_adapter_is_refused_and_never_replaced_by_the_base(
    served: Served, tmp_path: Path
) -> None:
    with pytest.raises(NotFound):
        served.selection("task", "three")
    with pytest.raises(LineageMismatch):
        served.selection("task+crma", "alone")
    without_backbone = served.with_store(AdapterStore(tmp_path))
    with pytest.raises(ConfigError, match="needs"):
        without_backbone.selection("crma", "one")


def test_choices_are_refused_where_nothing_can_constrain_an_answer(served: Served) -> None:
    settings = AblationSettings(("task",), choices=("x", "y"))
    with pytest.raises(ConfigError, match="POST /ablation") as caught:
        ablate(served, QUESTIONS, settings, note=ignore)
    assert caught.value.field == "choices"


def test_an_ablation_answers_each_question_as_it_is_answered_alone(served: Served) -> None:
    notes: list[str] = []
    settings = AblationSettings(("task+crma", "task", "base", "base"), max_tokens=5)
    body = ablate(served, QUESTIONS, settings, note=notes.append)
    assert list(body["variants"]) == ["task+crma", "task", "base", "base#2"]
    assert len(notes) == 6  # two tasks, three variants; the null run shares its answers
    backbone = served.store.backbone()
    assert backbone is not None
    texts = set()
    for question, shown in zip(QUESTIONS.questions, body["items"], strict=True):
        task = served.store.task(question.task)
        for variant, (with_task, with_crma) in SELECTED.items():
            assert served.selection(variant, question.task) == (
                task.digest if with_task else None,
                backbone.digest if with_crma else None,
            )
            plan = served.plan(variant, question.task)
            alone = served.answers(question.task, plan, [question.question], max_tokens=5)
            assert [shown["outputs"][variant]["text"]] == alone
            texts.update(alone)
    assert len(texts) > 6
    assert body["provenance"]["base"] == served.base.digest


def test_variants_that_resolve_to_the_same_adapters_share_answers_unless_repeated(
    served: Served,
) -> None:
    notes: list[str] = []
    variants = ("task", "task@v1", "task")
    for repeat, num_calls in ((False, 2), (True, 6)):
        notes.clear()
        settings = AblationSettings(variants, max_tokens=3, repeat=repeat)
        body = ablate(served, QUESTIONS, settings, note=notes.append)
        assert list(body["variants"]) == ["task", "task@v1", "task#2"]
        assert len(notes) == num_calls
        for shown in body["items"]:
            assert len({output["text"] for output in shown["outputs"].values()}) == 1


def test_controls_strengths_and_naive_bayes_are_further_rows(
    served: Served, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = AdapterStore(tmp_path)
    for seed, task in enumerate(("one", "two"), start=20):
        tiny.publish(control, base, task, seed, backbone=None)
    train = [Example(f"Is it {i}?", str(i)) for i in range(3)]

    def training_split(source: str, split: str) -> list[Example]:
        assert (source, split) == ("folder", "train")
        return train

    monkeypatch.setattr(offline, "load_split", training_split)
    settings = AblationSettings(("task+crma", "task"), max_tokens=5)
    further: Any = {
        "control": control,
        "strengths": [0, 0.5, 1],
        "naive_bayes_of": dict.fromkeys(("one", "two"), "folder"),
    }
    body = ablate(served, QUESTIONS, settings, **further, note=ignore)
    strengths = ["task+crma x0", "task+crma x0.5", "task+crma x1"]
    assert list(body["variants"]) == ["task+crma", "task", *strengths, "control", "naive_bayes"]
    by_control = served.with_store(control)
    for question, shown in zip(QUESTIONS.questions, body["items"], strict=True):
        texts = {label: output["text"] for label, output in shown["outputs"].items()}
        assert texts["task+crma x0"] == texts["task"]
        assert texts["task+crma x1"] == texts["task+crma"]
        plan = by_control.plan("task", question.task)
        prompts = [question.question]
        assert by_control.answers(question.task, plan, prompts, 5) == [texts["control"]]
        assert naive_bayes(train, prompts) == [texts["naive_bayes"]]


def logprobs_by_hand(served: Served, question: str, choices: list[str]) -> list[float]:
    """Return the log-probability of each choice: one forward pass each, without padding."""
    prompt = served.evaluator("one").fmt.encode(served.tokenizer, question)
    logprobs = []
    for choice in choices:
        ids = encode_text(served.tokenizer, choice)
        with torch.inference_mode(), served.injection.active(served.plan("task+crma", "one")):
            output = served.injection.model(input_ids=torch.tensor([[*prompt, *ids]]))
        logits = output.logits[0, len(prompt) - 1 : -1]
        of_ids = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])
        logprobs.append(of_ids.sum().item())
    return logprobs


@pytest.fixture(scope="module")
def choice_set() -> QuestionSet:
    items = [item("one", i, answers=["free"], choices=CHOICES) for i in range(3)]
    return inline_question_set(items)


def test_the_chosen_text_is_the_likeliest_by_one_forward_pass_at_a_time(
    served: Served, choice_set: QuestionSet
) -> None:
    settings = AblationSettings(("task+crma",), scorer="choice")
    body = ablate(served, choice_set, settings, note=ignore)
    for question, shown in zip(choice_set.questions, body["items"], strict=True):
        output = shown["outputs"]["task+crma"]
        expected = logprobs_by_hand(served, question.question, CHOICES)
        assert output["logprobs"] == pytest.approx(expected, abs=1e-4)
        assert output["text"] == CHOICES[expected.index(max(expected))]


def test_perplexity_is_that_of_the_answer_by_one_forward_pass_at_a_time(
    served: Served, choice_set: QuestionSet
) -> None:
    settings = AblationSettings(("task+crma",), scorer="perplexity")
    body = ablate(served, choice_set, settings, note=ignore)
    num_tokens = len(encode_text(served.tokenizer, "free"))
    for question, shown in zip(choice_set.questions, body["items"], strict=True):
        (expected,) = logprobs_by_hand(served, question.question, ["free"])
        nats = shown["outputs"]["task+crma"]["logprob_per_token"]
        assert nats == pytest.approx(expected / num_tokens, abs=1e-4)


def test_raw_questions_have_the_tokens_of_the_tokenizer_and_the_stop_token_of_the_task(
    served: Served,
) -> None:
    question = "Is <|im_end|> it?"
    evaluator = served.evaluator("one", raw=True)
    assert evaluator.fmt.encode(served.tokenizer, question) == served.tokenizer(question).input_ids
    assert evaluator.stop_id == served.evaluator("one").stop_id
    asked = inline_question_set([item("one", 1, question=question)])
    settings = {"variants": ("task",), "max_tokens": 5}
    raw, formatted = (
        ablate(served, asked, AblationSettings(raw=raw, **settings), note=ignore)
        for raw in (True, False)
    )
    alone = served.answers("one", served.plan("task", "one"), [question], 5, raw=True)
    texts = [each["items"][0]["outputs"]["task"]["text"] for each in (raw, formatted)]
    assert texts[0] == alone[0]
    assert texts[0] != texts[1]


def test_a_base_without_a_chat_template_is_asked_raw_and_the_message_says_so(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template: ask raw questions") as caught:
        served.evaluator("unheard-of")
    assert caught.value.field == "raw"
    evaluator = served.evaluator("unheard-of", raw=True)
    assert evaluator.stop_id == served.tokenizer.eos_token_id
