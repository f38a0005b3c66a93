"""The `llm` command: a prompt, its stream, a conversation that goes on, and a schema."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ADDRESS, MODEL = sys.argv[1:]
COMMAND = Path(sys.executable).with_name("llm")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        models = [
            {
                "model_id": "ours",
                "model_name": MODEL,
                "api_base": f"{ADDRESS}/v1",
                "api_key_name": "ours",
                "supports_schema": True,
                "supports_tools": True,
            }
        ]
        # JSON is YAML.
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps(models))
        environment = {**os.environ, "LLM_USER_PATH": folder}

        def llm(*arguments: str) -> str:
            command = [str(COMMAND), *arguments, "--key", "none"]
            found = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            assert found.returncode == 0, found.stderr
            return found.stdout.strip()

        options = ["-m", "ours", "-o", "temperature", "0", "-o", "max_tokens", "40"]
        streamed = llm("Is the sky clear?", *options)
        assert llm("Is the sky clear?", "--no-stream", *options) == streamed
        llm("And now?", "--continue", "-o", "max_tokens", "4")
        schema = json.dumps(
            {
                "type": "object",
                "properties": {"clear": {"type": "boolean"}},
                "required": ["clear"],
                "additionalProperties": False,
            }
        )
        answer = json.loads(llm("Is the sky clear?", "--schema", schema, *options))
        assert isinstance(answer["clear"], bool)


main()
