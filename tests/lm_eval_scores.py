"""What lm-eval finds on a server, and on the weights with its own Hugging Face backend.

Its tasks are 40 holdout questions of "legal".
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crma.core.selection import Variant
from crma.data.splits import load_split
from crma.evaluation.offline import Served

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{{prompt_field}}}}}"
target_delimiter: ""
output_type: {output_type}
"""
CHOICE = "doc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n"
OPEN = "doc_to_target: answer\ngeneration_kwargs: {until: ['<|im_end|>'], max_gen_toks: 16}\n"
NUM_QUESTIONS = 40
TOLERANCE = 1e-3  # of log-likelihoods in float32
MODELS: list[tuple[Variant, str]] = [  # variants, and what a server calls them
    ("base", "base"),
    ("task", "legal:crma-off"),
    ("task+crma", "legal"),
]


def check_scores(tasks: Path, address: str, variant: Variant, model: str, served: Served) -> str:
    """Check that lm-eval scores a server as it scores the weights; a line of what it found."""
    theirs = score_with_weights(tasks, variant, served)
    found = compared(score_through_server(tasks, address, model, served), theirs)
    # The base model's chats go through its own template, which adds a system turn.
    if variant != "base":
        assert chat_answers(tasks, address, model) == theirs.answers
    return found


def write_tasks(folder: Path, served: Served) -> Path:
    """Write the definitions of three tasks into a folder.

    `choice` asks which of five answers is the likeliest, `open` generates the answer, and `chat`
    does so from the question without the prompt format.
    """
    data = folder / "legal.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in _documents(served)))
    definitions = [
        ("choice", "multiple_choice", "prompt", CHOICE),
        ("open", "generate_until", "prompt", OPEN),
        ("chat", "generate_until", "question", OPEN),
    ]
    for name, output_type, prompt_field, rest in definitions:
        head = TASK.format(name=name, data=data, output_type=output_type, prompt_field=prompt_field)
        (folder / f"{name}.yaml").write_text(head + rest)
    return folder


def _documents(served: Served) -> Iterator[dict[str, Any]]:
    """The questions with prompt, right answer, and five or fewer choices to pick it from."""
    prompt_format = served.store.task("legal").prompt_format
    assert prompt_format is not None
    labels = sorted({example.completion for example in load_split("legal", "train")})[:4]
    for example in load_split("legal", "holdout")[:NUM_QUESTIONS]:
        choices = sorted({example.completion, *labels})
        yield {
            "prompt": prompt_format.head + example.prompt + prompt_format.tail,
            "choices": choices,
            "answer": example.completion,
            "question": example.prompt,
            "gold": choices.index(example.completion),
        }


def _evaluate(
    model: Any, names: list[str], tasks: Path, **options: Any
) -> dict[str, list[dict[str, Any]]]:
    """Run lm-eval; the logged samples of each task, in the order of its documents."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager: Any = TaskManager(include_path=str(tasks))
    found = lm_eval.simple_evaluate(
        model, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0, **options
    )
    return {
        name: sorted(found["samples"][name], key=lambda sample: sample["doc_id"]) for name in names
    }


def chat_answers(tasks: Path, address: str, model: str) -> list[str]:
    """The server's greedy answers to the questions, each of them one user turn of a chat."""
    arguments = {
        "model": model,
        "base_url": f"{address}/v1/chat/completions",
        "num_concurrent": 4,
    }
    samples = _evaluate(
        "local-chat-completions", ["chat"], tasks, model_args=arguments, apply_chat_template=True
    )
    return [sample["resps"][0][0] for sample in samples["chat"]]


class Scores(NamedTuple):
    """What lm-eval found on the tasks `choice` and `open`."""

    log_likelihoods: list[float]  # of every choice of every question
    answers: list[str]  # greedy
    accuracies: list[float]  # of the choices, one a question


def _score(tasks: Path, model: Any, arguments: dict[str, Any]) -> Scores:
    """Score a model of lm-eval on the tasks `choice` and `open`."""
    samples = _evaluate(model, ["choice", "open"], tasks, model_args=arguments)
    log_likelihoods: list[float] = []
    for sample in samples["choice"]:
        log_likelihoods += [float(response[0][0]) for response in sample["resps"]]
    answers = [sample["resps"][0][0] for sample in samples["open"]]
    accuracies = [sample["acc"] for sample in samples["choice"]]
    return Scores(log_likelihoods, answers, accuracies)


def score_through_server(tasks: Path, address: str, model: str, served: Served) -> Scores:
    """Score what a server answers as `model`."""
    arguments = {
        "model": model,
        "base_url": f"{address}/v1/completions",
        "tokenizer": str(served.base.path),
        "num_concurrent": 4,
        "batch_size": 4,
        "tokenizer_backend": "huggingface",
    }
    return _score(tasks, "local-completions", arguments)


def score_with_weights(tasks: Path, variant: Variant, served: Served) -> Scores:
    """Score with lm-eval's own Hugging Face backend.

    PEFT has no CRMA backbone, so with one the backend gets the model with our hooks.
    """
    from lm_eval.models.huggingface import HFLM

    plan: AbstractContextManager[Any] = nullcontext()
    options: dict[str, Any] = {"batch_size": 8}
    if variant == "task+crma":
        options |= {"pretrained": served.injection.model, "tokenizer": served.tokenizer}
        plan = served.injection.active(served.plan(variant, "legal"))
    else:
        options |= {"pretrained": str(served.base.path), "device": "cpu", "dtype": torch.float32}
        if variant == "task":
            options["peft"] = str(served.store.task("legal").path)
    backend = HFLM(**options)
    with plan:
        return _score(tasks, backend, {})


def compared(ours: Scores, theirs: Scores) -> str:
    """Check that two ways to score found the same; a line that says what they found."""
    pairs = zip(ours.log_likelihoods, theirs.log_likelihoods, strict=True)
    gaps = [abs(a - b) for a, b in pairs]
    assert max(gaps) < TOLERANCE
    assert ours.answers == theirs.answers
    assert ours.accuracies == theirs.accuracies
    return (
        f"{len(gaps)} log-likelihoods, largest difference {max(gaps):.2e}, "
        f"mean {sum(gaps) / len(gaps):.2e}; accuracy {sum(ours.accuracies) / NUM_QUESTIONS}"
    )
