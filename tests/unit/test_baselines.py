"""crma.baselines: what a trained adapter has to beat."""

from crma.baselines import majority, naive_bayes
from crma.data import Example


def test_majority_is_the_most_common_completion_and_breaks_ties_by_alphabet() -> None:
    assert majority([Example("1", "b"), Example("2", "b"), Example("3", "a")]) == "b"
    assert majority([Example("1", "b"), Example("2", "a")]) == "a"


def test_naive_bayes_learns_from_words_and_from_parts_of_words() -> None:
    train = [Example(f"{word} activity", "function") for word in ("kinase", "ligase")]
    train += [Example(f"cell {word}", "process") for word in ("death", "growth")]
    test = [Example(words, "") for words in ("synthase", "death of a cell", "activity")]
    assert naive_bayes(train, test) == ["function", "process", "function"]
