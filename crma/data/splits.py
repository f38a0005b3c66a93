"""Task data: the domains built into the cache, and users' own JSON Lines.

A built domain is a folder `<home>/data/<domain>` with `train.jsonl`, `validation.jsonl`, `holdout.jsonl` (lines of
{"prompt", "completion"}) and `public.jsonl` (lines of a question set; those of all domains, one after the other, are
the public set). Splits follow the hash of a question, so the order of a source never matters, and every file has its
digest in `data_digests.json`, so a changed source is noticed: whoever changes one on purpose writes there what
`digests(domain, split(domain, read_domain(domain)))` gives.
A task of the user's own is any folder with the first three files; see `read_jsonl`.
"""

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from crma.core.cache import cache_home
from crma.core.digests import bytes_digest
from crma.core.errors import DataError
from crma.core.files import publish_folder
from crma.data.examples import Example, read_jsonl
from crma.data.sources import (
    DOMAINS,
    MAX_PER_LABEL,
    PUBLIC_CODE,
    Pair,
    code_question,
    obstacle,
    read_domain,
    words,
)

SPLITS: Mapping[str, int] = {"train": 500, "validation": 100, "holdout": 100}
NUM_PUBLIC = 20  # public questions a domain
SALT = "crma-1:"
SOURCE_CHANGED = "The source has changed: give the pinned one (for code, docstrings as in CPython 3.11.2 to 3.11.7)."
DIGESTS_FILE = Path(__file__).with_name("data_digests.json")

Note = Callable[[str], object]


def build(
    domains: Sequence[str] | None = None,
    *,
    sources: Mapping[str, Path] | None = None,
    note: Note = lambda _: None,
) -> dict[str, str]:
    """Build the splits of some domains into the cache; nothing is fetched for what is there already.

    Args:
        domains: the domains wanted; none means all, less those this machine cannot build (a note says which).
        sources: domain -> a source file the user already has (see `crma.sources.read_domain`).
        note: called with a sentence before and after each domain.

    Returns:
        "<domain>/<split>" -> digest. Raises DataError.
    """
    sources = sources or {}
    for domain in (*(domains or ()), *sources):
        if domain not in DOMAINS:
            raise DataError(
                f"{domain!r} is not a built-in domain.",
                field="domain",
                value=domain,
                allowed=DOMAINS,
            )
    built: dict[str, str] = {}
    for domain in domains or DOMAINS:
        folder = cache_home() / "data" / domain
        wanted = {
            name: digest
            for name, digest in committed_digests().items()
            if name.startswith(f"{domain}/")
        }
        if (
            digests(domain, {path.name: path.read_bytes() for path in folder.glob("*.jsonl")})
            == wanted
        ):
            note(f"{domain}: already built in {folder}")
        elif not domains and domain not in sources and (reason := obstacle(domain)):
            note(f"{domain}: skipped, because {reason}")
            continue
        else:
            note(f"{domain}: building")
            files = split(domain, read_domain(domain, sources.get(domain)))
            _check_digests(domain, files, advice=SOURCE_CHANGED)
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            publish_folder(folder.parent, folder, files)
            note(f"{domain}: built in {folder}")
        built |= wanted
    return built


def split(domain: str, pairs: Sequence[Pair]) -> dict[str, bytes]:
    """File name -> content of a domain's splits and of its public questions, all disjoint.

    Questions that are equal but for case and punctuation are kept once, or not at all if their answers differ. The
    rest is thinned to `MAX_PER_LABEL` and dealt out in the order of a hash of the question. Domains
    cannot share a question: each asks for something else.
    """
    spellings: dict[str, set[Pair]] = defaultdict(set)
    for question, answer in pairs:
        spellings[" ".join(words(question))].add((question, answer))
    unambiguous = [
        min(found) for found in spellings.values() if len({answer for _, answer in found}) == 1
    ]
    pool = sorted(
        _thin(unambiguous, MAX_PER_LABEL.get(domain, len(pairs))), key=partial(_order, "split")
    )
    needed = sum(SPLITS.values()) + (0 if domain == "code" else NUM_PUBLIC)
    if len(pool) < needed:
        message = f"The source of {domain} gives {len(pool)} questions, too few for the splits."
        raise DataError(message, field=domain, value=len(pool), allowed=f"at least {needed}")
    left = iter(pool)
    files = {}
    for name, size in SPLITS.items():
        examples = [
            {"prompt": prompt, "completion": answer} for prompt, answer in islice(left, size)
        ]
        files[f"{name}.jsonl"] = _json_lines(examples)
    public = list(islice(left, NUM_PUBLIC))
    if domain == "code":  # our own wording, so that no docstring is committed
        public = [
            (f"{code_question(name)} {hint}", module)
            for name, (module, hint) in PUBLIC_CODE.items()
        ]
    items = [
        {"id": f"{domain}-{i:02}", "task": domain, "question": question, "answers": [answer]}
        for i, (question, answer) in enumerate(public, start=1)
    ]
    return files | {"public.jsonl": _json_lines(items)}


def load_split(task: str, split: str) -> list[Example]:
    """The examples of a split: of a built domain (digest checked), or of a folder of the user's own. DataError."""
    if split not in SPLITS:
        raise DataError(
            f"{split!r} is not a split.", field="split", value=split, allowed=tuple(SPLITS)
        )
    path = split_path(task, split)
    if not path.is_file():
        todo = (
            f"run `crma data {task}`"
            if task in DOMAINS
            else f"{task} is no built-in domain, so make it a folder"
        )
        raise DataError(
            f"There is no {path}: {todo}.", field="task", value=task, allowed=(*DOMAINS, "a folder")
        )
    if task in DOMAINS:
        _check_digests(
            task, {path.name: path.read_bytes()}, advice=f"Build it again with `crma data {task}`."
        )
    return read_jsonl(path)


def split_path(task: str, split: str) -> Path:
    """Where a split is, built or not. `task` is a built-in domain or the path of a folder."""
    folder = cache_home() / "data" / task if task in DOMAINS else Path(task)
    return folder / f"{split}.jsonl"


def committed_digests() -> dict[str, str]:
    """ "<domain>/<split>" -> the digest it must have."""
    return json.loads(DIGESTS_FILE.read_text(encoding="utf-8"))


def digests(domain: str, files: Mapping[str, bytes]) -> dict[str, str]:
    """ "<domain>/<split>" -> the digest it has."""
    return {f"{domain}/{Path(name).stem}": bytes_digest(content) for name, content in files.items()}


def _check_digests(domain: str, files: Mapping[str, bytes], *, advice: str) -> None:
    committed = committed_digests()
    for name, found in digests(domain, files).items():
        if found != committed.get(name):
            message = f"{name} is not the data this version was made with. {advice}"
            raise DataError(message, field=name, value=found, allowed=committed.get(name))


def _order(purpose: str, pair: Pair) -> bytes:
    return hashlib.sha256(f"{SALT}{purpose}:{pair[0]}".encode()).digest()


def _thin(pairs: Sequence[Pair], limit: int) -> list[Pair]:
    """At most `limit` questions of each answer, chosen by a hash that is independent of the order of the splits."""
    by_answer: dict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(pairs, key=partial(_order, "thin")):
        by_answer[pair[1]].append(pair)
    return [pair for same in by_answer.values() for pair in same[:limit]]


def _json_lines(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
