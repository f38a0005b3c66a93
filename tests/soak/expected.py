"""What each adapter answers when it is asked alone, by which answers under load are judged.

An adapter is its digest: an answer says which digests gave it, and so what its text must be.
"""

from dataclasses import dataclass, field
from typing import Any

import httpx

MAX_TOKENS = 16
CLEAR = 0.01  # log-probabilities that are closer may change places with the order of a sum
ABLATION_VARIANTS = ("task+crma", "task", "base")
Key = tuple[str | None, str | None, str]  # task digest, backbone digest, prompt


def question(prompt: str, task: str | None, crma: bool | None) -> dict[str, Any]:
    """A body of /generate that asks greedily."""
    return {"prompt": prompt, "task": task, "crma": crma, "max_tokens": MAX_TOKENS}


@dataclass
class Expected:
    """Answers gotten alone.

    Args:
        client: of a server that nobody else uses.
        prompts: that are asked.
        items: questions of the ablations.

    Attributes:
        texts: None: two tokens of the answer are nearly as likely.
        reports: digest of the serving backbone -> report of the ablation.
    """

    client: httpx.Client
    prompts: list[str]
    items: list[dict[str, Any]]
    texts: dict[Key, str | None] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ablation(self, **more: Any) -> dict[str, Any]:
        """The body of the ablation."""
        variants = list(ABLATION_VARIANTS)
        return {"questions": self.items, "variants": variants, "max_tokens": 8, **more}

    def learn(self, task: str | None, crma: bool) -> None:
        """Ask every prompt of a selection that has not been asked yet."""
        for prompt in self.prompts:
            body = question(prompt, task, crma) | {"logprobs": True, "top_logprobs": 2}
            answer = self._post("/generate", body)
            self.texts[key_of(answer["provenance"], prompt)] = (
                answer["text"] if _is_clear(answer["top_logprobs"]) else None
            )

    def learn_report(self) -> None:
        """Run the ablation under the backbone that serves."""
        report = self._post("/ablation", self.ablation())
        self.reports[report["provenance"]["crma"]] = outcome(report)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()


def key_of(provenance: dict[str, Any], prompt: str) -> Key:
    return provenance["task"], provenance["crma"], prompt


def outcome(report: dict[str, Any]) -> dict[str, Any]:
    """What of a report has to be the same however often the ablation is run."""
    return {name: report[name] for name in ("variants", "comparisons", "items")}


def _is_clear(top: list[list[dict[str, Any]]]) -> bool:
    gaps = (first["logprob"] - second["logprob"] for first, second in top)
    return min(gaps, default=0.0) > CLEAR
