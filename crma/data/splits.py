"""Task data: the built-in domains, built into the cache, and the user's own JSON Lines.

A built domain is a folder `<home>/data/<domain>` with `train.jsonl`, `validation.jsonl`,
`holdout.jsonl` and `reserve.jsonl` (lines of {"prompt", "completion"}), and `public.jsonl` (lines
of a question set; the public set is those of all domains, one after the other). The reserve has up
to MAX_RESERVE further questions for holdout. A task of CLINC150 has the first three files, and so
has any folder that is a user's own task; see `examples.read_jsonl`.

A hash of each question decides its split, so the order of a source does not matter. Every file has
its digest in `data_digests.json`, so a changed source is noticed. To change one on purpose, write
there what `digests(domain, split(domain, read_domain(domain)))` returns.
"""

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from crma.core.cache import cache_home
from crma.core.digests import bytes_digest
from crma.core.errors import ConfigError, DataError
from crma.core.files import publish_folder
from crma.data.clinc import CLINC, CLINC_TASKS, read_clinc
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
RESERVE = "reserve"  # a split for experiments with an endpoint; users' folders need none
MAX_RESERVE = 300
BUILT = (*DOMAINS, *CLINC_TASKS)  # the tasks whose data is in the cache
NUM_PUBLIC = 20  # public questions of each domain
SALT = "crma-1:"
SOURCE_CHANGED = (
    "The source has changed: give the pinned one "
    "(for code, docstrings as in CPython 3.11.2 to 3.11.7)."
)
DIGESTS_FILE = Path(__file__).with_name("data_digests.json")

Note = Callable[[str], object]


def build(
    domains: Sequence[str] | None = None,
    *,
    sources: Mapping[str, Path] | None = None,
    note: Note = lambda _: None,
) -> dict[str, str]:
    """Builds the splits of some domains into the cache. Fetches nothing for those already built.

    Args:
        domains: the domains to build. None means all that this machine can build; a note names
            each of the others.
        sources: domain -> a source file that the user already has (see `sources.read_domain`).
        note: called with a sentence before and after each domain.

    Returns:
        "<domain>/<split>" -> digest.

    Raises:
        ConfigError: there is no such domain.
        DataError: a source cannot be had, or has changed.
    """
    sources = sources or {}
    for domain in (*(domains or ()), *sources):
        if domain not in DOMAINS:
            message = f"{domain!r} is not a built-in domain."
            raise ConfigError(message, field="domain", value=domain, allowed=DOMAINS)
    built: dict[str, str] = {}
    for domain in domains or DOMAINS:
        folder = _folder(domain)
        expected = _expected_digests(domain)
        reason = None if domains or domain in sources else obstacle(domain)
        if _digests_in(domain, folder) == expected:
            note(f"{domain}: already built in {folder}")
        elif reason:
            note(f"{domain}: skipped, because {reason}")
            continue
        else:
            note(f"{domain}: building")
            _build_domain(domain, sources.get(domain), folder)
            note(f"{domain}: built in {folder}")
        built |= expected
    return built


def build_clinc(source: Path | None, *, note: Note = lambda _: None) -> dict[str, str]:
    """Builds the ten tasks of CLINC150 into the cache, unless they are built.

    Training data begins with the first question of every intent, then the second of every one, …:
    the first 15 k items of a task are k of each of its intents.

    Args:
        source: the folder of the data set (see `clinc.read_clinc`); None if the user gave none.
        note: called with a sentence before and after.

    Returns:
        "<task>/<split>" -> digest.

    Raises:
        DataError: no source where it is needed, one that cannot be read, or one that has changed.
    """
    expected: dict[str, str] = {}
    built: dict[str, str] = {}
    for task in CLINC_TASKS:
        expected |= _expected_digests(task)
        built |= _digests_in(task, _folder(task))
    if built == expected:
        note(f"{CLINC}: already built in {cache_home() / 'data'}")
        return expected
    if source is None:
        message = f"{CLINC} is read from a folder that you have: `--source {CLINC}=FOLDER`."
        raise DataError(message, field="source", value=CLINC, allowed="a folder of CLINC150")
    note(f"{CLINC}: building")
    tasks = split_clinc(read_clinc(source))
    for task, files in tasks.items():
        _check_digests(task, files, advice="The source has changed: give that of clinc/oos-eval.")
    for task, files in tasks.items():
        _replace_folder(_folder(task), files)
    note(f"{CLINC}: built in {cache_home() / 'data'}")
    return expected


def split_clinc(tasks: Mapping[str, Mapping[str, Sequence[Pair]]]) -> dict[str, dict[str, bytes]]:
    """Task -> file name -> content, of what `clinc.read_clinc` returns."""
    found = {}
    for task, pairs_of in tasks.items():
        files = {}
        for name in SPLITS:
            pairs = _in_turn(pairs_of[name]) if name == "train" else pairs_of[name]
            files[f"{name}.jsonl"] = _prompts(pairs)
        found[task] = files
    return found


def split(domain: str, pairs: Sequence[Pair]) -> dict[str, bytes]:
    """The splits and the public questions of a domain, which share no question.

    Questions that are equal but for case and punctuation are kept once, or not at all if their
    answers differ. The rest is thinned to `MAX_PER_LABEL` and dealt out in the order of a hash of
    the question. Domains cannot share a question, because each asks for something else.

    Args:
        domain: one of `DOMAINS`.
        pairs: (question, answer), in any order.

    Returns:
        File name -> content.

    Raises:
        DataError: too few questions.
    """
    unambiguous = _unambiguous(pairs)
    thinned = _thin(unambiguous, MAX_PER_LABEL.get(domain, len(pairs)))
    pool = sorted(thinned, key=partial(_order, "split"))
    num_public = 0 if domain == "code" else NUM_PUBLIC
    needed = sum(SPLITS.values()) + num_public
    if len(pool) < needed:
        message = f"The source of {domain} gives {len(pool)} questions, too few for the splits."
        raise DataError(message, field=domain, value=len(pool), allowed=f"at least {needed}")
    left = iter(pool)
    files = {}
    for name, size in SPLITS.items():
        dealt = islice(left, size)
        files[f"{name}.jsonl"] = _prompts(dealt)
    public = _public_code() if domain == "code" else list(islice(left, NUM_PUBLIC))
    files[f"{RESERVE}.jsonl"] = _prompts(islice(filter(_is_reserved, left), MAX_RESERVE))
    items = [
        {"id": f"{domain}-{i:02}", "task": domain, "question": question, "answers": [answer]}
        for i, (question, answer) in enumerate(public, start=1)
    ]
    return files | {"public.jsonl": _json_lines(items)}


def load_split(task: str, split: str) -> list[Example]:
    """The examples of a split.

    Args:
        task: a built domain, whose digest is checked, or the path of a user's folder.
        split: one of `SPLITS`, or RESERVE.

    Raises:
        DataError: no such split, a domain that is not built or was changed, or a bad file.
    """
    allowed = (*SPLITS, RESERVE)
    if split not in allowed:
        message = f"{split!r} is not a split."
        raise DataError(message, field="split", value=split, allowed=allowed)
    path = split_path(task, split)
    if not path.is_file():
        raise _missing(task, path)
    if task in BUILT:
        advice = f"Build it again with `crma data {_group(task)}`."
        _check_digests(task, {path.name: path.read_bytes()}, advice=advice)
    return read_jsonl(path)


def split_path(task: str, split: str) -> Path:
    """The file of a split, built or not. `task` is a built-in task or the path of a folder."""
    folder = _folder(task) if task in BUILT else Path(task)
    return folder / f"{split}.jsonl"


def committed_digests() -> dict[str, str]:
    """ "<domain>/<split>" -> the digest that it must have, for every domain."""
    return json.loads(DIGESTS_FILE.read_text(encoding="utf-8"))


def digests(domain: str, files: Mapping[str, bytes]) -> dict[str, str]:
    """ "<domain>/<split>" -> the digest that it has, for the files of one domain."""
    return {f"{domain}/{Path(name).stem}": bytes_digest(content) for name, content in files.items()}


def _missing(task: str, path: Path) -> DataError:
    """The error for a split whose file `path` is not there."""
    needed = [f"{split}.jsonl" for split in SPLITS]
    if task in BUILT:
        message = f"There is no {path}: run `crma data {_group(task)}`."
    elif path.stem == RESERVE and path.parent.is_dir():
        message = f"The folder {task} has no {path.name}, which only some experiments ask."
    elif path.parent.is_dir():
        missing = [name for name in needed if not (path.parent / name).is_file()]
        message = f"The folder {task} has no {', '.join(missing)}: a task needs one file a split."
        return DataError(message, field="task", value=task, allowed=needed)
    else:
        message = f"{task} is neither a built-in domain nor a folder that exists."
    allowed = (*DOMAINS, f"a folder with {', '.join(needed)}")
    return DataError(message, field="task", value=task, allowed=allowed)


def _build_domain(domain: str, source: Path | None, folder: Path) -> None:
    """Replaces the folder of a domain. If the source has changed, the folder stays as it is."""
    files = split(domain, read_domain(domain, source))
    _check_digests(domain, files, advice=SOURCE_CHANGED)
    _replace_folder(folder, files)


def _replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    publish_folder(folder.parent, folder, files)


def _folder(task: str) -> Path:
    """Where a built-in task is, built or not."""
    return cache_home() / "data" / task


def _group(task: str) -> str:
    """What `crma data` builds a task by."""
    return CLINC if task in CLINC_TASKS else task


def _expected_digests(domain: str) -> dict[str, str]:
    """The committed digests of one domain."""
    return {
        name: digest
        for name, digest in committed_digests().items()
        if name.startswith(f"{domain}/")
    }


def _digests_in(domain: str, folder: Path) -> dict[str, str]:
    """The digests of the files that a domain's folder holds; none if there is no folder."""
    return digests(domain, {path.name: path.read_bytes() for path in folder.glob("*.jsonl")})


def _check_digests(domain: str, files: Mapping[str, bytes], *, advice: str) -> None:
    committed = committed_digests()
    for name, found in digests(domain, files).items():
        if found != committed.get(name):
            message = f"{name} is not the data that this version was made with. {advice}"
            raise DataError(message, field=name, value=found, allowed=committed.get(name))


def _unambiguous(pairs: Sequence[Pair]) -> list[Pair]:
    """One spelling of each question, without the questions that have several answers."""
    spellings: dict[str, set[Pair]] = defaultdict(set)
    for question, answer in pairs:
        spellings[" ".join(words(question))].add((question, answer))
    kept = []
    for found in spellings.values():
        answers = {answer for _, answer in found}
        if len(answers) == 1:
            kept.append(min(found))
    return kept


def _public_code() -> list[Pair]:
    """The public questions of the code domain, with our own hints: no docstring is committed."""
    return [
        (f"{code_question(name)} {hint}", module) for name, (module, hint) in PUBLIC_CODE.items()
    ]


def _order(purpose: str, pair: Pair) -> bytes:
    """A sort key: a hash of the question that differs between purposes."""
    question, _ = pair
    return hashlib.sha256(f"{SALT}{purpose}:{question}".encode()).digest()


def _thin(pairs: Sequence[Pair], limit: int) -> list[Pair]:
    """At most `limit` questions of each answer.

    A hash chooses them that is independent of the one which orders the splits.
    """
    by_answer: dict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(pairs, key=partial(_order, "thin")):
        _, answer = pair
        by_answer[answer].append(pair)
    return [pair for same in by_answer.values() for pair in same[:limit]]


def _is_reserved(pair: Pair) -> bool:
    """Whether the reserve may ask a question. The other half stays for checks by outsiders."""
    question, _ = pair
    digest = hashlib.sha256(f"reserve{question}".encode()).digest()
    return digest[-1] % 2 == 0


def _in_turn(pairs: Sequence[Pair]) -> list[Pair]:
    """A first question of every answer, a second of every answer, …, each chosen by its hash."""
    by_answer: dict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(pairs, key=partial(_order, "split")):
        _, answer = pair
        by_answer[answer].append(pair)
    turns = zip_longest(*(by_answer[answer] for answer in sorted(by_answer)))
    return [pair for turn in turns for pair in turn if pair is not None]


def _prompts(pairs: Iterable[Pair]) -> bytes:
    """The lines of a split."""
    return _json_lines([{"prompt": prompt, "completion": answer} for prompt, answer in pairs])


def _json_lines(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
