"""CLINC150 as ten tasks of one skill: what does the user want?

Larson et al. 2019, "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction"
(EMNLP-IJCNLP, D19-1131), CC BY 3.0: ten domains of 15 intents, each with 100 utterances for
training, 20 for validation and 30 for the test. It is read from a folder that the user has: the
files `data_full.json` and `domains.json` of its repository (clinc/oos-eval).
"""

import json
from collections.abc import Mapping
from pathlib import Path

from crma.core.errors import DataError
from crma.data.sources import READING_ERRORS, Pair, words

CLINC = "clinc"
CLINC_TASKS = (
    "clinc-banking",
    "clinc-credit-cards",
    "clinc-kitchen-and-dining",
    "clinc-home",
    "clinc-auto-and-commute",
    "clinc-travel",
    "clinc-utility",
    "clinc-work",
    "clinc-small-talk",
    "clinc-meta",
)
# Split -> its name in the source. A question that two of them have stays in the first.
SOURCE_SPLITS: Mapping[str, str] = {"holdout": "test", "validation": "val", "train": "train"}


def read_clinc(folder: Path) -> dict[str, dict[str, list[Pair]]]:
    """Task -> split -> its (question, answer) pairs, in the source's order.

    A question of validation or training data that an earlier split asks too, but for case and
    punctuation, is left out, and so is one that training data asks twice.

    Args:
        folder: holds `data_full.json` and `domains.json`.

    Raises:
        DataError: the folder cannot be read, or is not of CLINC150.
    """
    try:
        return _read(folder)
    except READING_ERRORS as error:
        message = f"{folder} is not a folder of CLINC150: {error!r}."
        allowed = "a folder with data_full.json and domains.json"
        raise DataError(message, field="source", value=str(folder), allowed=allowed) from error


def _read(folder: Path) -> dict[str, dict[str, list[Pair]]]:
    utterances = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
    domains = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
    task_of: dict[str, str] = {}
    for domain, intents in domains.items():
        task_of |= dict.fromkeys(intents, f"{CLINC}-{domain.replace('_', '-')}")
    found: dict[str, dict[str, list[Pair]]] = {task: {} for task in CLINC_TASKS}
    seen: set[str] = set()
    for split, name in SOURCE_SPLITS.items():
        asked = set()
        for utterance, intent in utterances[name]:
            question = " ".join(words(utterance))
            is_repeated = question in seen or (split == "train" and question in asked)
            asked.add(question)
            if not is_repeated:
                pair = (f'What does the user want? "{utterance}"', intent.replace("_", " "))
                found[task_of[intent]].setdefault(split, []).append(pair)
        seen |= asked
    return found
