"""Task data: the five domains built into the cache, users' own JSON Lines, and the public question set.

A built domain is a folder `<home>/data/<domain>` with `train.jsonl`, `validation.jsonl`, `holdout.jsonl` (lines of
{"prompt", "completion"}) and `public.jsonl` (lines of a question set). Splits follow the hash of a question, so the
order of a source never matters, and every file has its digest in `data_digests.json`, so a changed source is noticed.
A task of the user's own is any folder with the first three files; see `read_jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from crma.cache import cache_home
from crma.errors import DataError
from crma.manifest import bytes_digest, file_digest
from crma.sources import DOMAINS, MAX_PER_LABEL, PUBLIC_CODE, Pair, code_question, obstacle, read_domain, words

SPLITS: Mapping[str, int] = {"train": 500, "validation": 100, "holdout": 100}
PUBLIC = "public"
NUM_PUBLIC = 20  # public questions a domain
SALT = "crma-1:"
SOURCE_CHANGED = (
    "Its source has changed: give the pinned version (for code, docstrings as in CPython 3.11.2 to 3.11.7)."
)
DIGESTS_FILE = Path(__file__).with_name("data_digests.json")

Note = Callable[[str], None]


@dataclass(frozen=True)
class Example:
    """One question of a task and its answer."""

    prompt: str
    completion: str


def build(
    domains: Sequence[str] | None = None,
    *,
    home: Path | None = None,
    sources: Mapping[str, Path] | None = None,
    accept: bool = False,
    note: Note | None = None,
) -> dict[str, str]:
    """Build the splits of some domains into the cache; nothing is fetched for what is there already.

    Args:
        domains: the domains wanted; none means all, less those this machine cannot build (a note says which).
        home: the cache folder; `cache_home()` when None.
        sources: domain -> a source file the user already has (see `crma.sources.read_domain`).
        accept: take the digests as they come out, to be committed as `data_digests.json`, instead of holding them to
            it. For whoever changes a source on purpose.
        note: called with a sentence before and after each domain; prints on stderr when None.

    Returns:
        "<domain>/<split>" -> digest. Raises DataError.
    """
    note = note or Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print
    sources = sources or {}
    for domain in (*(domains or ()), *sources):
        if domain not in DOMAINS:
            raise DataError(f"{domain!r} is not a built-in domain.", field="domain", value=domain, allowed=DOMAINS)
    expected = {} if accept else committed_digests()
    built: dict[str, str] = {}
    for domain in domains or DOMAINS:
        folder = (home or cache_home()) / "data" / domain
        if not accept and _digests(domain, folder) == _of(domain, expected):
            note(f"{domain}: already built in {folder}")
        elif not domains and (reason := obstacle(domain, sources.get(domain))):
            note(f"{domain}: skipped, because {reason}")
            continue
        else:
            note(f"{domain}: building")
            files = split(domain, read_domain(domain, sources.get(domain)))
            if not accept:
                _check_digests(domain, files, expected, advice=SOURCE_CHANGED)
            _write(files, folder)
            note(f"{domain}: built in {folder}")
        built |= _digests(domain, folder)
    return built


def split(domain: str, pairs: Sequence[Pair]) -> dict[str, bytes]:
    """File name -> content of a domain's splits and of its public questions, all disjoint.

    Questions that are equal but for case and punctuation are kept once, or not at all if their answers differ. The
    rest is thinned to `MAX_PER_LABEL` and dealt out in the order of a hash of the question. Domains
    cannot share a question: each asks for something else.
    """
    answers = defaultdict(set)
    for question, answer in pairs:
        answers[_normal(question)].add(answer)
    distinct = {_normal(question): (question, answer) for question, answer in sorted(pairs, reverse=True)}
    unambiguous = [pair for normal, pair in distinct.items() if len(answers[normal]) == 1]
    pool = sorted(_thin(unambiguous, MAX_PER_LABEL.get(domain)), key=lambda pair: _order("split", pair[0]))
    needed = sum(SPLITS.values()) + (0 if domain == "code" else NUM_PUBLIC)
    if len(pool) < needed:
        message = f"The source of {domain} gives {len(pool)} questions, too few for the splits."
        raise DataError(message, field=domain, value=len(pool), allowed=f"at least {needed}")
    files, start = {}, 0
    for name, size in SPLITS.items():
        lines = [asdict(Example(*pair)) for pair in pool[start : start + size]]
        files[f"{name}.jsonl"] = _json_lines(lines)
        start += size
    public = pool[start : start + NUM_PUBLIC]
    if domain == "code":  # our own wording, so that no docstring is committed
        public = [(f"{code_question(name)} {hint}", module) for name, (module, hint) in PUBLIC_CODE.items()]
    files[f"{PUBLIC}.jsonl"] = _json_lines(
        [
            {"id": f"{domain}-{i:02}", "task": domain, "question": question, "answers": [answer]}
            for i, (question, answer) in enumerate(public, start=1)
        ]
    )
    return files


def load_split(task: str, split: str, *, home: Path | None = None) -> list[Example]:
    """The examples of a split: of a built domain (digest checked), or of a folder of the user's own. DataError."""
    if split not in SPLITS:
        raise DataError(f"{split!r} is not a split.", field="split", value=split, allowed=tuple(SPLITS))
    path = split_path(task, split, home=home)
    if not path.is_file():
        todo = f"run `crma data {task}`" if task in DOMAINS else f"{task} is no built-in domain, so make it a folder"
        raise DataError(
            f"There is no {path}: {todo}.", field="task", value=task, allowed=f"{', '.join(DOMAINS)}, a folder"
        )
    if task in DOMAINS:
        advice = f"Build it again with `crma data {task}`."
        _check_digests(task, {path.name: path.read_bytes()}, committed_digests(), advice=advice)
    return read_jsonl(path)


def split_path(task: str, split: str, *, home: Path | None = None) -> Path:
    """Where a split is, built or not. `task` is a built-in domain or the path of a folder."""
    folder = (home or cache_home()) / "data" / task if task in DOMAINS else Path(task)
    return folder / f"{split}.jsonl"


def public_lines(*, home: Path | None = None) -> bytes:
    """The public question set as its file's bytes, from the built domains (all five must be there)."""
    paths = [split_path(domain, PUBLIC, home=home) for domain in DOMAINS]
    for path in paths:
        if not path.is_file():
            raise DataError(f"There is no {path}: run `crma data`.", field="domain", value=path.parent.name)
    return b"".join(path.read_bytes() for path in paths)


def committed_digests() -> dict[str, str]:
    """ "<domain>/<split>" -> the digest it must have."""
    return json.loads(DIGESTS_FILE.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[Example]:
    """Examples from JSON Lines in TRL's conventions; blank lines are skipped, further fields are ignored.

    A line is {"prompt": text, "completion": text}, the same with one message each (a list of one {"role", "content"}),
    or {"messages": [user, assistant]}. Training sees one user turn and one answer, so anything longer is refused.
    Raises DataError with the line number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.", field="data", value=str(path)) from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                examples.append(_example(json.loads(line)))
            except ValueError as error:
                allowed = '{"prompt", "completion"} or {"messages": [user, assistant]}'
                where = f"{path.name} line {number}"
                raise DataError(f"{where}: {error}.", field=where, value=line[:80], allowed=allowed) from error
    if not examples:
        raise DataError(f"{path} holds no examples.", field="data", value=str(path), allowed="at least one line")
    return examples


def _example(line: Any) -> Example:
    """One parsed line as an Example. Raises ValueError saying what is wrong."""
    if not isinstance(line, dict):
        raise ValueError("is not an object")
    if "messages" in line:
        turns = line["messages"]
        if not isinstance(turns, list) or len(turns) != 2:
            raise ValueError('"messages" must be one user message and one assistant message')
        prompt, completion = turns[:1], turns[1:]
    elif "prompt" in line and "completion" in line:
        prompt, completion = line["prompt"], line["completion"]
    else:
        raise ValueError('has neither "prompt" and "completion" nor "messages"')
    return Example(_text(prompt, "user"), _text(completion, "assistant"))


def _text(value: Any, role: str) -> str:
    """The text of a prompt or completion, plain or as a list of one message."""
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != role:
            raise ValueError(f"expected exactly one message of the {role}")
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the text of the {role} is missing or empty")
    return value


def _normal(question: str) -> str:
    return " ".join(words(question))


def _order(purpose: str, question: str) -> bytes:
    return hashlib.sha256(f"{SALT}{purpose}:{question}".encode()).digest()


def _thin(pairs: Sequence[Pair], limit: int | None) -> Sequence[Pair]:
    """At most `limit` questions of each answer, chosen by a hash that is independent of the order of the splits."""
    if limit is None:
        return pairs
    count: Counter[str] = Counter()
    kept = []
    for question, answer in sorted(pairs, key=lambda pair: _order("thin", pair[0])):
        count[answer] += 1
        if count[answer] <= limit:
            kept.append((question, answer))
    return kept


def _json_lines(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _digests(domain: str, folder: Path) -> dict[str, str]:
    return {f"{domain}/{path.stem}": file_digest(path) for path in sorted(folder.glob("*.jsonl"))}


def _of(domain: str, digests: Mapping[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in digests.items() if name.startswith(f"{domain}/")}


def _check_digests(domain: str, files: Mapping[str, bytes], expected: Mapping[str, str], *, advice: str) -> None:
    for name, content in files.items():
        found, wanted = bytes_digest(content), expected.get(f"{domain}/{Path(name).stem}")
        if found != wanted:
            message = f"{domain}/{name} is not the data this version was made with. {advice}"
            raise DataError(message, field=f"{domain}/{name}", value=found, allowed=wanted)


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    """Write a domain's folder aside and put it in the place of the old one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        aside.chmod(0o755)
        for name, content in files.items():
            (aside / name).write_bytes(content)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
