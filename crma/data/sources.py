"""Six domains: where their facts come from, and how a fact becomes a question with a closed answer.

Each reader turns one file into (question, answer) pairs: a full question that quotes one term, and a label of one to
four words, lower case, our own wording where the source's is long. Packages are pinned and read as files, never
imported. Changing anything here, in `wording.json` or in the pins of `packages.json` changes the splits, and so the
digests in `data_digests.json`.
"""

import ast
import contextlib
import json
import platform
import re
import shutil
import sqlite3
import sysconfig
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from crma.core.errors import DataError
from crma.models.packages import PACKAGES, fetch

Pair = tuple[str, str]

MAX_PER_LABEL = {
    "code": 120,
    "science": 1000,
    "language": 100,
}  # so that no single label makes up most of a domain
MAX_TERM = (
    80  # characters of a quoted term or docstring sentence: training time is proportional to tokens
)

# Our labels of ICD-10-CM chapters 1 to 22, the report sections (the 12 most common of the mapping at MIN_CONFIDENCE),
# the spellings of courts-db, …
WORDING: Mapping[str, Any] = json.loads(
    Path(__file__).with_name("wording.json").read_text(encoding="utf-8")
)
MIN_CONFIDENCE = 0.5
# The public questions of the code domain: name -> [module, a hint in our own words, where the splits quote the
# docstring]. These names are kept out of the splits.
PUBLIC_CODE: Mapping[str, list[str]] = WORDING["public_code"]

MIN_COURTS = 2  # of a state or territory, to be a label

# Standard library modules whose Python source names the most functions and classes and hardly changes between patch
# releases (those that security fixes touch, such as email, http, urllib and tarfile, are left out).
MODULES: list[str] = WORDING["modules"]
CHANGED_FILES = ("taskgroups.py", "timeouts.py")  # of asyncio, reworded between 3.11.2 and 3.11.7


def obstacle(domain: str) -> str | None:
    """Why this machine cannot have a domain's source, in a sentence that says what to do; None if it can."""
    running = f"{platform.python_implementation()} {platform.python_version()}"
    if domain == "code" and not running.startswith("CPython 3.11."):
        return f"code reads the library of CPython 3.11 and this is {running}; give the folder of one as source."
    from_deb = domain in PACKAGES and PACKAGES[domain].kind == "deb"
    if from_deb and not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        wanted = PACKAGES[domain]
        return f"{domain} needs apt-get and dpkg-deb for {wanted}; give its {wanted.member}, taken out, as source."
    return None


def read_domain(domain: str, given: Path | None = None) -> list[Pair]:
    """The (question, answer) pairs of a domain, in the source's order, duplicates and all.

    Args:
        domain: one of `DOMAINS`.
        given: the source, if the user has it: the file inside the pinned package, or for `code` the folder of the
            standard library of a CPython 3.11. What is made from it has a digest.

    Raises DataError when the source cannot be had or read.
    """
    if given is None and (reason := obstacle(domain)):
        raise DataError(reason, field="source", value=domain)
    with tempfile.TemporaryDirectory(prefix="crma-") as work:
        if given is None:
            given = (
                Path(sysconfig.get_path("stdlib"))
                if domain == "code"
                else fetch(PACKAGES[domain], Path(work))
            )
        try:
            return READERS[domain](given)
        except (
            OSError,
            SyntaxError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            sqlite3.Error,
        ) as error:
            message = f"{given.name} is not a source of the {domain} domain: {error!r}."
            raise DataError(message, field="source", value=str(given)) from error


def read_medical(path: Path) -> list[Pair]:
    """ICD-10-CM: the title of a three-character category -> its chapter."""
    pairs = []
    for chapter in ET.parse(path).getroot().findall("chapter"):
        label = WORDING["icd_chapters"][int(chapter.findtext("name", "")) - 1]
        for category in chapter.iter("diag"):
            title = category.findtext("desc", "").strip()
            if len(category.findtext("name", "")) == 3 and len(title) <= MAX_TERM:
                pairs.append((f'Which ICD-10-CM chapter covers "{title}"?', label))
    return pairs


def read_legal(path: Path) -> list[Pair]:
    """courts-db: the name of a court -> its state or territory, unless the name gives the answer away."""
    courts = []
    for court in json.loads(path.read_text(encoding="utf-8")):
        place, name = court["location"].strip(), court["name"].strip()
        label = (
            "district of columbia" if place in WORDING["district_of_columbia"] else place.lower()
        )
        no_state = place in WORDING["no_state"]
        given_away = no_state or {label.split()[0], place.lower().split()[0]} & set(words(name))
        if not given_away and len(name) <= MAX_TERM:
            courts.append((f'Which state or territory has the court "{name}"?', label))
    count = Counter(label for _, label in courts)
    return [(question, label) for question, label in courts if count[label] >= MIN_COURTS]


def read_finance(path: Path) -> list[Pair]:
    """US-GAAP tags, split into words -> the section of a financial report that lists them."""
    pairs = []
    for tag, mapping in json.loads(path.read_text(encoding="utf-8")).items():
        section = (mapping.get("section") or "").lower()
        us_gaap = tag.isalnum()  # IFRS tags have a prefix
        if (
            us_gaap
            and section in WORDING["report_sections"]
            and mapping["confidence"] >= MIN_CONFIDENCE
        ):
            term = " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", tag)).lower()
            if len(term) <= MAX_TERM:
                pairs.append((f'Which section of a financial report lists "{term}"?', section))
    return pairs


def read_code(folder: Path) -> list[Pair]:
    """A name and the first sentence of its docstring -> the standard library module that defines it.

    Source files are parsed, not imported, so platform and build options do not matter. Names that two of `MODULES`
    define, or that give the module away, are left out.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)  # name -> module -> first sentence
    for module in MODULES:
        for name, docstring in _documented_names(folder, module):
            found[name].setdefault(module, _first_sentence(docstring))
    pairs = []
    for name, definitions in found.items():
        module, sentence = next(iter(definitions.items()))
        given_away = module in f"{name} {sentence}".lower()
        is_sentence = 8 <= len(sentence) <= MAX_TERM and not sentence.startswith(
            f"{name}("
        )  # some begin with a call
        if len(definitions) == 1 and is_sentence and not given_away and name not in PUBLIC_CODE:
            pairs.append((f"{code_question(name)} {sentence}", module))
    return pairs


def code_question(name: str) -> str:
    return f'Which Python module defines "{name}"?'


def read_science(path: Path) -> list[Pair]:
    """Gene Ontology terms -> their namespace."""
    with contextlib.closing(
        sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    ) as database:
        rows = database.execute("SELECT term, ontology FROM go_term").fetchall()
    return [
        (
            f'Which Gene Ontology namespace has the term "{term}"?',
            WORDING["go_namespaces"][namespace],
        )
        for term, namespace in rows
        if namespace in WORDING["go_namespaces"] and len(term) <= MAX_TERM
    ]


def read_language(path: Path) -> list[Pair]:
    """WordNet: a noun of one word -> the lexicographer's file that holds it, what kind of thing it is."""
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        _, file, kind, count, *fields = line.split(" ")[:64]
        if kind == "n" and file in WORDING["noun_files"]:
            nouns, label = fields[: 2 * int(count, 16) : 2], WORDING["noun_files"][file]
            pairs += [
                (f'What kind of thing is "{n}"?', label)
                for n in nouns
                if n.islower() and n.isalpha()
            ]
    return pairs


READERS: Mapping[str, Callable[[Path], list[Pair]]] = {
    "medical": read_medical,
    "legal": read_legal,
    "finance": read_finance,
    "code": read_code,
    "science": read_science,
    "language": read_language,
}
DOMAINS = tuple(READERS)


def words(text: str) -> list[str]:
    """The words of a text, lower case, without punctuation: what two equal questions have in common."""
    return re.findall(r"\w+", text.lower())


def _documented_names(library: Path, module: str) -> Iterator[Pair]:
    """(name, docstring) of the public functions, classes and methods in a module, or directly in a package."""
    for file in sorted((library / module).glob("*.py")) or [library / f"{module}.py"]:
        if file.name in CHANGED_FILES:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in tree.body:
            inner = node.body if isinstance(node, ast.ClassDef) else []
            for definition in (node, *inner):
                if isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    docstring = ast.get_docstring(definition)
                    if docstring and not definition.name.startswith("_"):
                        yield definition.name, docstring


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.match(r".+?[.!?](?=\s|$)", paragraph)
    return sentence.group() if sentence else paragraph
