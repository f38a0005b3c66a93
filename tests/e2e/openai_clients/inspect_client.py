"""inspect-ai: an evaluation of two samples, whose answers are not cut off."""

import sys
import tempfile

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

ADDRESS, MODEL = sys.argv[1:]


def main() -> None:
    model = get_model(
        f"openai-api/crma/{MODEL}",
        base_url=f"{ADDRESS}/v1",
        api_key="none",
        config=GenerateConfig(temperature=0, max_connections=2),
    )
    samples = [
        Sample(input="What is the capital of France?", target="Paris"),
        Sample(input="What is the capital of Germany?", target="Berlin"),
    ]
    task = Task(dataset=samples, solver=generate(), scorer=includes())
    with tempfile.TemporaryDirectory() as folder:
        (log,) = eval(task, model=model, log_dir=folder, display="none")
        assert log.status == "success", log.error
        reasons = [sample.output.choices[0].stop_reason for sample in log.samples]
        assert reasons == ["stop", "stop"], reasons


main()
