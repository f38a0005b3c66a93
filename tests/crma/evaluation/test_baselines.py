"""crma.evaluation.baselines: the naive Bayes classifier on a corpus small enough to check."""

from crma.data.examples import Example
from crma.evaluation.baselines import naive_bayes


def test_naive_bayes_learns_from_words_and_from_parts_of_words() -> None:
    processes = ("death", "reproduction", "differentiation")
    train = [Example(f"{word} activity", "function") for word in ("kinase", "ligase")]
    train += [Example(f"cell {word}", "process") for word in processes]
    expected = {
        "synthase": "function",
        "death of a cell": "process",
        "activity": "function",
        "zzz": "process",  # nothing in it is known: the prior decides
    }
    assert naive_bayes(train, list(expected)) == list(expected.values())
