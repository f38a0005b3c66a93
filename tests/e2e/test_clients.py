"""Other people's clients on the real server, unchanged: lm-eval against its own Hugging Face backend, schemathesis.

They come with `make e2e` (the dependency group `e2e`). Needs `crma pull` and `crma data` before.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT

from crma.core.selection import Variant
from crma.data.splits import load_split
from crma.evaluation.offline import Served
from crma.models.base_model import find_base
from crma.store.adapter_store import AdapterStore

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore"),
]  # lm-eval's and its datasets' own

TASK = """
task: {0}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {1}}}}}
test_split: test
doc_to_text: "{{{{{3}}}}}"
target_delimiter: ""
output_type: {2}
"""
CHOICE = "doc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n"
OPEN = "doc_to_target: answer\ngeneration_kwargs: {until: ['<|im_end|>'], max_gen_toks: 16}\n"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server in fp32 on the shipped store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {
        "CRMA_PORT": port,
        "CRMA_DTYPE": "float32",
        "CRMA_STORE": str(ROOT / "adapters_store"),
    }
    command = [sys.executable, "-m", "server"]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | settings, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        assert any(" ready: " in line for line in server.stderr)
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield f"http://127.0.0.1:{port}"
        server.terminate()


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(find_base(), AdapterStore(ROOT / "adapters_store"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tasks(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 holdout questions of "legal": which of five answers is the likeliest, and the answer in full."""
    folder, fmt = tmp_path_factory.mktemp("tasks"), served.store.task("legal").prompt_format
    assert fmt is not None
    labels = sorted({example.completion for example in load_split("legal", "train")})[:4]
    lines = []
    for each in load_split("legal", "holdout")[:40]:
        choices = sorted({each.completion, *labels})
        line = {
            "prompt": fmt.head + each.prompt + fmt.tail,
            "choices": choices,
            "answer": each.completion,
        }
        line["question"] = each.prompt
        lines.append(json.dumps(line | {"gold": choices.index(each.completion)}) + "\n")
    (folder / "legal.jsonl").write_text("".join(lines))
    kinds = (
        ("choice", "multiple_choice", "prompt", CHOICE),
        ("open", "generate_until", "prompt", OPEN),
    )
    for name, kind, text, rest in (*kinds, ("chat", "generate_until", "question", OPEN)):
        (folder / f"{name}.yaml").write_text(
            TASK.format(name, folder / "legal.jsonl", kind, text) + rest
        )
    return folder


def chats(tasks: Path, address: str, model: str) -> list[str]:
    """The greedy answers to the questions, each one user turn of a chat."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    place = {"model": model, "base_url": f"{address}/v1/chat/completions", "num_concurrent": 4}
    options: Any = {
        "tasks": ["chat"],
        "task_manager": TaskManager(include_path=str(tasks)),
        "apply_chat_template": True,
    }
    found = lm_eval.simple_evaluate(
        "local-chat-completions", model_args=place, bootstrap_iters=0, **options
    )
    return [
        each["resps"][0][0]
        for each in sorted(found["samples"]["chat"], key=lambda each: each["doc_id"])
    ]


def samples(
    tasks: Path, model: Any, arguments: dict[str, Any]
) -> tuple[list[float], list[str], list[float]]:
    """Log-likelihood of every choice, the greedy answers, and the accuracy of the choices."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    options: Any = {
        "tasks": ["choice", "open"],
        "task_manager": TaskManager(include_path=str(tasks)),
    }
    found = lm_eval.simple_evaluate(
        model, model_args=arguments, log_samples=True, bootstrap_iters=0, **options
    )
    by_task = {
        name: sorted(found["samples"][name], key=lambda each: each["doc_id"])
        for name in ("choice", "open")
    }
    likelihoods = [float(answer[0][0]) for each in by_task["choice"] for answer in each["resps"]]
    return (
        likelihoods,
        [each["resps"][0][0] for each in by_task["open"]],
        [each["acc"] for each in by_task["choice"]],
    )


@pytest.mark.parametrize(
    ("variant", "model"), [("base", "base"), ("task", "legal:crma-off"), ("task+crma", "legal")]
)
def test_lm_eval_scores_through_the_server_what_it_scores_with_the_weights(
    variant: Variant,
    model: str,
    address: str,
    served: Served,
    tasks: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    remote = {
        "model": model,
        "base_url": f"{address}/v1/completions",
        "tokenizer": str(served.base.path),
    }
    remote |= {"num_concurrent": 4, "batch_size": 4, "tokenizer_backend": "huggingface"}
    ours = samples(tasks, "local-completions", remote)
    place = {"pretrained": str(served.base.path), "device": "cpu", "batch_size": 8}
    if (
        variant == "task+crma"
    ):  # PEFT knows no backbone: lm-eval's backend on the model with our hooks
        loaded = served.injection.model
        backend = huggingface.HFLM(pretrained=loaded, tokenizer=served.tokenizer, batch_size=8)
        plan = served.injection.active(served.plan(variant, "legal"))
    else:
        peft = {"peft": str(served.store.task("legal").path)} if variant == "task" else {}
        backend, plan = huggingface.HFLM(dtype=torch.float32, **place, **peft), nullcontext()
    with plan:
        theirs = samples(tasks, backend, {})
    gaps = [abs(a - b) for a, b in zip(ours[0], theirs[0], strict=True)]
    with capsys.disabled():
        print(
            f"\n{variant}: {len(gaps)} log-likelihoods, largest difference {max(gaps):.2e}, mean",
            end=" ",
        )  # noqa: T201
        print(f"{sum(gaps) / len(gaps):.2e}; accuracy {sum(ours[2]) / 40}, {sum(theirs[2]) / 40}")  # noqa: T201
    assert max(gaps) < 1e-3
    assert ours[1:] == theirs[1:]
    if variant != "base":  # whose chats go through the template, with a system turn
        assert chats(tasks, address, model) == theirs[1]


def test_schemathesis_finds_no_fault_and_no_answer_that_is_not_documented(
    address: str, tmp_path: Path
) -> None:
    """A 504 is no fault: the deadline is the request's own, and may be absurd."""
    pytest.importorskip("schemathesis")
    (tmp_path / "schemathesis.toml").write_text(
        'checks.not_a_server_error.expected-statuses = ["2xx", "4xx", "504"]\n'
    )
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    options = [
        "--checks",
        checks,
        "--max-examples",
        "20",
        "--phases",
        "examples,fuzzing",
        "--request-timeout",
        "120",
    ]
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"{address}/openapi.json",
        "--url",
        address,
        *options,
    ]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stdout[-3000:]
