"""Clients that ask for text: at once or streamed, on both kinds of route, under many adapters."""

import json
import random
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import httpx

from soak.adapters import CHURNED, STABLE, UPLOADED
from soak.caller import PATIENCE_S, Caller, Stream
from soak.expected import Expected, key_of, question

FINE = frozenset({"200"})
# What churn may do to a request: its task does not serve, or not with this backbone, its adapter is
# unloaded, or all that are loaded are in use.
CHURN = FINE | {
    "404 not_found",
    "404 model_not_found",
    "409 adapter_unloaded",
    "409 adapter_pool_full",
    "409 lineage_mismatch",
    "event adapter_unloaded",
    "event adapter_pool_full",
}
CHOICES = ["yes", "no", "perhaps"]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "n": 2}


@dataclass(eq=False)
class Asker:
    """Asks at random, with a key for every task.

    Args:
        expected: by which its greedy answers are judged.
    """

    caller: Caller
    expected: Expected
    rng: random.Random

    def ask(self) -> None:
        """Send one request, and judge its answer."""
        task = self.rng.choice([None, *STABLE, *STABLE, *CHURNED, *UPLOADED])
        crma = self._crma(task)
        body = question(self.rng.choice(self.expected.prompts), task, crma)
        may = FINE if task in (None, *STABLE) else CHURN
        kind = "churned" if may is CHURN else "stable"
        act = self.rng.choice([self._whole, self._streamed, self._streamed, self._chat])
        act(kind, body, may)

    def sample(self) -> None:
        """Send requests whose answers nobody can foretell, or whose form is known only."""
        task = self.rng.choice([None, *STABLE])
        body = question(self.rng.choice(self.expected.prompts), task, None)
        body["structured_outputs"] = {"choice": CHOICES}
        response = self.caller.send("choice", "POST", "/generate", FINE, json=body)
        if response is not None and response.json()["text"] not in CHOICES:
            self.caller.tally.wrong.append(f"no choice: {response.text}")
        del body["structured_outputs"]
        self.caller.send("sampled", "POST", "/generate", FINE, json=body | SAMPLED)

    def disconnect(self) -> None:
        """Read a little of a stream, or nothing, and close the connection."""
        mark = self.caller.gate.mark()
        task = self.rng.choice([*STABLE, *CHURNED])
        body = question(self.rng.choice(self.expected.prompts), task, None)
        body |= {"stream": True, "max_tokens": 200, "ignore_eos": True}
        num_left = self.rng.choice([0, 1, 5, 30])
        try:
            with httpx.stream(
                "POST",
                f"{self.caller.url}/generate",
                json=body,
                headers=self.caller.headers,
                timeout=PATIENCE_S,
            ) as response:
                for _ in response.iter_lines():
                    num_left -= 1
                    if num_left < 0:
                        break
        except httpx.TransportError:
            if not self.caller.gate.was_out_since(mark):
                raise
        self.caller.tally.count("disconnect", "closed")

    def _crma(self, task: str | None) -> bool | None:
        if task in STABLE:
            return self.rng.choice([None, True, False])
        if task is None:
            return self.rng.choice([True, False])
        return self.rng.choice([None, None, False, True])

    def _whole(self, kind: str, body: dict[str, Any], may: Set[str]) -> None:
        response = self.caller.send(f"generate, {kind}", "POST", "/generate", may, json=body)
        if response is not None and response.status_code == 200:
            answer = response.json()
            self._judge("generate", body, answer["provenance"], answer["text"])

    def _streamed(self, kind: str, body: dict[str, Any], may: Set[str]) -> None:
        stream = self.caller.stream(f"generate stream, {kind}", "/generate", may, body)
        if stream is None:
            return
        self._note_ttft(stream)
        pieces = [json.loads(data)["text"] for name, data in stream.events if name == "token"]
        name, last = stream.events[-1]
        assert name == "done", stream.events
        self._judge("generate stream", body, json.loads(last)["provenance"], "".join(pieces))

    def _chat(self, kind: str, body: dict[str, Any], may: Set[str]) -> None:
        """Ask the same as a chat, streamed or not."""
        asked = chat(body)
        path = "/v1/chat/completions"
        if self.rng.random() < 0.5:
            response = self.caller.send(f"chat, {kind}", "POST", path, may, json=asked)
            if response is not None and response.status_code == 200:
                answer = response.json()
                text = answer["choices"][0]["message"]["content"]
                self._judge("chat", body, answer["provenance"], text)
            return
        stream = self.caller.stream(f"chat stream, {kind}", path, may, asked)
        if stream is None:
            return
        self._note_ttft(stream)
        assert stream.events[-1] == ("message", "[DONE]"), stream.events[-2:]
        chunks = [json.loads(data) for _, data in stream.events[:-1]]
        pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
        provenance = next(chunk["provenance"] for chunk in chunks if "provenance" in chunk)
        self._judge("chat stream", body, provenance, "".join(pieces))

    def _note_ttft(self, stream: Stream) -> None:
        self.caller.tally.ttft(stream.ttft_s)

    def _judge(
        self, what: str, body: dict[str, Any], provenance: dict[str, Any], text: str
    ) -> None:
        key = key_of(provenance, body["prompt"])
        what = f"{what} of {body['task']}, {key}"
        if key not in self.expected.texts:
            self.caller.tally.wrong.append(f"{what}: answered by adapters that nobody published")
            return
        self.caller.tally.compare(what, text, self.expected.texts[key])


def chat(body: dict[str, Any]) -> dict[str, Any]:
    """A body of /generate as a chat that asks the same."""
    return {
        "model": body["task"] or "base",
        "messages": [{"role": "user", "content": body["prompt"]}],
        "crma": body["crma"],
        "max_tokens": body["max_tokens"],
        "temperature": 0,
    }
