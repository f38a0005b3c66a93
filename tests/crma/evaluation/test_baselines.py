"""crma.evaluation.baselines: what a trained adapter has to beat."""

from crma.data.examples import Example
from crma.evaluation.baselines import naive_bayes


def test_naive_bayes_learns_from_words_and_from_parts_of_words() -> None:
    train = [Example(f"{word} activity", "function") for word in ("kinase", "ligase")]
    train += [
        Example(f"cell {word}", "process") for word in ("death", "reproduction", "differentiation")
    ]
    prompts = [
        "synthase",
        "death of a cell",
        "activity",
        "zzz",
    ]  # of the last nothing is known: the prior decides
    assert naive_bayes(train, prompts) == ["function", "process", "function", "process"]
