"""An ablation on a server: as a background job, whose progress is shown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crma.cli.progress import progress
from crma.cli.server_link import connected


def ablate_on(
    server: str, key_file: Path | None, settings: Mapping[str, Any], questions: str | None
) -> dict[str, Any]:
    """Run an ablation on a server, and wait for its report.

    Args:
        server: its address.
        key_file: as of `connected`.
        settings: fields of POST /ablation.
        questions: a file, which is read and sent, or the name of a set on the server; None: public.

    Raises:
        ConfigError: a line of the file is no question, or the server refuses a field.
        ServerError: the server cannot be reached, or the job failed.
    """
    body = {**settings, **_asked(questions)}
    shown = progress(first=f"asking {server}")
    with connected(server, key_file) as client, shown as report:

        def on_progress(done: int, total: int) -> None:
            report("ablation", done, total)

        return client.run_ablation(on_progress, **body)


def _asked(questions: str | None) -> dict[str, Any]:
    """The field of the request that has, or names, the questions."""
    from crma.evaluation.question_set import read_question_set

    if questions is None or not Path(questions).exists():
        return {"question_set": questions or "public"}
    items = read_question_set(Path(questions)).questions
    return {"questions": [item.model_dump(mode="json", exclude_defaults=True) for item in items]}
