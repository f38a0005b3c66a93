"""Third-party clients against the real server: lm-eval and schemathesis.

lm-eval scores the server as it scores the weights with its own Hugging Face backend.

`make e2e` installs them (dependency group `e2e`). Needs `crma pull` and `crma data` first.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from api_keys import add
from paths import STORE
from server_process import running_server

from crma.access.scope import Scope
from crma.core.selection import Variant
from crma.data.splits import load_split
from crma.evaluation.offline import Served
from crma.models.base_model import find_base
from crma.store.adapter_store import AdapterStore

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore"),  # lm-eval and its datasets give many
]

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

SCHEMATHESIS_CONFIG = """
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", "504"]
"""
SCHEMATHESIS_CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_server() as address:
        yield address


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(find_base(), AdapterStore(STORE), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tasks(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of lm-eval tasks on 40 holdout questions of "legal".

    `choice` asks which of five answers is the likeliest, `open` generates the answer, and `chat`
    does so from the question without the prompt format.
    """
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "legal.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents(served)))
    definitions = [
        ("choice", "multiple_choice", "prompt", CHOICE),
        ("open", "generate_until", "prompt", OPEN),
        ("chat", "generate_until", "question", OPEN),
    ]
    for name, output_type, prompt_field, rest in definitions:
        head = TASK.format(name=name, data=data, output_type=output_type, prompt_field=prompt_field)
        (folder / f"{name}.yaml").write_text(head + rest)
    return folder


def documents(served: Served) -> Iterator[dict[str, Any]]:
    """The questions with prompt, right answer, and five or fewer choices to pick it from."""
    prompt_format = served.store.task("legal").prompt_format
    assert prompt_format is not None
    labels = sorted({example.completion for example in load_split("legal", "train")})[:4]
    for example in load_split("legal", "holdout")[:40]:
        choices = sorted({example.completion, *labels})
        yield {
            "prompt": prompt_format.head + example.prompt + prompt_format.tail,
            "choices": choices,
            "answer": example.completion,
            "question": example.prompt,
            "gold": choices.index(example.completion),
        }


def evaluate(
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
    samples = evaluate(
        "local-chat-completions", ["chat"], tasks, model_args=arguments, apply_chat_template=True
    )
    return [sample["resps"][0][0] for sample in samples["chat"]]


class Scores(NamedTuple):
    """What lm-eval found on the tasks `choice` and `open`."""

    log_likelihoods: list[float]  # of every choice of every question
    answers: list[str]  # greedy
    accuracies: list[float]  # of the choices, one a question


def score(tasks: Path, model: Any, arguments: dict[str, Any]) -> Scores:
    """Score a model of lm-eval on the tasks `choice` and `open`."""
    samples = evaluate(model, ["choice", "open"], tasks, model_args=arguments)
    log_likelihoods: list[float] = []
    for sample in samples["choice"]:
        log_likelihoods += [float(response[0][0]) for response in sample["resps"]]
    answers = [sample["resps"][0][0] for sample in samples["open"]]
    accuracies = [sample["acc"] for sample in samples["choice"]]
    return Scores(log_likelihoods, answers, accuracies)


def score_through_server(tasks: Path, address: str, model: str, served: Served) -> Scores:
    arguments = {
        "model": model,
        "base_url": f"{address}/v1/completions",
        "tokenizer": str(served.base.path),
        "num_concurrent": 4,
        "batch_size": 4,
        "tokenizer_backend": "huggingface",
    }
    return score(tasks, "local-completions", arguments)


def score_with_weights(tasks: Path, variant: Variant, served: Served) -> Scores:
    """Score with lm-eval's own Hugging Face backend.

    PEFT has no CRMA backbone, so with one the backend gets the model with our hooks.
    """
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    plan: AbstractContextManager[Any] = nullcontext()
    options: dict[str, Any] = {"batch_size": 8}
    if variant == "task+crma":
        options |= {"pretrained": served.injection.model, "tokenizer": served.tokenizer}
        plan = served.injection.active(served.plan(variant, "legal"))
    else:
        options |= {"pretrained": str(served.base.path), "device": "cpu", "dtype": torch.float32}
        if variant == "task":
            options["peft"] = str(served.store.task("legal").path)
    backend = huggingface.HFLM(**options)
    with plan:
        return score(tasks, backend, {})


@pytest.mark.parametrize(
    ("variant", "model"), [("base", "base"), ("task", "legal:crma-off"), ("task+crma", "legal")]
)
def test_lm_eval_scores_the_server_as_it_scores_the_weights(
    variant: Variant,
    model: str,
    address: str,
    served: Served,
    tasks: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval")
    ours = score_through_server(tasks, address, model, served)
    theirs = score_with_weights(tasks, variant, served)
    pairs = zip(ours.log_likelihoods, theirs.log_likelihoods, strict=True)
    gaps = [abs(a - b) for a, b in pairs]
    with capsys.disabled():
        sys.stderr.write(
            f"\n{variant}: {len(gaps)} log-likelihoods, largest difference {max(gaps):.2e}, "
            f"mean {sum(gaps) / len(gaps):.2e}; "
            f"accuracy {sum(ours.accuracies) / 40}, {sum(theirs.accuracies) / 40}\n"
        )
    assert max(gaps) < 1e-3
    assert ours.answers == theirs.answers
    assert ours.accuracies == theirs.accuracies
    # The base model's chats go through its own template, which adds a system turn.
    if variant != "base":
        assert chat_answers(tasks, address, model) == theirs.answers


def check_with_schemathesis(address: str, folder: Path, key: str | None = None) -> None:
    """Have schemathesis look for faults and undocumented answers.

    A 504 is not a fault: the request chooses its deadline, and may choose an absurd one.

    Args:
        folder: for its configuration.
        key: that it sends; None: none.
    """
    pytest.importorskip("schemathesis")
    (folder / "schemathesis.toml").write_text(SCHEMATHESIS_CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"]
    command += ["--url", address]
    command += ["--checks", ",".join(SCHEMATHESIS_CHECKS)]
    command += ["--max-examples", "20"]
    command += ["--phases", "examples,fuzzing"]
    command += ["--request-timeout", "120"]
    if key is not None:
        command += ["--header", f"Authorization: {key}"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert found.returncode == 0, found.stdout[-3000:]


def test_schemathesis_finds_no_fault_and_no_undocumented_answer(
    address: str, tmp_path: Path
) -> None:
    check_with_schemathesis(address, tmp_path)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a server whose store may be changed, and scope -> a key for it."""
    folder = tmp_path_factory.mktemp("keyed")
    shutil.copytree(STORE, folder / "store", ignore=shutil.ignore_patterns(".lock"))
    file = folder / "keys.json"
    keys = {scope: add(file, f"for-{scope}", scope)["Authorization"] for scope in Scope}
    settings = {
        "CRMA_STORE": str(folder / "store"),
        "CRMA_KEYS_FILE": str(file),
        "CRMA_EVALUATIONS": str(folder / "kept"),
    }
    with running_server(**settings) as address:
        yield address, {**keys}


@pytest.mark.parametrize("scope", ["none", *Scope])
def test_schemathesis_finds_no_fault_under_any_scope(
    scope: str, keyed: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    """On a server with keys, of which it sends one for the scope, or none."""
    address, keys = keyed
    check_with_schemathesis(address, tmp_path, keys.get(scope))
