"""Facts become questions with closed answers: on small files in the formats of the sources."""

import json
import sqlite3
from pathlib import Path

import pytest

from crma.core.errors import DataError
from crma.data import sources
from crma.data.sources import read_domain

ICD = """<ICD10CM.tabular>
  <chapter><name>1</name><desc>Certain infectious and parasitic diseases (A00-B99)</desc><section>
    <diag><name>A00</name><desc>Cholera</desc>
      <diag><name>A00.0</name><desc>Too fine</desc></diag>
    </diag>
  </section></chapter>
  <chapter><name>9</name><desc>Diseases of the circulatory system (I00-I99)</desc><section>
    <diag><name>I00</name><desc>Rheumatic fever</desc></diag>
    <diag><name>I01</name><desc>{long}</desc></diag>
  </section></chapter>
</ICD10CM.tabular>"""


def test_medical_asks_for_the_chapter_of_each_category(tmp_path: Path) -> None:
    path = tmp_path / "icd.xml"
    path.write_text(ICD.format(long="x" * 81))
    assert read_domain("medical", path) == [
        ('Which ICD-10-CM chapter covers "Cholera"?', "infectious diseases"),
        ('Which ICD-10-CM chapter covers "Rheumatic fever"?', "circulatory diseases"),
    ]


def test_legal_leaves_out_names_that_give_the_answer_away_and_rare_places(tmp_path: Path) -> None:
    kept = {
        "Stark Circuit Court": "Ohio",
        "Knox Circuit Court": "Ohio",
        "Newburgh Recorder's Court": "New York",
        "Yonkers Court": "New York",
    }
    dropped = {
        "Ohio Supreme Court": "Ohio",
        "Court of the Marshes": "United States",
        "Consular Court": "Panama",
    }
    path = tmp_path / "courts.json"
    courts = [{"name": name, "location": place} for name, place in (dropped | kept).items()]
    path.write_text(json.dumps(courts))
    asked = [
        (f'Which state or territory has the court "{name}"?', place.lower())
        for name, place in kept.items()
    ]
    assert read_domain("legal", path) == asked


def test_finance_splits_tags_into_words_and_keeps_only_certain_us_gaap_mappings(
    tmp_path: Path,
) -> None:
    mapping = {
        "_metadata": {"version": "3"},
        "AccountsPayableCurrent": {"section": "Current Liabilities", "confidence": 0.5},
        "OtherIRAAssets2": {"section": "Current Assets", "confidence": 1.0},
        "Unsure": {"section": "Equity", "confidence": 0.49},
    }
    dropped = {"Rare": "Banking Revenue", "Nowhere": None, "ifrs-full_Assets": "Current Assets"}
    mapping |= {tag: {"section": section, "confidence": 1.0} for tag, section in dropped.items()}
    path = tmp_path / "gaap.json"
    path.write_text(json.dumps(mapping))
    assert read_domain("finance", path) == [
        (
            'Which section of a financial report lists "accounts payable current"?',
            "current liabilities",
        ),
        ('Which section of a financial report lists "other ira assets 2"?', "current assets"),
    ]


def test_code_is_parsed_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MODULES", ["heapq", "asyncio"])
    (tmp_path / "heapq.py").write_text(
        "raise SystemExit('imported')\n"
        'def nlargest(n):\n    """Find the n largest\n    elements. In order."""\n'
        'def tell():\n    """This is what heapq does."""\n'
        'def shared():\n    """Defined in two modules."""\n'
        # A name of the public questions:
        'def heapify(x):\n    """Transform a list into a heap."""\n'
    )
    package = tmp_path / "asyncio"
    package.mkdir()
    (package / "tasks.py").write_text(
        'class Task:\n    """A coroutine."""\n    def shared(self):\n        """Of a class."""\n'
    )
    (package / "timeouts.py").write_text(
        'def timeout():\n    """Differs between patch releases."""\n'
    )
    assert read_domain("code", tmp_path) == [
        ('Which Python module defines "nlargest"? Find the n largest elements.', "heapq"),
        ('Which Python module defines "Task"? A coroutine.', "asyncio"),
    ]


def test_science_reads_the_three_namespaces(tmp_path: Path) -> None:
    path = tmp_path / "GO.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE go_term (term TEXT, ontology TEXT)")
        rows = [("axon", "CC"), ("kinase activity", "MF"), ("sleep", "BP"), ("all", "universal")]
        database.executemany("INSERT INTO go_term VALUES (?, ?)", rows)
    database.close()
    namespaces = ["cellular component", "molecular function", "biological process"]
    assert [answer for _, answer in read_domain("science", path)] == namespaces


def test_language_asks_for_the_kind_of_each_noun_of_one_lower_case_word(tmp_path: Path) -> None:
    path = tmp_path / "data.noun"
    path.write_text(
        "  1 A licence of many words, whose lines begin with spaces and hold no synset.\n"
        "00001 05 n 03 dog 0 domestic_dog 0 Fido 0 001 @ 00002 n 0000 | a pet  \n"
        "00002 03 n 01 entity 0 000 | a file that is left out  \n"
        "00003 17 n 01 stone 0 000 | a rock  \n"
    )
    asked = [
        ('What kind of thing is "dog"?', "animal"),
        ('What kind of thing is "stone"?', "natural object"),
    ]
    assert read_domain("language", path) == asked


@pytest.mark.parametrize("domain", sources.DOMAINS)
def test_a_file_of_another_format_is_named_in_the_error(tmp_path: Path, domain: str) -> None:
    path = tmp_path / "wrong"
    path.write_bytes(b'{"a": 1}')
    with pytest.raises(DataError, match=f"wrong is not a source of the {domain} domain"):
        read_domain(domain, path)
